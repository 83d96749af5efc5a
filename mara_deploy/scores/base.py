"""Scores: what an answer to a prompt is worth. Training maximises them, evaluation compares them.

A score is any callable (prompts, answers) → floats. `load_score` makes one of a Python function (`module:function`) or
of a Hugging Face sequence-classification or reward model; `Combined` is a weighted sum of several, as MARA
(arXiv 2505.19743) combines a reward (weight 1 or 2) and a cost (weight -1).
"""

from __future__ import annotations

import importlib
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError

DEMO_SCORE = "mara_deploy.demo.score:considerate"
"""What `--score demo` stands for."""


class ScoreError(MaraError):
    """A score that cannot be loaded, or that gives something other than one finite number per answer."""


class Score(Protocol):
    """What training and evaluation need from a score. Higher is better unless its weight is negative."""

    @property
    def name(self) -> str:
        """For reports: never a path of this machine."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """One number per answer, in order; prompts are user messages without a template."""


class LoadedScore(Score, Protocol):
    """A score that knows what it was made from."""

    @property
    def fingerprint(self) -> str:
        """Identifies the code or the weights that the values depend on."""


class FunctionScore:
    """A Python callable (prompts, answers) → floats. fingerprint: of the code, see `LoadedScore`."""

    def __init__(
        self,
        name: str,
        function: Callable[[Sequence[str], Sequence[str]], Sequence[float]],
        fingerprint: str = "unknown",
    ) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._function = function

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Call it; what it raises, or gives instead of numbers, becomes a ScoreError of one line."""
        given = self._guarded(lambda: self._function(list(prompts), list(answers)))
        try:
            if isinstance(given, (str, bytes, Mapping, Set)):
                raise TypeError
            iterator = iter(given)
        except TypeError:
            raise ScoreError(
                f"the score {self.name} gave {_shown(given)}; it must give a list with one number per answer"
            ) from None
        return [_number(self.name, value) for value in self._guarded(lambda: list(iterator))]

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """What somebody else's code gives. Raises ScoreError, which names the line that failed."""
        try:
            return call()
        except MaraError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}{_place(error)}"
            raise ScoreError(f"the score {self.name} failed with {said}") from error


@dataclass(frozen=True)
class Scored:
    """The scores of some answers, alone and together."""

    combined: list[float]
    """(N,) weighted sums"""
    each: dict[str, list[float]]
    """{name of a score: (N,) its own values, unweighted}"""


class Combined:
    """Weighted sum of scores. Itself a score; `detail` keeps each one's own values.

    parts: (weight, score), at least one, weights finite and not 0. Equal names are numbered.
    """

    def __init__(self, parts: Sequence[tuple[float, Score]]) -> None:
        if not parts:
            raise ScoreError("there is no score: give at least one --score")
        for weight, score in parts:
            check_weight(weight, score.name)
        self.parts = tuple(parts)
        self.names = numbered([score.name for _, score in parts])
        self.weights = tuple(float(weight) for weight, _ in parts)
        self.name = " ".join(f"{w:+g}·{n}" for w, n in zip(self.weights, self.names, strict=True)).removeprefix("+1·")

    def detail(self, prompts: Sequence[str], answers: Sequence[str]) -> Scored:
        """Score N answers. Raises ScoreError naming score and prompt where a value is not finite."""
        each = {
            name: checked_values(name, score, prompts, answers)
            for name, (_, score) in zip(self.names, self.parts, strict=True)
        }
        combined = [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True))
            for row in zip(*each.values(), strict=True)
        ]
        for prompt, value in zip(prompts, combined, strict=True):
            if not math.isfinite(value):
                raise ScoreError(f"the scores add up to {value} for the answer to the prompt {_short(prompt)!r}")
        return Scored(combined, each)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """(N,) weighted sums."""
        return self.detail(prompts, answers).combined


def check_weight(weight: float, name: str) -> None:
    """Raise ScoreError for a weight that means nothing. name: of its score."""
    if not math.isfinite(weight) or weight == 0.0:
        raise ScoreError(f"--weight of {name} is {weight}; it must be a finite number other than 0")


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names, equal ones told apart by a number."""
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    )


def checked_values(name: str, score: Score, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """(N,) values of a score. Raises ScoreError unless there is a finite number per answer, naming score and prompt."""
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers")
    values = [_number(name, value) for value in score(prompts, answers)]
    if len(values) != len(answers):
        raise ScoreError(f"the score {name} gave {len(values)} numbers for {len(answers)} answers")
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isfinite(value):
            raise ScoreError(f"the score {name} is {value} for the answer to the prompt {_short(prompt)!r}")
    return values


def load_score(
    spec: str, *, template: str | None = None, device: str = "cpu", batch_size: int = 8, max_tokens: int | None = None
) -> LoadedScore:
    """A score by its name.

    spec: `demo`; `module:function`, importable from the working directory too; or the folder or Hub id of a Hugging
    Face sequence-classification or reward model, followed by `#LABEL` where it has several labels.
    template, batch_size, max_tokens: of a model, see `mara_deploy.scores.reward_model.load`; device: where it runs.
    Raises ScoreError, OptionError for the device.
    """
    if spec == "demo":
        spec = DEMO_SCORE
    if is_function(spec):
        if template is not None:
            raise ScoreError(f"--score-template is for a model; the score {spec} is a Python function")
        return _function(spec)
    try:
        from mara_deploy.scores import reward_model
    except ImportError as error:
        raise ScoreError(
            f"the score {spec} names a model, which needs packages that are not installed ({error}): pip install "
            "'mara-deploy[train]', or name a Python function (module:function)"
        ) from None
    return reward_model.load(spec, template, device, batch_size, max_tokens)


def is_function(spec: str) -> bool:
    """Whether a score is Python code; else it is a model."""
    module, colon, function = spec.partition(":")
    return spec == "demo" or (colon == ":" and all(part.isidentifier() for part in (*module.split("."), function)))


def _function(spec: str) -> FunctionScore:
    module, _, function = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not see the working directory
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a user's module may fail in any way a program can
        said = f"{type(error).__name__}: {error}{_place(error)}"
        raise ScoreError(f"the score {spec} cannot be loaded: {said}") from error
    if not hasattr(found, function):
        raise ScoreError(f"the score {spec} cannot be loaded: {module} has no function {function!r}")
    called = getattr(found, function)
    if not callable(called):
        raise ScoreError(
            f"the score {spec} cannot be loaded: {function!r} of {module} is of type {type(called).__name__}, which is "
            "not callable: name a function of prompts and answers"
        )
    file = getattr(found, "__file__", None)
    return FunctionScore(spec, called, sha256(Path(file))[:16] if file else "built in")


def _number(name: str, value: Any) -> float:
    """What a score gave for an answer, as a number. Raises ScoreError."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ScoreError(
            f"the score {name} gave {_shown(value)}, of type {type(value).__name__}, where an answer's number should be"
        ) from None


def _place(error: BaseException) -> str:
    """Where the user's code failed, as ` (file:line)`: the innermost line outside of Python, packages and this file."""
    paths = sysconfig.get_paths()
    others = (*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), __file__, "<")
    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    if not theirs:
        return ""
    file = Path(theirs[-1].filename)
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f" ({shown}:{theirs[-1].lineno})"


def _shown(value: Any) -> str:
    return _short(" ".join(repr(value).split()))


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
