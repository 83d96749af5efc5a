"""Scores: the value of an answer to a prompt. Training maximises them, evaluation compares them.

A score is any callable (prompts, answers) → floats. `Combined` is a weighted sum of several, as MARA (arXiv 2505.19743)
combines a reward (weight 1 or 2) and a cost (weight -1). `mara_deploy.scores.load` makes scores from their names.

Scores are code and models of others, and this is their boundary: `Combined` turns whatever they raise or return into
numbers, or into a ScoreError of one line. Functions also run in processes of their own (`mara_deploy.scores.function`).
"""

from __future__ import annotations

import math
import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from mara_runtime.errors import MaraError

_TRANSIENT = re.compile("timeout|connect|ratelimit|unavailable", re.IGNORECASE)
"""Names of such errors in the packages of web services, which share no base class."""


class ScoreError(MaraError):
    """A score that cannot be loaded, that fails, or that returns something other than one finite number per answer."""

    transient = False
    """whether it may succeed when it is called again, as after a lost connection"""


class Score(Protocol):
    """What training and evaluation need from a score. Higher is better unless its weight is negative."""

    @property
    def name(self) -> str:
        """For reports: never a path of this machine."""

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the prompt file that it reads, such as a reference answer."""

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], **columns: Sequence[Any]) -> Sequence[float]:
        """One number per answer, in order. prompts: texts or conversations, see `mara_deploy.prompts.Asked`; columns:
        one value per answer."""


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
        self.columns = tuple(dict.fromkeys(column for score in self._scores for column in score.columns))

    def room(self, prompts: Sequence[Any]) -> int | None:
        """Tokens that an answer to any of the prompts can have for scores with a limit; None: none has one.

        Raises ScoreError for a prompt that leaves none.
        """
        limits = []
        for name, score in zip(self.names, self._scores, strict=True):
            if hasattr(score, "room"):
                with foreign(name):
                    limits.append(score.room(prompts))
        return min((limit for limit in limits if limit is not None), default=None)

    def detail(self, prompts: Sequence[Any], answers: Sequence[str], **columns: Sequence[Any]) -> ScoreValues:
        """Score N answers. Raises ScoreError, naming score and prompt, for a value that is not a finite number."""
        each = {
            name: checked_values(name, score, prompts, answers, {column: columns[column] for column in score.columns})
            for name, score in zip(self.names, self._scores, strict=True)
        }
        combined = [
            sum(weight * value for weight, value in zip(self.weights, row, strict=True))
            for row in zip(*each.values(), strict=True)
        ]
        for prompt, value in zip(prompts, combined, strict=True):
            if not math.isfinite(value):
                raise ScoreError(f"the combined score is {value} for the answer to the prompt {shown(prompt)}")
        return ScoreValues(combined, each)

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """(N,) weighted sums, see `detail`."""
        return self.detail(prompts, answers, **columns).combined


def check_weight(weight: float, name: str) -> None:
    """Raise ScoreError for a weight out of range. name: of its score."""
    if not math.isfinite(weight) or weight == 0.0:
        raise ScoreError(f"--weight of {name} is {weight}; it must be a finite number other than 0")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number appended to those that occur more than once."""
    return tuple(
        name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)
    )


def checked_values(
    name: str,
    score: Any,
    prompts: Sequence[Any],
    answers: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> list[float]:
    """(N,) values of a score. Raises ScoreError, naming score and prompt, unless it returns N finite numbers."""
    with foreign(name):
        values = _numbers(name, score(prompts, answers, **(columns or {})), len(answers))
    for prompt, value in zip(prompts, values, strict=True):
        if not math.isfinite(value):
            raise ScoreError(f"the score {name} is {value} for the answer to the prompt {shown(prompt)}")
    return values


@contextmanager
def foreign(name: str) -> Iterator[None]:
    """Turn what the code or the model of a score raises into a ScoreError of one line."""
    try:
        yield
    except MaraError:
        raise
    except (Exception, SystemExit) as error:
        raise failure(f"the score {name} failed", error) from error


def failure(what: str, error: BaseException) -> ScoreError:
    """A ScoreError that says what failed, and with which error in which line of whose file."""
    made = ScoreError(f"{what} with {_describe(error)}")
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    made.transient = (isinstance(error, OSError) and not isinstance(error, lasting)) or any(
        _TRANSIENT.search(kind.__name__) for kind in type(error).__mro__
    )
    return made


def _describe(error: BaseException) -> str:
    """Type, message and location of an error in another's code: its innermost line outside Python, packages and us."""
    paths = sysconfig.get_paths()
    ours = (*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), str(Path(__file__).parent), "<")
    files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    theirs = [(file, line) for file, line in files if not file.startswith(ours) and "site-packages" not in file]
    location = ""
    if theirs:
        file = Path(theirs[-1][0])
        name = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
        location = f" ({name}:{theirs[-1][1]})"
    try:
        message = " ".join(str(error).split())
    except Exception:  # it is another's class
        message = ""
    return f"{type(error).__name__}{': ' * bool(message)}{shorten(message, 300)}{location}"


def _numbers(name: str, returned: Any, count: int) -> list[float]:
    """What the score `name` returned for so many answers, as floats. Raises ScoreError."""
    try:
        if isinstance(returned, (str, bytes, Mapping, Set)):
            raise TypeError
        iterator = iter(returned)
    except TypeError:
        raise ScoreError(
            f"the score {name} returned {shown(returned)}; it must return a list with one number per answer"
        ) from None
    values = [_as_number(name, value) for value in islice(iterator, count + 1)]
    if len(values) != count:
        found = f"more than {count}" if len(values) > count else len(values)
        raise ScoreError(f"the score {name} returned {found} numbers for {count} answers")
    return values


def _as_number(name: str, value: Any) -> float:
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
    try:
        return shorten(" ".join(repr(value).split()))
    except Exception:  # it is another's class
        return f"a {type(value).__name__}"


def shorten(text: str, limit: int = 80) -> str:
    """At most `limit` characters of a text, for error messages."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
