"""The sequential accept/reject procedure of docs/internals/method.md §1, one candidate at a time.

Written from the specification, without the product's code: every schedule, draft and engine is compared with it. The
language model and the agent are `Node`s: a table in the unit tests, Hugging Face eager in tests/oracle.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

STRATEGIES = ("top1", "max_prob", "random")
ORDERS = ("ranked", "best_last", "reversed")
FALLBACKS = ("first", "last")

Self = TypeVar("Self", bound="Node")


class Node(Protocol):
    """A prefix that the model has run."""

    @property
    def logits(self) -> Sequence[float]:
        """(V,) of the next token."""

    @property
    def margin(self) -> float:
        """The agent's margin of the prefix's last token. Raises ValueError, naming what is not finite."""

    def then(self: Self, token: int) -> Self:
        """The prefix and one token more; this node stays as it is."""


@dataclass
class Candidates:
    """The candidate list of one position, and the distance to another list."""

    ids: list[int]
    """best first"""
    logit_gap: float
    """smallest difference of neighbours in rank, among the candidates and to the next token after them (nats)"""
    nucleus_gap: float
    """smallest distance of an ascending cumulative probability from 1 - top_p"""


def candidates(logits: Sequence[float], top_k: int, top_p: float) -> Candidates:
    """§1.2. Raises ValueError where the logits give no probabilities."""
    if any(map(math.isnan, logits)) or not math.isfinite(max(logits)):
        raise ValueError("non-finite logits")
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    best = logits[ranked[0]]
    weights = [math.exp(logits[i] - best) for i in ranked[:top_k]]
    total = math.fsum(weights)
    tails, cumulative = [], 0.0  # ascending cumulative probabilities, by rank from the last
    for weight in reversed(weights):
        cumulative += weight / total
        tails.append(cumulative)
    count = max(1, sum(tail > 1.0 - top_p for tail in tails))
    # A swap matters inside the list and across its end. Above rank top_k, top-p drops both in either order.
    edge = [logits[i] for i in ranked[: count + 1]]
    logit_gap = min((a - b for a, b in pairwise(edge)), default=math.inf)
    if top_p < 1.0:
        nucleus_gap = min((abs(tail - (1.0 - top_p)) for tail in tails[:-1]), default=math.inf)
    else:  # the limit is 0: only an underflowing probability reaches it
        possible = [w / total for i, w in zip(ranked, weights, strict=False) if logits[i] > -math.inf]
        nucleus_gap = 0.0 if min(possible) < 1e-30 else math.inf
    return Candidates(ranked[:count], logit_gap, nucleus_gap)


@dataclass
class Position:
    """One emitted token."""

    position: int
    """in the sequence, prompt included, from 0"""
    candidates: list[int]
    """by LM rank"""
    token: int
    rank: int
    """from 1"""
    margins: dict[int, float]
    """{LM rank: margin} of the examined candidates, in the order of examination"""
    forced: bool
    gaps: dict[str, float]
    """{what: the smallest change of a number that could change the outcome here}"""


@dataclass
class Answer:
    """What the procedure emits, and its counters after each token."""

    positions: list[Position] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    """in the form of `Stats.algorithm`"""

    @property
    def tokens(self) -> list[int]:
        """Emitted token ids."""
        return [position.token for position in self.positions]


@dataclass(frozen=True)
class Options:
    """How to decode; a `DecodeConfig` has these fields, too."""

    top_k: int = 40
    top_p: float = 0.95
    strategy: str = "top1"
    order: str = "ranked"
    threshold: float = 0.0
    seed: int = 0
    align: bool = True
    sample: bool = False
    temperature: float = 1.0


def examination_order(order: str, count: int) -> list[int]:
    """Ranks from 0, in the order in which the agent sees them."""
    ranks = list(range(count))
    return {"ranked": ranks, "best_last": ranks[1:] + ranks[:1], "reversed": ranks[::-1]}[order]


def fallback_rank(fallback: str, count: int) -> int:
    """Rank from 0 of what is emitted when every candidate is rejected."""
    return {"first": 0, "last": count - 1}[fallback]


def pick(strategy: str, margins: dict[int, float], threshold: float, rng: np.random.Generator) -> int | None:
    """The key of the accepted candidate to emit, in the order of `margins`; None: all are rejected."""
    accepted = [rank for rank, margin in margins.items() if margin > threshold]
    if not accepted:
        return None
    if strategy == "random":
        return accepted[int(rng.integers(len(accepted)))]
    best = accepted[0]
    for rank in accepted[1:] if strategy == "max_prob" else ():
        best = rank if margins[rank] > margins[best] else best
    return best


def decode(
    node: Node, start: int, options: Any, *, fallback: str = "first", eos: Container[int] = (), limit: int
) -> Answer:
    """§1 from the prompt's node on, whose length is `start`: aligned, plain greedy or plain sampled.

    options: see `Options`. Raises ValueError, naming the position, for what is not finite.
    """
    answer, rng = Answer(), np.random.default_rng(options.seed)
    decisions = examined = forced_tokens = 0
    accepted_rank: Counter[str] = Counter()
    candidate_counts: Counter[str] = Counter()
    distances: list[float] = []
    while len(answer.positions) < limit:
        position = start + len(answer.positions)
        greedy = not (options.align or options.sample)
        try:
            found = candidates(node.logits, 1 if greedy else options.top_k, options.top_p)
        except ValueError as error:
            raise ValueError(f"position {position}: {error}") from error
        ids, rank, forced = found.ids, 0, False
        gaps = {"logit": found.logit_gap, "nucleus": found.nucleus_gap}
        margins: dict[int, float] = {}  # by rank from 0
        nodes: dict[int, Node] = {}
        if options.align:
            candidate_counts[str(len(ids))] += 1
        if options.align and len(ids) > 1:
            for candidate in examination_order(options.order, len(ids)):
                nodes[candidate] = node.then(ids[candidate])
                try:
                    margins[candidate] = nodes[candidate].margin
                except ValueError as error:
                    raise ValueError(f"position {position}: candidate {ids[candidate]} has a {error}") from error
                if options.strategy == "top1" and margins[candidate] > options.threshold:
                    break
            picked = pick(options.strategy, margins, options.threshold, rng)
            forced = picked is None
            rank = fallback_rank(fallback, len(ids)) if picked is None else picked
            if not forced:
                accepted_rank[str(rank + 1)] += 1
            decisions, examined, forced_tokens = decisions + 1, examined + len(margins), forced_tokens + forced
            gaps["margin"] = min(abs(margin - options.threshold) for margin in margins.values())
            distances.append(gaps["margin"])
            accepted = sorted((m for m in margins.values() if m > options.threshold), reverse=True)
            if options.strategy == "max_prob" and len(accepted) > 1:
                gaps["best_two"] = accepted[0] - accepted[1]
        elif options.sample and not options.align:
            logits = node.logits
            weights = [math.exp((logits[i] - logits[ids[0]]) / options.temperature) for i in ids]
            rank = int(rng.choice(len(ids), p=[weight / sum(weights) for weight in weights]))
        by_rank = {candidate + 1: margin for candidate, margin in margins.items()}
        answer.positions.append(Position(position, ids, ids[rank], rank + 1, by_rank, forced, gaps))
        answer.counts.append(
            {
                "tokens": len(answer.positions),
                "decisions": decisions,
                "examined": examined,
                "forced": forced_tokens,
                "accepted_rank": dict(accepted_rank),
                "candidate_counts": dict(candidate_counts),
                "smallest_margin": min(distances, default=None),
            }
        )
        if ids[rank] in eos:
            break
        if len(answer.positions) < limit:
            node = nodes[rank] if rank in nodes else node.then(ids[rank])
    return answer
