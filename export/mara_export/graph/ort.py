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
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mara_export.graph.decomposed import capped, softmax
from mara_export.graph.experts import chosen_experts
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
    Heads,
    attribute,
    custom_nodes,
    dims,
    is_weight,
    merged_heads,
    produced_by,
    put_together,
    replace_node,
)
from mara_export.graph.packed import packed_of
from mara_export.graph.portable import rms_norms, rotary_attributes, rotary_embedding
from mara_export.graph.quantise import quantise
from mara_export.graph.weights import lazy, read
from mara_runtime import tensors

OPSETS = {"": 23, MICROSOFT: 1}
_SWAPPED = [0, 1, 3, 2, 4]  # (B, M, kv_heads, groups, head_dim) ↔ (B, M, groups, kv_heads, head_dim)


def grouped_attention(graph: ir.Graph, context: GraphContext) -> None:
    """CachedAttention, and Rotary right before it, → RotaryEmbedding, ScatterND, MultiHeadAttention."""
    grouped = _GroupedAttention(graph, context)
    for node in custom_nodes(graph, CACHED_ATTENTION):
        grouped.rewrite(node)


Turn = tuple[ir.Value | None, ...]
"""The weights that a Rotary reads: its cosines and sines, (positions, W / 2) each."""


def still_tables(tables: Sequence[NDArray[np.float32]], heads: int) -> list[NDArray[np.float32]]:
    """Cosines and sines (positions, W / 2), followed by rows at which nothing rotates.

    More than one if need be: the operator requires at least as many rows as there are heads.
    """
    count = max(1, heads - len(tables[0]))
    return [
        np.concatenate([table, np.full((count, table.shape[1]), still, table.dtype)])
        for table, still in zip(tables, (1, 0), strict=True)
    ]


