"""Making a KV entry that of another slot where nothing but a pass may write to the cache.

An accepted sibling's entry has to lie where its sequence goes on. Where the cache is out of reach, the entry is
computed again: the row is *owed*, and stands in front of the next pass, which is one row wider for it and costs little
more. The result is a copy's as long as the slots below the row's position are what they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mara_runtime.engine import Pass


@dataclass(frozen=True)
class _Owed:
    token: int
    position: int
    slot: int


class Refeed:
    """What each slot was written from, and the rows that are owed."""

    def __init__(self, slots: int) -> None:
        self._written: list[tuple[int, int] | None] = [None] * slots  # (token, position)
        self._owed: list[_Owed] = []

    def note(self, work: Pass) -> None:
        """A pass is run: remember its tokens and positions by slot."""
        rows = zip(work.tokens, work.positions, strict=True)
        self._written[work.slot : work.slot + len(work.tokens)] = [(int(t), int(p)) for t, p in rows]

    def owe(self, source: int, target: int) -> None:
        """The entry of slot `source` is to be that of slot `target`. Raises ValueError for a slot never written."""
        entry = self._written[source]
        if entry is None:
            raise ValueError(f"slot {source} was never written")
        self._written[target] = entry
        if source != target:
            self._owed.append(_Owed(*entry, target))

    def prepend(self, work: Pass, most: int) -> list[tuple[Pass, int]]:
        """The passes to run for `work`, `work` the last, each with how many rows in front the caller did not ask for.

        most: rows of a pass at most. Row numbers in what the last pass returns are higher by its rows in front.
        """
        rows = self._due(work)
        front = rows and rows[-1].slot + 1 == work.slot and len(work.tokens) < most
        alone = [(Pass([row.token], [row.position], row.slot), 1) for row in (rows[:-1] if front else rows)]
        return [*alone, (_in_front(rows[-1], work), 1) if front else (work, 0)]

    def clear(self) -> None:
        """Nothing is written, nothing is owed."""
        self._written = [None] * len(self._written)
        self._owed.clear()

    def _due(self, work: Pass) -> list[_Owed]:
        """What is owed, less what `work` writes over anyway."""
        rows, self._owed = self._owed, []
        while rows and work.slot <= rows[-1].slot < work.slot + len(work.tokens):
            rows.pop()  # from the end only: a later row may look at an earlier one
        return rows


def _in_front(row: _Owed, work: Pass) -> Pass:
    return replace(
        work,
        tokens=[row.token, *work.tokens],
        positions=[row.position, *work.positions],
        slot=row.slot,
        head_rows=[i + 1 for i in work.head_rows],
        agent_rows=[i + 1 for i in work.agent_rows],
        fallback_row=None if work.fallback_row is None else work.fallback_row + 1,
    )
