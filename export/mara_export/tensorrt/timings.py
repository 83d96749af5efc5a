"""TensorRT's timing cache: kernel timings in a file, so that the next build need not measure them again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mara_runtime import files
from mara_runtime.errors import OptionError


def check(path: Path) -> None:
    """Reject, before the build, a file that could not be written after it. Raises OptionError."""
    try:
        if path.exists():
            if not path.is_file():
                raise OptionError(f"--timing-cache is {path}, which is not a file")
            with path.open("rb+"):
                pass
        with tempfile.NamedTemporaryFile(prefix=".timings.", dir=path.parent):
            pass
    except OSError as error:
        raise OptionError(f"--timing-cache is {path}, which cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def timing_cache(config: Any, path: Path | None, default: str, note: Callable[[str], None]) -> Iterator[None]:
    """Give a builder's configuration the timings of earlier builds, and save what the build adds.

    path: the user's file; None: `default` in their cache folder. note: receives a message where the user's file is not
    used.
    """
    content = files.read_cached(default) if path is None else _read(path)
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        if path is not None:
            note(f"--timing-cache: {path} is damaged, or from another GPU or TensorRT; starting an empty one")
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    measured = memoryview(config.get_timing_cache().serialize())
    if path is None:
        files.write_cached(default, measured)
        return
    try:
        files.write_atomic(path, measured)
    except OSError as error:
        note(f"--timing-cache: {path} cannot be written ({error.strerror}); the next build measures again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
