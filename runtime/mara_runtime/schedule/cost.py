"""What a pass costs on one machine, by its rows and its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a pass on one machine, measured."""

    contexts: tuple[int, ...]
    """tokens in the KV cache, ascending"""
    widths: tuple[int, ...]
    """rows, ascending from 1"""
    body_ms: tuple[tuple[float, ...], ...]
    """[context][width] without the LM head"""
    heads: tuple[int, ...]
    """rows through the LM head, ascending from 1"""
    head_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        axes = (self.contexts, self.widths, self.heads)
        sizes = [len(row) == len(self.widths) for row in self.body_ms]
        times = [*self.head_ms, *(ms for row in self.body_ms for ms in row)]
        if (
            not all(axes)
            or any(a >= b for axis in axes for a, b in pairwise(axis))
            or len(sizes) != len(self.contexts)
            or not all(sizes)
            or len(self.head_ms) != len(self.heads)
            or not all(0 <= ms < np.inf for ms in times)
        ):
            raise ValueError("a cost has a time for each width at each context, and for each number of heads")

    def rows_ms(self, context: int) -> NDArray[np.float64]:
        """(WIDEST + 1,) cost by number of rows at a context, interpolated; beyond the last context, as there."""
        curves = np.array([_interpolate(self.widths, row) for row in self.body_ms])
        return np.array([np.interp(context, self.contexts, column) for column in curves.T])

    @cached_property
    def curve(self) -> Callable[[int, int, int], list[float]]:
        """(context, rows, conversations) → cost by number of rows, beside those of others; see `beside`."""

        @lru_cache(maxsize=1024)
        def curve(context: int, rows: int, conversations: int) -> list[float]:
            alone: list[float] = self.rows_ms(context).tolist()
            return beside(alone, rows, conversations) if conversations else alone

        return curve

    def heads_ms(self) -> NDArray[np.float64]:
        """(WIDEST + 1,) cost by number of rows through the LM head."""
        return _interpolate(self.heads, self.head_ms)


WIDEST = 128
"""Widest pass that is priced; beyond the widest that was measured, the last slope continues."""


def beside(alone: Sequence[float], rows: int, conversations: int) -> list[float]:
    """What a pass costs by rows, beside so many of others: what its rows add, and its share of what no row adds.

    The second is where the curve's tangent at the others' rows meets the axis. alone: of 0 … WIDEST rows.
    """
    rows = min(rows, WIDEST // 2)
    before, slope = alone[rows], alone[-1] - alone[-2]
    share = max(0.0, before - rows * (alone[rows + 1] - before)) / (conversations + 1)
    longer = [*alone, *(alone[-1] + slope * (i + 1) for i in range(rows))]
    return [0.0, *(longer[rows + width] - before + share for width in range(1, len(alone)))]


def _interpolate(at: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """Values at 0 … WIDEST: 0 at 0, non-decreasing."""
    x, y = [0, *at], [0.0, *np.maximum.accumulate(values).tolist()]
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(at) > 1 else y[-1]
    index = np.arange(WIDEST + 1)
    interpolated: NDArray[np.float64] = np.interp(index, x, y) + np.maximum(index - x[-1], 0) * slope
    return interpolated
