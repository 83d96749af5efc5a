"""Answers and score values on disk, written as they come, so that an interrupted evaluation can continue.

A store is a file of JSON lines: the first holds the settings that its content depends on, each other line a record. A
line ends with a checksum of what is before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mara_deploy.prompts import Asked, key_of
from mara_deploy.scores.base import Combined, Score, WeightedScore, checked_values, shorten, unique_names
from mara_runtime.errors import MaraError
from mara_runtime.files import read_file, writing

_SEAL = ', "sha256": "'


class Store:
    """Records by key, appended to `path`.

    settings: plain JSON values. Raises MaraError for a file written with other settings, naming the first that differs,
    and for a damaged one. An incomplete last line, left by an interruption, is dropped; a file without records is begun
    again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, Any] = {}
        current: dict[str, Any] = json.loads(json.dumps(settings))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = read_file(path, path.stat().st_size) if path.exists() else b""
            complete = content[: content.rfind(b"\n") + 1]
            if complete.count(b"\n") < 2:
                complete = b""
            for number, line in enumerate(complete.splitlines(), 1):
                self._read(number, line, current)
            if len(complete) < len(content):
                os.truncate(path, len(complete))
            if not complete:
                self._append([{"settings": current}])

    def _read(self, number: int, line: bytes, current: dict[str, Any]) -> None:
        try:
            body, seal, checksum = line.decode().rpartition(_SEAL)
            if line.decode() != _sealed(body) or not seal:
                raise ValueError(checksum)
            value = json.loads(body + "}")
            if number > 1:
                self._records[value["key"]] = value["record"]
                return
            saved = value["settings"]
            changed = next((key for key in {**current, **saved} if current.get(key) != saved.get(key)), None)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self.damaged(f"line {number}") from None
        if changed is not None:
            before, now = (shorten(json.dumps(of.get(changed), ensure_ascii=False), 60) for of in (saved, current))
            raise MaraError(
                f"{self.path} was made with {changed} {before}, now it is {now}: use the same settings, choose another "
                "--out, or delete the file"
            )

    def damaged(self, where: str) -> MaraError:
        """The error for a part of the file that is not as it was written."""
        return MaraError(f"{self.path}, {where}, is damaged: delete the file to compute it again")

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
        lines = "".join(_sealed(json.dumps(value, ensure_ascii=False)[:-1]) + "\n" for value in values)
        with self.path.open("ab") as file:
            file.write(lines.encode())


def _sealed(body: str) -> str:
    """A line, from its JSON object without the closing brace."""
    return f'{body}{_SEAL}{hashlib.sha256(body.encode()).hexdigest()[:16]}"}}'


class CachedScore:
    """A score that is computed once per prompt and answer. Identical answers have identical values."""

    def __init__(self, score: Score, store: Store) -> None:
        self.name, self.columns = score.name, score.columns
        self._score, self._store = score, store

    def __call__(self, prompts: Sequence[Asked], answers: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """See `Score`."""
        rows = list(zip(prompts, answers, *columns.values(), strict=True))
        keys = [_key(*row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._store}
        if new:
            some_prompts, some_answers, *others = map(list, zip(*new.values(), strict=True))
            some_columns = dict(zip(columns, others, strict=True))
            values = checked_values(self.name, self._score, some_prompts, some_answers, some_columns)
            self._store.add(dict(zip(new, values, strict=True)))
        found = [self._store[key] for key in keys]
        if not all(isinstance(value, float) and math.isfinite(value) for value in found):
            raise self._store.damaged("a score")
        return found


def _key(prompt: Asked, answer: str, *columns: Any) -> str:
    """The key of a score."""
    asked = key_of([prompt, *columns]) if columns else key_of(prompt)
    return hashlib.sha256(f"{len(asked)} {asked}{answer}".encode()).hexdigest()


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
