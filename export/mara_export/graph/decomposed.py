"""The `decomposed` lowering: basic operators alone, for TensorRT 10.3 and 10.13, which have no attention and no cache.

Attention works on groups of heads: queries that share keys become rows of one matrix, so no key is repeated. Norms and
softmax are islands (precision.py): they compute in float32 whatever the rest of the graph computes in.

New entries are scattered into a *copy* of the cache, so past and present are two buffers that are swapped, except where
an engine lets them be one (ONNX Runtime).
"""

from __future__ import annotations

import onnx_ir as ir

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
    put_together,
    replace_node,
)
from mara_export.graph.portable import rotary_weights
from mara_export.graph.precision import island
from mara_export.graph.qdq import quantise_qdq
from mara_runtime import tensors

OPSETS = {"": 20}
"""The last that TensorRT 10.3 documents; blocks of int4 need one more (qdq.py)."""


def attention(graph: ir.Graph, context: GraphContext) -> None:
    """CachedAttention → ScatterND of keys and values, two MatMuls and a Softmax."""
    add, shape = Builder(graph, "decomposed"), context.shape
    heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_dim
    slots = _slots(add, kv_heads)
    for node in custom_nodes(graph, CACHED_ATTENTION):
        q, k, v, past_k, past_v, mask, _ = node.inputs
        name = str(node.name)
        # without a `reduction` attribute: the parser of 10.3 rejects even "none"
        keys = add("ScatterND", past_k, slots, k, out=f"{name}/key")
        values = add("ScatterND", past_v, slots, v, out=f"{name}/value")
        # before the product, whose sums could otherwise leave float16 at 65504
        scaled = add("Mul", q, add.constant(attribute(node, "scale")), out=f"{name}/scaled")
        seated = add.seated(scaled, f"{name}/q")
        grouped = add("Reshape", seated, add.ints(0, kv_heads, -1, size), out=f"{name}/grouped")
        columns = add("Transpose", keys, out=f"{name}/columns", perm=[0, 1, 3, 2])
        products = add("MatMul", grouped, columns, out=f"{name}/products")  # (B, kv_heads, groups · M, C)
        scores = add("Reshape", products, add.ints(0, heads, -1, 0), out=f"{name}/scores")  # 0: C, as it is
        masked = island(add("Add", scores, mask, out=f"{name}/masked"))
        weights = island(add("Softmax", masked, out=f"{name}/weights", axis=-1))
        merged = add("Reshape", weights, add.ints(0, kv_heads, -1, 0), out=f"{name}/merged")
        sums = add("MatMul", merged, values, out=f"{name}/sums")  # (B, kv_heads, groups · M, H)
        out = add("Reshape", sums, add.ints(0, heads, -1, size), out=f"{name}/out")
        by_seat = add("Transpose", out, out=f"{node.name}/heads_last", perm=HEADS_LAST)
        replace_node(node, put_together(add, node, by_seat, shape), keys, values)


def _slots(add: Builder, kv_heads: int) -> ir.Value:
    """(1, kv_heads, S, 3): conversation, head and slot that ScatterND writes each entry to, in every layer."""
    rows = add("Shape", add.input(tensors.INPUT_IDS), start=1, end=2)
    size = add("Concat", add.ints(1, kv_heads), rows, add.ints(1), axis=0)
    conversation, slot = (add("Expand", add("Reshape", part, add.ints(1, 1, -1, 1)), size) for part in add.written())
    head = add("Expand", add.constant([[[[head]] for head in range(kv_heads)]]), size)
    return add("Concat", conversation, head, slot, out="decomposed/slots", axis=-1)


def rotary(graph: ir.Graph, context: GraphContext) -> None:
    """Rotary → the products and sums of both halves of each head."""
    add, half = Builder(graph, "decomposed/rotary"), context.shape.head_dim // 2
    positions = add.input(tensors.POSITION_IDS)
    cos, sin = (  # (positions, H/2) → (1, 1, S, H/2)
        add("Unsqueeze", add("Gather", table, positions, axis=0), add.ints(1)) for table in rotary_weights(add, context)
    )
    for node in custom_nodes(graph, ROTARY):
        value, name = node.inputs[0], node.name
        low, high = (
            add("Slice", value, add.ints(start), add.ints(start + half), add.ints(-1), out=f"{name}/{side}")
            for start, side in ((0, "low"), (half, "high"))
        )
        first = add(
            "Sub",
            add("Mul", low, cos, out=f"{name}/low_cos"),
            add("Mul", high, sin, out=f"{name}/high_sin"),
            out=f"{name}/first",
        )
        second = add(
            "Add",
            add("Mul", high, cos, out=f"{name}/high_cos"),
            add("Mul", low, sin, out=f"{name}/low_sin"),
            out=f"{name}/second",
        )
        replace_node(node, add("Concat", first, second, out=f"{name}/rotated", axis=-1))


def rms_norms(graph: ir.Graph, context: GraphContext) -> None:
    """RMSNorm → x / sqrt(mean(x²) + ε) · weight, in float32 up to the weight."""
    add = Builder(graph, "decomposed/norms")
    for node in custom_nodes(graph, NORM):
        x, weight = node.inputs
        name = node.name
        squares = island(add("Mul", x, x, out=f"{name}/squares"))
        mean = island(add("ReduceMean", squares, add.ints(-1), out=f"{name}/mean", keepdims=1))
        added = island(add("Add", mean, add.constant(attribute(node, "epsilon")), out=f"{name}/added"))
        root = island(add("Sqrt", added, out=f"{name}/root"))
        unit = island(add("Div", x, root, out=f"{name}/unit"))
        replace_node(node, add("Mul", unit, weight, out=f"{name}/normalised"))


QUANTISE: GraphPass = quantise_qdq
PASSES: tuple[GraphPass, ...] = (attention, rotary, rms_norms)
