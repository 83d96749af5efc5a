"""Files in the user's cache folder: what was measured or compiled on this machine, kept for the next start.

Nothing depends on them: what cannot be read is made anew, and what cannot be written is made again next time.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, and our folder in it. Raises RuntimeError for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mara-deploy"


def read(name: str) -> bytes:
    """What a file holds; nothing, if it cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return (folder() / name).read_bytes()
    return b""


def write(name: str, content: bytes | memoryview) -> None:
    """Write or replace a file, if that is possible."""
    with contextlib.suppress(OSError, RuntimeError):
        path = folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write or replace a file so that a reader sees the old one or the new one. Raises OSError, and leaves nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
