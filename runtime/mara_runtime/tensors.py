"""Every tensor of the exported graphs: names, shapes, dtypes. Export, lowering, engines and tests read them here.

Symbolic dimensions: S rows of one forward pass, R rows whose logits are wanted, C slots of the KV cache,
N hidden states. A row is one token; it is written to one KV slot and has one position:

    row i is written to slot `write_indices[0] + i`, rotates by `position_ids[0, i]`, and attends to the slots
    where `attention_mask[0, 0, i]` is 0 (elsewhere `MASKED`).

Slot and position are different things: sibling candidates share a position and occupy a slot each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
ATTENTION_MASK = "attention_mask"
WRITE_INDICES = "write_indices"
LOGITS_ROWS = "logits_rows"
LAST_HIDDEN_STATE = "last_hidden_state"
LOGITS = "logits"

AGENT_STATES = "hidden_states"
AGENT_MARGIN = "margin"

MASKED = -1e9
"""Additive mask of a slot that a row must not see; finite, so that no row of it can become NaN."""


@dataclass(frozen=True)
class Tensor:
    """A graph input or output."""

    name: str
    dtype: str
    """numpy name: float32, int64, …"""
    shape: tuple[int | str, ...]
    """sizes; a string is a symbolic dimension"""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of an LLM that its graph's tensors depend on."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def past(layer: int, part: str) -> str:
    """Name of the KV cache input of `layer`; `part` is "key" or "value"."""
    return f"past_key_values.{layer}.{part}"


def present(layer: int, part: str) -> str:
    """Name of the KV cache output of `layer`: the same memory as `past(layer, part)`."""
    return f"present.{layer}.{part}"


def kv_names(num_layers: int) -> list[tuple[str, str]]:
    """(past, present) names in the order of the graph's inputs and outputs."""
    return [(past(i, p), present(i, p)) for i in range(num_layers) for p in ("key", "value")]


def llm_inputs(shape: ModelShape) -> list[Tensor]:
    """Inputs of `llm.onnx` in order."""
    kv = (1, shape.num_kv_heads, "C", shape.head_dim)
    return [
        Tensor(INPUT_IDS, "int64", (1, "S")),
        Tensor(POSITION_IDS, "int64", (1, "S")),
        Tensor(ATTENTION_MASK, "float32", (1, 1, "S", "C")),
        Tensor(WRITE_INDICES, "int64", (1,)),
        Tensor(LOGITS_ROWS, "int64", ("R",)),
        *(Tensor(name, "float32", kv) for name, _ in kv_names(shape.num_layers)),
    ]


def llm_outputs(shape: ModelShape) -> list[Tensor]:
    """Outputs of `llm.onnx` in order; the hidden state is taken after the final norm."""
    kv = (1, shape.num_kv_heads, "C", shape.head_dim)
    return [
        Tensor(LOGITS, "float32", ("R", shape.vocab_size)),
        Tensor(LAST_HIDDEN_STATE, "float32", (1, "S", shape.hidden_size)),
        *(Tensor(name, "float32", kv) for _, name in kv_names(shape.num_layers)),
    ]


def agent_inputs(hidden_size: int) -> list[Tensor]:
    """Inputs of `agent.onnx`."""
    return [Tensor(AGENT_STATES, "float32", ("N", hidden_size))]


def agent_outputs() -> list[Tensor]:
    """Outputs of `agent.onnx`: margin = z1 - z0, accepted when above the threshold."""
    return [Tensor(AGENT_MARGIN, "float32", ("N",))]


def dynamic_axes(tensors: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    """{name: {axis: symbol}}, as exporters want it."""
    return {t.name: {i: d for i, d in enumerate(t.shape) if isinstance(d, str)} for t in tensors}
