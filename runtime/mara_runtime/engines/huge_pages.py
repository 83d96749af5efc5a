"""Huge pages on Linux for the memory of a library that does not ask for them itself.

A pass reads all weights. In pages of 4 KiB a processor looks up the address of each anew, in pages of 2 MiB it knows
them: a pass takes some percent less time (benchmarks/huge_pages.py). Unless the system is set to "never", a process may
ask.

https://docs.kernel.org/admin-guide/mm/transhuge.html, https://man7.org/linux/man-pages/man2/madvise.2.html
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPPINGS = Path("/proc/self/maps")
LARGEST = 32 * 2**20
"""Larger ones, as of kernels with base pages of 64 KiB, would waste too much."""
_HUGEPAGE, _COLLAPSE = 14, 25
"""madvise: take huge pages from now on, or by and by; move what is there into them now (since Linux 6.1)."""

_Range = tuple[int, int]


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Afterwards, move into huge pages what the process allocated meanwhile. Where that cannot be, nothing happens."""
    size = page_size()
    before = private_memory() if size else []
    yield
    if not size:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, end in added(before, private_memory()):
        first, last = -(-start // size) * size, end // size * size  # whole pages alone
        if first < last:
            for advice in (_HUGEPAGE, _COLLAPSE):
                madvise(first, last - first, advice)  # what it refuses stays as it is


def page_size() -> int:
    """Bytes of a huge page; 0 where there are none to be had."""
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        size = int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return size if allowed and size <= LARGEST else 0


def private_memory() -> list[_Range]:
    """Where the process has writable memory of its own that no file is behind, ascending."""
    found = []
    try:
        text = MAPPINGS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon"))):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def added(before: list[_Range], after: list[_Range]) -> Iterator[_Range]:
    """What lies in `after` and not in `before`, both ascending: a mapping that grew is told in its new part."""
    for start, end in after:
        for low, high in before:
            if start < high and low < end:
                if start < low:
                    yield start, low
                start = high
        if start < end:
            yield start, end
