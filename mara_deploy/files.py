"""Files and folders of long runs: written whole, held by one command at a time, failures said in one line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError
from mara_runtime.files import locked


@contextlib.contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """Turn an OSError into the MaraError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise MaraError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Reserve a folder, made if it is missing, for this run. Raises MaraError where another run has it."""
    with in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise MaraError(f"another run is using {folder}: wait until it ends, or choose another --out") from None
        yield


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that either the old or the new one is there, whole, also after a loss of power.

    write: called with the file to write. One command alone may write `path`: see `held`.
    """
    beside = partial(path)
    with in_one_line(path):
        try:
            write(beside)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def partial(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text in UTF-8."""
    write_whole(path, lambda to: to.write_text(text, encoding="utf-8"))


def fingerprint(folder: Path) -> str:
    """Checksums of a model folder's configuration, tokenizer and weights, which tell it from others."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")])
    return " ".join(f"{path.name}:{sha256(path)[:16]}" for path in files)
