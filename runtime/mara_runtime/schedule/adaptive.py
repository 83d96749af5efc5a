"""The schedule with the least expected cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.base import PassContext, PassPlan
from mara_runtime.schedule.cost import WIDEST, Cost


class Adaptive:
    """The least expected cost, by the measured curve and the learned chances."""

    _CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
    _DRAFTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
    _CONTEXTS = 64  # tokens within which the cost is taken for the same

    def __init__(self, cost: Cost, acceptance: Acceptance | None = None) -> None:
        self._cost = cost
        self._acceptance = acceptance or Acceptance()
        self._head = cost.heads_ms().tolist()
        self._curves: dict[int, list[float]] = {}

    def plan(self, view: PassContext) -> PassPlan:
        """See `Schedule`."""
        body = self._rows_ms(view.length)
        plain = body[1] + self._head[1]  # what a confirmed token saves
        gains = [0.0]  # expected number of confirmed tokens, by how many are drafted
        reached = plain
        for chance in view.draft.chances:
            reached *= chance
            gains.append(gains[-1] + reached)
        drafts = [m for m in self._DRAFTS if m < len(gains)]
        count, start = len(view.probabilities), len(view.margins)
        if not count:
            return PassPlan(0, min(drafts, key=lambda m: body[1 + m] + self._head[1 + m] - gains[m]))

        if view.exhaustive:
            chances = [0.0] * count  # of ending the decision
        else:
            chances = self._acceptance.estimate(view.probabilities, view.margins, view.threshold)
        rest = self._rest(chances, start, body, view.rerun_fallback)
        best, plan = math.inf, PassPlan(count - start, 0)
        rejected, examined = 1.0, start
        for size in self._sizes(count - start):
            if body[min(size, WIDEST)] - gains[-1] >= best:  # more rows never cost less
                break
            while examined < start + size:
                rejected *= 1.0 - chances[examined]
                examined += 1
            last = examined == count
            width = size + int(last and start > 0 and view.rerun_fallback)
            follows = 0.0 if last else rejected * rest[start + size]
            for m in drafts if start == 0 else drafts[:1]:
                head = self._head[2 + m] if m else self._head[1] * (1.0 if last else 1.0 - rejected)
                cost = body[min(width + m, WIDEST)] + head + follows - chances[0] * gains[m]
                if cost < best:
                    best, plan = cost, PassPlan(size, m)
        return plan

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule`."""
        self._acceptance.update(probabilities, margins, threshold)

    def _rest(self, chances: list[float], start: int, body: list[float], rerun_fallback: bool) -> list[float]:
        """[i] least expected cost of the passes that settle a decision when its first i candidates were rejected."""
        count, head = len(chances), self._head[1]
        rest = [0.0] * (count + 1)
        for i in range(count - 1, start, -1):
            least = body[min(count - i + rerun_fallback, WIDEST)] + head
            rejected, size = 1.0, 0
            for chunk in self._CHUNKS:
                if i + chunk >= count or body[chunk] >= least:  # more rows never cost less
                    break
                while size < chunk:
                    rejected *= 1.0 - chances[i + size]
                    size += 1
                least = min(least, body[chunk] + head * (1.0 - rejected) + rejected * rest[i + chunk])
            rest[i] = least
        return rest

    def _sizes(self, most: int) -> list[int]:
        return [*(size for size in self._CHUNKS if size < most), most]

    def _rows_ms(self, length: int) -> list[float]:
        step = length // self._CONTEXTS
        if step not in self._curves:
            self._curves[step] = self._cost.rows_ms(step * self._CONTEXTS).tolist()
        return self._curves[step]
