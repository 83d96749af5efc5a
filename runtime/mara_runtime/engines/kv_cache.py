"""The KV cache of one conversation: which tokens its slots hold, and the memory of an engine behind it.

    slot      0     1     2     3     4    …
    token    the   cat   sat    ·     ·          tokens = [the, cat, sat]

Slot i of the sequence holds the entry of its i-th token. Rows of a pass may lie in slots behind the sequence; `commit`
makes one of them its next entry.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol


class CacheMemory(Protocol):
    """Where an engine keeps KV entries, by slot."""

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

    def zero(self) -> None:
        """Zero all slots: masked slots take part in attention with weight 0, and 0 × NaN is NaN."""


class KVCache:
    """Bookkeeping on top of an engine's memory. Hold `lock` while reading, writing or running passes."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self.tokens: list[int] = []
        """whose entries lie in slots 0, 1, …; correct at any time, also after an interrupted pass"""
        self.lock = threading.RLock()
        self.owner: object = None
        """the answer that is being decoded; an earlier one cannot go on"""

    @property
    def capacity(self) -> int:
        """Slots at most."""
        return self._memory.capacity

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common prefix with `prompt`, at least one token short of it, and make room for the rest.

        Returns the length of that prefix.
        """
        kept, longest = 0, min(len(self.tokens), len(prompt) - 1)
        while kept < longest and self.tokens[kept] == prompt[kept]:
            kept += 1
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

    def clear(self) -> None:
        """Drop all tokens and zero the memory, as after a NaN."""
        self.tokens.clear()
        self._memory.zero()
