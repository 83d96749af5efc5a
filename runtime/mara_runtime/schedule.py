"""How much to put into the next pass: candidates of this position, and a drafted continuation under the first of them.

A decision depends on prefix and candidate alone, so any schedule gives the sequential algorithm's answer
(docs/method.md); what it decides is the cost. `Adaptive` weighs what a row costs on this machine (`Cost`, measured)
against the chance that it is needed (`Acceptance` and the draft's own chances, learned while running).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.drafts import NO_DRAFT, Draft


@dataclass(frozen=True)
class View:
    """What is known when a pass is planned."""

    length: int
    """tokens in the KV cache"""
    probabilities: NDArray[np.float64]
    """of the position's candidates in the order of examination; empty when its token is settled and only has to run"""
    margins: tuple[float, ...] = ()
    """of the candidates examined so far, all rejected or all to be compared"""
    threshold: float = 0.0
    """that a margin must exceed"""
    exhaustive: bool = False
    """every candidate is examined, whatever the agent says"""
    refeed: bool = False
    """after more than one pass, the last carries the fallback's row once more"""
    draft: Draft = NO_DRAFT
    """a guess of what follows the settled token, or the first candidate"""


@dataclass(frozen=True)
class Plan:
    """What the pass holds."""

    candidates: int
    """how many of those not yet examined, at least 1 (0 where there is nothing to decide)"""
    drafted: int
    """how many tokens of the draft"""


