"""Every tensor of the exported graphs: names, shapes, dtypes. Export, engines and tests take them from here.

A bundle has one graph, the *step*: the LLM, its agents, the election among candidates, and the LM head on the rows that
need it. Symbolic dimensions: S rows of one pass, B conversations that share it, M rows at most of one of them, C slots
of a conversation's KV cache, N rows that the agents judge, H0 rows that go through the LM head whatever the agents
decide, R rows that went through it, P = H0 + B rows of the outputs about them, Q rows whose hidden states are returned,
A agents in memory, W1 and W2 the widths of their hidden layers.

A row is a token of one conversation; it has one KV slot there and one position. Everything but attention sees the rows
as they come. For attention they take seats, M for each conversation:

    row i sits at `seats[0, i]` = b · M + m, as the m-th row of conversation b, and `grid[b, m]` = i;
    it is written to slot `write_indices[b] + m` of b, rotated by `position_ids[0, i]`, and attends to the slots of b
    below its position and to its own.

Where a conversation has fewer rows than M, `grid` names any row of its own. Slots and positions differ: sibling
candidates share a position and occupy a slot each. A prompt or a draft has positions T, T+1, …, siblings have T, T, …,
and one pass may contain both.

Agents are data: the graph takes the weights of A of them, stacked, and for each row that they judge a mix. A row's
margin is the sum of the agents' margins, each times its part of the mix; a part of 0 leaves an agent out.

The election of a conversation: among the judged rows whose margin exceeds `threshold`, the one with the greatest
`priorities + margin_weight * margins`; a priority of -inf excludes a row, as it does those of other conversations. If
there is none, the fallback row, unless that is -1. The elected rows are appended to `head_rows`, in the order of the
conversations; `rows` returns all that went through the head. For each of them the graph returns its `TOP` most likely
tokens, and the log of the sum of all exponentials: log-probability = logit - log_normaliser. Where a conversation
elects no row, there is a -1 among the last B of `rows`, in its place or behind them all, and the other outputs there
are undefined: output sizes are known in advance, so nothing is allocated during a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
WRITE_INDICES = "write_indices"
GRID = "grid"
SEATS = "seats"
HEAD_ROWS = "head_rows"
AGENT_ROWS = "agent_rows"
HIDDEN_ROWS = "hidden_rows"
AGENT_MIX = "agent_mix"
PRIORITIES = "priorities"
MARGIN_WEIGHT = "margin_weight"
THRESHOLD = "threshold"
FALLBACK_ROW = "fallback_row"

MARGINS = "margins"
ROWS = "rows"
TOP_IDS = "top_ids"
TOP_LOGITS = "top_logits"
LOG_NORMALISER = "log_normaliser"
LAST_HIDDEN_STATE = "last_hidden_state"
LOGITS = "logits"

# of the parts of the step, before they are joined
ATTENTION_MASK = "attention_mask"
AGENT_STATES = "hidden_states"

TOP_SPARE = 8
"""Tokens returned in addition to the candidates of a position: engines promise no order of equal logits, so the host
sorts and cuts."""
DRAFT_ROWS = 16
"""Longest draft; with the candidates and one rerun fallback it makes up the KV cache's spare slots."""
PREFILL_ROWS = 256
"""Rows of one prefill pass: attention scores and mask of longer ones grow to gigabytes."""

AGENT_WIDTHS = (1024, 256)
"""W1 and W2 of the released agents."""

MASKED = -3e4
"""Additive mask of a slot that a row must not attend to; finite, in float16 too, so that no masked row becomes NaN."""
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Types of KV entries, and bytes per number."""


@dataclass(frozen=True)
class Tensor:
    """A graph input or output."""

    name: str
    dtype: str
    """numpy name: float32, int64, …"""
    shape: tuple[int | str, ...]
    """sizes; a string is a symbolic dimension"""


@dataclass(frozen=True)
class CacheGroup:
    """KV caches of one size: each holds keys and values of one layer, which other layers may read, too."""

    count: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of an LLM that determine its graph's tensors."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    """of queries, in each layer"""
    caches: tuple[CacheGroup, ...]
    """no two of the same size; caches are numbered in this order, those of a group in the order of their layers"""

    @property
    def num_caches(self) -> int:
        """Of all sizes: as many as layers, or fewer where layers read those of others."""
        return sum(group.count for group in self.caches)


def past(cache: int, part: str) -> str:
    """Name of a KV cache as an input; `part` is "key" or "value"."""
    return f"past_key_values.{cache}.{part}"


def present(cache: int, part: str) -> str:
    """Name of a KV cache as an output: the same memory as `past(cache, part)`."""
    return f"present.{cache}.{part}"


def kv_names(num_caches: int) -> list[tuple[str, str]]:
    """(past, present) names in the order of the graph's inputs and outputs."""
    return [(past(i, p), present(i, p)) for i in range(num_caches) for p in ("key", "value")]


