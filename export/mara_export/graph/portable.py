"""The `portable` lowering: standard ONNX operators, for ONNX Runtime and TensorRT ≥ 10.15.

Attention, TensorScatter (the KV cache, in place under TensorRT), RotaryEmbedding, RMSNormalization.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from mara_export.graph.decomposed import attended
from mara_export.graph.experts import all_experts
from mara_export.graph.nodes import (
    CACHED_ATTENTION,
    HEADS_LAST,
    NORM,
    ROTARY,
    Builder,
    GraphContext,
    GraphPass,
    attribute,
    custom_nodes,
    dims,
    put_together,
    replace_node,
)
from mara_export.graph.qdq import quantise_qdq
from mara_export.targets import TARGETS
from mara_runtime import tensors

OPSETS = {"": 24}


def cached_attention(graph: ir.Graph, context: GraphContext) -> None:
    """CachedAttention → TensorScatter of keys and values, Attention over all of them."""
    add, on_tensorrt = Builder(graph, "portable"), TARGETS[context.options.target].is_tensorrt
    for node in custom_nodes(graph, CACHED_ATTENTION):
        q, *new, sinks, past_k, past_v, mask, write = node.inputs
        written = list[ir.Value]()
        entries: Sequence[ir.Value | None] = [past_k, past_v]
        if new[0] is not None:
            entries = written = [
                add(
                    "TensorScatter",
                    *(past, add.seated(value, f"{node.name}/{part[0]}"), write),
                    out=f"{node.name}/{part}",
                    axis=-2,
                    mode="linear",
                )
                for part, past, value in zip(("key", "value"), entries, new, strict=True)
            ]
        if sinks is not None or (attribute(node, "softcap") and on_tensorrt):  # its attention does not know them
            by_seat = attended(add, node, q, entries, mask)
        else:
            known = {name: value for name in ("scale", "softcap") if (value := attribute(node, name))}
            seated = add.seated(q, f"{node.name}/q")
            out = add("Attention", seated, *entries, mask, out=f"{node.name}/attention", **known)
            by_seat = add("Transpose", out, out=f"{node.name}/heads_last", perm=HEADS_LAST)
        replace_node(node, put_together(add, node, by_seat), *written)


def rotary_embedding(graph: ir.Graph, context: GraphContext) -> None:
    """Rotary → RotaryEmbedding."""
    add = Builder(graph, "portable")
    positions = add.input(tensors.POSITION_IDS)
    for node in custom_nodes(graph, ROTARY):
        out = f"{node.name}/rotated"
        replace_node(node, add("RotaryEmbedding", *node.inputs, positions, out=out, **rotary_attributes(node)))


def rms_norms(graph: ir.Graph, context: GraphContext) -> None:
    """RMSNorm → RMSNormalization."""
    add = Builder(graph, "portable")
    for node in custom_nodes(graph, NORM):
        epsilon = attribute(node, "epsilon")
        out = f"{node.name}/normalised"
        replace_node(node, add("RMSNormalization", *node.inputs, out=out, axis=-1, epsilon=epsilon))


def rotary_attributes(node: ir.Node) -> dict[str, Any]:
    """Of a RotaryEmbedding, in place of a Rotary: none where it turns whole heads by halves."""
    width = 2 * dims(node.inputs[1])[1]
    partial = {} if width == attribute(node, "head_dim") else {"rotary_embedding_dim": width}
    return {"interleaved": 1, **partial} if attribute(node, "interleaved") else partial


QUANTISE: GraphPass = quantise_qdq
PASSES: tuple[GraphPass, ...] = (cached_attention, rotary_embedding, rms_norms, all_experts)
