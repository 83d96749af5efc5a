"""Scores: what an answer to a prompt is worth. Training maximises them, evaluation compares them.

A score is any callable (prompts, answers) → floats. `load_score` makes one of a Python function (`module:function`) or
of a Hugging Face sequence-classification or reward model; `Combined` is a weighted sum of several, as MARA
(arXiv 2505.19743) combines a reward (weight 1 or 2) and a cost (weight -1).
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mara_runtime.errors import MaraError

DEMO_SCORE = "mara_deploy.demo.score:considerate"
"""What `--score demo` stands for."""


class ScoreError(MaraError):
    """A score that cannot be loaded, or that gives something other than one finite number an answer."""


class Score(Protocol):
    """What training and evaluation need of a score. Higher is better unless its weight is negative."""

    @property
    def name(self) -> str:
        """For reports: never a path of this machine."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """One number an answer, in order; prompts are user messages without a template."""


class FunctionScore:
    """A Python callable (prompts, answers) → floats."""

    def __init__(self, name: str, function: Callable[[Sequence[str], Sequence[str]], Sequence[float]]) -> None:
        self.name = name
        self._function = function

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Call it; what it raises becomes a ScoreError of one line."""
        try:
            return [float(value) for value in self._function(list(prompts), list(answers))]
        except MaraError:
            raise
        except Exception as error:  # somebody else's code
            raise ScoreError(f"the score {self.name} failed with {type(error).__name__}: {error}") from error


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
            if not math.isfinite(weight) or weight == 0.0:
                raise ScoreError(f"--weight of {score.name} is {weight}; it must be a finite number other than 0")
        self.parts = tuple(parts)
        names = [score.name for _, score in parts]
        self.names = tuple(
            name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
        )
        self.weights = tuple(float(weight) for weight, _ in parts)
        self.name = " ".join(f"{w:+g}·{n}" for w, n in zip(self.weights, self.names, strict=True)).removeprefix("+1·")

    def detail(self, prompts: Sequence[str], answers: Sequence[str]) -> Scored:
        """Score N answers. Raises ScoreError naming score and prompt where a value is not finite."""
        if len(prompts) != len(answers):
            raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers")
        each: dict[str, list[float]] = {}
        for name, (_, score) in zip(self.names, self.parts, strict=True):
            values = [float(value) for value in score(prompts, answers)]
            if len(values) != len(answers):
                raise ScoreError(f"the score {name} gave {len(values)} numbers for {len(answers)} answers")
            for prompt, value in zip(prompts, values, strict=True):
                if not math.isfinite(value):
                    raise ScoreError(f"the score {name} is {value} for the answer to the prompt {_short(prompt)!r}")
            each[name] = values
        combined = [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True))
            for row in zip(*each.values(), strict=True)
        ]
        return Scored(combined, each)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """(N,) weighted sums."""
        return self.detail(prompts, answers).combined


def load_score(
    spec: str, *, template: str | None = None, device: str = "cpu", batch_size: int = 8, max_tokens: int | None = None
) -> Score:
    """A score by its name.

    spec: `demo`; `module:function`, importable from the working directory too; or the folder or Hub id of a Hugging
    Face sequence-classification or reward model, followed by `#LABEL` where it has several labels.
    template, batch_size, max_tokens: of a model, see `mara_deploy.reward_model.load`; device: where it runs.
    Raises ScoreError, OptionError for the device.
    """
    if spec == "demo":
        spec = DEMO_SCORE
    if is_function(spec):
        if template is not None:
            raise ScoreError(f"--score-template is for a model; the score {spec} is a Python function")
        return _function(spec)
    from mara_deploy import reward_model

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
        raise ScoreError(f"the score {spec} cannot be loaded: {type(error).__name__}: {error}") from error
    called = getattr(found, function, None)
    if not callable(called):
        raise ScoreError(f"the score {spec} cannot be loaded: {module} has no function {function!r}")
    return FunctionScore(spec, called)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
