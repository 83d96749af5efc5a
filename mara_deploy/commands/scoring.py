"""`--score` and the options that go with it, for the commands that score answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.options import add_options, from_args, reject
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

if TYPE_CHECKING:
    from mara_deploy.scores.base import WeightedScore


@dataclass(frozen=True)
class ScoreOption:
    """One `--score` with the options that apply to it."""

    spec: str
    weight: float = 1.0
    template: str | None = None


@dataclass(frozen=True)
class ScoreModelOptions(Options):
    """How scores that are models run."""

    score_device: str = option("auto", "device of score models: auto (CUDA if available), cpu, cuda", metavar="DEVICE")
    score_batch: int = option(8, "answers per batch of a score model", least=1)


class _AddScore(argparse.Action):
    """Appends {spec} to the scores."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *given: Any) -> None:
        namespace.score = [*namespace.score, {"spec": given[0]}]


class _SetOfLastScore(argparse.Action):
    """Adds a key to the last `--score`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *given: Any) -> None:
        value, option = given
        if not namespace.score:
            parser.error(f"{option} must follow the --score that it applies to")
        last: dict[str, Any] = namespace.score[-1]
        if self.dest in last:
            parser.error(f"{option} is given twice for the score {last['spec']}")
        last[self.dest] = value


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `score_options` reads."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--score",
        action=_AddScore,
        default=[],
        metavar="SCORE",
        help="module:function or file.py:function, called with prompts and answers; the folder or Hub id of a reward "
        "or classification model, with #LABEL appended if it has several labels; or demo (can be repeated)",
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
    """The scores, and device and batch size of those that are models; None, None if none is.

    Raises OptionError, and ScoreError for a weight, where something is missing, out of range, or without effect.
    """
    from mara_deploy.scores.base import check_weight
    from mara_deploy.scores.load import is_function

    options = from_args(ScoreModelOptions, args)
    scores = [ScoreOption(**given) for given in args.score]
    if not scores:
        raise OptionError("--score is missing: give a module:function or a model that scores answers")
    for score in scores:
        check_weight(score.weight, score.spec)
    if all(is_function(score.spec) for score in scores):
        reject(args, ScoreModelOptions, ("score_device", "score_batch"), "no --score is a model")
        return scores, None, None
    return scores, options.score_device, options.score_batch


def judges(options: Sequence[ScoreOption], device: str | None, batch: int | None) -> list[WeightedScore]:
    """Load the scores. device, batch: of models, None for the default. Raises ScoreError, OptionError."""
    from mara_deploy.scores.base import WeightedScore
    from mara_deploy.scores.load import is_function, load_score

    device, batch = device or ScoreModelOptions.score_device, batch or ScoreModelOptions.score_batch
    if not all(is_function(given.spec) for given in options):
        with suppress(ImportError):  # which loading the model reports
            from mara_deploy.devices import device_name
            from mara_export.hf.checkpoint import silence_transformers

            silence_transformers()
            device = device_name(device)
    loaded = []
    for given in options:
        score = load_score(given.spec, template=given.template, device=device, batch_size=batch)
        settings = {"template": given.template, "code or weights": score.fingerprint}
        if not is_function(given.spec):
            settings["device"] = device.partition(":")[0]  # its type, which also determines the precision
        loaded.append(WeightedScore(score, given.weight, settings))
    return loaded
