"""Files: the user's cache folder, atomic writes, folder locks, and one-line errors for what cannot be written.

The cache holds measurements and kernels compiled on this machine. It may be deleted at any time: what cannot be read is
computed again.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from mara_runtime.errors import MaraError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mara-deploy` or `~/.cache/mara-deploy`. Raises RuntimeError for a user without a home folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mara-deploy"


def read_file(path: Path, most: int) -> bytes:
    """Content of a regular file of at most so many bytes. Raises OSError; a pipe or device is not waited for."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(min(found.st_size, most) + 1)  # which takes that much memory, whatever there is to read
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def mapped(path: Path) -> mmap.mmap:
    """Content of a file that is not empty, read as it is used. Raises OSError."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_cached(name: str, most: int = 1 << 30) -> bytes:
    """Content of a cache file; empty if it cannot be read, or is larger than `most` bytes."""
    with contextlib.suppress(OSError, RuntimeError):
        return read_file(cache_folder() / name, most)
    return b""


def write_cached(name: str, content: bytes | memoryview) -> None:
    """Write or replace a cache file; a cache that cannot be written is ignored."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def write_atomic(path: Path, content: bytes | memoryview | str | Callable[[Path], object]) -> None:
    """Write or replace a file, with the mode of the user's umask.

    Readers see either the old or the new file, complete, even after a power failure. content: bytes, text, or a
    function that writes the file whose path it is given. Raises OSError, and leaves nothing behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~umask())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def umask() -> int:
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a MaraError: cannot write `path`."""
    try:
        yield
    except OSError as error:
        raise MaraError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Lock an existing folder against other processes; yields whether system and file system support that.

    wait: block until the lock is free; otherwise raise BlockingIOError if it is not. Raises FileNotFoundError where the
    folder is removed before it is locked. The lock is on the folder itself:
    it leaves no file behind, and ends with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle, supported = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            supported = False
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):  # noqa: PTH116 - beside os.fstat
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield supported
    finally:
        os.close(handle)
