"""What a schedule is asked and answers: candidates of this position, and drafted tokens under the first of them.

A decision depends on prefix and candidate alone, so every schedule gives the sequential algorithm's answer
(docs/internals/method.md); it determines the cost. `Fixed` always takes the same width. `Adaptive` weighs the measured
cost of a row against the probability that it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.schedule.drafts import NO_DRAFT, Draft


@dataclass(eq=False)
class Company:
    """Other conversations that share the next pass, as far as is known: as they shared the last one.

    Whoever runs the passes keeps it up to date.
    """

    rows: int = 0
    """of all of them"""
    conversations: int = 0


ALONE = Company()
"""Nobody's, so it stays as it is."""


@dataclass(frozen=True)
class PassContext:
    """What is known when a pass is planned."""

    length: int
    """tokens in the KV cache"""
    probabilities: NDArray[np.float64]
    """of the position's candidates in the order of examination; empty when the token is known and only has to run"""
    margins: tuple[float, ...] = ()
    """of the candidates examined so far: all rejected, or the strategy examines every candidate"""
    threshold: float = 0.0
    """a candidate is accepted when its margin exceeds this"""
    exhaustive: bool = False
    """every candidate is examined, whatever the agents decide"""
    rerun_fallback: bool = False
    """the last of several passes runs the fallback once more"""
    draft: Draft = NO_DRAFT
    """a guess of what follows the known token, or the first candidate"""
    company: Company = ALONE
    """who shares the pass"""


@dataclass(frozen=True)
class PassPlan:
    """What the pass contains."""

    candidates: int
    """number of those not yet examined, at least 1; 0 where there is nothing to decide"""
    drafted: int
    """number of tokens of the draft"""


class Schedule(Protocol):
    """Plans passes. It determines what an answer costs, never the answer."""

    def plan(self, context: PassContext) -> PassPlan:
        """Plan the next pass."""

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """Learn from a decision. probabilities: in the order of examination; margins: of the examined candidates."""


@dataclass(frozen=True)
class Fixed:
    """The same width for every pass."""

    width: int | None
    """candidates of a pass; None: all"""
    drafted: int = 0

    def plan(self, context: PassContext) -> PassPlan:
        """See `Schedule`."""
        left = len(context.probabilities) - len(context.margins)
        return PassPlan(
            left if self.width is None else min(self.width, left), min(self.drafted, len(context.draft.tokens))
        )

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule`."""
