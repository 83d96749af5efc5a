"""Files of long runs: one command at a time per folder, atomic writes, and fingerprints of model folders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError
from mara_runtime.files import locked, write_atomic, writing


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create the folder if it is missing, lock it for this run, and remove what killed runs were writing.

    Raises MaraError while another run has the lock.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise MaraError(f"another run is using {folder}: wait until it ends, or choose another --out") from None
        for partial in folder.glob(".*.partial"):
            with writing(partial):
                partial.unlink()
        yield


def write_file(path: Path, content: str | Callable[[Path], object]) -> None:
    """`write_atomic` that raises MaraError."""
    with writing(path):
        write_atomic(path, content)


def fingerprint(folder: Path) -> str:
    """Checksums of a model folder's configuration, tokenizer and weights."""
    files = sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")])
    return " ".join(f"{path.name}:{sha256(path)[:16]}" for path in files)
