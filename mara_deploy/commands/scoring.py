"""`--score` and what goes with it, for the commands that score answers."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_runtime.errors import OptionError

if TYPE_CHECKING:
    from mara_deploy.evaluate.judge import Judge


@dataclass
class ScoreOption:
    """One `--score` with the options after it that are about it."""

    spec: str
    weight: float | None = None
    template: str | None = None


class _OfTheLastScore(argparse.Action):
    """Sets a field of the `--score` before it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        scores: list[ScoreOption] = namespace.score
        if not scores:
            parser.error(f"{option} belongs after the --score that it is about")
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
    group.add_argument("--score-device", default="cpu", metavar="D", help="where models run (default cpu)")
    group.add_argument(
        "--score-batch", type=int, default=8, metavar="N", help="answers a model reads at once (default 8)"
    )


class _Score(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        namespace.score = [*namespace.score, ScoreOption(values)]


def judges(args: argparse.Namespace) -> list[Judge]:
    """Load the scores. Raises ScoreError, OptionError."""
    from mara_deploy.evaluate.judge import Judge
    from mara_deploy.scores import DEMO_SCORE, load_score

    if not args.score:
        raise OptionError("there is no --score: name what says how good an answer is, module:function or a model")
    if args.score_batch < 1:
        raise OptionError(f"--score-batch is {args.score_batch}; it must be at least 1")
    found = []
    for option in args.score:
        score = load_score(option.spec, template=option.template, device=args.score_device, batch_size=args.score_batch)
        spec = DEMO_SCORE if option.spec == "demo" else option.spec
        weight = 1.0 if option.weight is None else option.weight
        found.append(Judge(score, weight, {"template": option.template, "code or weights": _fingerprint(spec)}))
    return found


def _fingerprint(spec: str) -> str:
    """What the values of a score depend on: the module's text, the model's commit, or the model folder's checksums."""
    from mara_runtime.bundle import sha256

    module = sys.modules.get(spec.partition(":")[0])
    if module is not None and ":" in spec:
        source = getattr(module, "__file__", None)
        return sha256(Path(source))[:16] if source else "built in"
    from mara_deploy.evaluate.store import fingerprint
    from mara_export.sources import resolve_model

    source = resolve_model(spec.partition("#")[0])
    return source.revision or fingerprint(source.folder)
