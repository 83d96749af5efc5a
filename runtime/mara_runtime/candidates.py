"""Candidate selection: which tokens of a position compete, best first.

Source: MARA (arXiv 2505.19743) §3 and its released code; see docs/method.md for where the two disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidates:
    """The tokens that compete at one position, by LM rank."""

    ids: NDArray[np.int64]
    """(n,) token ids, best first"""
    probabilities: NDArray[np.float64]
    """(n,) LM probabilities, renormalised over the candidates"""

    def __len__(self) -> int:
        return len(self.ids)


def select(logits: NDArray[np.float32], top_k: int, top_p: float) -> Candidates:
    """Top-k, then top-p, of one row of logits.

    logits: (V,) without NaN; top_k ≥ 1, clipped to V; 0 ≤ top_p ≤ 1. Ranked by the logits themselves, equal
    logits by lower token id; exactly top_k survive the first filter. From the low end, every id whose ascending
    cumulative probability (over the top_k, in float64) is ≤ 1 - top_p is dropped; the best always stays.
    """
    k = min(top_k, len(logits))
    kth = np.partition(logits, len(logits) - k)[len(logits) - k]
    pool = np.flatnonzero(logits >= kth)  # more than k when the k-th value is tied
    ids = pool[np.lexsort((pool, -logits[pool]))][:k]
    weights = np.exp(logits[ids].astype(np.float64) - np.float64(logits[ids[0]]))
    weights /= weights.sum()
    kept = np.cumsum(weights[::-1])[::-1] > 1.0 - top_p
    kept[0] = True
    weights = weights[kept]
    return Candidates(ids[kept].astype(np.int64), weights / weights.sum())


def sample(candidates: Candidates, temperature: float, rng: np.random.Generator) -> int:
    """Draw an index in LM rank; the temperature comes after both filters, so it leaves the set as it is."""
    with np.errstate(divide="ignore", over="ignore"):  # towards 0 it becomes greedy: -inf has weight 0
        logs = np.log(candidates.probabilities)
        weights = np.exp((logs - logs[0]) / temperature)
    return int(rng.choice(len(candidates), p=weights / weights.sum()))
