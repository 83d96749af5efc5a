"""Moving a KV entry on a device: recompute it as the first row of the next pass.

An accepted candidate's entry lies in a slot behind the sequence and belongs into the sequence's next slot. Copying it
takes one call per layer; recomputing it takes one more row in a pass that runs anyway, and gives the same entry, as
the slots below its position have not changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mara_runtime.engines.base import Pass, StepOutput


@dataclass(frozen=True)
class Merged:
    """What runs for a pass."""

    first: Pass | None
    """to be run before"""
    work: Pass
    in_front: int
    """rows of it that recompute an entry"""

    def read(self, out: StepOutput) -> StepOutput:
        """The outputs of `work` as those of the pass that it was made of."""
        return replace(out, rows=out.rows - self.in_front) if self.in_front else out


class Recompute:
    """The entry of one place that has to be recomputed, if any. At most one: a pass runs between two commits."""

    def __init__(self) -> None:
        self._pending: Pass | None = None

    def schedule(self, token: int, position: int) -> None:
        """The entry of `token` belongs into the slot of its position."""
        self._pending = Pass([token], [position], position)

    def cancel(self) -> None:
        """The entry is recomputed, or no longer needed."""
        self._pending = None

    def take_over(self, other: Recompute, count: int) -> None:
        """The first `count` entries are copies of another place's, with what those still lack."""
        row = other._pending
        self._pending = row if row is not None and row.slot < count else None

    def merged(self, work: Pass, *, merge: bool = True) -> Merged:
        """The pass with the entry that it needs; `cancel` when it has run. A pass that fails leaves the entry pending.

        merge: where the pending row's slot is the one before `work`, a single pass runs both.
        """
        row = self._pending
        if row is None or work.slot <= row.slot:  # overwritten: the sequence ends before it
            return Merged(None, work, 0)
        if not merge or row.slot + 1 != work.slot:
            return Merged(row, work, 0)
        both = replace(
            work,
            tokens=[*row.tokens, *work.tokens],
            positions=[*row.positions, *work.positions],
            slot=row.slot,
            head_rows=[i + 1 for i in work.head_rows],
            agent_rows=[i + 1 for i in work.agent_rows],
            hidden_rows=[i + 1 for i in work.hidden_rows],
            fallback_row=None if work.fallback_row is None else work.fallback_row + 1,
        )
        return Merged(None, both, 1)
