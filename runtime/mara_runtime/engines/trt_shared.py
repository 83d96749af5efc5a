"""Passes of several conversations in one pass of a TensorRT engine: which fit together, and how they are laid out.

A pass covers neighbouring places. A place among them that asks for nothing gets an idle row of its own, behind all
that it holds, so that nothing that is not finite there reaches another conversation. Sizes are rounded up, or each
pass would have a shape, and so a CUDA graph, of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mara_runtime.engines.base import Pass
from mara_runtime.engines.io_block import Sizes


@dataclass(frozen=True)
class Bounds:
    """What the optimisation profile of shared passes allows."""

    places: int
    """most neighbouring places, B"""
    width: int
    """most rows of a place, M"""
    rows: int
    """most rows of all places, S, and most judged ones, N"""
    heads: int
    """most rows through the LM head, H0"""
    slots: int
    """of a place, C at its largest"""


@dataclass(frozen=True)
class Layout:
    """One pass of the engine."""

    low: int
    """first place"""
    passes: list[Pass]
    """of the places from `low` on; those that ask for nothing have an idle row, others may have some at their end"""
    sizes: Sizes
    asking: Collection[int]
    """places whose outputs are wanted"""

    @property
    def high(self) -> int:
        """Behind the last place."""
        return self.low + len(self.passes)

    @property
    def slots(self) -> int:
        """Slots of a place that the pass writes to at most: M from the first slot of each on."""
        return max(work.slot for work in self.passes) + self.sizes.width


@dataclass(frozen=True)
class Table:
    """Lays passes out."""

    bounds: Bounds
    ends: Sequence[int]
    """of each place, the slot of an idle row"""
    like: Sizes
    """of which agents and their widths are taken"""

    def layouts(self, works: Mapping[int, Pass]) -> list[Layout]:
        """As few passes as the bounds allow, each place in one of them."""
        done: list[Layout] = []
        now: Layout | None = None
        for place, work in works.items():
            one = self.alone(place, work)
            if len(work.tokens) > self.bounds.width or work.logits or len(work.hidden_rows):
                done.append(one)
                continue
            joined = now and self._together({each: works[each] for each in (*now.asking, place)})
            if now is not None and joined is None:
                done.append(now)
            now = joined or one
        return done if now is None else [*done, now]

    def alone(self, place: int, work: Pass) -> Layout:
        """The pass of one conversation."""
        rows, heads, asked = len(work.tokens), len(work.head_rows), len(work.agent_rows)
        shown = len(work.hidden_rows)
        sizes = self.like._replace(
            conversations=1, width=rows, rows=rows, heads=max(heads, 1), asked=max(asked, 1), shown=max(shown, 1)
        )
        return Layout(place, [work], sizes, [place])

    def _together(self, works: Mapping[int, Pass]) -> Layout | None:
        """The passes of several places in one, or None where they do not fit."""
        bounds, low = self.bounds, min(works)
        passes = [works[i] if i in works else Pass([0], [0], self.ends[i]) for i in range(low, max(works) + 1)]
        rows, heads, asked = (
            sum(len(getattr(work, name)) for work in passes) for name in ("tokens", "head_rows", "agent_rows")
        )
        if len(passes) > bounds.places or max(rows, asked) > bounds.rows:
            return None
        width = min(rounded(max(len(work.tokens) for work in passes)), bounds.width)
        more = min(rounded(rows), len(passes) * width, bounds.rows) - rows
        rows += more
        for i in reversed(range(len(passes))):
            idle = min(width - len(passes[i].tokens), more)
            more -= idle
            passes[i] = _with_idle_rows(passes[i], idle) if idle else passes[i]
        sizes = self.like._replace(
            conversations=len(passes),
            width=width,
            rows=rows,
            heads=min(rounded(max(heads, 1)), bounds.heads),
            asked=min(rounded(max(asked, 1)), bounds.rows),
            shown=1,
        )
        layout = Layout(low, passes, sizes, list(works))
        return layout if layout.slots <= bounds.slots else None


def _with_idle_rows(work: Pass, count: int) -> Pass:
    """Rows behind all others, which see themselves alone."""
    zeros = [0] * count
    return replace(work, tokens=[*work.tokens, *zeros], positions=[*work.positions, *zeros])


def rounded(count: int) -> int:
    """The next power of two up to 8, then the next multiple of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8
