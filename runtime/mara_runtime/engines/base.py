"""What the decode loop asks of an engine: passes of rows over a KV cache of numbered slots.

An engine runs the step graph (`mara_runtime.tensors`, which defines row, slot and position). It knows nothing of
candidates, strategies or text.
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
from mara_runtime.engines.kv_cache import KVCache

NEVER = -math.inf
"""Priority of a row that is never elected."""


@dataclass(frozen=True)
class Pass:
    """One forward pass: its rows, and which outputs the caller needs."""

    tokens: Sequence[int]
    """(S,) one token per row"""
    positions: Sequence[int]
    """(S,) a row attends to the slots below its position and to its own slot"""
    slot: int
    """row i writes its KV entry to slot `slot + i`"""
    head_rows: Sequence[int] = ()
    """rows that go through the LM head whatever the agents decide"""
    agent_rows: Sequence[int] = ()
    """(N,) rows that the agents judge"""
    priorities: Sequence[float] = ()
    """(N,) the accepted row with the greatest `priority + margin_weight * margin` is elected: it, too, goes through the
    LM head; NEVER excludes a row"""
    margin_weight: float = 0.0
    threshold: float = 0.0
    """a row is accepted when its margin exceeds this"""
    fallback_row: int | None = None
    """elected when no row is accepted; None: no row is"""
    mix: Sequence[float] | NDArray[np.float32] = (1.0,)
    """(A,) how much the margin of each agent in use counts, or (N, A) by row; one number is for all, 0 leaves out"""
    full: bool = False
    """also return hidden states and logits, for parity checks and diagnosis"""

    @classmethod
    def prefill(cls, tokens: Sequence[int], start: int, *, last: bool) -> Pass:
        """Part of a prompt from position `start` on; the last part's last row goes through the LM head."""
        return cls(tokens, range(start, start + len(tokens)), start, [len(tokens) - 1] if last else ())

    @classmethod
    def sequence(cls, tokens: Sequence[int], start: int, *, mix: Sequence[float] | None) -> Pass:
        """A token at position `start`, whose successor is not yet known, and a draft after it; all through the LM head.

        mix: of the agents, which judge the drafted rows; None: they do not.
        """
        rows = range(len(tokens))
        judged = () if mix is None else rows[1:]
        positions, priorities = range(start, start + len(tokens)), [NEVER] * len(judged)
        return cls(tokens, positions, start, rows, judged, priorities, mix=mix or (1.0,))

    @classmethod
    def siblings(
        cls,
        tokens: Sequence[int],
        draft: Sequence[int],
        position: int,
        slot: int,
        *,
        mix: Sequence[float],
        priorities: Sequence[float],
        margin_weight: float,
        threshold: float,
        fallback: int | None,
    ) -> Pass:
        """Candidates of one position, and under the first a draft; `sibling_row` tells the row of each candidate.

        tokens, priorities: by candidate; a last one without a priority is not judged. slot: of the first candidate;
        with a draft it equals `position`. fallback: index of the candidate elected when none is accepted.
        """
        first, *others = tokens
        drafted = len(draft)
        return cls(
            [first, *draft, *others],
            [position, *range(position + 1, position + 1 + drafted), *[position] * len(others)],
            slot,
            head_rows=range(1 + drafted) if drafted else (),
            agent_rows=range(len(priorities) + drafted),
            mix=mix,
            priorities=[priorities[0], *[NEVER] * drafted, *priorities[1:]],
            margin_weight=margin_weight,
            threshold=threshold,
            fallback_row=None if fallback is None else sibling_row(fallback, drafted),
        )

    @classmethod
    def full_outputs(cls, tokens: Sequence[int], positions: Sequence[int], slot: int, agents: int = 1) -> Pass:
        """Every output of every row; (agents × S,) margins, of one agent after another."""
        rows = range(len(tokens))
        judged = [*rows] * agents
        mix = np.repeat(np.eye(agents, dtype=np.float32), len(rows), axis=0) if agents else (1.0,)
        return cls(tokens, positions, slot, rows, judged, [NEVER] * len(judged), mix=mix, full=True)


def sibling_row(index: int, drafted: int) -> int:
    """Row of the candidate `index` in a pass of `Pass.siblings` with so many drafted tokens."""
    return index + drafted if index else 0


