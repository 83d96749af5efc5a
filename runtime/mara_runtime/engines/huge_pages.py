"""Huge pages on Linux for the memory of a library that does not request them itself.

A pass reads all weights. With pages of 4 KiB most address translations miss the TLB, with pages of 2 MiB few do, and a
pass takes some percent less time (benchmarks/huge_pages.py). A process may request them unless the system setting is
"never".

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
"""Larger ones, as with base pages of 64 KiB, would waste too much."""
_HUGEPAGE, _COLLAPSE = 14, 25
"""madvise: use huge pages from now on; move existing pages into them now (since Linux 6.1)."""

_Range = tuple[int, int]


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """On exit, move what the process has allocated meanwhile into huge pages, where the system supports it."""
    size = page_size()
    before = private_memory() if size else []
    yield
    if not size:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for start, end in added(before, private_memory()):
        first, last = -(-start // size) * size, end // size * size  # whole pages only
        if first < last:
            for advice in (_HUGEPAGE, _COLLAPSE):
                madvise(first, last - first, advice)  # refusals are harmless


def page_size() -> int:
    """Bytes of a huge page; 0 where they are unavailable."""
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        size = int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0
    return size if allowed and size <= LARGEST else 0


def private_memory() -> list[_Range]:
    """Address ranges of the process's writable anonymous private memory, ascending."""
    ranges = []
    try:
        text = MAPPINGS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0].startswith(("[heap]", "[anon"))):
            start, end = addresses.split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def added(before: list[_Range], after: list[_Range]) -> Iterator[_Range]:
    """Ranges in `after` and not in `before`, both ascending: of a mapping that grew, the new part."""
    for start, end in after:
        for low, high in before:
            if start < high and low < end:
                if start < low:
                    yield start, low
                start = high
        if start < end:
            yield start, end
