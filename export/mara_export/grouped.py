"""The `ort` lowering: attention on groups of heads, by ONNX Runtime's MultiHeadAttention over a cache of fixed size.

The queries that share keys become rows of one matrix, (S, groups) of them behind each other, so that the keys are read
once for all of them: GroupQueryAttention reads them again for each head, which takes twice the time at a thousand
tokens of context. For that the heads of the queries go from the order (kv_heads, groups) to (groups, kv_heads); where
the matrices in front of the attention and behind it can take the change, it costs nothing when the graph runs.

The new entries are written by ScatterND, in place where past and present are bound to one memory.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, numpy_helper

from mara_export.nodes import Parts, Traced
from mara_export.weights import Weights
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

MICROSOFT = "com.microsoft"
_SHARED = "grouped"
_SLOTS, _MASK = f"{_SHARED}/slots", f"{_SHARED}/mask"
_HEADS_LAST = [0, 2, 1, 3]  # (1, heads, S, head_dim) ↔ (1, S, heads, head_dim)
_SWAPPED = [0, 1, 3, 2, 4]  # (1, S, kv_heads, groups, head_dim) ↔ (1, S, groups, kv_heads, head_dim)
_LARGE = 2**40


@dataclass(frozen=True)
class Projection:
    """A matrix product by a weight, with or without a bias."""

    value: str
    """what is multiplied"""
    product: NodeProto
    sum: NodeProto | None
    bias: str | None


class Grouped(Parts):
    """Nodes and constants that take the place of the traced attentions. tables: names of the rotary embedding's."""

    def __init__(self, graph: Traced, weights: Weights, shape: ModelShape, tables: tuple[str, str]) -> None:
        super().__init__(_SHARED)
        self.projected: dict[str, tuple[str, str, str]] = {}
        """of each attention: the values (1, S, heads · head_dim) that it takes for q, k and v"""
        self._graph, self._weights, self._shape, self._tables = graph, weights, shape, tables
        self._groups = shape.num_heads // shape.num_kv_heads
        self._replaced: set[str] = set()
        self._slots()
        self._mask()

    def rewrite(self, node: NodeProto) -> None:
        """Add what stands for a traced attention."""
        *qkv, past_k, past_v, _, _ = node.input
        out, present_k, present_v = node.output
        name, groups = node.name, self._groups
        plain, rotates = zip(*(self._graph.rotated(value) for value in qkv), strict=True)
        q, k, v = (self._packed(value, f"{name}/{part}") for part, value in zip("qkv", plain, strict=True))
        self.projected[name] = q, k, v
        joined = self._graph.joined(out)  # what the model's own Transpose and Reshape make of it
        swapped = groups > 1 and joined is not None and self._swap_weights(q, joined)
        queries, keys = (
            self._rotary(value, f"{name}/{part}_rotated") if turns else value
            for part, value, turns in (("q", q, rotates[0]), ("k", k, rotates[1]))
        )
        if groups > 1:
            if not swapped:
                queries = self._swap(queries, f"{name}/q", self._shape.num_kv_heads, groups)
            rows = self._ints(1, -1, self._shape.num_kv_heads * self._shape.head_dim)
            queries = self._add("Reshape", [queries, rows], f"{name}/q_grouped")
        for past, value, present, part in ((past_k, keys, present_k, "key"), (past_v, v, present_v, "value")):
            entries = self._add("Reshape", [value, self._ints(-1, self._shape.head_dim)], f"{name}/{part}_entries")
            self._add("ScatterND", [past, _SLOTS, entries], present, f"{name}/{part}")

        result = joined or f"{name}/out_packed"
        attended = f"{name}/out_grouped" if groups > 1 else result
        self._add(
            "MultiHeadAttention",
            [queries, present_k, present_v, "", "", _MASK if groups > 1 else tensors.ATTENTION_MASK],
            attended,
            f"{name}/attention",
            domain=MICROSOFT,
            num_heads=self._shape.num_kv_heads,
            scale=next(float(a.f) for a in node.attribute if a.name == "scale"),
        )
        if groups > 1:
            if not swapped:
                attended = self._swap(attended, f"{name}/out", groups, self._shape.num_kv_heads)
            whole = self._ints(1, -1, self._shape.num_heads * self._shape.head_dim)
            self._add("Reshape", [attended, whole], result)
        if joined is None:
            sizes = self._ints(0, 0, self._shape.num_heads, self._shape.head_dim)
            rows_apart = self._add("Reshape", [result, sizes], f"{name}/out_rows")
            self._add("Transpose", [rows_apart], out, perm=_HEADS_LAST)
        else:
            self._replaced.add(joined)

    def replaces(self, node: NodeProto) -> bool:
        """Has an attention taken the place of this traced node?"""
        return bool(self._replaced & set(node.output))

    # ── once in a graph ──────────────────────────────────────────────────────────────────────────────────────────────

    def _slots(self) -> None:
        """(S · kv_heads, 3): where ScatterND writes each entry, as (0, head, slot). The same in every layer."""
        heads = self._shape.num_kv_heads
        name = f"{_SHARED}/write"
        rows = self._add("Shape", [tensors.INPUT_IDS], f"{name}/rows", start=1, end=2)
        count = self._add("Mul", [rows, self._ints(heads)], f"{name}/count")
        end = self._add("Squeeze", [count, self._ints(0)], f"{name}/end")
        number = self._add("Range", [self._whole(0), end, self._whole(1)], f"{name}/number")
        column = self._add("Unsqueeze", [number, self._ints(1)], f"{name}/column")
        parts = self._add(
            "Div", [column, self._constant("divisors", np.array([[_LARGE, 1, heads]], np.int64))], f"{name}/parts"
        )
        place = self._add(
            "Mod", [parts, self._constant("moduli", np.array([[_LARGE, heads, _LARGE]], np.int64))], f"{name}/place"
        )
        start = self._add("Concat", [self._ints(0, 0), tensors.WRITE_INDICES], f"{name}/start", axis=0)
        self._add("Add", [place, start], _SLOTS)

    def _mask(self) -> None:
        """(1, 1, S · groups, C): every row of the mask for each query of a group."""
        if self._groups > 1:
            name = f"{_SHARED}/mask"
            rows = self._add("Squeeze", [tensors.ATTENTION_MASK, self._ints(0, 1)], f"{name}/rows")
            apart = self._add("Unsqueeze", [rows, self._ints(1)], f"{name}/apart")
            repeated = self._add("Expand", [apart, self._ints(1, self._groups, 1)], f"{name}/repeated")
            flat = self._add("Flatten", [repeated], f"{name}/flat", axis=2)
            self._add("Unsqueeze", [flat, self._ints(0, 1)], _MASK)

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
            rows = self._add("Transpose", [value], f"{name}_rows", perm=_HEADS_LAST)
        return self._add("Reshape", [rows, self._ints(0, 0, -1)], f"{name}_packed")

    def _rotary(self, value: str, result: str) -> str:
        return self._add("RotaryEmbedding", [value, tensors.POSITION_IDS, *self._tables], result, domain=MICROSOFT)

    def _swap(self, value: str, name: str, outer: int, inner: int) -> str:
        """(1, …) of heads in the order (outer, inner) as (1, S, inner, outer, head_dim)."""
        sizes = self._ints(1, -1, outer, inner, self._shape.head_dim)
        apart = self._add("Reshape", [value, sizes], f"{name}_apart")
        return self._add("Transpose", [apart], f"{name}_swapped", perm=_SWAPPED)

    def _swap_weights(self, queries: str, joined: str) -> bool:
        """Change the order of the heads in the weights around an attention, if there are such."""
        before = projection(queries, self._graph.maker, self._weights)
        if before is None:
            return False
        made = (before.product, before.sum or before.product)
        behind = self._graph.readers(joined)
        alone = all(len(self._graph.readers(node.output[0])) == 1 for node in made) and len(behind) == 1
        if not alone or behind[0].op_type != "MatMul" or behind[0].input[1] not in self._weights:
            return False

        def swapped(name: str, axis: int) -> str:
            values = self._weights.read(name)
            sizes = list(values.shape)
            sizes[axis : axis + 1] = [self._shape.num_kv_heads, self._groups, self._shape.head_dim]
            turned: NDArray[Any] = np.swapaxes(values.reshape(sizes), axis, axis + 1).reshape(values.shape)
            self._weights.add(numpy_helper.from_array(np.ascontiguousarray(turned), f"{name}/{_SHARED}"))
            return f"{name}/{_SHARED}"

        before.product.input[1] = swapped(before.product.input[1], 1)
        if before.sum is not None and before.bias is not None:
            index = list(before.sum.input).index(before.bias)
            before.sum.input[index] = swapped(before.bias, 0)
        behind[0].input[1] = swapped(behind[0].input[1], 0)
        return True


def projection(name: str, makers: dict[str, NodeProto], weights: Weights) -> Projection | None:
    """The projection that makes a value, if one does."""
    node, total, bias = makers.get(name), None, None
    if node is not None and node.op_type == "Add":
        total = node
        bias, product = sorted(node.input, key=lambda value: value not in weights)
        if bias not in weights:
            return None
        node = makers.get(product)
    if node is None or node.op_type != "MatMul" or node.input[1] not in weights:
        return None
    return Projection(node.input[0], node, total, bias)
