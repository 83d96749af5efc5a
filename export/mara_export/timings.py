"""TensorRT's timing cache: what it measured of kernels, in a file, so that the next build need not."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mara_runtime.calibrate import cache_folder
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
def kept(config: Any, named: Path | None, own: str, note: Callable[[str], None]) -> Iterator[None]:
    """Give a builder's configuration what earlier builds measured; after the build, keep what it has added.

    named: the file that the user has chosen; None: `own` in their cache folder. Only of a file that was chosen is
    `note` told what becomes of it: the other is a convenience, and without it the next build takes minutes longer.
    """
    path = named or _in_cache_folder(own)
    known = b""
    if path is not None:
        with contextlib.suppress(OSError):
            known = path.read_bytes()
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        if named is not None:
            note(f"--timing-cache: {path} is damaged, or of another GPU or TensorRT; it is started anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    if path is None:
        return
    try:
        if named is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            cache = config.get_timing_cache()
            part.write_bytes(memoryview(cache.serialize()))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        if named is not None:
            note(f"--timing-cache: {path} could not be written ({error.strerror}); the next build measures again")


def _in_cache_folder(name: str) -> Path | None:
    try:
        return cache_folder() / name
    except RuntimeError:  # a user without a home
        return None
