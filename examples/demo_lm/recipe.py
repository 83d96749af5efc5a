"""The recipe of the demo's LM: every number its weights depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that the weights depend on, apart from machine and package versions."""

    seed: int = 0
    steps: int = 1400
    """optimizer steps, ≥ 1; the learning rate's schedule is a function of the step alone"""
    threads: int = 1
    """torch CPU threads, ≥ 1; a second one gains little at this size"""
    vocab_size: int = 1024
    """BPE tokens, the three special ones and the 256 bytes included"""
    tokenizer_dialogues: int = 6000
    """dialogues that the tokenizer is trained on"""
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    """max_position_embeddings, and the length of a training row, so that every position is trained; tokens"""
    rope_theta: float = 10000.0
    batch: int = 4
    """rows a step"""
    learning_rate: float = 4e-3
    """highest rate, reached after the warm-up, then a half cosine down to `final_rate` of it"""
    final_rate: float = 0.02
    warmup_steps: int = 60
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    """of matrices; vectors have none"""
    clip_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (0-based)."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (
            self.final_rate + (1 - self.final_rate) * cosine
        )  # fmt: skip
