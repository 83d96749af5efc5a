"""`--score` and what goes with it, for the commands that score answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mara_runtime.errors import OptionError

if TYPE_CHECKING:
    from mara_deploy.scores.base import WeightedScore

DEVICE, BATCH = "cpu", 8
"""Defaults for models: where they run, and how many answers they read at once."""


@dataclass
class ScoreOption:
    """One `--score` with the options that apply to it."""

    spec: str
    weight: float | None = None
    template: str | None = None


class _OfTheLastScore(argparse.Action):
    """Sets a field of the last `--score`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        scores: list[ScoreOption] = namespace.score
        if not scores:
            parser.error(f"{option} belongs after the --score that it applies to")
        if getattr(scores[-1], self.dest) is not None:
            parser.error(f"{option} is given twice for the score {scores[-1].spec}")
        setattr(scores[-1], self.dest, values)


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Options that `judges` reads."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--score",
        action=_Score,
        default=[],
        metavar="S",
        help="module:function, called with prompts and answers; or the folder or Hub id of a reward or classification "
        "model (#LABEL after it where it has several labels); or demo. May be repeated",
    )
    group.add_argument(
        "--weight",
        type=float,
        action=_OfTheLastScore,
        default=argparse.SUPPRESS,
        metavar="W",
        help="of the --score before it, in the weighted sum (default 1); -1 for a cost",
    )
    group.add_argument(
        "--score-template",
        dest="template",
        action=_OfTheLastScore,
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="what the model of the --score before it reads, with {prompt} and {answer} (default: its chat template)",
    )
    group.add_argument("--score-device", metavar="D", help=f"where models run (default {DEVICE})")
    group.add_argument("--score-batch", type=int, metavar="N", help=f"answers a model reads at once (default {BATCH})")


class _Score(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.score = [*namespace.score, ScoreOption(values)]


def judges(options: Sequence[ScoreOption], device: str | None, batch: int | None) -> list[WeightedScore]:
    """Load the scores. device, batch: as `of_models` takes them. Raises ScoreError, OptionError."""
    from mara_deploy.scores.base import WeightedScore
    from mara_deploy.scores.load import is_function, load_score

    device, batch = of_models(options, device, batch)
    if device is not None:
        _silence_transformers()
    on_models: dict[str, Any] = {} if device is None else {"device": device, "batch_size": batch}
    found = []
    for option in options:
        score = load_score(option.spec, template=option.template, **on_models)
        weight = 1.0 if option.weight is None else option.weight
        settings = {"template": option.template, "code or weights": score.fingerprint}
        if device is not None and not is_function(option.spec):
            settings["device"] = device.partition(":")[0]  # its kind, which also says the precision
        found.append(WeightedScore(score, weight, settings))
    return found


def _silence_transformers() -> None:
    """As `mara_export.hf.checkpoint` does; where it is not installed, loading the model says so."""
    try:
        from mara_export.hf.checkpoint import silence_transformers
    except ImportError:
        return
    silence_transformers()


def of_models(
    options: Sequence[ScoreOption], device: str | None, batch: int | None
) -> tuple[str, int] | tuple[None, None]:
    """Where models run, and how many answers they read at once; both None where no score is a model.

    device, batch: as they were given, None for the default. Raises OptionError, for a weight ScoreError, for
    what is missing, out of range, or would be ignored.
    """
    from mara_deploy.scores.base import check_weight
    from mara_deploy.scores.load import is_function

    if not options:
        raise OptionError("there is no --score: name what says how good an answer is, module:function or a model")
    for option in options:
        check_weight(1.0 if option.weight is None else option.weight, option.spec)
    if batch is not None and batch < 1:
        raise OptionError(f"--score-batch is {batch}; it must be at least 1")
    if not all(is_function(option.spec) for option in options):
        return DEVICE if device is None else device, BATCH if batch is None else batch
    for flag, value in (("--score-device", device), ("--score-batch", batch)):
        if value is not None:
            raise OptionError(f"{flag} is {value}, but no --score is a model: leave it out")
    return None, None
