"""`--score` and the options that go with it, for the commands that score answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.options import add_options, from_args
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

if TYPE_CHECKING:
    from mara_deploy.scores.base import WeightedScore

DEVICE, BATCH = "cpu", 8
"""Defaults of `ScoreModelOptions`."""


@dataclass
class ScoreOption:
    """One `--score` with the options that apply to it."""

    spec: str
    weight: float | None = None
    template: str | None = None


@dataclass(frozen=True)
class ScoreModelOptions(Options):
    """How scores that are models run."""

    score_device: str | None = option(None, "device that score models run on", metavar="DEVICE", unset=DEVICE)
    score_batch: int | None = option(None, "answers per batch of a score model", least=1, unset=str(BATCH))


class _AddScore(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.score = [*namespace.score, ScoreOption(values)]


class _SetOfLastScore(argparse.Action):
    """Sets a field of the last `--score`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        scores: list[ScoreOption] = namespace.score
        if not scores:
            parser.error(f"{option} must follow the --score that it applies to")
        if getattr(scores[-1], self.dest) is not None:
            parser.error(f"{option} is given twice for the score {scores[-1].spec}")
        setattr(scores[-1], self.dest, values)


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `score_options` reads."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--score",
        action=_AddScore,
        default=[],
        metavar="SCORE",
        help="module:function, called with prompts and answers; the folder or Hub id of a reward or classification "
        "model, with #LABEL appended if it has several labels; or demo (can be repeated)",
    )
    group.add_argument(
        "--weight",
        type=float,
        action=_SetOfLastScore,
        default=argparse.SUPPRESS,
        metavar="X",
        help="weight of the preceding --score in the sum; -1 for a cost (default: 1)",
    )
    group.add_argument(
        "--score-template",
        dest="template",
        action=_SetOfLastScore,
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="input of the preceding --score's model, with {prompt} and {answer} (default: its chat template)",
    )
    add_options(group, ScoreModelOptions)


def score_options(args: argparse.Namespace) -> tuple[list[ScoreOption], str | None, int | None]:
    """The scores, and device and batch size of those that are models, see `on_models`. Raises OptionError."""
    options, scores = from_args(ScoreModelOptions, args), args.score
    return scores, *on_models(scores, options.score_device, options.score_batch)


def judges(options: Sequence[ScoreOption], device: str | None, batch: int | None) -> list[WeightedScore]:
    """Load the scores. device, batch: as `on_models` takes them. Raises ScoreError, OptionError."""
    from mara_deploy.scores.base import WeightedScore
    from mara_deploy.scores.load import is_function, load_score

    device, batch = on_models(options, device, batch)
    if device is not None:
        _silence_transformers()
    for_models: dict[str, Any] = {} if device is None else {"device": device, "batch_size": batch}
    loaded = []
    for given in options:
        score = load_score(given.spec, template=given.template, **for_models)
        weight = 1.0 if given.weight is None else given.weight
        settings = {"template": given.template, "code or weights": score.fingerprint}
        if device is not None and not is_function(given.spec):
            settings["device"] = device.partition(":")[0]  # its type, which also determines the precision
        loaded.append(WeightedScore(score, weight, settings))
    return loaded


def _silence_transformers() -> None:
    """As `mara_export.hf.checkpoint` does; where it is not installed, loading the model reports that."""
    try:
        from mara_export.hf.checkpoint import silence_transformers
    except ImportError:
        return
    silence_transformers()


def on_models(
    options: Sequence[ScoreOption], device: str | None, batch: int | None
) -> tuple[str, int] | tuple[None, None]:
    """Device and batch size of the scores that are models; (None, None) if none is.

    device, batch: as given, None for the default. Raises OptionError, and ScoreError for a weight, where something is
    missing, out of range, or without effect.
    """
    from mara_deploy.scores.base import check_weight
    from mara_deploy.scores.load import is_function

    if not options:
        raise OptionError("--score is missing: give a module:function or a model that scores answers")
    for given in options:
        check_weight(1.0 if given.weight is None else given.weight, given.spec)
    if not all(is_function(given.spec) for given in options):
        return DEVICE if device is None else device, BATCH if batch is None else batch
    for flag, value in (("--score-device", device), ("--score-batch", batch)):
        if value is not None:
            raise OptionError(f"{flag} is {value}, but no --score is a model; leave it out")
    return None, None