class _GroupedAttention:
    """What the attentions of one graph share, and the rewriting of each."""

    def __init__(self, graph: ir.Graph, context: GraphContext) -> None:
        self._add = Builder(graph, "grouped")
        self._on_cuda = context.options.target == "cuda"
        self._tables: dict[tuple[Turn, int], list[ir.Value]] = {}
        self._positions: dict[tuple[Any, ...], ir.Value] = {}
        self._slots: dict[int, ir.Value] = {}
        self._masks: dict[tuple[ir.Value | None, int], ir.Value] = {}

    def rewrite(self, node: ir.Node) -> None:
        """Replace a traced attention and what the model does right after it: putting the heads together."""
        *given, sinks, past_k, past_v, mask, _ = node.inputs
        assert past_k is not None
        assert past_v is not None
        qkv = [value for value in given if value is not None]  # or queries alone
        add, name, heads = self._add, str(node.name), Heads.of(node)
        counts = (heads.count, heads.kv, heads.kv)[: len(qkv)]
        plain, turning = _before_rotary(qkv)
        merged = merged_heads(node.outputs[0])
        swapped = heads.groups > 1 and merged is not None and self._swap_weights(plain[0], merged, heads)

        packed = [self._packed(value, f"{name}/{part}_packed") for part, value in zip("qkv", plain, strict=False)]
        together = add("Concat", *packed, out=f"{name}/qkv", axis=-1) if len(packed) > 1 else packed[0]
        rows = add("Reshape", together, add.ints(-1, sum(counts), heads.size), out=f"{name}/heads")
        if any(turning):
            rows = self._rotated(rows, turning, counts, f"{name}/rotated")
        queries, *new = self._split(rows, counts, heads.size, name)
        seated = add("Gather", queries, add.input(tensors.GRID), out=f"{name}/seated", axis=0)  # (B, M, heads, H)
        if heads.groups > 1 and not swapped:
            seated = self._swap(seated, f"{name}/q", heads.kv, heads.groups, heads.size)
        rows = add("Reshape", seated, add.ints(0, -1, heads.kv * heads.size), out=f"{name}/rows")
        keys, values, written = past_k, past_v, list[ir.Value]()
        if new:
            slots = self._written_slots(heads.kv)
            keys = add("ScatterND", past_k, slots, new[0], out=f"{name}/all_keys")
            values = add("ScatterND", past_v, slots, new[1], out=f"{name}/all_values")
            written = [keys, values]
        written_out = sinks is not None or attribute(node, "softcap")
        attend = self._attend_written_out if written_out else self._attend
        attended = attend(node, rows, keys, values, self._grouped_mask(mask, heads.groups))
        if heads.groups > 1 and not swapped:
            attended = self._swap(attended, f"{name}/out", heads.groups, heads.kv, heads.size)
        replace_node(node, put_together(add, node, attended), *written)

    def _attend(self, node: ir.Node, rows: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value) -> ir.Value:
        """Queries in groups, (B, M · groups, kv_heads · head_dim), over the cache; as many results."""
        return self._add(
            "MultiHeadAttention",
            *(rows, keys, values, None, None, mask),
            out=f"{node.name}/attention",
            domain=MICROSOFT,
            num_heads=Heads.of(node).kv,
            scale=attribute(node, "scale"),
        )

    def _attend_written_out(
        self, node: ir.Node, rows: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value
    ) -> ir.Value:
        """As `_attend`, in basic operators: MultiHeadAttention does not cap scores, and knows no sinks."""
        add, name, heads = self._add, node.name, Heads.of(node)
        apart = add("Reshape", rows, add.ints(0, -1, heads.kv, heads.size), out=f"{name}/apart")
        queries = add("Transpose", apart, out=f"{name}/queries", perm=HEADS_LAST)  # (B, kv_heads, M · groups, H)
        scaled = add("Mul", queries, add.constant(attribute(node, "scale")), out=f"{name}/scaled")
        columns = add("Transpose", keys, out=f"{name}/columns", perm=[0, 1, 3, 2])
        scores = capped(add, add("MatMul", scaled, columns, out=f"{name}/products"), node)
        weights = softmax(add, add("Add", scores, mask, out=f"{name}/masked"), node, (heads.kv, heads.groups))
        sums = add("MatMul", weights, values, out=f"{name}/sums")
        by_seat = add("Transpose", sums, out=f"{name}/heads_last", perm=HEADS_LAST)
        return add("Reshape", by_seat, add.ints(0, -1, heads.kv * heads.size), out=f"{name}/attention")

    # ── once per graph ───────────────────────────────────────────────────────────────────────────────────────────────

    def _written_slots(self, kv_heads: int) -> ir.Value:
        """(S, kv_heads, 3): where ScatterND writes each entry, as (conversation, head, slot)."""
        if kv_heads not in self._slots:
            add = self._add
            conversation, slot = (add("Unsqueeze", part, add.ints(1, 2)) for part in add.written())
            first = add("Mul", conversation, add.constant([[[1, 0, 0]]]))
            last = add("Mul", slot, add.constant([[[0, 0, 1]]]))
            heads = add.constant([[[0, head, 0] for head in range(kv_heads)]])
            self._slots[kv_heads] = add("Add", add("Add", first, last), heads)
        return self._slots[kv_heads]

    def _grouped_mask(self, mask: ir.Value | None, groups: int) -> ir.Value:
        """(B, 1, M · groups, C): every row of the mask for each query of a group."""
        key = mask, groups
        if key not in self._masks:
            assert mask is not None
            add, self._masks[key] = self._add, mask
            if groups > 1:
                apart = add("Transpose", mask, perm=HEADS_LAST)
                self._masks[key] = add(
                    "Reshape", add("Expand", apart, add.ints(1, 1, groups, 1)), add.ints(0, 1, -1, 0)
                )
        return self._masks[key]

    def _rotated(self, rows: ir.Value, turning: Sequence[ir.Node | None], counts: Sequence[int], out: str) -> ir.Value:
        """(S, all heads, head_dim), those turned that have a Rotary, which are alike. counts: of heads, by part."""
        add, one = self._add, next(filter(None, turning))
        key = tuple(one.inputs[1:]), sum(counts)
        if key not in self._tables:
            arrays = still_tables([read(value) for value in key[0]], key[1])
            names = [f"{value.name}/{key[1]}" for value in key[0] if value is not None]
            self._tables[key] = [add.weight(*each) for each in zip(names, arrays, strict=True)]
        tables = self._tables[key]
        still, more = dims(key[0][0])[0], rotary_attributes(one)
        if "rotary_embedding_dim" in more:
            more["num_heads"] = 1  # else it takes twice the tables' width for the size of a head
        positions = self._positions_of([each is not None for each in turning], counts, still)
        return add("RotaryEmbedding", rows, positions, *tables, out=out, domain=MICROSOFT, **more)

    def _positions_of(self, rotates: Sequence[bool], counts: Sequence[int], still: int) -> ir.Value:
        """(S, all heads): the row's position for heads that rotate. rotates: do queries, keys, values?"""
        key = (*rotates, *counts, still)
        if key not in self._positions:
            add = self._add
            column = add("Transpose", add.input(tensors.POSITION_IDS), perm=[1, 0])
            rotating = add.constant(np.repeat([*rotates], counts)[None])
            self._positions[key] = add("Where", rotating, column, add.constant([[still]]))
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

    def _split(self, rows: ir.Value, counts: Sequence[int], size: int, name: str) -> Sequence[ir.Value]:
        """(S, all heads, head_dim) as queries, keys and values, or queries alone.

        ONNX Runtime's CUDA provider copies sizes and addresses of unequal parts to the device, in four copies, unless
        there are three parts of the last axis.
        """
        if len(counts) == 1:
            return [rows]
        add, names = self._add, [f"{name}/{part}" for part in "qkv"]
        if not self._on_cuda:
            return add.several("Split", [rows, add.ints(*counts)], names, axis=1)
        rows = add("Reshape", rows, add.ints(0, -1), out=f"{name}/qkv_rows")
        sizes = add.ints(*(count * size for count in counts))
        parts = add.several("Split", [rows, sizes], [f"{part}_row" for part in names], axis=1)
        apart = zip(parts, counts, names, strict=True)
        return [add("Reshape", part, add.ints(0, count, size), out=out) for part, count, out in apart]

    def _swap(self, value: ir.Value, name: str, outer: int, inner: int, size: int) -> ir.Value:
        """(B, …) of heads in the order (outer, inner) as (B, M, inner, outer, head_dim)."""
        apart = self._add("Reshape", value, self._add.ints(0, -1, outer, inner, size), out=f"{name}_apart")
        return self._add("Transpose", apart, out=f"{name}_swapped", perm=_SWAPPED)

    def _swap_weights(self, queries: ir.Value, merged: ir.Value, heads: Heads) -> bool:
        """Change the order of the heads in the weights around an attention, if there are such weights."""
        product, bias = self._projection_of(queries, heads.size)
        readers = merged.consumers()
        output = readers[0] if len(readers) == 1 and readers[0].op_type == "MatMul" else None
        if product is None or output is None or not is_weight(output.inputs[1]):
            return False
        packed = packed_of(output.inputs[1])
        if packed is not None and not packed.can_swap(heads):
            return False
        self._swap_weight(product, 1, 1, heads)
        if bias is not None:
            self._swap_weight(bias, next(i for i, value in enumerate(bias.inputs) if is_weight(value)), 0, heads)
        self._swap_weight(output, 1, 0, heads)
        return True

    def _projection_of(self, value: ir.Value | None, size: int) -> tuple[ir.Node | None, ir.Node | None]:
        """The MatMul by a weight that the heads of a value come from, and the Add of a bias, if nobody else reads them.

        What lies in between treats every head alike: taking heads apart, turning them, and a norm over one.
        """
        bias = None
        while value is not None and len(value.consumers()) == 1 and (node := value.producer()) is not None:
            if node.op_type == "MatMul" and is_weight(node.inputs[1]):
                return node, bias
            if node.op_type == "Add" and bias is None and any(map(is_weight, node.inputs)):
                bias = node
                value = next(source for source in node.inputs if not is_weight(source))
                continue
            head_norm = node.op_type == NORM and is_weight(node.inputs[1]) and dims(node.inputs[1]) == (size,)
            if bias is not None or not (head_norm or node.op_type in ("Transpose", "Reshape", ROTARY)):
                break
            value = node.inputs[0]
        return None, None

    def _swap_weight(self, node: ir.Node, index: int, axis: int, heads: Heads) -> None:
        """Let a node read a weight with the heads of one axis in the order (groups, kv_heads)."""
        weight = node.inputs[index]
        assert weight is not None
        sizes, tensor, packed = dims(weight), weight.const_value, packed_of(weight)
        apart, name = [*sizes[:axis], heads.kv, heads.groups, heads.size, *sizes[axis + 1 :]], f"{weight.name}/grouped"
        if packed is not None:
            swapped = packed.with_heads_swapped(1 - axis, heads).tensor(f"{name}/{axis}")
        else:
            swapped = lazy(
                f"{name}/{axis}",
                sizes,
                lambda: np.ascontiguousarray(np.swapaxes(read(tensor).reshape(apart), axis, axis + 1)).reshape(sizes),
            )
        node.replace_input_with(index, self._add.initializer(swapped))


def _before_rotary(qkv: Sequence[ir.Value | None]) -> tuple[list[ir.Value], list[ir.Node | None]]:
    """Queries, keys and values before their rotary embedding, and it; as they are unless those that turn turn alike."""
    turning = [produced_by(ROTARY, value) for value in qkv]
    if len({(*node.inputs[1:], attribute(node, "interleaved")) for node in turning if node is not None}) > 1:
        turning = [None] * len(qkv)
    plain = [value if node is None else node.inputs[0] for value, node in zip(qkv, turning, strict=True)]
    return [value for value in plain if value is not None], turning


QUANTISE: GraphPass = quantise
PASSES: tuple[GraphPass, ...] = (
    grouped_attention,
    rotary_embedding,
    rms_norms,
    chosen_experts,
    join_projections,
    fuse_residuals,
)
