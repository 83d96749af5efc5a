"""What the decode loop needs of an engine.

An engine runs the step graph (mara_runtime.tensors) over a KV cache of numbered slots. It knows nothing of
candidates, strategies or text; rows and slots are explained in `mara_runtime.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.errors import NumericsError


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass, and what is wanted of them."""

    tokens: Sequence[int]
    """(S,) a token a row"""
    positions: Sequence[int]
    """(S,) a row attends to the slots below its position and to its own"""
    slot: int
    """row i is written to slot `slot + i`"""
    head_rows: Sequence[int] = ()
    """rows whose next tokens are wanted, whatever the agent says"""
    agent_rows: Sequence[int] = ()
    """(N,) rows shown to the agent"""
    priorities: Sequence[float] = ()
    """(N,) of the accepted ones the greatest `priority + margin_weight * margin` is elected; -inf: never"""
    margin_weight: float = 0.0
    threshold: float = 0.0
    """a row is accepted when its margin exceeds this"""
    fallback_row: int | None = None
    """elected when no row is accepted; None: none"""


@dataclass(frozen=True)
class StepOutput:
    """What a pass returns; the arrays may be overwritten by the next pass."""

    margins: NDArray[np.float32]
    """(N,) of the agent's rows; NaN where the hidden state is not finite"""
    rows: NDArray[np.int64]
    """(R,) those that went through the LM head: `head_rows`, then the elected one, if any"""
    top_ids: NDArray[np.int64]
    """(R, K) the best next tokens"""
    top_logits: NDArray[np.float32]
    """(R, K) descending"""
    log_normaliser: NDArray[np.float32]
    """(R,) log-probability = logit - log_normaliser; NaN where the logits are not finite"""


@dataclass(frozen=True)
class FullOutput:
    """All that a pass computes, for whoever compares or diagnoses; decoding has no need of it."""

    hidden: NDArray[np.float32]
    """(S, D) after the final norm"""
    logits: NDArray[np.float32]
    """(S, V)"""
    margins: NDArray[np.float32]
    """(S,)"""


class Engine(Protocol):
    """One open model with its KV cache."""

    @property
    def slots(self) -> int:
        """Size of the KV cache when it is largest."""

    def run(self, work: Pass) -> StepOutput:
        """Run the rows, write their KV entries, and return what was asked for."""

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> FullOutput:
        """Run the rows and return their hidden states, logits and margins."""

    def begin(self, kept: int, slots: int) -> None:
        """A text begins that will need `slots` soon: the first `kept` entries of the cache stay, the others may go.

        The engine may make its cache larger or smaller now, which is cheaper than growing pass by pass.
        """

    def move(self, source: int, target: int) -> None:
        """Make the entry of slot `source` that of slot `target`, in every layer."""

    def clear(self) -> None:
        """Make every slot what it was at first, zero: a NaN in a masked slot would reach the rows that mask it."""

    def describe(self) -> dict[str, Any]:
        """What ran: name, versions, graph, threads; recorded with every result.

        What changes while it runs, sizes in bytes, is under "memory".
        """


def is_finite(out: StepOutput) -> bool:
    """Are all margins and logits of a pass numbers?"""
    return all(map(math.isfinite, out.margins.tolist())) and all(map(math.isfinite, out.log_normaliser.tolist()))


def fill(inputs: Mapping[str, NDArray[Any]], work: Pass) -> None:
    """Write a pass into the arrays of the graph's inputs. An array may have a row where the pass has none."""
    inputs[tensors.INPUT_IDS][0] = work.tokens
    inputs[tensors.POSITION_IDS][0] = work.positions
    inputs[tensors.WRITE_INDICES][0] = work.slot
    inputs[tensors.HEAD_ROWS][:] = work.head_rows if len(work.head_rows) else 0  # row 0 fills the place …
    inputs[tensors.AGENT_ROWS][:] = work.agent_rows if len(work.agent_rows) else 0
    inputs[tensors.PRIORITIES][:] = work.priorities if len(work.priorities) else -np.inf  # … and is never chosen
    inputs[tensors.MARGIN_WEIGHT][0] = work.margin_weight
    inputs[tensors.THRESHOLD][0] = float32_below(work.threshold)
    inputs[tensors.FALLBACK_ROW][0] = -1 if work.fallback_row is None else work.fallback_row


def outcome(outputs: Mapping[str, NDArray[Any]], work: Pass, extra: int = 0) -> StepOutput:
    """Read the arrays of the graph's outputs, without rows that stood where the pass has none.

    extra: rows that ran in front of the pass's own.
    """
    rows = outputs[tensors.ROWS]
    told = slice(len(rows) - 1 - len(work.head_rows), len(rows) if rows[-1] >= 0 else -1)
    return StepOutput(
        outputs[tensors.MARGINS][: len(work.agent_rows)],
        rows[told] - extra if extra else rows[told],
        outputs[tensors.TOP_IDS][told],
        outputs[tensors.TOP_LOGITS][told],
        outputs[tensors.LOG_NORMALISER][told],
    )


@lru_cache(maxsize=8)
def float32_below(threshold: float) -> float:
    """The greatest float32 ≤ threshold: a float32 margin exceeds the one exactly when it exceeds the other."""
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))


def check_row(engine: Engine, token: int, position: int, slot: int, *, margin: bool) -> None:
    """Run one row. Raises NumericsError, naming its position, when it gives something that is not a number.

    margin: the agent's answer counts, too.
    """
    found = engine.evaluate([token], [position], slot)
    if not np.isfinite(found.hidden).all():
        raise NumericsError(
            f"the hidden state at position {position} (token {token}) is not finite: the model's weights or its "
            "precision are at fault; export it again, at a higher precision if it was quantised"
        )
    # -inf alone is a token ruled out; NaN, +inf, or nothing but -inf leaves no probabilities
    if np.isnan(found.logits).any() or not np.isfinite(found.logits.max()):
        raise NumericsError(
            f"the logits after position {position} are not finite: the model's LM head or its precision is at fault; "
            "export it again, at a higher precision if it was quantised"
        )
    if margin and not np.isfinite(found.margins).all():
        raise NumericsError(
            f"the agent's margin at position {position} is not finite: the agent's weights are at fault"
        )
