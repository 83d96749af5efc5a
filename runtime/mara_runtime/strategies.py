"""Examination orders and selection strategies: from margins to the accepted candidate.

Names as in MARA's released code (IAAR-Shanghai/MARA); docs/internals/method.md lists where it and the paper differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def examination_order(order: str, count: int) -> list[int]:
    """LM ranks, from 0, in the order in which the agent examines them."""
    ranks = list(range(count))
    if order == "ranked":
        return ranks
    if order == "best_last":
        return [*ranks[1:], 0]
    if order == "reversed":
        return ranks[::-1]
    raise ValueError(order)


def choose(strategy: str, margins: Sequence[float], threshold: float, rng: np.random.Generator) -> int | None:
    """Index into `margins` (examination order) of the candidate to emit; None when all are rejected.

    A margin equal to the threshold rejects. `random` draws from `rng` once per decision with an accepted candidate.
    """
    accepted = [i for i, margin in enumerate(margins) if margin > threshold]
    if not accepted:
        return None
    if strategy == "top1":
        return accepted[0]
    if strategy == "max_prob":
        return max(accepted, key=lambda i: margins[i])
    if strategy == "random":
        return accepted[int(rng.integers(len(accepted)))]
    raise ValueError(strategy)
