"""The `decomposed` lowering: basic operators alone, for TensorRT 10.3 and 10.13, which have no attention and no cache.

Attention works on groups of heads: queries that share keys become rows of one matrix, so no key is repeated. Norms and
softmax are islands (precision.py): they compute in float32 whatever the rest of the graph computes in.

New entries are scattered into a *copy* of the cache, so past and present are two buffers that are swapped, except where
an engine lets them be one (ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mara_export.graph.experts import all_experts
from mara_export.graph.nodes import (
    CACHED_ATTENTION,
    HEADS_LAST,
    NORM,
    ROTARY,
    Builder,
    GraphContext,
    GraphPass,
    Heads,
    attribute,
    custom_nodes,
    dims,
    put_together,
    replace_node,
)
from mara_export.graph.precision import island
from mara_export.graph.qdq import quantise_qdq
from mara_runtime import tensors

OPSETS = {"": 20}
"""The last that TensorRT 10.3 documents; blocks of int4 need one more (qdq.py)."""


def attention(graph: ir.Graph, context: GraphContext) -> None:
    """CachedAttention → ScatterND of keys and values, two MatMuls and a Softmax."""
    add = Builder(graph, "decomposed")
    slots: dict[int, ir.Value] = {}
    for node in custom_nodes(graph, CACHED_ATTENTION):
        q, k, v, _, keys, values, mask, _ = node.inputs
        name, heads, written = str(node.name), Heads.of(node), []
        if k is not None:
            if heads.kv not in slots:
                slots[heads.kv] = _slots(add, heads.kv)
            # without a `reduction` attribute: the parser of 10.3 rejects even "none"
            keys = add("ScatterND", keys, slots[heads.kv], k, out=f"{name}/key")
            values = add("ScatterND", values, slots[heads.kv], v, out=f"{name}/value")
            written = [keys, values]
        replace_node(node, put_together(add, node, attended(add, node, q, (keys, values), mask)), *written)


def attended(
    add: Builder, node: ir.Node, q: ir.Value | None, entries: Sequence[ir.Value | None], mask: ir.Value | None
) -> ir.Value:
    """What an attention returns of queries (1, heads, S, head_dim), by seats: (B, M, heads, head_dim).

    entries: keys and values of the cache.
    """
    name, heads, (keys, values) = str(node.name), Heads.of(node), entries
    # before the product, whose sums could otherwise leave float16 at 65504
    scaled = add("Mul", q, add.constant(attribute(node, "scale")), out=f"{name}/scaled")
    seated = add.seated(scaled, f"{name}/q")
    grouped = add("Reshape", seated, add.ints(0, heads.kv, -1, heads.size), out=f"{name}/grouped")
    columns = add("Transpose", keys, out=f"{name}/columns", perm=[0, 1, 3, 2])
    products = add("MatMul", grouped, columns, out=f"{name}/products")  # (B, kv_heads, groups · M, C)
    products = capped(add, products, node)
    scores = add("Reshape", products, add.ints(0, heads.count, -1, 0), out=f"{name}/scores")  # 0: C, as it is
    weights = softmax(add, add("Add", scores, mask, out=f"{name}/masked"), node, (heads.count, 1))
    merged = add("Reshape", weights, add.ints(0, heads.kv, -1, 0), out=f"{name}/merged")
    sums = add("MatMul", merged, values, out=f"{name}/sums")  # (B, kv_heads, groups · M, H)
    out = add("Reshape", sums, add.ints(0, heads.count, -1, heads.size), out=f"{name}/out")
    return add("Transpose", out, out=f"{name}/heads_last", perm=HEADS_LAST)


def softmax(add: Builder, masked: ir.Value, attention: ir.Node, heads: tuple[int, int]) -> ir.Value:
    """Weights of masked scores (B, h₀, M · h₁, C). heads: (h₀, h₁), as the model's are in the scores.

    An attention's sinks are scores of one more slot, which has no value.
    """
    name, sinks = attention.name, attention.inputs[3]
    scores = island(masked)
    if sinks is not None:
        apart = add("Reshape", sinks, add.ints(1, heads[0], 1, heads[1]), out=f"{name}/sinks_apart")
        conversations, seats = (add("Shape", add.input(tensors.GRID), start=i, end=i + 1) for i in range(2))
        size = add("Concat", conversations, add.ints(heads[0]), seats, add.ints(heads[1]), axis=0)
        spread = add("Expand", apart, size, out=f"{name}/sinks_spread")  # (B, h₀, M, h₁)
        column = add("Reshape", spread, add.ints(0, heads[0], -1, 1), out=f"{name}/sinks_column")
        scores = island(add("Concat", scores, column, out=f"{name}/with_sinks", axis=-1))
    weights = island(add("Softmax", scores, out=f"{name}/weights", axis=-1))
    if sinks is not None:
        ends = add.ints(0), add.ints(-1), add.ints(-1)
        weights = island(add("Slice", weights, *ends, out=f"{name}/without_sinks"))
    return weights


def capped(add: Builder, scores: ir.Value, attention: ir.Node) -> ir.Value:
    """Scores, softly kept below an attention's cap if it has one."""
    cap, name = attribute(attention, "softcap"), attention.name
    if not cap:
        return scores
    part = island(add("Div", scores, add.constant(cap), out=f"{name}/part"))
    bent = island(add("Tanh", part, out=f"{name}/bent"))
    return island(add("Mul", bent, add.constant(cap), out=f"{name}/capped"))


