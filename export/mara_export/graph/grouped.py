"""The `ort` lowering: attention on groups of heads, by ONNX Runtime's MultiHeadAttention over a cache of fixed size.

The queries that share keys become rows of one matrix, (S, groups) of them behind each other, so that the keys are read
once for all of them: GroupQueryAttention reads them again for each head, which takes twice the time at a thousand
tokens of context. For that the heads of the queries go from the order (kv_heads, groups) to (groups, kv_heads); where
the matrices in front of the attention and behind it can take the change, it costs nothing when the graph runs.

Queries, keys and values go through one rotary embedding: a position of its own, at which nothing turns, is what the
values' heads have. The new entries are written by ScatterND, in place where past and present are bound to one memory.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from mara_export.graph.nodes import MICROSOFT, NORM, Nodes, Traced
from mara_export.graph.weights import Weights
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

_SHARED = "grouped"
_SLOTS, _MASK = f"{_SHARED}/slots", f"{_SHARED}/mask"
_HEADS_LAST = [0, 2, 1, 3]  # (1, heads, S, head_dim) ↔ (1, S, heads, head_dim)
_SWAPPED = [0, 1, 3, 2, 4]  # (1, S, kv_heads, groups, head_dim) ↔ (1, S, groups, kv_heads, head_dim)
_ROWS_FIRST = [2, 1, 0, 3]  # (1, 1, S, C) → (S, 1, 1, C)

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


def with_still_row(tables: Tables, shape: ModelShape) -> Tables:
    """The tables of the rotary embedding, (positions, head_dim / 2) each, and behind them rows at which nothing turns.

    More than one if need be: the operator wants as many rows as it is given heads.
    """
    count = max(1, _all_heads(shape) - len(tables[0]))
    cos, sin = (
        np.full((count, table.shape[1]), still, table.dtype) for table, still in zip(tables, (1, 0), strict=True)
    )
    return np.concatenate([tables[0], cos]), np.concatenate([tables[1], sin])


def _all_heads(shape: ModelShape) -> int:
    """Of queries, keys and values."""
    return shape.num_heads + 2 * shape.num_kv_heads


class Grouped:
    """Nodes and constants that take the place of the traced attentions.

    tables: names of the rotary embedding's, by `with_still_row`; still: the first row at which nothing turns.
    """

    def __init__(self, graph: Traced, weights: Weights, shape: ModelShape, tables: tuple[str, str], still: int) -> None:
        self.add = Nodes(_SHARED)
        self._graph, self._weights, self._shape, self._tables, self._still = graph, weights, shape, tables, still
        self._groups = shape.num_heads // shape.num_kv_heads
        self._replaced: set[str] = set()
        self._positions: dict[tuple[bool, ...], str] = {}
        self._slots()
        self._mask()

    def rewrite(self, node: NodeProto) -> None:
        """Add what stands for a traced attention."""
        *qkv, past_k, past_v, _, _ = node.input
        out, present_k, present_v = node.output
        add, name, groups, shape = self.add, node.name, self._groups, self._shape
        plain, turns = zip(*(self._graph.rotated(value) for value in qkv), strict=True)
        joined = self._graph.joined(out)  # what the model's own Transpose and Reshape make of it
        swapped = groups > 1 and joined is not None and self._swap_weights(plain[0], joined)

        packed = [self._packed(value, f"{name}/{part}_packed") for part, value in zip("qkv", plain, strict=True)]
        together = add("Concat", *packed, to=f"{name}/qkv", axis=-1)
        heads = add("Reshape", together, add.ints(-1, _all_heads(shape), shape.head_dim), to=f"{name}/heads")
        if any(turns):
            positions = self._positions_of(turns)
            heads = add("RotaryEmbedding", heads, positions, *self._tables, to=f"{name}/rotated", domain=MICROSOFT)
        sizes = add.ints(shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        queries, keys, values = add.several("Split", [heads, sizes], [f"{name}/{part}" for part in "qkv"], axis=1)
        if groups > 1 and not swapped:
            queries = self._swap(queries, f"{name}/q", shape.num_kv_heads, groups)
        queries = add("Reshape", queries, add.ints(1, -1, shape.num_kv_heads * shape.head_dim), to=f"{name}/rows")
        for past, new, present in ((past_k, keys, present_k), (past_v, values, present_v)):
            add("ScatterND", past, _SLOTS, new, to=present, name=f"{new}_scatter")

        result = joined or f"{name}/out_packed"
        attended = f"{name}/out_grouped" if groups > 1 else result
        mask = _MASK if groups > 1 else tensors.ATTENTION_MASK
        add(
            "MultiHeadAttention",
            *(queries, present_k, present_v, "", "", mask),
            to=attended,
            name=f"{name}/attention",
            domain=MICROSOFT,
            num_heads=shape.num_kv_heads,
            scale=helper.get_node_attr_value(node, "scale"),
        )
        if groups > 1:
            if not swapped:
                attended = self._swap(attended, f"{name}/out", groups, shape.num_kv_heads)
            add("Reshape", attended, add.ints(1, -1, shape.num_heads * shape.head_dim), to=result)
        if joined is None:
            sizes = add.ints(0, 0, shape.num_heads, shape.head_dim)
            add("Transpose", add("Reshape", result, sizes, to=f"{name}/out_rows"), to=out, perm=_HEADS_LAST)
        else:
            self._replaced.add(joined)

    def replaces(self, node: NodeProto) -> bool:
        """Has an attention taken the place of this traced node?"""
        return bool(self._replaced & set(node.output))

    # ── once in a graph ──────────────────────────────────────────────────────────────────────────────────────────────

    def _slots(self) -> None:
        """(S, kv_heads, 3): where ScatterND writes each entry, as (0, head, slot). The same in every layer."""
        add = self.add
        slot = add("Unsqueeze", add.written_slots(add.rows()), add.ints(1, 2))
        last = add("Mul", slot, add.constant([[[0, 0, 1]]]))
        add("Add", last, add.constant([[[0, head, 0] for head in range(self._shape.num_kv_heads)]]), to=_SLOTS)

    def _mask(self) -> None:
        """(1, 1, S · groups, C): every row of the mask for each query of a group."""
        if self._groups > 1:
            add = self.add
            apart = add("Transpose", tensors.ATTENTION_MASK, perm=_ROWS_FIRST)
            add("Reshape", add("Expand", apart, add.ints(1, 1, self._groups, 1)), add.ints(1, 1, -1, 0), to=_MASK)

    def _positions_of(self, turns: Sequence[bool]) -> str:
        """(S, all heads): the row's position for the heads that turn; for queries, keys, values each: do they?"""
        key = tuple(turns)
        if key not in self._positions:
            add = self.add
            counts = (self._shape.num_heads, self._shape.num_kv_heads, self._shape.num_kv_heads)
            column = add("Transpose", tensors.POSITION_IDS, perm=[1, 0])
            turning = add.constant(np.repeat(key, counts)[None])
            self._positions[key] = add("Where", turning, column, add.constant([[self._still]]))
        return self._positions[key]

    # ── an attention's parts ─────────────────────────────────────────────────────────────────────────────────────────

    def _packed(self, value: str, name: str) -> str:
        """(1, heads, S, head_dim) as (1, S, heads · head_dim): what it was before the model split it, if it did."""
        apart = self._graph.made_by("Transpose", value)
        if apart is not None and list(apart.attribute[0].ints) == _HEADS_LAST:
            rows = apart.input[0]
            split = self._graph.made_by("Reshape", rows)
            if split is not None:
                return str(split.input[0])
        else:
            rows = self.add("Transpose", value, to=f"{name}_rows", perm=_HEADS_LAST)
        return self.add("Reshape", rows, self.add.ints(0, 0, -1), to=name)

    def _swap(self, value: str, name: str, outer: int, inner: int) -> str:
        """(1, …) of heads in the order (outer, inner) as (1, S, inner, outer, head_dim)."""
        sizes = self.add.ints(1, -1, outer, inner, self._shape.head_dim)
        apart = self.add("Reshape", value, sizes, to=f"{name}_apart")
        return self.add("Transpose", apart, to=f"{name}_swapped", perm=_SWAPPED)

    def _swap_weights(self, queries: str, joined: str) -> bool:
        """Change the order of the heads in the weights around an attention, if there are such."""
        product, bias = self._projection_of(queries)
        behind = self._graph.readers(joined)
        if (
            product is None
            or len(behind) != 1
            or behind[0].op_type != "MatMul"
            or behind[0].input[1] not in self._weights
        ):
            return False
        product.input[1] = self._swapped(product.input[1], 1)
        if bias is not None:
            index = next(i for i, name in enumerate(bias.input) if name in self._weights)
            bias.input[index] = self._swapped(bias.input[index], 0)
        behind[0].input[1] = self._swapped(behind[0].input[1], 0)
        return True

    def _projection_of(self, value: str) -> tuple[NodeProto | None, NodeProto | None]:
        """The MatMul by a weight that the heads of a value come from, and the Add of a bias, if nobody else reads them.

        What lies between treats every head alike: taking heads apart, and a norm over one.
        """
        bias = None
        while len(self._graph.readers(value)) == 1 and (node := self._graph.maker.get(value)) is not None:
            if node.op_type == "MatMul" and node.input[1] in self._weights:
                return node, bias
            if node.op_type == "Add" and bias is None and any(name in self._weights for name in node.input):
                bias = node
                value = next(name for name in node.input if name not in self._weights)
                continue
            of_one_head = (
                node.op_type == NORM
                and node.input[1] in self._weights
                and self._weights.shape(node.input[1]) == (self._shape.head_dim,)
            )
            if bias is not None or not (of_one_head or node.op_type in ("Transpose", "Reshape")):
                break
            value = node.input[0]
        return None, None

    def _swapped(self, name: str, axis: int) -> str:
        """A weight with the heads of one axis in the order (groups, kv_heads)."""
        sizes = self._weights.shape(name)
        apart = [*sizes[:axis], self._shape.num_kv_heads, self._groups, self._shape.head_dim, *sizes[axis + 1 :]]
        turned = f"{name}/{_SHARED}/{axis}"
        read = self._weights.read
        self._weights.make(turned, sizes, lambda: np.swapaxes(read(name).reshape(apart), axis, axis + 1).reshape(sizes))
        return turned
