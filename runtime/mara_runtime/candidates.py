"""Candidate selection: which tokens of a position compete, best first.

Source: MARA (arXiv 2505.19743) §3 and its released code; docs/internals/method.md lists where the two differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import ge, sub

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
    """nats: the smallest change that alters the list, between two neighbouring logits or at the top-p boundary"""

    def __len__(self) -> int:
        return len(self.ids)


_ALONE = np.ones(1)


def select(
    ids: NDArray[np.int64], logits: NDArray[np.float32], log_normaliser: float, top_k: int, top_p: float
) -> Candidates:
    """Top-k, then top-p, of the best tokens of one position.

    ids, logits: (K,) the K ≥ top_k best tokens, or all, in any order; fastest in descending order.
    Ranked by the logits themselves, equal logits by lower token id; exactly top_k survive the first filter. From
    the low end, every id whose ascending cumulative probability (over the top_k, in float64) is ≤ 1 - top_p is dropped;
    the best always stays.
    """
    values = logits.tolist()
    if any(map(ge, values[1:], values)):  # engines return them in order, except for equal logits
        tokens = ids.tolist()
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], tokens[i]))
        values, ids = [values[i] for i in ranked], ids[ranked]
    first = values[0]
    if top_k == 1:  # plain greedy decoding, every step
        gap = first - values[1] if len(values) > 1 else math.inf
        return Candidates(ids[:1].copy(), _ALONE, np.array([first - log_normaliser]), gap)
    exp = math.exp
    weights = [exp(value - first) for value in values[:top_k]]
    total, dropped = math.fsum(weights), 1.0 - top_p
    count = len(weights)
    below, tail = 0.0, weights[-1] / total  # probability of the dropped ones, without and with the next
    while tail <= dropped and count > 1:
        count -= 1
        below, tail = tail, tail + weights[count - 1] / total
    edge = values[: count + 1]  # a swap matters within the list and across its end
    gap = min(map(sub, edge, edge[1:]), default=math.inf)
    if top_p < 1.0:
        odds = _log_odds(dropped)
        if count > 1:
            gap = min(gap, abs(_log_odds(tail) - odds))
        if count < len(weights):
            gap = min(gap, abs(_log_odds(below) - odds))
    kept = [weight / total for weight in weights[:count]]
    total = math.fsum(kept)
    return Candidates(
        ids[:count].copy(),
        np.array([weight / total for weight in kept]),
        np.array([value - log_normaliser for value in edge[:count]]),
        gap,
    )


def _log_odds(probability: float) -> float:
    """If each logit is off by at most δ, this is off by at most 2 δ, as is the difference of two logits."""
    if 0.0 < probability < 1.0:
        return math.log(probability / (1.0 - probability))
    return math.inf if probability > 0.5 else -math.inf


def sample(candidates: Candidates, temperature: float, rng: np.random.Generator) -> int:
    """Draw an LM rank, from 0; the temperature comes after both filters and does not change the set."""
    with np.errstate(divide="ignore", over="ignore"):  # as it approaches 0, sampling becomes greedy: -inf has weight 0
        logs = np.log(candidates.probabilities)
        weights = np.exp((logs - logs[0]) / temperature)
    return int(rng.choice(len(candidates), p=weights / weights.sum()))
