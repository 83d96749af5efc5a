"""Moving a KV entry on a device: recompute it as the first row of the next pass.

An accepted candidate's entry lies in a slot behind the sequence and belongs into the sequence's next slot. Copying it
takes one call per layer; recomputing it takes one more row in a pass that runs anyway, and gives the same entry, as
the slots below its position have not changed.
"""

from __future__ import annotations

from dataclasses import replace

from mara_runtime.engines.base import Pass


class Recompute:
    """The entry that has to be recomputed, if any. At most one: a pass runs between two commits."""

    def __init__(self) -> None:
        self._pending: Pass | None = None

    def schedule(self, token: int, position: int) -> None:
        """The entry of `token` belongs into the slot of its position."""
        self._pending = Pass([token], [position], position)

    def cancel(self) -> None:
        """The entry is recomputed, or no longer needed."""
        self._pending = None

    def passes(self, work: Pass, *, merge: bool = True) -> tuple[Pass | None, Pass, int]:
        """(pass to run first, pass that contains `work`, rows in front of those of `work`); `cancel` follows them.

        merge: where the pending row's slot is the one before `work`, a single pass runs both. A pass that fails leaves
        the row pending.
        """
        row = self._pending
        if row is None or work.slot <= row.slot:  # overwritten: the sequence ends before it
            return None, work, 0
        if not merge or row.slot + 1 != work.slot:
            return row, work, 0
        merged = replace(
            work,
            tokens=[*row.tokens, *work.tokens],
            positions=[*row.positions, *work.positions],
            slot=row.slot,
            head_rows=[i + 1 for i in work.head_rows],
            agent_rows=[i + 1 for i in work.agent_rows],
            fallback_row=None if work.fallback_row is None else work.fallback_row + 1,
        )
        return None, merged, 1
