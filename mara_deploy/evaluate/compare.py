"""Preference rates and their confidence intervals.

The preference rate is MARA's metric (arXiv 2505.19743): (wins - losses) / (wins + ties + losses) over unique prompts.
Intervals are percentile bootstraps over units (Efron and Tibshirani, An Introduction to the Bootstrap, 1993): single
prompts, or groups of related prompts, which are resampled as a whole because their outcomes are correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Interval = tuple[float, float]

_DRAWS_PER_BLOCK = 1 << 21
"""Unit indices drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the percentile bootstrap."""

    resamples: int = 10_000
    """≥ 1"""
    level: float = 0.95
    """confidence level, in (0, 1)"""
    seed: int = 0
    """≥ 0"""

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0.0 < self.level < 1.0 or self.seed < 0:
            raise ValueError(f"{self}: resamples ≥ 1, 0 < level < 1, seed ≥ 0")

    def interval(self, values: F64, units: NDArray[np.int64]) -> Interval | None:
        """Interval of the mean of `values` (N,). units: (N,) unit of each value, 0 … U-1. None for a single unit."""
        sums, sizes = np.bincount(units, values), np.bincount(units)
        if len(sums) < 2:
            return None
        rng = np.random.default_rng(self.seed)
        means: list[F64] = []
        block = max(1, _DRAWS_PER_BLOCK // len(sums))
        for start in range(0, self.resamples, block):
            drawn = rng.integers(len(sums), size=(min(block, self.resamples - start), len(sums)))
            means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
        tail = (1.0 - self.level) / 2
        low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class Preference:
    """Aligned answers against a baseline's by one score."""

    wins: int
    ties: int
    """prompts whose two scores are exactly equal"""
    losses: int
    rate: float
    """(wins - losses) / (wins + ties + losses); -1 … 1"""
    units: int
    """prompts, or groups of prompts, that are resampled; ≥ 1"""
    interval: Interval | None
    """of the rate; None for a single unit"""
    mean: float
    """mean score of the aligned answers"""
    baseline_mean: float
    """mean score of the baseline's answers"""
    difference_interval: Interval | None
    """of mean - baseline_mean"""


def preference(
    ours: Sequence[float], theirs: Sequence[float], units: NDArray[np.int64], bootstrap: Bootstrap, sign: float = 1.0
) -> Preference:
    """Compare the scores (N,) of two answers to each of N ≥ 1 prompts.

    units: (N,) unit of each prompt, numbered from 0 without gaps; sign: negative where a lower score is better.
    """
    if not len(ours) == len(theirs) == len(units) or not len(ours):
        raise ValueError(f"{len(ours)}, {len(theirs)} scores and {len(units)} units; expected equal numbers, ≥ 1")
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    outcome = np.sign(sign) * np.sign(a - b)
    return Preference(
        wins=int((outcome > 0).sum()),
        ties=int((outcome == 0).sum()),
        losses=int((outcome < 0).sum()),
        rate=float(outcome.mean()),
        units=int(units.max()) + 1,
        interval=bootstrap.interval(outcome, units),
        mean=float(a.mean()),
        baseline_mean=float(b.mean()),
        difference_interval=bootstrap.interval(a - b, units),
    )


def unit_numbers(groups: Sequence[str | None]) -> NDArray[np.int64]:
    """(N,) number of each group, in order of first appearance; every None is a unit by itself."""
    numbers: dict[object, int] = {}
    keys = [(i,) if group is None else group for i, group in enumerate(groups)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
