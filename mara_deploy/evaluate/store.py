"""What a run has found so far, kept as it comes, so that an interrupted run can go on where it stopped.

A file of JSON lines: the first holds the settings that the others depend on, each of the others a record under a key.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError


class Store:
    """Records by key, appended one by one to `path`.

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
                self._write({"settings": wanted})

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
        with contextlib.suppress(OSError):  # of what is written already; `add` has said it
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Any:
        return self._records[key]

    def add(self, key: str, record: Any) -> None:
        """Keep a record, at once."""
        with in_one_line(self.path):
            self._write({"key": key, "record": record})
        self._records[key] = record

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())
        self._file.flush()


@contextlib.contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """Turn an OSError into the MaraError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise MaraError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Reserve a folder, made if it is missing, for this run. Raises MaraError where another run has it.

    The lock is on the folder itself: it leaves no file behind, and ends with the process, even a killed one.
    """
    with in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MaraError(f"another run is using {folder}: wait until it ends, or choose another --out") from None
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that either the old or the new one is there, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with in_one_line(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def fingerprint(folder: Path) -> str:
    """Checksums of a model folder's configuration, tokenizer and weights, which tell it from others."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")])
    return " ".join(f"{path.name}:{sha256(path)[:16]}" for path in files)


def _whole_lines(path: Path) -> bytes:
    """The file up to its last line end; nothing if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _short(value: Any, most: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 1] + "…"
