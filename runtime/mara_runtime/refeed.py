"""Owed rows: how an engine whose KV cache lies out of the host's reach moves an entry.

An accepted candidate's entry lies in a slot of its own and belongs into the sequence's next one. To copy it there takes
a call for every layer; to compute it again takes one more row in a pass that runs anyway. So the engine only notes that
the row is owed, and the next pass begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mara_runtime.engine import Pass


@dataclass(frozen=True)
class Prepared:
    """A pass to run."""

    work: Pass
    extra: int = 0
    """rows in front that the caller did not ask for; 0 or 1"""


class Refeed:
    """What was written to each slot, and which row is owed, if any."""

    def __init__(self, slots: int) -> None:
        self._written: list[tuple[int, int] | None] = [None] * slots  # (token, position)
        self._owed: tuple[int, int, int] | None = None  # token, position, slot

    def owe(self, source: int, target: int) -> None:
        """The entry of slot `source` shall be that of slot `target`. Raises IndexError when `source` holds none."""
        entry = self._written[source]
        if entry is None:
            raise IndexError(f"slot {source} holds no entry")
        self._owed = (*entry, target)

    def forget(self) -> None:
        """The cache was emptied."""
        self._written = [None] * len(self._written)
        self._owed = None

    def prepare(self, work: Pass, *, together: bool = True) -> list[Prepared]:
        """The passes that do `work`, the last of them, and what is owed.

        together: mostly one pass does both, with the owed row in front.
        """
        passes = self._with_owed(work, together)
        for prepared in passes:
            rows = zip(prepared.work.tokens, prepared.work.positions, strict=True)
            for slot, (token, position) in enumerate(rows, prepared.work.slot):
                self._written[slot] = (int(token), int(position))
        return passes

    def _with_owed(self, work: Pass, together: bool) -> list[Prepared]:
        owed, self._owed = self._owed, None
        if owed is None or work.slot <= owed[2]:  # that slot is not part of the sequence any more
            return [Prepared(work)]
        token, position, slot = owed
        if not together or work.slot > slot + 1:
            return [Prepared(Pass([token], [position], slot), 1), Prepared(work)]
        joined = replace(
            work,
            tokens=[token, *work.tokens],
            positions=[position, *work.positions],
            slot=slot,
            head_rows=[row + 1 for row in work.head_rows],
            agent_rows=[row + 1 for row in work.agent_rows],
            fallback_row=None if work.fallback_row is None else work.fallback_row + 1,
        )
        return [Prepared(joined, 1)]
