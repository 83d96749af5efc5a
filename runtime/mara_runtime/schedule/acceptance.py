"""How likely a candidate is accepted, learned while decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Features = tuple[float, float, float, float]
"""Of a candidate: log-probability, gap to the candidate before, ten times its probability, whether there is one before.

Scaled so that weights of a few units separate candidates: acceptance may change within a few hundredths.
"""


class Acceptance:
    """Probability that a candidate is accepted: a logistic regression on cheap features, learned online.

    Each decision takes one Newton step, with a curvature that slowly decays: a few dozen decisions are enough, and it
    adapts when the kind of text changes.
    """

    _FEATURES = 6
    _LEAST, _MOST = 0.01, 0.99
    _MEMORY = 0.995
    _PRIOR = 0.1  # initial curvature: data outweigh it after a few decisions

    def __init__(self) -> None:
        self._weights = [1.0, *[0.0] * (self._FEATURES - 1)]  # most candidates are accepted in MARA's own evaluation
        self._curvature = [[self._PRIOR * (i == j) for j in range(self._FEATURES)] for i in range(self._FEATURES)]
        self._scale = 1.0  # of margins, a moving average
        self._probabilities: NDArray[np.float64] | None = None  # whose features are cached
        self._cached: list[_Features] = []

    def estimate(
        self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float = 0.0
    ) -> list[float]:
        """(n,) acceptance probabilities in the order of examination; margins: of the first candidates, if known."""
        seen = self._clipped((math.fsum(margins) / len(margins) - threshold) if margins else 0.0)
        chances = (self._chance(features, seen) for features in self._features(probabilities))
        return [min(max(chance, self._LEAST), self._MOST) for chance in chances]

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule.update`."""
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
        """Of each candidate, without its margin. Plain Python, which is faster than NumPy for so few numbers."""
        if probabilities is not self._probabilities:  # asked for by each plan of a decision and by its update
            self._cached, before = [], None
            for probability in probabilities.tolist():
                log = math.log(max(probability, 1e-9)) / 3
                first = before is None
                self._cached.append(
                    (log, 0.0 if before is None else log - before, 10 * probability, 0.0 if first else 1.0)
                )
                before = log
            self._probabilities = probabilities
        return self._cached

    def _clipped(self, margin: float) -> float:
        return min(max(margin / self._scale, -3.0), 3.0)

    def _chance(self, features: _Features, seen: float) -> float:
        log, gap, probability, later = features
        always, of_log, of_gap, of_probability, of_later, of_seen = self._weights
        score = always + of_log * log + of_gap * gap + of_probability * probability + of_later * later + of_seen * seen
        return 1 / (1 + math.exp(-min(max(score, -30.0), 30.0)))


def _solution(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix · x = right, for a symmetric positive definite matrix; neither argument is modified."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, above in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / above[i]
            for j in range(i, size + 1):
                row[j] -= factor * above[j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        row, rest = rows[i], rows[i][size]
        for j in range(i + 1, size):
            rest -= row[j] * solution[j]
        solution[i] = rest / row[i]
    return solution
