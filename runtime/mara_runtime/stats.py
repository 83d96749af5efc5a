"""What an answer consists of and what it took: its steps, and counters of the algorithm and of the work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.candidates import Candidates

if TYPE_CHECKING:
    from mara_runtime.config import DecodeConfig
    from mara_runtime.manifest import Noise


@dataclass(frozen=True)
class Step:
    """One emitted token and how it was chosen."""

    token: int
    position: int
    """of the token in the sequence, prompt included, from 0"""
    candidates: Candidates
    """by LM rank; in plain greedy decoding the best alone"""
    rank: int
    """LM rank of the token among the candidates, from 1"""
    margins: dict[int, float]
    """{LM rank: margin} of the examined candidates; empty when there was nothing to decide"""
    forced: bool
    """all candidates were rejected, and the fallback was emitted"""
    drafted: bool = False
    """it was guessed, and confirmed"""
    states: dict[int, NDArray[np.float32]] | None = None
    """{LM rank: (D,) hidden state} of the examined candidates; None where they were not asked for"""


@dataclass
class Stats:
    """Counters of one answer; docs/internals/method.md defines those of the algorithm."""

    # of the algorithm: what the sequential procedure would count
    tokens: int = 0
    """emitted, end-of-sequence included"""
    decisions: int = 0
    """positions with several candidates"""
    examined: int = 0
    """candidates that the sequential procedure asks the agents about"""
    forced: int = 0
    """decisions in which all candidates were rejected"""
    accepted_rank: Counter[int] = field(default_factory=Counter)
    """{LM rank of the accepted candidate, from 1: decisions}; forced ones are not in it"""
    candidate_counts: Counter[int] = field(default_factory=Counter)
    """{number of candidates: emitted positions}; empty in plain decoding"""
    smallest_margin: float | None = None
    """least |margin - threshold| among the examined candidates: how close a decision was"""

    # of the arithmetic
    within_noise: int = 0
    """positions decided by less than the noise that the bundle records: another pass width, or another machine, may
    choose differently"""

    # of the work
    prompt_tokens: int = 0
    reused_tokens: int = 0
    """of the prompt, still in the KV cache"""
    forwards: int = 0
    """forward passes of the LLM after the prompt"""
    rows: int = 0
    """rows in them"""
    drafted: int = 0
    """drafted rows among them"""
    confirmed: int = 0
    """drafted tokens that were emitted"""
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    """after the prompt, without the caller's time between tokens"""
    engine_ms: float = 0.0
    """of decode_ms, inside the engine's passes"""

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, which comes with the prompt, by decode time; 0 where there are none."""
        return (self.tokens - 1) / self.decode_ms * 1e3 if self.tokens > 1 and self.decode_ms else 0.0

    def record(self, step: Step, config: DecodeConfig, noise: Noise | None) -> None:
        """Count an emitted token."""
        self.tokens += 1
        self.confirmed += step.drafted
        if config.align:
            self.candidate_counts[len(step.candidates)] += 1
        distances = [abs(margin - config.threshold) for margin in step.margins.values()]
        if distances:
            self.decisions += 1
            self.examined += len(distances)
            nearest = min(distances)
            self.smallest_margin = nearest if self.smallest_margin is None else min(self.smallest_margin, nearest)
            if step.forced:
                self.forced += 1
            else:
                self.accepted_rank[step.rank] += 1
        if noise is not None:
            if config.strategy == "max_prob" and len(distances) > 1 and not step.forced:
                best, second, *_ = sorted(step.margins.values(), reverse=True)
                distances.append(best - second)
            self.within_noise += step.candidates.gap < noise.logits or min(distances, default=np.inf) < noise.margins

    def algorithm(self) -> dict[str, Any]:
        """The algorithm's counters alone: the same for every schedule (the margin up to rounding)."""
        return {
            "tokens": self.tokens,
            "decisions": self.decisions,
            "examined": self.examined,
            "forced": self.forced,
            "accepted_rank": {str(k): self.accepted_rank[k] for k in sorted(self.accepted_rank)},
            "candidate_counts": {str(k): self.candidate_counts[k] for k in sorted(self.candidate_counts)},
            "smallest_margin": self.smallest_margin,
        }

    def to_json(self) -> dict[str, Any]:
        """All counters as plain values."""
        return {
            **self.algorithm(),
            "within_noise": self.within_noise,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "forwards": self.forwards,
            "rows": self.rows,
            "drafted": self.drafted,
            "confirmed": self.confirmed,
            "prefill_ms": round(self.prefill_ms, 3),
            "decode_ms": round(self.decode_ms, 3),
            "engine_ms": round(self.engine_ms, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }
