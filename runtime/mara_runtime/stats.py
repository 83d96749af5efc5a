"""What a generation counted: the algorithm's counters, which no schedule changes, and the work done for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters of one generation. `docs/method.md` defines each of the algorithm's counters."""

    # of the algorithm: what the sequential procedure would count
    tokens: int = 0
    """emitted, end-of-sequence included"""
    decisions: int = 0
    """positions with several candidates"""
    examined: int = 0
    """candidates that the sequential procedure asks the agent about"""
    forced: int = 0
    """decisions in which all candidates were rejected"""
    accepted_rank: Counter[int] = field(default_factory=Counter)
    """{LM rank of the accepted candidate, from 1: decisions}; forced ones are not in it"""
    candidate_counts: Counter[int] = field(default_factory=Counter)
    """{number of candidates: emitted positions}; empty in plain decoding"""
    smallest_margin: float | None = None
    """least |margin - threshold| among the examined candidates: how near a decision came to tipping"""

    # of the work
    prompt_tokens: int = 0
    forwards: int = 0
    """forward passes of the LLM after the prompt"""
    rows: int = 0
    """token rows computed in them"""
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    """after the prompt, without the time the caller spends between tokens"""

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens by decode time."""
        return self.tokens / self.decode_ms * 1e3 if self.decode_ms else 0.0

    def saw_margin(self, distance: float) -> None:
        """Note |margin - threshold| of an examined candidate."""
        if self.smallest_margin is None or distance < self.smallest_margin:
            self.smallest_margin = distance

    def algorithm(self) -> dict[str, Any]:
        """The algorithm's counters alone: equal for every schedule (the margin, a measurement, up to rounding)."""
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
            "prompt_tokens": self.prompt_tokens,
            "forwards": self.forwards,
            "rows": self.rows,
            "prefill_ms": round(self.prefill_ms, 3),
            "decode_ms": round(self.decode_ms, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }
