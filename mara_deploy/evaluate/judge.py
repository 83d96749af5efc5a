"""Scores whose values are kept, so that an answer is judged once, even across interruptions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_deploy.evaluate.store import Store
from mara_deploy.scores.base import Combined, Score, checked_values, numbered


@dataclass(frozen=True)
class Judge:
    """A score and its part in the combined one."""

    score: Score
    weight: float = 1.0
    """finite, not 0; negative where a lower value is better"""
    settings: Mapping[str, Any] | None = None
    """what its values depend on besides prompt and answer; plain JSON. Values kept under other settings are refused"""


class Remembered:
    """A score that asks another one only for what it has not judged before. Equal answers have equal values."""

    def __init__(self, score: Score, store: Store) -> None:
        self.name = score.name
        self._score, self._store = score, store

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Score`."""
        keys = [_key(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        unknown = {
            key: (prompt, answer)
            for key, prompt, answer in zip(keys, prompts, answers, strict=True)
            if key not in self._store
        }
        if unknown:
            asked_prompts, asked_answers = zip(*unknown.values(), strict=True)
            values = checked_values(self.name, self._score, asked_prompts, asked_answers)
            self._store.keep(dict(zip(unknown, values, strict=True)))
        return [float(self._store[key]) for key in keys]


def remember(judges: Sequence[Judge], folder: Path) -> tuple[Combined, list[Store]]:
    """The judges' combined score, values kept in `folder`; the stores are to be closed.

    Where a store or a weight is refused, none stays open.
    """
    names = numbered([judge.score.name for judge in judges])
    with ExitStack() as opened:
        stores = [
            opened.enter_context(Store(folder / f"{slug(name)}.jsonl", {"score": name, **(judge.settings or {})}))
            for name, judge in zip(names, judges, strict=True)
        ]
        combined = Combined([(j.weight, Remembered(j.score, store)) for j, store in zip(judges, stores, strict=True)])
        opened.pop_all()  # they are the caller's now
    return combined, stores


def slug(name: str) -> str:
    """A file name for a name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "unnamed"


def _key(prompt: str, answer: str) -> str:
    return hashlib.sha256(f"{len(prompt)} {prompt}{answer}".encode()).hexdigest()