class Schedule(Protocol):
    """Plans passes; its choices change what an answer costs, never the answer."""

    def plan(self, view: View) -> Plan:
        """What to put into the next pass."""

    def learn(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """A decision is made: the candidates' probabilities in the order of examination, the margins that were seen."""


@dataclass(frozen=True)
class Fixed:
    """The same width for every pass."""

    width: int | None
    """candidates of a pass; None: all"""
    drafted: int = 0

    def plan(self, view: View) -> Plan:
        """See `Schedule`."""
        left = len(view.probabilities) - len(view.margins)
        return Plan(left if self.width is None else min(self.width, left), min(self.drafted, len(view.draft.tokens)))

    def learn(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule`."""


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
        """(0 … widest) cost of so many rows at a context, interpolated; beyond the last context, as there."""
        curves = np.array([_interpolated(self.widths, row) for row in self.body_ms])
        return np.array([np.interp(context, self.contexts, column) for column in curves.T])

    def heads_ms(self) -> NDArray[np.float64]:
        """(0 … most) cost of so many rows through the head."""
        return _interpolated(self.heads, self.head_ms)


WIDEST = 128
"""Rows of a pass that are planned for; beyond the widest that was measured the last slope goes on."""


def _interpolated(at: Sequence[int], values: Sequence[float]) -> NDArray[np.float64]:
    """values at 0 … WIDEST, 0 at 0, never falling."""
    x, y = [0, *at], [0.0, *np.maximum.accumulate(values).tolist()]
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(at) > 1 else y[-1]
    index = np.arange(WIDEST + 1)
    values_there: NDArray[np.float64] = np.interp(index, x, y) + np.maximum(index - x[-1], 0) * slope
    return values_there


_Features = tuple[float, float, float, float]
"""Of a candidate: its log-probability, the gap to the one before, ten times its probability, is there one before?

Scaled so that a weight of a few units can tell candidates apart: acceptance may turn within a few hundredths.
"""


class Acceptance:
    """How likely the agent accepts a candidate: a logistic regression on what is cheap to see, learned on the way.

    Each decision takes one Newton step, with a curvature that slowly forgets: a few dozen decisions are enough, and
    another kind of text is learned anew.
    """

    _FEATURES = 6
    _LEAST, _MOST = 0.01, 0.99
    _MEMORY = 0.995
    _PRIOR = 0.1  # curvature that the weights begin with: what was learned weighs more after a few decisions

    def __init__(self) -> None:
        self._weights = [1.0, *[0.0] * (self._FEATURES - 1)]  # most candidates are accepted, says MARA's own evaluation
        self._curvature = [[self._PRIOR * (i == j) for j in range(self._FEATURES)] for i in range(self._FEATURES)]
        self._scale = 1.0  # of margins, fading
        self._of: NDArray[np.float64] | None = None  # whose features are kept
        self._kept: list[_Features] = []

    def estimate(
        self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float = 0.0
    ) -> list[float]:
        """(n,) chances of the candidates in the order of examination; margins: of the first of them, seen already."""
        seen = self._clipped((math.fsum(margins) / len(margins) - threshold) if margins else 0.0)
        found = (self._chance(features, seen) for features in self._features(probabilities))
        return [min(max(chance, self._LEAST), self._MOST) for chance in found]

    def learn(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule.learn`."""
        values = [margin - threshold for margin in margins]
        curvature = [[self._MEMORY * entry for entry in row] for row in self._curvature]
        for i in range(self._FEATURES):
            curvature[i][i] += self._PRIOR * (1 - self._MEMORY)
        slope, total = [0.0] * self._FEATURES, 0.0
        for i, (value, features) in enumerate(zip(values, self._features(probabilities), strict=False)):
            seen = self._clipped(total / i if i else 0.0)
            chance = self._chance(features, seen)
            inputs = (1.0, *features, seen)
            error, bend = (value > 0) - chance, chance * (1 - chance)
            for row, x in enumerate(inputs):
                slope[row] += error * x
                bent, of_row = bend * x, curvature[row]
                for column, y in enumerate(inputs):
                    of_row[column] += bent * y
            total += value
        self._curvature = curvature
        step = _solution(curvature, slope)
        self._weights = [weight + change for weight, change in zip(self._weights, step, strict=True)]
        self._scale += 0.05 * (math.fsum(map(abs, values)) / len(values) + 1e-9 - self._scale)

    def _features(self, probabilities: NDArray[np.float64]) -> list[_Features]:
        """Of each candidate, without the margins just seen. In plain Python, which is quicker for so few numbers."""
        if probabilities is not self._of:  # the plan's are asked for again by the next plan and the lesson
            self._kept, before = [], None
            for probability in probabilities.tolist():
                log = math.log(max(probability, 1e-9)) / 3
                first = before is None
                self._kept.append(
                    (log, 0.0 if before is None else log - before, 10 * probability, 0.0 if first else 1.0)
                )
                before = log
            self._of = probabilities
        return self._kept

    def _clipped(self, margin: float) -> float:
        return min(max(margin / self._scale, -3.0), 3.0)

    def _chance(self, features: _Features, seen: float) -> float:
        log, gap, probability, later = features
        always, of_log, of_gap, of_probability, of_later, of_seen = self._weights
        score = always + of_log * log + of_gap * gap + of_probability * probability + of_later * later + of_seen * seen
        return 1 / (1 + math.exp(-min(max(score, -30.0), 30.0)))


def _solution(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix · x = right, for a matrix that is symmetric and positive definite; left as they are, both."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, above in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / above[i]
            for j in range(i, size + 1):
                row[j] -= factor * above[j]
    found = [0.0] * size
    for i in reversed(range(size)):
        row, rest = rows[i], rows[i][size]
        for j in range(i + 1, size):
            rest -= row[j] * found[j]
        found[i] = rest / row[i]
    return found


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

    def plan(self, view: View) -> Plan:
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
            return Plan(0, min(drafts, key=lambda m: body[1 + m] + self._head[1 + m] - gains[m]))

        if view.exhaustive:
            chances = [0.0] * count  # of ending the decision
        else:
            chances = self._acceptance.estimate(view.probabilities, view.margins, view.threshold)
        rest = self._rest(chances, start, body, view.refeed)
        best, plan = math.inf, Plan(count - start, 0)
        rejected, examined = 1.0, start
        for size in self._sizes(count - start):
            if body[min(size, WIDEST)] - gains[-1] >= best:  # more rows never cost less
                break
            while examined < start + size:
                rejected *= 1.0 - chances[examined]
                examined += 1
            last = examined == count
            width = size + int(last and start > 0 and view.refeed)
            follows = 0.0 if last else rejected * rest[start + size]
            for m in drafts if start == 0 else drafts[:1]:
                head = self._head[2 + m] if m else self._head[1] * (1.0 if last else 1.0 - rejected)
                cost = body[min(width + m, WIDEST)] + head + follows - chances[0] * gains[m]
                if cost < best:
                    best, plan = cost, Plan(size, m)
        return plan

    def learn(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule`."""
        self._acceptance.learn(probabilities, margins, threshold)

    def _rest(self, chances: list[float], start: int, body: list[float], refeed: bool) -> list[float]:
        """[i] least expected cost of the passes that settle a decision when its first i candidates were rejected."""
        count, head = len(chances), self._head[1]
        rest = [0.0] * (count + 1)
        for i in range(count - 1, start, -1):
            least = body[min(count - i + refeed, WIDEST)] + head
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
