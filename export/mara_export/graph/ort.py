"""The `ort` lowering, for ONNX Runtime: attention on groups of heads, few large matrix products, few nodes.

Queries that share keys become rows of one matrix, (S, groups) of them in a row, so the keys are read once for all of
them: GroupQueryAttention reads them again for each head, which takes twice the time at a context of a thousand tokens.
For that the query heads change from the order (kv_heads, groups) to (groups, kv_heads); where the matrices before and
after the attention can absorb the change, it costs nothing at run time.

Queries, keys and values go through one RotaryEmbedding: value heads have a position of their own, at which nothing
rotates. New entries are written by ScatterND, in place where past and present are bound to the same memory.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mara_export.graph.fuse import fuse_residuals, join_projections
from mara_export.graph.nodes import (
    CACHED_ATTENTION,
    HEADS_LAST,
    MICROSOFT,
    NORM,
    ROTARY,
    Builder,
    GraphContext,
    GraphPass,
    Tables,
    attribute,
    custom_nodes,
    dims,
    is_weight,
    merged_heads,
    produced_by,
    put_together,
    replace_node,
)
from mara_export.graph.portable import rms_norms, rotary_embedding
from mara_export.graph.quantise import quantise
from mara_export.graph.weights import lazy, read
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

OPSETS = {"": 23, MICROSOFT: 1}
_SWAPPED = [0, 1, 3, 2, 4]  # (B, M, kv_heads, groups, head_dim) ↔ (B, M, groups, kv_heads, head_dim)


def grouped_attention(graph: ir.Graph, context: GraphContext) -> None:
    """CachedAttention, and Rotary right before it, → RotaryEmbedding, ScatterND, MultiHeadAttention."""
    grouped = _GroupedAttention(graph, context)
    for node in custom_nodes(graph, CACHED_ATTENTION):
        grouped.rewrite(node)


def still_tables(tables: Tables, shape: ModelShape) -> Tables:
    """The rotary tables, (positions, head_dim / 2) each, followed by rows at which nothing rotates.

    More than one if need be: the operator requires at least as many rows as there are heads.
    """
    count = max(1, _all_heads(shape) - len(tables[0]))
    cos, sin = (
        np.full((count, table.shape[1]), still, table.dtype) for table, still in zip(tables, (1, 0), strict=True)
    )
    return np.concatenate([tables[0], cos]), np.concatenate([tables[1], sin])


def _all_heads(shape: ModelShape) -> int:
    """Of queries, keys and values."""
    return shape.num_heads + 2 * shape.num_kv_heads


class _GroupedAttention:
    """What the attentions of one graph share, and the rewriting of each."""

    def __init__(self, graph: ir.Graph, context: GraphContext) -> None:
        self._add, self._shape = Builder(graph, "grouped"), context.shape
        self._groups = context.shape.num_heads // context.shape.num_kv_heads
        self._on_cuda = context.options.target == "cuda"
        self._still = len(context.rotary[0])
        cos, sin = still_tables(context.rotary, context.shape)
        self._tables = self._add.weight("rotary/cos", cos), self._add.weight("rotary/sin", sin)
        self._positions: dict[tuple[bool, ...], ir.Value] = {}
        self._slots = self._written_slots()
        self._mask = self._grouped_mask()

    def rewrite(self, node: ir.Node) -> None:
        """Replace a traced attention and what the model does right after it: putting the heads together."""
        *qkv, past_k, past_v, _, _ = node.inputs
        add, name, groups, shape = self._add, str(node.name), self._groups, self._shape
        plain, rotates = zip(*(_before_rotary(value) for value in qkv), strict=True)
        merged = merged_heads(node.outputs[0])
        swapped = groups > 1 and merged is not None and self._swap_weights(plain[0], merged)

        packed = [self._packed(value, f"{name}/{part}_packed") for part, value in zip("qkv", plain, strict=True)]
        together = add("Concat", *packed, out=f"{name}/qkv", axis=-1)
        heads = add("Reshape", together, add.ints(-1, _all_heads(shape), shape.head_dim), out=f"{name}/heads")
        if any(rotates):
            positions = self._positions_of(rotates)
            heads = add("RotaryEmbedding", heads, positions, *self._tables, out=f"{name}/rotated", domain=MICROSOFT)
        queries, keys, values = self._split(heads, name)
        seated = add("Gather", queries, add.input(tensors.GRID), out=f"{name}/seated", axis=0)  # (B, M, heads, H)
        if groups > 1 and not swapped:
            seated = self._swap(seated, f"{name}/q", shape.num_kv_heads, groups)
        rows = add("Reshape", seated, add.ints(0, -1, shape.num_kv_heads * shape.head_dim), out=f"{name}/rows")
        all_keys = add("ScatterND", past_k, self._slots, keys, out=f"{name}/all_keys")
        all_values = add("ScatterND", past_v, self._slots, values, out=f"{name}/all_values")
        attended = add(
            "MultiHeadAttention",
            *(rows, all_keys, all_values, None, None, self._mask),
            out=f"{name}/attention",
            domain=MICROSOFT,
            num_heads=shape.num_kv_heads,
            scale=attribute(node, "scale"),
        )
        if groups > 1 and not swapped:
            attended = self._swap(attended, f"{name}/out", groups, shape.num_kv_heads)
        replace_node(node, put_together(add, node, attended, shape), all_keys, all_values)

    # ── once per graph ───────────────────────────────────────────────────────────────────────────────────────────────

    def _written_slots(self) -> ir.Value:
        """(S, kv_heads, 3): where ScatterND writes each entry, as (conversation, head, slot)."""
        add = self._add
        conversation, slot = (add("Unsqueeze", part, add.ints(1, 2)) for part in add.written())
        first = add("Mul", conversation, add.constant([[[1, 0, 0]]]))
        last = add("Mul", slot, add.constant([[[0, 0, 1]]]))
        heads = add.constant([[[0, head, 0] for head in range(self._shape.num_kv_heads)]])
        return add("Add", add("Add", first, last), heads)

    def _grouped_mask(self) -> ir.Value:
        """(B, 1, M · groups, C): every row of the mask for each query of a group."""
        add, mask = self._add, self._add.input(tensors.ATTENTION_MASK)
        if self._groups == 1:
            return mask
        apart = add("Transpose", mask, perm=HEADS_LAST)
        return add("Reshape", add("Expand", apart, add.ints(1, 1, self._groups, 1)), add.ints(0, 1, -1, 0))

    def _positions_of(self, rotates: Sequence[bool]) -> ir.Value:
        """(S, all heads): the row's position for heads that rotate. rotates: do queries, keys, values?"""
        key = tuple(rotates)
        if key not in self._positions:
            add = self._add
            counts = (self._shape.num_heads, self._shape.num_kv_heads, self._shape.num_kv_heads)
            column = add("Transpose", add.input(tensors.POSITION_IDS), perm=[1, 0])
            rotating = add.constant(np.repeat(key, counts)[None])
            self._positions[key] = add("Where", rotating, column, add.constant([[self._still]]))
        return self._positions[key]

    # ── parts of an attention ────────────────────────────────────────────────────────────────────────────────────────

    def _packed(self, value: ir.Value, name: str) -> ir.Value:
        """(1, heads, S, head_dim) as (1, S, heads · head_dim): what it was before the model split it, if it did."""
        transpose = produced_by("Transpose", value)
        if transpose is not None and list(attribute(transpose, "perm")) == HEADS_LAST:
            rows = transpose.inputs[0]
            split = produced_by("Reshape", rows)
            if split is not None and split.inputs[0] is not None:
                return split.inputs[0]
        else:
            rows = self._add("Transpose", value, out=f"{name}_rows", perm=HEADS_LAST)
        return self._add("Reshape", rows, self._add.ints(0, 0, -1), out=name)

    def _split(self, heads: ir.Value, name: str) -> Sequence[ir.Value]:
        """(S, all heads, head_dim) as queries, keys and values.

        ONNX Runtime's CUDA provider copies sizes and addresses of unequal parts to the device, in four copies, unless
        there are three parts of the last axis.
        """
        add, size, names = self._add, self._shape.head_dim, [f"{name}/{part}" for part in "qkv"]
        counts = self._shape.num_heads, self._shape.num_kv_heads, self._shape.num_kv_heads
        if not self._on_cuda:
            return add.several("Split", [heads, add.ints(*counts)], names, axis=1)
        rows = add("Reshape", heads, add.ints(0, -1), out=f"{name}/qkv_rows")
        sizes = add.ints(*(count * size for count in counts))
        parts = add.several("Split", [rows, sizes], [f"{part}_row" for part in names], axis=1)
        apart = zip(parts, counts, names, strict=True)
        return [add("Reshape", part, add.ints(0, count, size), out=out) for part, count, out in apart]

    def _swap(self, value: ir.Value, name: str, outer: int, inner: int) -> ir.Value:
        """(B, …) of heads in the order (outer, inner) as (B, M, inner, outer, head_dim)."""
        sizes = self._add.ints(0, -1, outer, inner, self._shape.head_dim)
        apart = self._add("Reshape", value, sizes, out=f"{name}_apart")
        return self._add("Transpose", apart, out=f"{name}_swapped", perm=_SWAPPED)

    def _swap_weights(self, queries: ir.Value, merged: ir.Value) -> bool:
        """Change the order of the heads in the weights around an attention, if there are such weights."""
        product, bias = self._projection_of(queries)
        readers = merged.consumers()
        output = readers[0] if len(readers) == 1 and readers[0].op_type == "MatMul" else None
        if product is None or output is None or not is_weight(output.inputs[1]):
            return False
        self._swap_weight(product, 1, axis=1)
        if bias is not None:
            self._swap_weight(bias, next(i for i, value in enumerate(bias.inputs) if is_weight(value)), axis=0)
        self._swap_weight(output, 1, axis=0)
        return True

    def _projection_of(self, value: ir.Value | None) -> tuple[ir.Node | None, ir.Node | None]:
        """The MatMul by a weight that the heads of a value come from, and the Add of a bias, if nobody else reads them.

        What lies in between treats every head alike: taking heads apart, and a norm over one.
        """
        bias = None
        while value is not None and len(value.consumers()) == 1 and (node := value.producer()) is not None:
            if node.op_type == "MatMul" and is_weight(node.inputs[1]):
                return node, bias
            if node.op_type == "Add" and bias is None and any(map(is_weight, node.inputs)):
                bias = node
                value = next(source for source in node.inputs if not is_weight(source))
                continue
            head_norm = (
                node.op_type == NORM and is_weight(node.inputs[1]) and dims(node.inputs[1]) == (self._shape.head_dim,)
            )
            if bias is not None or not (head_norm or node.op_type in ("Transpose", "Reshape")):
                break
            value = node.inputs[0]
        return None, None

    def _swap_weight(self, node: ir.Node, index: int, axis: int) -> None:
        """Let a node read a weight with the heads of one axis in the order (groups, kv_heads)."""
        weight = node.inputs[index]
        assert weight is not None
        sizes, tensor = dims(weight), weight.const_value
        apart = [*sizes[:axis], self._shape.num_kv_heads, self._groups, self._shape.head_dim, *sizes[axis + 1 :]]
        swapped = lazy(
            f"{weight.name}/grouped/{axis}",
            sizes,
            lambda: np.ascontiguousarray(np.swapaxes(read(tensor).reshape(apart), axis, axis + 1)).reshape(sizes),
        )
        node.replace_input_with(index, self._add.initializer(swapped))


def _before_rotary(value: ir.Value | None) -> tuple[ir.Value, bool]:
    """A value before the rotary embedding, and whether there is one."""
    node = produced_by(ROTARY, value)
    source = value if node is None else node.inputs[0]
    assert source is not None
    return source, node is not None


QUANTISE: GraphPass = quantise
PASSES: tuple[GraphPass, ...] = (grouped_attention, rotary_embedding, rms_norms, join_projections, fuse_residuals)
