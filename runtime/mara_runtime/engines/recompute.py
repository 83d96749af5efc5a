"""Owed rows: how an engine whose KV cache lies out of the host's reach moves an entry.

An accepted candidate's entry lies in a slot of its own and belongs in the sequence's next one. To copy it there takes
a call for every layer; to compute it again takes one more row in a pass that runs anyway. So the engine only notes that
the row is owed, and the next pass begins with it. The result is a copy's as long as the slots below the row's position
are what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mara_runtime.engines.base import Pass


@dataclass(frozen=True)
class Prepared:
    """A pass to run."""

    work: Pass
    extra: int = 0
    """rows in front that the caller did not ask for; 0 or 1"""


@dataclass(frozen=True)
class _Owed:
    token: int
    position: int
    slot: int


class Recompute:
    """What was written to each slot, and which rows are owed."""

    def __init__(self, slots: int) -> None:
        self._written: list[tuple[int, int] | None] = [None] * slots  # (token, position)
        self._owed: list[_Owed] = []

    def owe(self, source: int, target: int) -> None:
        """The entry of slot `source` shall be that of slot `target`. Raises IndexError when `source` holds none."""
        entry = self._written[source]
        if entry is None:
            raise IndexError(f"slot {source} holds no entry")
        self._written[target] = entry
        if source != target:
            self._owed.append(_Owed(*entry, target))

    def forget(self) -> None:
        """The cache was emptied."""
        self._written = [None] * len(self._written)
        self._owed.clear()

    def done(self) -> None:
        """The prepared passes have run. Until then the rows stay owed: a pass that fails leaves nothing undone."""
        self._owed.clear()

    def prepare(self, work: Pass, *, together: bool = True) -> list[Prepared]:
        """The passes that do what is owed and then `work`, the last of them; `done` follows when they have run.

        together: where `work` goes on right behind the owed row, one pass does both, with that row in front.
        """
        rows = list(self._owed)
        after = work.slot + len(work.tokens)
        while rows and work.slot <= rows[-1].slot < after:
            rows.pop()  # `work` writes over it; from the end only, as a later row may look at an earlier one
        for slot, (token, position) in enumerate(zip(work.tokens, work.positions, strict=True), work.slot):
            self._written[slot] = (int(token), int(position))
        joined = rows.pop() if together and rows and rows[-1].slot + 1 == work.slot else None
        alone = [Prepared(Pass([row.token], [row.position], row.slot), 1) for row in rows]
        return [*alone, Prepared(work) if joined is None else Prepared(_join(joined, work), 1)]


def _join(row: _Owed, work: Pass) -> Pass:
    return replace(
        work,
        tokens=[row.token, *work.tokens],
        positions=[row.position, *work.positions],
        slot=row.slot,
        head_rows=[i + 1 for i in work.head_rows],
        agent_rows=[i + 1 for i in work.agent_rows],
        fallback_row=None if work.fallback_row is None else work.fallback_row + 1,
    )
