"""Files: the user's cache folder, atomic writes, locks on folders.

The cache folder keeps what was measured or compiled on this machine. Nothing depends on it: what cannot be read is made
again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, and our folder in it. Raises RuntimeError for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mara-deploy"


def read_cached(name: str) -> bytes:
    """What a file holds; nothing, if it cannot be read."""
    with contextlib.suppress(OSError, RuntimeError):
        return (cache_folder() / name).read_bytes()
    return b""


def write_cached(name: str, content: bytes | memoryview) -> None:
    """Write or replace a file, if that is possible."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder() / name
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


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Lock a folder that exists, on systems and file systems that have locks. Raises BlockingIOError.

    wait: until no other process has it; else that raises. The lock is on the folder itself: it leaves no file behind,
    and ends with the process, even a killed one.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
