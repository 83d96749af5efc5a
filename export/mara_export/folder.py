"""Folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mara_runtime.errors import MaraError


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` on success and vanishes otherwise."""
    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")
    new_parents = [parent for parent in out.parents if not parent.exists()]  # the deepest first
    folder = None
    try:
        with _in_one_line(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield folder
        with _in_one_line(out):
            _open_to_others(folder)
            folder.replace(out)
        new_parents = []
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MaraError(f"cannot write {out}: {error.strerror}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # gone already when it was renamed
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MaraError(f"cannot write {out}: {error}") from error


def _open_to_others(folder: Path) -> None:
    """Undo the private modes of temporary files: what a user makes follows their umask."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