@dataclass(frozen=True)
class StepOutput:
    """What a pass returns; the arrays may be overwritten by the next pass."""

    margins: NDArray[np.float32]
    """(N,) of `agent_rows`; NaN where the hidden state is not finite"""
    rows: NDArray[np.int64]
    """(R,) rows that went through the LM head: `head_rows`, then the elected one, if any"""
    top_ids: NDArray[np.int64]
    """(R, K) most likely next tokens"""
    top_logits: NDArray[np.float32]
    """(R, K) descending"""
    log_normaliser: NDArray[np.float32]
    """(R,) log-probability = logit - log_normaliser; NaN where the logits are not finite"""
    hidden: NDArray[np.float32] | None = None
    """(S, D) after the final norm; only of a full pass"""
    logits: NDArray[np.float32] | None = None
    """(R, V) only of a full pass"""


class Engine(Protocol):
    """One open model and its KV cache."""

    @property
    def cache(self) -> KVCache:
        """What the slots hold. Whoever runs passes holds its lock."""

    def use(self, agents: Sequence[str]) -> None:
        """Take these agents of the bundle into memory, in the order of the mix of the passes that follow.

        At first none is: their margins are 0. Raises BundleError for a damaged file, EngineError where it has no room.
        """

    def run(self, work: Pass) -> StepOutput:
        """Run the rows, write their KV entries, return the outputs. Cached tokens from `work.slot` on are dropped."""

    def describe(self) -> dict[str, Any]:
        """What runs: name, versions, graph, threads; recorded with every result.

        What changes at run time, sizes in bytes, is under "memory".
        """


def is_finite(out: StepOutput) -> bool:
    """Whether all margins and normalisers are finite."""
    return all(map(math.isfinite, out.margins.tolist())) and all(map(math.isfinite, out.log_normaliser.tolist()))


def fill_inputs(inputs: Mapping[str, NDArray[Any]], work: Pass) -> None:
    """Write a pass into the arrays of the graph's inputs. An array may have a row where the pass has none."""
    inputs[tensors.INPUT_IDS][0] = work.tokens
    inputs[tensors.POSITION_IDS][0] = work.positions
    inputs[tensors.WRITE_INDICES][0] = work.slot
    inputs[tensors.HEAD_ROWS][:] = work.head_rows if len(work.head_rows) else 0  # padding is row 0 …
    inputs[tensors.AGENT_ROWS][:] = work.agent_rows if len(work.agent_rows) else 0
    inputs[tensors.AGENT_MIX].T[:] = work.mix if len(work.agent_rows) else 0  # … whose margin is 0, not infinite …
    inputs[tensors.PRIORITIES][:] = work.priorities if len(work.priorities) else NEVER  # … and is never elected
    inputs[tensors.MARGIN_WEIGHT][0] = work.margin_weight
    inputs[tensors.THRESHOLD][0] = _float32_below(work.threshold)
    inputs[tensors.FALLBACK_ROW][0] = -1 if work.fallback_row is None else work.fallback_row


def read_outputs(
    outputs: Mapping[str, NDArray[Any]],
    work: Pass,
    row_offset: int = 0,
    hidden: NDArray[np.float32] | None = None,
    logits: NDArray[np.float32] | None = None,
) -> StepOutput:
    """Read the arrays of the graph's outputs, without padding.

    row_offset: rows that ran in front of the pass's own. hidden (1, S, D) and logits (≥ R, V) of a full pass, S without
    the rows in front.
    """
    rows = outputs[tensors.ROWS]
    end = len(rows) if rows[-1] >= 0 else len(rows) - 1  # without an elected row the last is padding
    asked = slice(len(rows) - 1 - len(work.head_rows), end)
    return StepOutput(
        outputs[tensors.MARGINS][: len(work.agent_rows)],
        rows[asked] - row_offset if row_offset else rows[asked],
        outputs[tensors.TOP_IDS][asked],
        outputs[tensors.TOP_LOGITS][asked],
        outputs[tensors.LOG_NORMALISER][asked],
        None if hidden is None else hidden[0],
        None if logits is None else logits[asked],
    )


@lru_cache(maxsize=8)
def _float32_below(threshold: float) -> float:
    """The greatest float32 ≤ threshold: a float32 margin exceeds one exactly when it exceeds the other."""
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))
