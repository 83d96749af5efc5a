"""What the decode loop needs of an engine, and how one is chosen.

An engine runs a frozen LLM over a KV cache of numbered slots, and its agent. It knows nothing of candidates,
strategies or text. Rows and slots are explained in `mara_runtime.tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.config import ENGINES
from mara_runtime.errors import EngineError, NumericsError
from mara_runtime.tensors import MASKED

if TYPE_CHECKING:
    from mara_runtime.bundle import Bundle


@dataclass(frozen=True)
class Forward:
    """What one forward pass returns; the arrays may be overwritten by the next pass."""

    hidden: NDArray[np.float32]
    """(S, D) after the final norm, a row each"""
    logits: NDArray[np.float32]
    """(R, V) of the rows asked for, in the order asked"""


class Engine(Protocol):
    """One open model with its KV cache."""

    @property
    def slots(self) -> int:
        """Size of the KV cache."""

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int, logits_rows: Sequence[int]
    ) -> Forward:
        """Run S rows: row i has `tokens[i]` at `positions[i]` and is written to slot `slot + i`.

        It attends to the slots below its position and to its own. So a prompt is a chain, positions slot, slot+1, …;
        siblings share a position, and a later pass may place more of them in later slots.
        """

    def margins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, D) hidden states to (N,) accept margins of the agent."""

    def move(self, source: int, target: int) -> None:
        """Make the entry of slot `source` that of slot `target`, in every layer."""

    def clear(self) -> None:
        """Make every slot what it was at first, zero: a NaN in a masked slot would reach the rows that mask it."""

    def describe(self) -> dict[str, Any]:
        """What ran: name, versions, graph, threads; recorded with every result."""


def check_finite(out: Forward, positions: Sequence[int], tokens: Sequence[int]) -> None:
    """Raise NumericsError, naming the position, when a pass over these rows gave something that is not a number."""
    bad = np.flatnonzero(~np.isfinite(out.hidden).all(axis=1)).tolist()
    if bad:
        position = positions[bad[0]]
        # Siblings of one pass may infect each other, so all that are not finite are named.
        at_fault = ", ".join(str(tokens[row]) for row in bad if positions[row] == position)
        raise NumericsError(
            f"the hidden state at position {position} (token {at_fault}) is not finite: the model's weights or its "
            "precision are at fault; export it again, at a higher precision if it was quantised"
        )
    # -inf alone is a token ruled out; NaN, +inf, or nothing but -inf leaves no probabilities
    if out.logits.size and not np.isfinite(out.logits.max(axis=1)).all():
        raise NumericsError(
            f"the logits after position {positions[-1]} are not finite: the model's LM head or its precision is at "
            "fault; export it again, at a higher precision if it was quantised"
        )


def attention_mask(positions: Sequence[int], slot: int, slots: int) -> NDArray[np.float32]:
    """(1, 1, S, slots) additive mask of the rule in `Engine.forward`."""
    index = np.arange(slots)
    own = slot + np.arange(len(positions))
    seen = (index < np.asarray(positions)[:, None]) | (index == own[:, None])
    mask: NDArray[np.float32] = np.where(seen, np.float32(0), np.float32(MASKED))
    return mask[None, None]


def open_engine(bundle: Bundle, name: str = "auto", threads: int | None = None) -> tuple[Engine, dict[str, str]]:
    """Open the named engine, or with "auto" the best that bundle and machine have.

    Returns the engine and, for each engine preferred to it, why that one declined.
    Raises EngineError, with every reason, when none fits.
    """
    from mara_runtime.ort_engine import OrtEngine, why_not

    if name not in ("auto", *ENGINES):
        raise EngineError(f"unknown engine {name!r}; known: auto, {', '.join(ENGINES)}")
    declined: dict[str, str] = {}
    for candidate in ENGINES if name == "auto" else (name,):
        reason = why_not(bundle, candidate)
        if reason is None:
            return OrtEngine(bundle, candidate, threads), declined
        declined[candidate] = reason
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in declined.items())
    raise EngineError(f"no engine can run {bundle.folder} here ({reasons})")
