"""An engine without a transformer: logits and hidden states come from a table of the caller's.

It tests everything above engines. Its cache holds what the real one holds, an entry a slot, and a row's prefix is
read from the slots it may see, so a decode loop that places, moves or counts a slot wrongly gets other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.base import FullOutput, Pass, StepOutput
from mara_runtime.tensors import top_tokens

Prefix = tuple[int, ...]
Lookup = Callable[[Prefix], tuple[NDArray[np.float32], NDArray[np.float32]]]


class TableEngine:
    """Looks up (logits (V,), hidden state (D,)) by the tokens up to and including a row's own.

    agent: hidden states (N, D) to margins (N,). Rows must be written at a slot not below their position, as every
    sequence has its first `position` slots filled before it.
    """

    def __init__(
        self,
        lookup: Lookup,
        agent: Callable[[NDArray[np.float32]], NDArray[np.float32]],
        slots: int,
        max_candidates: int = 64,
    ) -> None:
        self._lookup = lookup
        self._agent = agent
        self._most = max_candidates
        self._entries: list[tuple[int, int] | None] = [None] * slots  # (token, position) by slot

    @property
    def slots(self) -> int:
        """Size of the KV cache."""
        return len(self._entries)

    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`; an entry that does not belong to the prefix it stands in is an IndexError."""
        hidden, logits = self._rows(work.tokens, work.positions, work.slot)
        asked = list(work.agent_rows)
        margins = self._margins(hidden[asked]) if asked else np.zeros(0, np.float32)
        scores = [
            (priority + work.margin_weight * margin, -index)
            for index, (priority, margin) in enumerate(zip(work.priorities, margins, strict=True))
            if float(margin) > work.threshold and priority > -np.inf
        ]
        rows = list(work.head_rows)
        if scores:
            rows.append(asked[-max(scores)[1]])
        elif work.fallback_row is not None:
            rows.append(work.fallback_row)
        chosen = logits[rows]
        top = top_tokens(self._most, logits.shape[1])
        ids = np.argsort(-chosen, axis=1, kind="stable")[:, :top]
        with np.errstate(invalid="ignore"):
            greatest = chosen.max(axis=1, keepdims=True, initial=-np.inf)
            normaliser = np.log(np.exp(chosen - greatest).sum(axis=1)) + greatest[:, 0]
        return StepOutput(
            margins, np.array(rows, np.int64), ids.astype(np.int64), np.take_along_axis(chosen, ids, 1), normaliser
        )

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> FullOutput:
        """See `Engine.evaluate`."""
        hidden, logits = self._rows(tokens, positions, slot)
        return FullOutput(hidden, logits, self._margins(hidden))

    def begin(self, kept: int, slots: int) -> None:
        """See `Engine.begin`; the others are gone, so that who needs one of them all the same is found out."""
        self._entries[kept:] = [None] * (len(self._entries) - kept)

    def move(self, source: int, target: int) -> None:
        """See `Engine.move`."""
        self._entries[target] = self._entries[source]

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._entries = [None] * len(self._entries)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {"name": "table"}

    def _margins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """NaN for a state that is not finite, whatever the agent makes of it."""
        margins = self._agent(hidden).astype(np.float32)
        return np.where(np.isfinite(hidden).all(axis=1), margins, np.float32(np.nan))

    def _rows(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            self._entries[slot + row] = (int(token), int(position))
        rows = [self._lookup((*self._prefix(p), int(t))) for t, p in zip(tokens, positions, strict=True)]
        return np.stack([hidden for _, hidden in rows]), np.stack([logits for logits, _ in rows])

    def _prefix(self, position: int) -> Prefix:
        tokens: list[int] = []
        for index, entry in enumerate(self._entries[:position]):
            if entry is None or entry[1] != index:
                raise IndexError(f"slot {index} holds {entry}, not the token of position {index}")
            tokens.append(entry[0])
        return tuple(tokens)
