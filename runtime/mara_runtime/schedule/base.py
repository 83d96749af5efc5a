"""How much to put into the next pass: candidates of this position, and a drafted continuation under the first of them.

A decision depends on prefix and candidate alone, so any schedule gives the sequential algorithm's answer
(docs/method.md); what it decides is the cost. `Adaptive` weighs what a row costs on this machine (`Cost`, measured)
against the chance that it is needed (`Acceptance` and the draft's own chances, learned while running).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.schedule.drafts import NO_DRAFT, Draft


@dataclass(frozen=True)
class PassContext:
    """What is known when a pass is planned."""

    length: int
    """tokens in the KV cache"""
    probabilities: NDArray[np.float64]
    """of the position's candidates in the order of examination; empty when its token is settled and only has to run"""
    margins: tuple[float, ...] = ()
    """of the candidates examined so far, all rejected or all to be compared"""
    threshold: float = 0.0
    """that a margin must exceed"""
    exhaustive: bool = False
    """every candidate is examined, whatever the agent says"""
    rerun_fallback: bool = False
    """after more than one pass, the last carries the fallback's row once more"""
    draft: Draft = NO_DRAFT
    """a guess of what follows the settled token, or the first candidate"""


@dataclass(frozen=True)
class PassPlan:
    """What the pass holds."""

    candidates: int
    """how many of those not yet examined, at least 1 (0 where there is nothing to decide)"""
    drafted: int
    """how many tokens of the draft"""


class Schedule(Protocol):
    """Plans passes; its choices change what an answer costs, never the answer."""

    def plan(self, view: PassContext) -> PassPlan:
        """What to put into the next pass."""

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """A decision is made: the candidates' probabilities in the order of examination, the margins that were seen."""


@dataclass(frozen=True)
class Fixed:
    """The same width for every pass."""

    width: int | None
    """candidates of a pass; None: all"""
    drafted: int = 0

    def plan(self, view: PassContext) -> PassPlan:
        """See `Schedule`."""
        left = len(view.probabilities) - len(view.margins)
        return PassPlan(
            left if self.width is None else min(self.width, left), min(self.drafted, len(view.draft.tokens))
        )

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """See `Schedule`."""
