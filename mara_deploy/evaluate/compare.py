"""Preference rates and their confidence intervals.

The preference rate is MARA's measure (arXiv 2505.19743): (wins - losses) / (wins + ties + losses) over unique prompts.
Intervals are percentile bootstraps over units: single prompts, or groups of related ones, which are drawn whole because
answers to related prompts win and lose together (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Interval = tuple[float, float]

_DRAWS_AT_A_TIME = 1 << 21


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made."""

    resamples: int = 10_000
    """draws of all units with replacement; ≥ 1"""
    level: float = 0.95
    """share of the resampled means that lie in the interval; 0 … 1, both excluded"""
    seed: int = 0
    """of the draws; ≥ 0"""

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0.0 < self.level < 1.0 or self.seed < 0:
            raise ValueError(f"{self}: resamples ≥ 1, 0 < level < 1, seed ≥ 0")

    def interval(self, values: F64, units: NDArray[np.int64]) -> Interval | None:
        """Interval of the mean of `values` (N,), which belong to `units` (N,), 0 … U-1. None if there is one unit."""
        sums, sizes = np.bincount(units, values), np.bincount(units)
        if len(sums) < 2:
            return None
        rng = np.random.default_rng(self.seed)
        means: list[F64] = []
        at_a_time = max(1, _DRAWS_AT_A_TIME // len(sums))
        for start in range(0, self.resamples, at_a_time):
            drawn = rng.integers(len(sums), size=(min(at_a_time, self.resamples - start), len(sums)))
            means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
        tail = (1.0 - self.level) / 2
        low, high = np.quantile(np.concatenate(means), [tail, 1.0 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class Preference:
    """Aligned answers against a baseline's, under one score."""

    wins: int
    ties: int
    """prompts whose two scores are equal, to the last bit"""
    losses: int
    rate: float
    """(wins - losses) / (wins + ties + losses); -1 … 1"""
    units: int
    """prompts, or groups of them, that the intervals are over; ≥ 1"""
    interval: Interval | None
    """of the rate; None: a single unit says nothing about the spread"""
    mean: float
    """of the aligned answers' scores"""
    baseline_mean: float
    difference_interval: Interval | None
    """of mean - baseline_mean"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def preference(
    ours: Sequence[float], theirs: Sequence[float], units: NDArray[np.int64], bootstrap: Bootstrap, sign: float = 1.0
) -> Preference:
    """Compare the scores (N,) of two answers to each of N ≥ 1 prompts.

    units: (N,) unit of each prompt, numbered from 0 without gaps; sign: -1 where a lower score is better, as of a cost.
    """
    if not len(ours) == len(theirs) == len(units) or not len(ours):
        raise ValueError(f"{len(ours)}, {len(theirs)} scores and {len(units)} units; all must be equal, and not 0")
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


def number_units(names: Sequence[str | None]) -> NDArray[np.int64]:
    """Units by name, numbered in the order of appearance; each without a name is a unit of its own."""
    numbers: dict[object, int] = {}
    keys = [(i,) if name is None else name for i, name in enumerate(names)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
