"""Answers and score values on disk, written as they come, so that an interrupted evaluation can continue.

A store is a file of JSON lines: the first holds the settings that its content depends on, each other line a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mara_deploy.scores.base import Combined, Score, WeightedScore, checked_values, shorten, unique_names
from mara_runtime.errors import MaraError
from mara_runtime.files import writing


class Store:
    """Records by key, appended to `path`.

    settings: plain JSON values. Raises MaraError for a file written with other settings, naming the first that differs,
    and for a damaged one. An incomplete last line, left by an interruption, is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, Any] = {}
        current: dict[str, Any] = json.loads(json.dumps(settings))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            complete = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(complete.splitlines(), 1):
                self._read(number, line, current)
            if len(complete) < len(content):
                os.truncate(path, len(complete))
            if not complete:
                self._append([{"settings": current}])

    def _read(self, number: int, line: bytes, current: dict[str, Any]) -> None:
        try:
            value = json.loads(line)
            if number > 1:
                self._records[value["key"]] = value["record"]
                return
            saved = value["settings"]
            changed = next((key for key in {**current, **saved} if current.get(key) != saved.get(key)), None)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MaraError(f"{self.path}, line {number}, is damaged: delete the file to compute it again") from None
        if changed is not None:
            before, now = (shorten(json.dumps(of.get(changed), ensure_ascii=False), 60) for of in (saved, current))
            raise MaraError(
                f"{self.path} was made with {changed} {before}, now it is {now}: use the same settings, choose another "
                "--out, or delete the file"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Any:
        return self._records[key]

    def add(self, records: Mapping[str, Any]) -> None:
        """Append records in a single write: what was computed in one batch is kept, or computed again, as a whole."""
        with writing(self.path):
            self._append([{"key": key, "record": record} for key, record in records.items()])
        self._records.update(records)

    def _append(self, values: Sequence[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
        with self.path.open("ab") as file:
            file.write(lines.encode())


class CachedScore:
    """A score that is computed once per prompt and answer. Identical answers have identical values."""

    def __init__(self, score: Score, store: Store) -> None:
        self.name = score.name
        self._score, self._store = score, store

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See `Score`."""
        keys = [
            hashlib.sha256(f"{len(prompt)} {prompt}{answer}".encode()).hexdigest()
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        pairs = dict(zip(keys, zip(prompts, answers, strict=True), strict=True))
        missing = [key for key in pairs if key not in self._store]
        if missing:
            new_prompts, new_answers = zip(*(pairs[key] for key in missing), strict=True)
            values = checked_values(self.name, self._score, new_prompts, new_answers)
            self._store.add(dict(zip(missing, values, strict=True)))
        return [float(self._store[key]) for key in keys]


def cached_scores(scores: Sequence[WeightedScore], folder: Path) -> Combined:
    """The combined score with its values cached in `folder`. Raises MaraError where a store or a weight is refused."""
    names = unique_names([part.score.name for part in scores])
    stores = [
        Store(folder / f"{file_name(name)}.jsonl", {"score": name, **part.settings})
        for name, part in zip(names, scores, strict=True)
    ]
    return Combined(
        [WeightedScore(CachedScore(p.score, store), p.weight) for p, store in zip(scores, stores, strict=True)]
    )


def file_name(name: str) -> str:
    """A name as the stem of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "unnamed"
