"""The KV caches of an engine, one for each conversation that it holds at once: their *places*.

A KV cache knows which tokens its slots hold; the memory of an engine lies behind it.

    slot      0     1     2     3     4    …
    token    the   cat   sat    ·     ·          tokens = [the, cat, sat]

Slot i of the sequence holds the entry of its i-th token. Rows of a pass may lie in slots behind the sequence; `commit`
makes one of them its next entry. A conversation that has ended leaves its entries in its place, until another one needs
it: the next turn of that conversation, or a prompt that begins alike, goes on from them.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol, overload

from mara_runtime.errors import EngineError

WORTH_COPYING = 16
"""Tokens of a common prefix for which another place's entries are copied."""


class CacheMemory(Protocol):
    """Where an engine keeps the KV entries of one place, by slot."""

    @property
    def capacity(self) -> int:
        """Slots at most."""

    def resize(self, slots: int, kept: int) -> None:
        """A text of `slots` tokens begins; only the first `kept` entries are needed.

        The memory may grow or shrink now, which is cheaper than growing pass by pass. Raises EngineError.
        """

    def grow(self, slots: int) -> None:
        """Make room for `slots`, keeping all entries. Raises EngineError beyond the capacity."""

    def move(self, token: int, source: int, target: int) -> None:
        """Make the entry of `token` in slot `source` that of slot `target`, its position, in every layer."""

    def copy(self, place: int, count: int) -> bool:
        """Make the first `count` entries those of another place; False: the engine cannot. Raises EngineError."""

    def zero(self) -> None:
        """Zero all slots: masked slots take part in attention with weight 0, and 0 × NaN is NaN."""


class EngineMemory(Protocol):
    """Where an engine keeps the KV entries of all places."""

    @property
    def most_places(self) -> int:
        """Places at most."""

    def place(self, index: int) -> CacheMemory:
        """The memory of one more place, the next in order. Raises EngineError if memory runs out."""


class KVCache:
    """Bookkeeping on top of one place's memory. Hold the lock of `Places` while reading, writing or running passes."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self.tokens: list[int] = []
        """whose entries lie in slots 0, 1, …; correct at any time, also after an interrupted pass"""

    @property
    def capacity(self) -> int:
        """Slots at most."""
        return self._memory.capacity

    def common(self, prompt: Sequence[int]) -> int:
        """Length of the longest prefix of `prompt` that it holds, at least one token short of all."""
        kept, longest = 0, min(len(self.tokens), len(prompt) - 1)
        while kept < longest and self.tokens[kept] == prompt[kept]:
            kept += 1
        return kept

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common prefix with `prompt`, at least one token short of it, and make room for the rest.

        Returns the length of that prefix.
        """
        kept = self.common(prompt)
        del self.tokens[kept:]
        self._memory.resize(len(prompt), kept)
        return kept

    def reserve(self, slot: int, rows: int) -> None:
        """An engine is about to write `rows` entries from `slot` on. Raises EngineError where they do not fit."""
        del self.tokens[slot:]
        self._memory.grow(slot + rows)

    def extend(self, tokens: Sequence[int]) -> None:
        """A pass has written the entries of the sequence's next tokens in place."""
        self.tokens.extend(tokens)

    def commit(self, token: int, slot: int) -> None:
        """The sequence goes on with `token`, whose entry a pass has written to `slot`."""
        target = len(self.tokens)
        if slot != target:
            self._memory.move(token, slot, target)
        self.tokens.append(token)

    def copy(self, place: int, tokens: Sequence[int]) -> bool:
        """Begin with `tokens`, whose entries another place holds, if the engine can copy them; has it?"""
        before = self.tokens[:]
        self.tokens.clear()  # whatever becomes of the copy
        copied = self._memory.copy(place, len(tokens))
        self.tokens.extend(tokens if copied else before)
        return copied

    def clear(self) -> None:
        """Drop all tokens and zero the memory, as after a NaN."""
        self.tokens.clear()
        self._memory.zero()


class Places(Sequence[KVCache]):
    """The KV caches of an engine; at first there is one. Whoever runs passes holds `lock`."""

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._caches: list[KVCache] = []
        self._recent: list[int] = []  # places that a text began in, the last at the end
        self.lock = threading.RLock()
        self.owner: object = None
        """whose answers are being decoded; those of an earlier owner cannot go on"""
        self.open(1)

    @property
    def most(self) -> int:
        """Places at most."""
        return self._memory.most_places

    def open(self, count: int) -> None:
        """Have at least `count` places. Raises EngineError if the engine takes fewer, or if memory runs out."""
        if count > self.most:
            raise EngineError(f"{count} conversations at once are more than the {self.most} that the engine takes")
        while len(self._caches) < count:
            self._caches.append(KVCache(self._memory.place(len(self._caches))))

    def seat(self, prompt: Sequence[int], free: Collection[int]) -> int:
        """The place among `free` for a text with this prompt, with what any place holds of the prompt.

        That is the place whose text goes on: all of it, but for its last few tokens. Else it is the one that was left
        alone for longest, so that other conversations can still go on, also those that only begin alike; the first of
        those that no text began in yet. Where entries cannot be copied, a place that keeps half of its text is better.
        """
        held = [cache.common(prompt) for cache in self._caches]
        unused = [place for place in range(len(self._caches)) if place in free and place not in self._recent]
        by_age = [*unused, *(place for place in self._recent if place in free)]
        place, oldest = max(by_age, key=lambda p: held[p]), by_age[0]
        best = max(range(len(held)), key=lambda p: held[p])

        def begin(place: int) -> bool:
            """Copy what the prompt begins with, if that is worthwhile and the engine can; has it?"""
            worthwhile = held[best] >= held[place] + WORTH_COPYING
            return worthwhile and self._caches[place].copy(best, prompt[: held[best]])

        lost = len(self._caches[place].tokens) - held[place]
        if lost > WORTH_COPYING and begin(oldest):
            place = oldest
        else:
            place = oldest if lost > held[place] else place
            begin(place)
        self._recent = [*(p for p in self._recent if p != place), place]
        return place

    @overload
    def __getitem__(self, index: int) -> KVCache: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[KVCache]: ...
    def __getitem__(self, index: int | slice) -> KVCache | Sequence[KVCache]:
        return self._caches[index]

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self._caches)
