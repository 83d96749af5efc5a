"""An engine without a transformer: logits and hidden states come from a table of the caller's.

It tests everything above engines. Its cache holds what the real one holds, an entry a slot, and a row's prefix is
read from the slots it may see, so a decode loop that places, moves or counts a slot wrongly gets other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engine import Forward

Prefix = tuple[int, ...]
Lookup = Callable[[Prefix], tuple[NDArray[np.float32], NDArray[np.float32]]]


class TableEngine:
    """Looks up (logits (V,), hidden state (D,)) by the tokens up to and including a row's own.

    agent: hidden states (N, D) to margins (N,). Rows must be written at a slot not below their position, as every
    sequence has its first `position` slots filled before it.
    """

    def __init__(self, lookup: Lookup, agent: Callable[[NDArray[np.float32]], NDArray[np.float32]], slots: int) -> None:
        self._lookup = lookup
        self._agent = agent
        self._entries: list[tuple[int, int] | None] = [None] * slots  # (token, position) by slot

    @property
    def slots(self) -> int:
        """Size of the KV cache."""
        return len(self._entries)

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int, logits_rows: Sequence[int]
    ) -> Forward:
        """See `Engine.forward`; an entry that does not belong to the prefix it stands in is an IndexError."""
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self._entries[slot + row] = (int(token), int(position))
        rows = [self._lookup((*self._prefix(p), int(t))) for t, p in zip(tokens, positions, strict=True)]
        return Forward(
            hidden=np.stack([hidden for _, hidden in rows]),
            logits=np.stack([rows[r][0] for r in logits_rows]) if len(logits_rows) else np.zeros((0, 0), np.float32),
        )

    def margins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.margins`."""
        return self._agent(hidden)

    def move(self, source: int, target: int) -> None:
        """See `Engine.move`."""
        self._entries[target] = self._entries[source]

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._entries = [None] * len(self._entries)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"name": "table"}

    def _prefix(self, position: int) -> Prefix:
        tokens: list[int] = []
        for index, entry in enumerate(self._entries[:position]):
            if entry is None or entry[1] != index:
                raise IndexError(f"slot {index} holds {entry}, not the token of position {index}")
            tokens.append(entry[0])
        return tuple(tokens)
