"""The sequential procedure of docs/internals/method.md, one candidate at a time, and what fixed schedules should cost.

Written from the specification, without the product's decode loop: what the loop's answers are compared with.
"""

import math
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.config import DecodeConfig
from tests.unit.helpers import Lookup, sum_agent


@dataclass
class Position:
    """One emitted token."""

    token: int
    ids: list[int]
    """its candidates, by LM rank"""
    rank: int
    """from 1"""
    margins: dict[int, float]
    """{LM rank: margin} of the examined ones, in the order of examination"""
    forced: bool


@dataclass
class Sequential:
    """An answer, and the algorithm's counters after each of its tokens."""

    positions: list[Position] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """Emitted ids."""
        return [position.token for position in self.positions]


@dataclass
class Work:
    """What an answer costs after the prompt."""

    passes: int = 0
    rows: int = 0
    shown: int = 0
    """rows shown to the agent"""
    headed: int = 0
    """rows through the LM head"""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.passes + other.passes,
            self.rows + other.rows,
            self.shown + other.shown,
            self.headed + other.headed,
        )


def candidates_of(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """method.md §1.2."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = [math.exp(logits[i] - logits[ranked[0]]) for i in ranked]
    kept = list(ranked)
    cumulative = 0.0
    while len(kept) > 1:
        cumulative += weights[len(kept) - 1] / sum(weights)
        if cumulative > 1.0 - top_p:
            break
        kept.pop()
    return kept


def order_of(config: DecodeConfig, count: int) -> list[int]:
    """Ranks from 0 in the order of examination."""
    order = list(range(count))
    if config.order == "best_last":
        return order[1:] + order[:1]
    return order[::-1] if config.order == "reversed" else order


def fallback_of(fallback: str, count: int) -> int:
    """Rank from 0 of what is emitted when all are rejected."""
    return {"first": 0, "last": count - 1}[fallback]


def sequential(
    table: Lookup,
    prompt: list[int],
    config: DecodeConfig,
    fallback: str,
    eos: Set[int],
    limit: int,
    agent: Callable[[NDArray[np.float32]], NDArray[np.float32]] = sum_agent,
) -> Sequential:
    """The answer to a prompt: aligned, plain greedy or plain sampled."""
    out = Sequential()
    rng = np.random.default_rng(config.seed)
    sequence = list(prompt)
    decisions = examined = forced_ones = 0
    accepted_rank: Counter[str] = Counter()
    candidate_counts: Counter[str] = Counter()
    distances: list[float] = []
    while True:
        logits = [float(x) for x in table(tuple(sequence))[0]]
        greedy = not (config.align or config.sample)
        ids = candidates_of(logits, 1 if greedy else config.top_k, config.top_p)
        margins: dict[int, float] = {}  # by rank from 0, in the order of examination
        accepted: list[int] = []
        rank = 0
        if config.align:
            candidate_counts[str(len(ids))] += 1
            if len(ids) > 1:
                decisions += 1
                for candidate in order_of(config, len(ids)):
                    hidden = table((*sequence, ids[candidate]))[1]
                    margins[candidate] = float(agent(hidden[None])[0])
                    if margins[candidate] > config.threshold:
                        accepted.append(candidate)
                        if config.strategy == "top1":
                            break
                examined += len(margins)
                distances += [abs(margin - config.threshold) for margin in margins.values()]
                if not accepted:
                    forced_ones += 1
                    rank = fallback_of(fallback, len(ids))
                elif config.strategy == "top1":
                    rank = accepted[0]
                elif config.strategy == "max_prob":
                    rank = accepted[0]
                    for candidate in accepted[1:]:
                        if margins[candidate] > margins[rank]:
                            rank = candidate
                else:
                    rank = accepted[int(rng.integers(len(accepted)))]
                if accepted:
                    accepted_rank[str(rank + 1)] += 1
        elif config.sample:
            weights = [math.exp((logits[i] - logits[ids[0]]) / config.temperature) for i in ids]
            rank = int(rng.choice(len(ids), p=[weight / sum(weights) for weight in weights]))
        token = ids[rank]
        sequence.append(token)
        seen = {candidate + 1: margin for candidate, margin in margins.items()}
        out.positions.append(Position(token, ids, rank + 1, seen, bool(margins) and not accepted))
        out.counts.append(
            {
                "tokens": len(out.positions),
                "decisions": decisions,
                "examined": examined,
                "forced": forced_ones,
                "accepted_rank": dict(accepted_rank),
                "candidate_counts": dict(candidate_counts),
                "smallest_margin": min(distances, default=None),
            }
        )
        if token in eos or len(out.positions) == limit:
            return out


def work_of(answer: Sequential, config: DecodeConfig, fallback: str, width: int | None) -> Work:
    """What the answer costs when every pass holds `width` candidates (None: all) and nothing is drafted.

    A pass with the last candidates carries the fallback's row once more, if it might be wanted and ran in an earlier
    pass; with `random` the chosen one always runs again. The LM head sees the row whose next tokens go on, alone.
    """
    total = Work()
    for index, position in enumerate(answer.positions):
        follows = index < len(answer.positions) - 1
        if not position.margins:
            total += Work(1, 1, 0, 1) if follows else Work()
            continue
        count = len(position.ids)
        order = order_of(config, count)
        done, accepted = 0, False
        while done < count and not (accepted and config.strategy == "top1"):
            chunk = order[done : done + (width or count)]
            done += len(chunk)
            here = any(position.margins.get(rank + 1, -math.inf) > config.threshold for rank in chunk)
            wanted = done == count and not accepted and config.strategy != "random"
            rows = len(chunk) + int(wanted and fallback_of(fallback, count) not in chunk)
            total += Work(1, rows, len(chunk), int(config.strategy != "random" and (here or wanted)))
            accepted = accepted or here
        if config.strategy == "random" and follows:
            total += Work(1, 1, 0, 1)
    return total
