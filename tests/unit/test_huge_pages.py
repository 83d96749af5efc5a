"""Huge pages: which memory they are asked for, and that Linux gives them."""

import ctypes
import mmap
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mara_runtime.engines import huge_pages
from mara_runtime.engines.huge_pages import added

MB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ([], [(1, 3), (5, 9)], [(1, 3), (5, 9)]),
        ([(1, 3), (5, 9)], [(1, 3), (5, 9)], []),
        ([(5, 9)], [(2, 12)], [(2, 5), (9, 12)]),  # it grew both ways
        ([(2, 4), (6, 8)], [(1, 9)], [(1, 2), (4, 6), (8, 9)]),  # two became one
        ([(1, 9)], [(2, 4), (6, 8)], []),  # a part was given back
        ([(1, 4)], [(4, 6)], [(4, 6)]),
    ],
)
def test_memory_that_was_added_between_two_listings(
    before: list[tuple[int, int]], after: list[tuple[int, int]], found: list[tuple[int, int]]
) -> None:
    assert list(added(before, after)) == found


def huge_bytes(address: int) -> int:
    """Of the mapping that holds an address: how much of it lies in huge pages."""
    inside, text = False, Path("/proc/self/smaps").read_text(errors="replace")
    for line in text.splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no mapping holds the address")


@pytest.fixture
def memory() -> Iterator[list[mmap.mmap]]:
    """Mappings to be closed after the test."""
    made: list[mmap.mmap] = []
    yield made
    for mapping in made:
        mapping.close()


def filled(made: list[mmap.mmap], size: int) -> int:
    """A private mapping, written to; returns its address."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made.append(mapping)
    mapping[:] = bytes([7]) * size
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


@linux
def test_memory_allocated_inside_lies_in_huge_pages_and_keeps_its_content(memory: list[mmap.mmap]) -> None:
    if not huge_pages.page_size():
        pytest.skip("this system gives no huge pages")
    if tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2]) < (6, 1):
        pytest.skip("this kernel cannot collapse pages at once: they come by and by")
    with huge_pages.huge_pages():
        address = filled(memory, 16 * MB)
    assert huge_bytes(address) >= 12 * MB  # what lies across a border of pages is left out
    assert set(memory[0][:]) == {7}


@linux
def test_only_whole_pages_inside_what_was_added_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * MB
    found = iter([[(0, size)], [(0, size), (3 * size + 4096, 6 * size - 4096), (8 * size + 1, 8 * size + 9)]])
    asked: set[tuple[int, int]] = set()
    monkeypatch.setattr(huge_pages, "page_size", lambda: size)
    monkeypatch.setattr(huge_pages, "private_memory", lambda: next(found))
    library = SimpleNamespace(madvise=lambda start, length, advice: asked.add((start, length)))
    monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda *_, **__: library)
    with huge_pages.huge_pages():
        pass
    assert asked == {(4 * size, size)}


@linux
@pytest.mark.parametrize(
    ("enabled", "size", "found"),
    [
        ("always [madvise] never", "2097152", 2 * MB),
        ("[always] madvise never", "2097152", 2 * MB),
        ("always madvise [never]", "2097152", 0),
        ("always [madvise] never", str(512 * MB), 0),  # base pages of 64 KiB
        ("always [madvise] never", "", 0),
        (None, "2097152", 0),
    ],
)
def test_the_system_s_setting_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: list[mmap.mmap], enabled: str | None, size: str, found: int
) -> None:
    if enabled is not None:
        (tmp_path / "enabled").write_text(enabled)
    (tmp_path / "hpage_pmd_size").write_text(size)
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    assert huge_pages.page_size() == found
    if not found:
        asked = []
        monkeypatch.setattr(huge_pages.ctypes, "CDLL", lambda name: asked.append(name))
        with huge_pages.huge_pages():
            filled(memory, 4 * MB)
        assert asked == []