def spare_slots(max_candidates: int) -> int:
    """KV slots that one decision may need in addition to the sequence's."""
    return max_candidates + DRAFT_ROWS + 1


def agent_weights(hidden_size: int) -> list[Tensor]:
    """The weights of A agents, in the order of their layers; mara_runtime.agents makes them of agent files."""
    return [
        Tensor("agents.0.weight", "float32", ("A", "W1", hidden_size)),
        Tensor("agents.0.bias", "float32", ("A", "W1", 1)),
        Tensor("agents.1.weight", "float32", ("A", "W2", "W1")),
        Tensor("agents.1.bias", "float32", ("A", "W2", 1)),
        Tensor("agents.2.weight", "float32", ("A", 1, "W2")),
        Tensor("agents.2.bias", "float32", ("A", 1, 1)),
    ]


def agent_inputs(hidden_size: int) -> list[Tensor]:
    """Inputs of the traced agents."""
    return [
        Tensor(AGENT_STATES, "float32", ("N", hidden_size)),
        Tensor(AGENT_MIX, "float32", ("A", "N")),
        *agent_weights(hidden_size),
    ]


def agent_outputs() -> list[Tensor]:
    """Outputs of the traced agents: an agent's margin is z1 - z0, and a row is accepted when the mix exceeds the
    threshold."""
    return [Tensor(MARGINS, "float32", ("N",))]


def pass_inputs() -> list[Tensor]:
    """Inputs of `step.onnx` that say what a pass does, in order."""
    return [
        Tensor(INPUT_IDS, "int64", (1, "S")),
        Tensor(POSITION_IDS, "int64", (1, "S")),
        Tensor(WRITE_INDICES, "int64", ("B",)),
        Tensor(GRID, "int64", ("B", "M")),
        Tensor(SEATS, "int64", (1, "S")),
        Tensor(HEAD_ROWS, "int64", ("H0",)),
        Tensor(AGENT_ROWS, "int64", ("N",)),
        Tensor(HIDDEN_ROWS, "int64", ("Q",)),
        Tensor(AGENT_MIX, "float32", ("A", "N")),
        Tensor(PRIORITIES, "float32", ("B", "N")),
        Tensor(MARGIN_WEIGHT, "float32", ("B", 1)),
        Tensor(THRESHOLD, "float32", ("B", 1)),
        Tensor(FALLBACK_ROW, "int64", ("B",)),
    ]


def step_inputs(shape: ModelShape, cache: str = "float32") -> list[Tensor]:
    """Inputs of `step.onnx`, in order. cache: type of the KV cache, one of CACHE_BYTES."""
    return [*pass_inputs(), *agent_weights(shape.hidden_size), *_cache(shape, 0, cache)]


def step_outputs(shape: ModelShape, top: int, cache: str = "float32") -> list[Tensor]:
    """Outputs of `step.onnx`, in order. Hidden states and logits are copied to the host only where a pass asks."""
    return [
        Tensor(MARGINS, "float32", ("N",)),
        Tensor(ROWS, "int64", ("P",)),
        Tensor(TOP_IDS, "int64", ("P", top)),
        Tensor(TOP_LOGITS, "float32", ("P", top)),
        Tensor(LOG_NORMALISER, "float32", ("P",)),
        Tensor(LOGITS, "float32", ("R", shape.vocab_size)),
        Tensor(LAST_HIDDEN_STATE, "float32", ("Q", shape.hidden_size)),
        *_cache(shape, 1, cache),
    ]


def top_tokens(max_candidates: int, vocab_size: int) -> int:
    """Tokens that a step returns for each row that went through the head."""
    return min(max_candidates + TOP_SPARE, vocab_size)


def _cache(shape: ModelShape, side: int, dtype: str) -> list[Tensor]:
    sizes = [("B", group.kv_heads, "C", group.head_dim) for group in shape.caches for _ in range(2 * group.count)]
    names = (pair[side] for pair in kv_names(shape.num_caches))
    return [Tensor(name, dtype, size) for name, size in zip(names, sizes, strict=True)]


def dynamic_axes(tensors: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    """{name: {axis: symbol}}, as exporters expect it."""
    return {t.name: {i: d for i, d in enumerate(t.shape) if isinstance(d, str)} for t in tensors}
