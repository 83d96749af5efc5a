"""The schedule with the least expected cost: measured times of passes, learned probabilities of acceptance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.base import PassContext, PassPlan
from mara_runtime.schedule.cost import WIDEST, Cost


class Adaptive:
    """See `Schedule`."""

    _CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
    _DRAFTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
    _CONTEXT_STEP = 64  # tokens within which the cost counts as constant

    def __init__(self, cost: Cost, acceptance: Acceptance | None = None) -> None:
        self._cost = cost
        self._acceptance = acceptance or Acceptance()
        self._head = cost.heads_ms().tolist()

    def plan(self, context: PassContext) -> PassPlan:
        """See `Schedule`."""
        step = context.length // self._CONTEXT_STEP * self._CONTEXT_STEP
        body = self._cost.curve(step, context.company.rows, context.company.conversations)
        plain = body[1] + self._head[1]  # saved by a confirmed token
        gains = [0.0]  # expected savings, by number of drafted tokens
        reached = plain
        for chance in context.draft.chances:
            reached *= chance
            gains.append(gains[-1] + reached)
        drafts = [m for m in self._DRAFTS if m < len(gains)]
        count, start = len(context.probabilities), len(context.margins)
        if not count:
            return PassPlan(0, min(drafts, key=lambda m: body[1 + m] + self._head[1 + m] - gains[m]))

        if context.exhaustive:
            chances = [0.0] * count  # that a candidate ends the decision
        else:
            chances = self._acceptance.estimate(context.probabilities, context.margins, context.threshold)
        rest = self._rest(chances, start, body, context.rerun_fallback)
        best, plan = math.inf, PassPlan(count - start, 0)
        rejected, examined = 1.0, start
        for size in self._sizes(count - start):
            if body[min(size, WIDEST)] - gains[-1] >= best:  # more rows never cost less
                break
            while examined < start + size:
                rejected *= 1.0 - chances[examined]
                examined += 1
            last = examined == count
            width = size + int(last and start > 0 and context.rerun_fallback)
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
        """[i] least expected cost of the passes that end a decision whose first i candidates were rejected."""
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