def _slots(add: Builder, kv_heads: int) -> ir.Value:
    """(1, kv_heads, S, 3): conversation, head and slot that ScatterND writes each entry to, in every layer."""
    rows = add("Shape", add.input(tensors.INPUT_IDS), start=1, end=2)
    size = add("Concat", add.ints(1, kv_heads), rows, add.ints(1), axis=0)
    conversation, slot = (add("Expand", add("Reshape", part, add.ints(1, 1, -1, 1)), size) for part in add.written())
    head = add("Expand", add.constant([[[[head]] for head in range(kv_heads)]]), size)
    return add("Concat", conversation, head, slot, out=f"decomposed/slots_{kv_heads}", axis=-1)


def rotary(graph: ir.Graph, context: GraphContext) -> None:
    """Rotary → products and sums of the two numbers that turn together."""
    add = Builder(graph, "decomposed/rotary")
    positions = add.input(tensors.POSITION_IDS)
    angles: dict[ir.Value | None, ir.Value] = {}
    for node in custom_nodes(graph, ROTARY):
        value, *tables = node.inputs
        name, half, pairs = node.name, dims(tables[0])[1], attribute(node, "interleaved")
        for table in tables:  # (positions, W/2) → (1, 1, S, W/2)
            if table not in angles:
                angles[table] = add("Unsqueeze", add("Gather", table, positions, axis=0), add.ints(1))
        cos, sin = (angles[table] for table in tables)
        # starts, ends, axes, and steps
        sides = ((0, 2 * half, -1, 2), (1, 2 * half, -1, 2)) if pairs else ((0, half, -1), (half, 2 * half, -1))
        low, high = (
            add("Slice", value, *map(add.ints, side), out=f"{name}/{part}")
            for part, side in zip(("low", "high"), sides, strict=True)
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
        if pairs:
            apart = [add("Unsqueeze", turned, add.ints(-1)) for turned in (first, second)]
            parts = [add("Reshape", add("Concat", *apart, axis=-1), add.ints(0, 0, 0, 2 * half))]
        else:
            parts = [first, second]
        if 2 * half < attribute(node, "head_dim"):
            rest = map(add.ints, (2 * half, attribute(node, "head_dim"), -1))
            parts.append(add("Slice", value, *rest, out=f"{name}/rest"))
        replace_node(node, add("Concat", *parts, out=f"{name}/rotated", axis=-1))


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
PASSES: tuple[GraphPass, ...] = (attention, rotary, rms_norms, all_experts)
