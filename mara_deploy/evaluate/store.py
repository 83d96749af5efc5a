"""What a run has found so far, kept as it comes, so that an interrupted run can go on where it stopped.

A file of JSON lines: the first holds the settings that the others depend on, each of the others a record under a key.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mara_deploy.files import in_one_line
from mara_runtime.errors import MaraError


class Store:
    """Records by key, appended to `path`.

    settings: plain JSON values. A file made under other settings is refused, naming the first that differs. A line that
    an interruption cut short is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._records: dict[str, Any] = {}
        wanted: dict[str, Any] = json.loads(json.dumps(settings))
        with in_one_line(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = _whole_lines(path)
            for number, line in enumerate(whole.splitlines() if whole else [], 1):
                self._read(number, line, wanted)
            self._file = path.open("ab")
            self._file.truncate(len(whole))
            if not whole:
                self._write([{"settings": wanted}])

    def _read(self, number: int, line: bytes, settings: dict[str, Any]) -> None:
        try:
            value = json.loads(line)
            if number == 1:
                found = value["settings"]
                different = next((k for k in {**settings, **found} if settings.get(k) != found.get(k)), None)
            else:
                self._records[value["key"]] = value["record"]
                return
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MaraError(
                f"{self.path}, line {number}, is damaged: remove the file, and its contents are made again"
            ) from None
        if different is not None:
            raise MaraError(
                f"{self.path} was made with {different} {_short(found.get(different))}, now it is "
                f"{_short(settings.get(different))}: go on with the settings it was made with, choose another --out, "
                "or remove the file"
            )

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # of what is written already; `keep` has said it
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Any:
        return self._records[key]

    def keep(self, records: Mapping[str, Any]) -> None:
        """Keep records by key, all of them at once: what was computed together is there or made again together."""
        with in_one_line(self.path):
            self._write([{"key": key, "record": record} for key, record in records.items()])
        self._records.update(records)

    def _write(self, values: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
        self._file.flush()


def _whole_lines(path: Path) -> bytes:
    """The file up to its last line end; nothing if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 1] + "…"
