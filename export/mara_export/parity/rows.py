"""What the two sides compute of a prompt and its sibling candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
NAMES = ("hidden", "logits", "margins")
"""Attributes of `Rows`."""
SIBLINGS = 8
"""Candidates after each prompt."""


@dataclass(frozen=True)
class Rows:
    """Results of N token rows."""

    hidden: F32
    """(N, D) after the final norm"""
    logits: F32
    """(N, V)"""
    margins: F32
    """(N, K) of each agent; (N,) of one"""

    def tail(self, count: int) -> Rows:
        """The last `count` rows."""
        return Rows(self.hidden[-count:], self.logits[-count:], self.margins[-count:])

    def of_agent(self, index: int) -> Rows:
        """With the margins of one agent."""
        return replace(self, margins=self.margins[:, index])

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        """All rows of several."""
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in NAMES))


@dataclass(frozen=True)
class Side:
    """Results of one prompt on one side: each position of the prompt, then each sibling after it."""

    rows: Rows
    """T + K rows"""
    recomputed: Rows
    """the last of them, at least the siblings, with other pass widths"""
    perturbed: Rows | None = None
    """all of them over a slightly changed KV cache; None where nothing rounds activations"""

    def of_agent(self, index: int) -> Side:
        """With the margins of one agent."""
        perturbed = None if self.perturbed is None else self.perturbed.of_agent(index)
        return Side(self.rows.of_agent(index), self.recomputed.of_agent(index), perturbed)

    def noise(self, name: str) -> float:
        """Largest difference between rows and recomputed rows."""
        return difference(getattr(self.rows.tail(len(self.recomputed.margins)), name), getattr(self.recomputed, name))

    def level_flips(self, name: str) -> float:
        """Largest difference where activations were rounded to other levels."""
        return 0.0 if self.perturbed is None else difference(getattr(self.rows, name), getattr(self.perturbed, name))


@dataclass(frozen=True)
class Case:
    """One prompt with the reference's results."""

    tokens: list[int]
    siblings: list[int]
    reference: Side
    is_text: bool = True
    """False: random tokens, on which perplexity means nothing"""


def difference(a: F32, b: F32) -> float:
    """Largest absolute difference; NaN if there is one."""
    return float(np.abs(a - b).max())
