"""The `decomposed` lowering: basic operators alone, for TensorRT 10.3 and 10.13, which know no attention and no cache.

Attention works on groups of heads: the queries that share keys lie behind each other as rows of one matrix, so that no
key is repeated. Norms and softmax are `islands`: they compute in float32 whatever the rest of the graph computes in.

The new entries are scattered into a *copy* of the cache, so past and present are two buffers that change places, except
where an engine lets them be one (ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from mara_export.narrow import island
from mara_export.nodes import NODE, NORM, ROTARY, Parts
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

OPSET = 20
"""The last that TensorRT 10.3 says it reads; blocks of int4 need one more (see qdq.py)."""
_SHARED = "decomposed"
_COS, _SIN, _SLOTS = f"{_SHARED}/cos", f"{_SHARED}/sin", f"{_SHARED}/slots"


class Decomposed(Parts):
    """Nodes and constants that take the place of the traced ones. tables: names of the rotary embedding's."""

    def __init__(self, shape: ModelShape, tables: tuple[str, str]) -> None:
        super().__init__(_SHARED)
        self._shape = shape
        for table, result in zip(tables, (_COS, _SIN), strict=True):  # (positions, H/2) → (1, 1, S, H/2)
            rows = self._add("Gather", [table, tensors.POSITION_IDS], f"{result}_rows", axis=0)
            self._add("Unsqueeze", [rows, self._ints(1)], result)
        self._slots()

    def rewrite(self, node: NodeProto) -> None:
        """Add what stands for a traced node: itself, if it is a standard one."""
        parts = {NODE: self._attention, ROTARY: self._rotary, NORM: self._norm}
        if node.domain:
            parts[node.op_type](node)
        else:
            self.nodes.append(node)

    def _slots(self) -> None:
        """(1, kv_heads, S, 3): where ScatterND writes each entry, as (0, head, slot). The same in every layer."""
        heads = self._shape.num_kv_heads
        name = f"{_SHARED}/write"
        count = self._add("Shape", [tensors.INPUT_IDS], f"{name}/count", start=1, end=2)
        end = self._add("Squeeze", [count, self._ints(0)], f"{name}/end")
        rows = self._add("Range", [self._whole(0), end, self._whole(1)], f"{name}/rows")
        slots = self._add("Add", [rows, tensors.WRITE_INDICES], f"{name}/slots")
        column = self._add("Reshape", [slots, self._ints(1, 1, -1, 1)], f"{name}/column")
        size = self._add("Concat", [self._ints(1, heads), count, self._ints(1)], f"{name}/size", axis=0)
        last = self._add("Expand", [column, size], f"{name}/slot")
        of_heads = np.zeros((1, heads, 1, 2), np.int64)
        of_heads[0, :, 0, 1] = np.arange(heads)
        size = self._add("Concat", [self._ints(1, heads), count, self._ints(2)], f"{name}/heads_size", axis=0)
        first = self._add("Expand", [self._constant("heads", of_heads), size], f"{name}/head")
        self._add("Concat", [first, last], _SLOTS, axis=-1)

    def _attention(self, node: NodeProto) -> None:
        q, k, v, past_k, past_v, mask, _ = node.input
        out, present_k, present_v = node.output
        name, heads, kv_heads, size = node.name, self._shape.num_heads, self._shape.num_kv_heads, self._shape.head_dim
        # without a `reduction` attribute: the parser of 10.3 refuses even "none"
        self._add("ScatterND", [past_k, _SLOTS, k], present_k, f"{name}/key")
        self._add("ScatterND", [past_v, _SLOTS, v], present_v, f"{name}/value")
        scale = next(float(a.f) for a in node.attribute if a.name == "scale")
        # before the product, whose sums would else leave float16 at 65504
        scaled = self._add("Mul", [q, self._constant(f"scale/{name}", np.float32(scale))], f"{name}/scaled")
        grouped = self._add("Reshape", [scaled, self._ints(1, kv_heads, -1, size)], f"{name}/grouped")
        columns = self._add("Transpose", [present_k], f"{name}/columns", perm=[0, 1, 3, 2])
        products = self._add("MatMul", [grouped, columns], f"{name}/products")  # (1, kv_heads, groups · S, C)
        scores = self._add("Reshape", [products, self._ints(1, heads, -1, 0)], f"{name}/scores")  # 0: C, as it is
        masked = self._island("Add", [scores, mask], f"{name}/masked")
        weights = self._island("Softmax", [masked], f"{name}/weights", axis=-1)
        together = self._add("Reshape", [weights, self._ints(1, kv_heads, -1, 0)], f"{name}/together")
        sums = self._add("MatMul", [together, present_v], f"{name}/sums")  # (1, kv_heads, groups · S, H)
        self._add("Reshape", [sums, self._ints(1, heads, -1, size)], out, f"{name}/out")

    def _rotary(self, node: NodeProto) -> None:
        half = self._shape.head_dim // 2
        for part, value, result in zip("qk", node.input, node.output, strict=True):
            name = f"{node.name}/{part}"
            low, high = (
                self._add(
                    "Slice", [value, self._ints(start), self._ints(start + half), self._ints(-1)], f"{name}/{side}"
                )
                for start, side in ((0, "low"), (half, "high"))
            )
            products = {
                (side, table): self._add("Mul", [value, table], f"{name}/{side}_{table.rpartition('/')[2]}")
                for side, value in (("low", low), ("high", high))
                for table in (_COS, _SIN)
            }
            first = self._add("Sub", [products["low", _COS], products["high", _SIN]], f"{name}/first")
            second = self._add("Add", [products["high", _COS], products["low", _SIN]], f"{name}/second")
            self._add("Concat", [first, second], result, name, axis=-1)

    def _norm(self, node: NodeProto) -> None:
        x, weight = node.input
        epsilon = next(float(a.f) for a in node.attribute if a.name == "epsilon")
        name = node.name
        squares = self._island("Mul", [x, x], f"{name}/squares")
        mean = self._island("ReduceMean", [squares, self._ints(-1)], f"{name}/mean", keepdims=1)
        added = self._island("Add", [mean, self._constant(f"epsilon/{name}", np.float32(epsilon))], f"{name}/added")
        root = self._island("Sqrt", [added], f"{name}/root")
        unit = self._island("Div", [x, root], f"{name}/unit")
        self._add("Mul", [unit, weight], node.output[0], name)

    def _island(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._add(op, inputs, output, **attributes)
        island(self.nodes[-1])
        return output
