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
from mara_runtime.engines.kv_cache import KVCache, Places

NEVER = -math.inf
"""Priority of a row that is never elected."""


@dataclass(frozen=True)
class Pass:
    """What one conversation asks of a forward pass: its rows, and which outputs it needs."""

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
    hidden_rows: Sequence[int] = ()
    """(Q,) rows whose hidden states are returned"""
    logits: bool = False
    """also return logits, for parity checks and diagnosis"""

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
        never = [NEVER] * len(judged)
        return cls(tokens, positions, slot, rows, judged, never, mix=mix, hidden_rows=rows, logits=True)


def sibling_row(index: int, drafted: int) -> int:
    """Row of the candidate `index` in a pass of `Pass.siblings` with so many drafted tokens."""
    return index + drafted if index else 0


@dataclass(frozen=True)
class StepOutput:
    """What a pass returns to one conversation; the arrays may be overwritten by the next pass."""

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
    """(Q, D) of `hidden_rows`, after the final norm; None where there are none"""
    logits: NDArray[np.float32] | None = None
    """(R, V) where the pass asks for them"""


Works = Sequence[tuple[int, Pass]]
"""(place, pass) of each conversation that takes part, at most one of a place, the places ascending."""


class Engine(Protocol):
    """One open model and its KV caches."""

    @property
    def places(self) -> Places:
        """A KV cache for each conversation that it holds at once. Whoever runs passes holds their lock."""

    @property
    def cache(self) -> KVCache:
        """Of the first place, the only one at first."""

    def use(self, agents: Sequence[str]) -> None:
        """Take these agents of the bundle into memory, in the order of the mix of the passes that follow.

        At first none is: their margins are 0. Raises BundleError for a damaged file, EngineError where it has no room.
        """

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """Run the rows, write their KV entries, return the outputs. Cached tokens from `work.slot` on are dropped."""

    def run_together(self, works: Works) -> list[StepOutput]:
        """`run` for several places, in as few passes as the engine can."""

    def describe(self) -> dict[str, Any]:
        """What runs: name, versions, graph, threads; recorded with every result.

        What changes at run time, sizes in bytes, is under "memory".
        """


def is_finite(out: StepOutput) -> bool:
    """Whether all margins and normalisers are finite."""
    return all(map(math.isfinite, out.margins.tolist())) and all(map(math.isfinite, out.log_normaliser.tolist()))


class Seating:
    """How the passes of some conversations lie in one pass of the graph: rows behind each other, in the order given.

    seats: which of the B conversations of the graph each pass is of, ascending. conversations: B. width: M.
    """

    def __init__(self, works: Sequence[Pass], seats: Sequence[int], conversations: int, width: int) -> None:
        self.works, self.seats, self.conversations, self.width = works, seats, conversations, width

    def fill(self, inputs: Mapping[str, NDArray[Any]], *, seated: bool = False) -> None:
        """Write the passes into the arrays of the graph's inputs.

        Arrays may have more elements than the passes: row 0 is then asked for once more, judged with whatever mix is
        there, and never elected. A conversation without a pass writes where its `write_indices` say, which are left
        alone, and elects nobody. seated: grid and seats are as an earlier call has left them, and right.
        """
        if self.conversations > 1:
            for name, unused in ((tensors.GRID, 0), (tensors.PRIORITIES, NEVER), (tensors.FALLBACK_ROW, -1)):
                inputs[name][...] = unused
        row = head = judged = hidden = 0
        for work, seat in zip(self.works, self.seats, strict=True):
            end = row + len(work.tokens)
            inputs[tensors.INPUT_IDS][0, row:end] = work.tokens
            inputs[tensors.POSITION_IDS][0, row:end] = work.positions
            inputs[tensors.WRITE_INDICES][seat] = work.slot
            if not seated:
                grid, start, count = inputs[tensors.GRID][seat], seat * self.width, end - row
                grid[:count] = range(row, end)
                grid[count:] = row  # a row of its own where there is none
                inputs[tensors.SEATS][0, row:end] = range(start, start + count)
            asked = slice(head, head := head + len(work.head_rows))
            inputs[tensors.HEAD_ROWS][asked] = np.add(work.head_rows, row) if row else work.head_rows
            if len(work.agent_rows):
                asked = slice(judged, judged := judged + len(work.agent_rows))
                inputs[tensors.AGENT_ROWS][asked] = np.add(work.agent_rows, row) if row else work.agent_rows
                inputs[tensors.AGENT_MIX].T[asked] = work.mix
                inputs[tensors.PRIORITIES][seat, asked] = work.priorities
            if len(work.hidden_rows):
                asked = slice(hidden, hidden := hidden + len(work.hidden_rows))
                inputs[tensors.HIDDEN_ROWS][asked] = np.add(work.hidden_rows, row)
            inputs[tensors.MARGIN_WEIGHT][seat, 0] = work.margin_weight
            inputs[tensors.THRESHOLD][seat, 0] = _float32_below(work.threshold)
            inputs[tensors.FALLBACK_ROW][seat] = -1 if work.fallback_row is None else work.fallback_row + row
            row = end
        if head < len(inputs[tensors.HEAD_ROWS]):
            inputs[tensors.HEAD_ROWS][head:] = 0
        if hidden < len(inputs[tensors.HIDDEN_ROWS]):
            inputs[tensors.HIDDEN_ROWS][hidden:] = 0
        if judged < len(inputs[tensors.AGENT_ROWS]):
            inputs[tensors.AGENT_ROWS][judged:] = 0
            inputs[tensors.PRIORITIES][:, judged:] = NEVER

    def read(
        self,
        outputs: Mapping[str, NDArray[Any]],
        hidden: NDArray[np.float32] | None = None,
        logits: NDArray[np.float32] | None = None,
    ) -> list[StepOutput]:
        """The outputs of each pass, without padding. hidden: (≥ Q, D); logits: (≥ R, V) of a single pass."""
        rows = outputs[tensors.ROWS]
        elected = len(rows) - self.conversations  # where to look for the next one
        found = []
        row = head = judged = shown = 0
        for work in self.works:
            end = row + len(work.tokens)
            ends = head + len(work.head_rows), judged + len(work.agent_rows), shown + len(work.hidden_rows)
            while elected < len(rows) and rows[elected] < row:  # -1, or of padding
                elected += 1
            asked: Any = slice(head, ends[0])
            if elected < len(rows) and rows[elected] < end:
                asked = slice(head, elected + 1) if elected == ends[0] else [*range(head, ends[0]), elected]
            found.append(
                StepOutput(
                    outputs[tensors.MARGINS][judged : ends[1]],
                    rows[asked] - row if row else rows[asked],
                    outputs[tensors.TOP_IDS][asked],
                    outputs[tensors.TOP_LOGITS][asked],
                    outputs[tensors.LOG_NORMALISER][asked],
                    hidden[shown : ends[2]] if hidden is not None and len(work.hidden_rows) else None,
                    logits[asked] if logits is not None and work.logits else None,
                )
            )
            head, judged, shown = ends
            row = end
        return found


@lru_cache(maxsize=8)
def _float32_below(threshold: float) -> float:
    """The greatest float32 ≤ threshold: a float32 margin exceeds one exactly when it exceeds the other."""
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-np.inf)))
