"""Candidate selection: which tokens of a position compete, best first.

Source: MARA (arXiv 2505.19743) §3 and its released code; see docs/method.md for where the two disagree.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from operator import ge, neg, sub

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Candidates:
    """The tokens that compete at one position, by LM rank."""

    ids: NDArray[np.int64]
    """(n,) token ids, best first"""
    probabilities: NDArray[np.float64]
    """(n,) LM probabilities, renormalised over the candidates"""
    log_probabilities: NDArray[np.float64]
    """(n,) LM log-probabilities over the whole vocabulary"""
    gap: float
    """nats by which two logits, or the odds of a tail and of 1 - top_p, differ at least: closed, it is another list"""

    def __len__(self) -> int:
        return len(self.ids)


_ALONE = np.ones(1)


def select(
    ids: NDArray[np.int64], logits: NDArray[np.float32], log_normaliser: float, top_k: int, top_p: float
) -> Candidates:
    """Top-k, then top-p, of the best tokens of one position.

    ids, logits: (K,) the K ≥ top_k best tokens, or all, in any order; quickest in descending order.
    Ranked by the logits themselves, equal logits by lower token id; exactly top_k survive the first filter. From
    the low end, every id whose ascending cumulative probability (over the top_k, in float64) is ≤ 1 - top_p is dropped;
    the best always stays.
    """
    values, names = logits.tolist(), ids.tolist()
    if any(map(ge, values[1:], values)):  # an engine's row is in order, but for equal logits
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], names[i]))
        values, names = [values[i] for i in ranked], [names[i] for i in ranked]
    first = values[0]
    if top_k == 1:  # plain greedy decoding, every step
        gap = first - values[1] if len(values) > 1 else math.inf
        return Candidates(np.array(names[:1], np.int64), _ALONE, np.array([first - log_normaliser]), gap)
    weights = [math.exp(value - first) for value in values[:top_k]]
    total = math.fsum(weights)
    weights = [weight / total for weight in weights]
    tails = [*accumulate(reversed(weights))][::-1]  # descending
    dropped = 1.0 - top_p
    count = max(1, bisect_left(tails, -dropped, key=neg))
    edge = values[: count + 1]  # a swap matters inside the list and across its end
    gap = min(map(sub, edge, edge[1:]), default=math.inf)
    if top_p < 1.0:
        for tail in tails[max(count - 1, 1) : count + 1]:  # the last that stays, the first that is dropped
            gap = min(gap, abs(_log_odds(tail) - _log_odds(dropped)))
    kept = math.fsum(weights[:count])
    return Candidates(
        np.array(names[:count], np.int64),
        np.array([weight / kept for weight in weights[:count]]),
        np.array([value - log_normaliser for value in values[:count]]),
        gap,
    )


def _log_odds(probability: float) -> float:
    """Logits that err by δ each move this by at most 2 δ, as they move the difference of two."""
    if 0.0 < probability < 1.0:
        return math.log(probability / (1.0 - probability))
    return math.inf if probability > 0.5 else -math.inf


def sample(candidates: Candidates, temperature: float, rng: np.random.Generator) -> int:
    """Draw an index in LM rank; the temperature comes after both filters, so it leaves the set as it is."""
    with np.errstate(divide="ignore", over="ignore"):  # towards 0 it becomes greedy: -inf has weight 0
        logs = np.log(candidates.probabilities)
        weights = np.exp((logs - logs[0]) / temperature)
    return int(rng.choice(len(candidates), p=weights / weights.sum()))
