"""The KV cache's bookkeeping, and entries that are recomputed instead of moved."""

from dataclasses import replace

import pytest

from mara_runtime.engines.base import Pass
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.engines.recompute import Merged, Recompute
from tests.conformance import chain, siblings


class Memory:
    """Records what it is asked for; see `CacheMemory`."""

    capacity = 8

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def resize(self, slots: int, kept: int) -> None:
        self.calls.append(("resize", slots, kept))

    def grow(self, slots: int) -> None:
        self.calls.append(("grow", slots))
        if slots > self.capacity:
            raise IndexError(slots)

    def move(self, token: int, source: int, target: int) -> None:
        self.calls.append(("move", token, source, target))

    def zero(self) -> None:
        self.calls.append(("zero",))


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def cache(memory: Memory) -> KVCache:
    """A cache that holds 1 2 3."""
    cache = KVCache(memory)
    cache.extend([1, 2, 3])
    return cache


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [([1, 2, 3, 4], 3), ([1, 2, 3], 2), ([1, 2], 1), ([1], 0), ([1, 2, 4, 5], 2), ([2, 2, 3], 0)],
    ids=str,
)
def test_reuse_keeps_the_common_prefix_and_never_the_whole_prompt(
    cache: KVCache, memory: Memory, prompt: list[int], kept: int
) -> None:
    assert cache.reuse(prompt) == kept
    assert cache.tokens == prompt[:kept]
    assert memory.calls == [("resize", len(prompt), kept)]


def test_reserve_drops_the_tokens_that_a_pass_overwrites_even_if_there_is_no_room(
    cache: KVCache, memory: Memory
) -> None:
    cache.reserve(3, 2)
    assert (cache.tokens, memory.calls) == ([1, 2, 3], [("grow", 5)])
    cache.reserve(1, 2)
    assert cache.tokens == [1]
    with pytest.raises(IndexError):
        cache.reserve(0, 9)
    assert cache.tokens == []


def test_commit_moves_only_an_entry_that_lies_elsewhere(cache: KVCache, memory: Memory) -> None:
    cache.commit(7, 3)
    assert (cache.tokens, memory.calls) == ([1, 2, 3, 7], [])
    cache.commit(8, 6)
    assert (cache.tokens, memory.calls) == ([1, 2, 3, 7, 8], [("move", 8, 6, 4)])


def test_clear_drops_all_tokens_and_zeroes_the_memory(cache: KVCache, memory: Memory) -> None:
    cache.clear()
    assert (cache.tokens, memory.calls, cache.capacity) == ([], [("zero",)], 8)


# ── recomputed entries ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def recompute() -> Recompute:
    """The entry of token 9 belongs into slot 3."""
    recompute = Recompute()
    recompute.schedule(9, 3)
    return recompute


def test_the_row_runs_in_front_of_the_pass_after_it_until_that_succeeded(recompute: Recompute) -> None:
    work = Pass([4, 5], [4, 4], 4, [0], [1, 0], [0.0, -1.0], 0.5, 0.25, 1, hidden_rows=[1])
    both = Pass([9, 4, 5], [3, 4, 4], 3, [1], [2, 1], [0.0, -1.0], 0.5, 0.25, 2, hidden_rows=[2])
    for _ in range(2):  # the first was interrupted
        assert recompute.merged(work) == Merged(None, both, 1)
    assert recompute.merged(replace(work, fallback_row=None)).work.fallback_row is None
    recompute.cancel()
    assert recompute.merged(work) == Merged(None, work, 0)


def test_the_row_runs_alone_before_a_pass_that_it_cannot_join_and_never_if_overwritten(recompute: Recompute) -> None:
    row = Pass([9], [3], 3)
    adjacent, later = chain([4, 5], 4), siblings([4, 5], 4, 6)
    assert recompute.merged(adjacent, merge=False) == Merged(row, adjacent, 0)
    assert recompute.merged(later) == Merged(row, later, 0)
    for work in (chain([4], 3), chain([4, 5, 6], 1)):
        assert recompute.merged(work) == Merged(None, work, 0)
