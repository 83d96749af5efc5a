"""TensorRT's timing cache: what it measured of kernels, in a file, so that the next build need not."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mara_runtime import files
from mara_runtime.errors import OptionError


def check(path: Path) -> None:
    """Refuse, before the build, a file that could not be written after it. Raises OptionError."""
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
def kept(config: Any, chosen: Path | None, own: str, note: Callable[[str], None]) -> Iterator[None]:
    """Give a builder's configuration what earlier builds measured; after the build, keep what it has added.

    chosen: the user's file; None: `own` in their cache folder. What becomes of a file that was chosen, `note` is told.
    """
    known = files.read_cached(own) if chosen is None else _read(chosen)
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        if chosen is not None:
            note(f"--timing-cache: {chosen} is damaged, or of another GPU or TensorRT; it is started anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    cache = config.get_timing_cache()
    content = memoryview(cache.serialize())
    if chosen is None:
        files.write_cached(own, content)
        return
    try:
        files.write_atomic(chosen, content)
    except OSError as error:
        note(f"--timing-cache: {chosen} could not be written ({error.strerror}); the next build measures again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
