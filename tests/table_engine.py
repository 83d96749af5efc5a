"""An engine without a transformer: logits and hidden states come from a table of the caller's.

It tests everything above engines. Each of its places has an entry per slot, as a real one has, and a row's prefix is
read from the slots that it attends to: a decode loop that places, moves or counts a slot wrongly gets other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.base import Pass, StepOutput, Works
from mara_runtime.engines.kv_cache import KVCache, Places
from mara_runtime.tensors import top_tokens

Prefix = tuple[int, ...]
F32 = NDArray[np.float32]
Lookup = Callable[[Prefix], tuple[F32, F32]]


class TableMemory:
    """See `CacheMemory`; an entry is a token and its position. others: the memories of all places."""

    def __init__(self, slots: int, others: Sequence[TableMemory] = ()) -> None:
        self.entries: list[tuple[int, int] | None] = [None] * slots
        self._others = others
        self.moves: list[tuple[int, int]] = []
        self.zeroed = 0

    @property
    def capacity(self) -> int:
        return len(self.entries)

    def resize(self, slots: int, kept: int) -> None:
        """Drops all other entries, so that a pass that needs one of them fails."""
        self.entries[kept:] = [None] * (len(self.entries) - kept)

    def grow(self, slots: int) -> None:
        if slots > self.capacity:
            raise IndexError(f"{slots} slots are needed; the KV cache has {self.capacity}")

    def move(self, token: int, source: int, target: int) -> None:
        assert self.entries[source] == (token, target)
        self.moves.append((source, target))
        self.entries[target] = self.entries[source]

    def copy(self, place: int, count: int) -> bool:
        self.entries[:count] = self._others[place].entries[:count]
        return True

    def zero(self) -> None:
        self.zeroed += 1
        self.entries = [None] * len(self.entries)


class TableMemories:
    """See `EngineMemory`."""

    def __init__(self, slots: int, most_places: int) -> None:
        self.most_places = most_places
        self._slots = slots
        self._memories: list[TableMemory] = []

    def __getitem__(self, place: int) -> TableMemory:
        return self._memories[place]

    def place(self, index: int) -> TableMemory:
        assert index == len(self._memories) < self.most_places
        self._memories.append(TableMemory(self._slots, self._memories))
        return self._memories[-1]


class TableEngine:
    """Looks up (logits (V,), hidden state (D,)) by the tokens up to and including a row's own.

    agents: by name, hidden states (N, D) to margins (N,). A row's slot is never below its position.
    """

    def __init__(
        self,
        lookup: Lookup,
        agents: Mapping[str, Callable[[F32], F32]],
        slots: int,
        max_candidates: int = 64,
        most_places: int = 8,
    ) -> None:
        self._lookup, self._agents = lookup, agents
        self._in_use: list[Callable[[F32], F32]] = []
        self.max_candidates = max_candidates
        self.memories = TableMemories(slots, most_places)
        self._places = Places(self.memories)

    @property
    def places(self) -> Places:
        return self._places

    @property
    def cache(self) -> KVCache:
        return self._places[0]

    @property
    def memory(self) -> TableMemory:
        """Of the first place."""
        return self.memories[0]

    def use(self, agents: Sequence[str]) -> None:
        self._in_use = [self._agents[name] for name in agents]

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`. Raises IndexError where a row would attend to an entry of another sequence."""
        return self.run_together([(place, work)])[0]

    def run_together(self, works: Works) -> list[StepOutput]:
        """See `Engine.run_together`."""
        numbers = [place for place, _ in works]
        assert numbers == sorted(set(numbers)), f"places {numbers}"
        return [self._run(work, place) for place, work in works]

    def _run(self, work: Pass, place: int) -> StepOutput:
        self._places[place].reserve(work.slot, len(work.tokens))
        hidden, logits = self._rows(work, place)
        judged = list(work.agent_rows)
        margins = self._margins(hidden[judged], work.mix) if judged else np.zeros(0, np.float32)
        scores = [
            (priority + work.margin_weight * margin, -index)
            for index, (priority, margin) in enumerate(zip(work.priorities, margins, strict=True))
            if float(margin) > work.threshold and priority > -np.inf
        ]
        rows = list(work.head_rows)
        if scores:
            rows.append(judged[-max(scores)[1]])
        elif work.fallback_row is not None:
            rows.append(work.fallback_row)
        chosen = logits[rows]
        top = top_tokens(self.max_candidates, logits.shape[1])
        ids = np.argsort(-chosen, axis=1, kind="stable")[:, :top]
        with np.errstate(invalid="ignore", over="ignore"):
            greatest = chosen.max(axis=1, keepdims=True, initial=-np.inf)
            normaliser = np.log(np.exp(chosen - greatest).sum(axis=1)) + greatest[:, 0]
        return StepOutput(
            margins,
            np.array(rows, np.int64),
            ids.astype(np.int64),
            np.take_along_axis(chosen, ids, 1),
            normaliser,
            hidden[[*work.hidden_rows]] if len(work.hidden_rows) else None,
            chosen if work.logits else None,
        )

    def describe(self) -> dict[str, Any]:
        return {"name": "table"}

    def _margins(self, hidden: F32, mix: Sequence[float] | F32) -> F32:
        """NaN for a state that is not finite, whatever the agents make of it."""
        parts = np.broadcast_to(np.asarray(mix, np.float32), (len(hidden), max(len(self._in_use), 1)))
        margins = np.zeros(len(hidden), np.float32)
        for part, agent in zip(parts.T, self._in_use, strict=False):
            with np.errstate(invalid="ignore", over="ignore"):
                margins += np.where(part == 0, 0, part * agent(hidden).astype(np.float32))
        return np.where(np.isfinite(hidden).all(axis=1), margins, np.float32(np.nan))

    def _rows(self, work: Pass, place: int) -> tuple[F32, F32]:
        """(S, D) hidden states and (S, V) logits."""
        entries, rows = self.memories[place].entries, [*zip(work.tokens, work.positions, strict=True)]
        for row, (token, position) in enumerate(rows):
            entries[work.slot + row] = int(token), int(position)
        found = [self._lookup((*self._prefix(entries, position), int(token))) for token, position in rows]
        return np.stack([hidden for _, hidden in found]), np.stack([logits for logits, _ in found])

    def _prefix(self, entries: Sequence[tuple[int, int] | None], position: int) -> Prefix:
        tokens: list[int] = []
        for index, entry in enumerate(entries[:position]):
            if entry is None or entry[1] != index:
                raise IndexError(f"slot {index} holds {entry}, not the token of position {index}")
            tokens.append(entry[0])
        return tuple(tokens)
