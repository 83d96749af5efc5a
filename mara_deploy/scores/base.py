"""Scores: the value of an answer to a prompt. Training maximises them, evaluation compares them.

A score is any callable (prompts, answers) → floats. `Combined` is a weighted sum of several, as MARA (arXiv 2505.19743)
combines a reward (weight 1 or 2) and a cost (weight -1). `mara_deploy.scores.load` makes scores from their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mara_runtime.errors import MaraError


class ScoreError(MaraError):
    """A score that cannot be loaded, or that returns something other than one finite number per answer."""


class Score(Protocol):
    """What training and evaluation need from a score. Higher is better unless its weight is negative."""

    @property
    def name(self) -> str:
        """For reports: never a path of this machine."""

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        """One number per answer, in order; prompts are user messages without a template."""


@dataclass(frozen=True)
class WeightedScore:
    """A score and its weight in the combined score."""

    score: Score
    weight: float = 1.0
    """finite, not 0; negative where a lower value is better"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """plain JSON values that the score depends on besides prompt and answer: cached values are valid for these only"""


@dataclass(frozen=True)
class ScoreValues:
    """The scores of N answers."""

    combined: list[float]
    """(N,) weighted sums"""
    each: dict[str, list[float]]
    """{name of a score: (N,) its own values, unweighted}"""


class Combined:
    """Weighted sum of at least one score; itself a score. Scores of the same name get numbers."""

    def __init__(self, parts: Sequence[WeightedScore]) -> None:
        if not parts:
            raise ScoreError("there are no scores: pass at least one --score")
        for part in parts:
            check_weight(part.weight, part.score.name)
        self.names = unique_names([part.score.name for part in parts])
        self.weights = tuple(float(part.weight) for part in parts)
        self.name = " ".join(f"{w:+g}·{n}" for w, n in zip(self.weights, self.names, strict=True)).removeprefix("+1·")
        self._scores = [part.score for part in parts]

    def detail(self, prompts: Sequence[str], answers: Sequence[str]) -> ScoreValues:
        """Score N answers. Raises ScoreError, naming score and prompt, for a value that is not a finite number."""
        each = {
            name: checked_values(name, score, prompts, answers)
            for name, score in zip(self.names, self._scores, strict=True)
        }
        combined = [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True))
            for row in zip(*each.values(), strict=True)
        ]
        for prompt, value in zip(prompts, combined, strict=True):
            if not math.isfinite(value):
                raise ScoreError(f"the combined score is {value} for the answer to the prompt {shorten(prompt)!r}")
        return ScoreValues(combined, each)

    def room(self, prompts: Sequence[str]) -> int | None:
        """Tokens that an answer to any of the prompts can have for scores with a limit; None: none has one.

        Raises ScoreError for a prompt that leaves none.
        """
        limits = [score.room(prompts) for score in self._scores if hasattr(score, "room")]
        return min((limit for limit in limits if limit is not None), default=None)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """(N,) weighted sums, see `detail`."""
        return self.detail(prompts, answers).combined


def check_weight(weight: float, name: str) -> None:
    """Raise ScoreError for a weight out of range. name: of its score."""
    if not math.isfinite(weight) or weight == 0.0:
        raise ScoreError(f"--weight of {name} is {weight}; it must be a finite number other than 0")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number appended to those that occur more than once."""
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    )


def checked_values(name: str, score: Score, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """(N,) values of a score. Raises ScoreError, naming score and prompt, unless it returns N finite numbers."""
    values = [_as_number(name, value) for value in score(prompts, answers)]
    if len(values) != len(answers):
        raise ScoreError(f"the score {name} returned {len(values)} numbers for {len(answers)} answers")
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isfinite(value):
            raise ScoreError(f"the score {name} is {value} for the answer to the prompt {shorten(prompt)!r}")
    return values


def _as_number(name: str, value: Any) -> float:
    """A value that the score `name` returned, as a float. Raises ScoreError."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ScoreError(
            f"the score {name} returned {shown(value)} of type {type(value).__name__} for an answer; expected a number"
        ) from None


def shown(value: object) -> str:
    """A value on one short line, for error messages."""
    return shorten(" ".join(repr(value).split()))


def shorten(text: str, limit: int = 80) -> str:
    """At most `limit` characters of a text, for error messages."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
