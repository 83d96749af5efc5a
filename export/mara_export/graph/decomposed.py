"""The `decomposed` lowering: basic operators alone, for TensorRT 10.3 and 10.13, which know no attention and no cache.

Attention works on groups of heads: the queries that share keys lie behind each other as rows of one matrix, so that no
key is repeated. Norms and softmax are `islands`: they compute in float32 whatever the rest of the graph computes in.

The new entries are scattered into a *copy* of the cache, so past and present are two buffers that change places, except
where an engine lets them be one (ONNX Runtime).
"""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from mara_export.graph.narrow import island
from mara_export.graph.nodes import NODE, NORM, ROTARY, Nodes
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

OPSET = 20
"""The last that TensorRT 10.3 says it reads; blocks of int4 need one more (see qdq.py)."""
_SHARED = "decomposed"
_COS, _SIN, _SLOTS = f"{_SHARED}/cos", f"{_SHARED}/sin", f"{_SHARED}/slots"


class Decomposed:
    """Nodes and constants that take the place of the traced ones. tables: names of the rotary embedding's."""

    def __init__(self, shape: ModelShape, tables: tuple[str, str]) -> None:
        self.add, self._shape = Nodes(_SHARED), shape
        for table, result in zip(tables, (_COS, _SIN), strict=True):  # (positions, H/2) → (1, 1, S, H/2)
            self.add("Unsqueeze", self.add("Gather", table, tensors.POSITION_IDS, axis=0), self.add.ints(1), to=result)
        self._slots()

    def rewrite(self, node: NodeProto) -> None:
        """Add what stands for a traced node: itself, if it is a standard one."""
        parts = {NODE: self._attention, ROTARY: self._rotary, NORM: self._norm}
        if node.domain:
            parts[node.op_type](node)
        else:
            self.add.nodes.append(node)

    def _slots(self) -> None:
        """(1, kv_heads, S, 3): where ScatterND writes each entry, as (0, head, slot). The same in every layer."""
        add, heads = self.add, self._shape.num_kv_heads
        rows = add.rows()
        column = add("Reshape", add.written_slots(rows), add.ints(1, 1, -1, 1))
        last = add("Expand", column, add("Concat", add.ints(1, heads), rows, add.ints(1), axis=0))
        size = add("Concat", add.ints(1, heads), rows, add.ints(2), axis=0)
        first = add("Expand", add.constant([[[[0, head]] for head in range(heads)]]), size)
        add("Concat", first, last, to=_SLOTS, axis=-1)

    def _attention(self, node: NodeProto) -> None:
        q, k, v, past_k, past_v, mask, _ = node.input
        out, present_k, present_v = node.output
        heads, kv_heads, size = self._shape.num_heads, self._shape.num_kv_heads, self._shape.head_dim
        add, name = self.add, node.name
        # without a `reduction` attribute: the parser of 10.3 refuses even "none"
        add("ScatterND", past_k, _SLOTS, k, to=present_k, name=f"{name}/key")
        add("ScatterND", past_v, _SLOTS, v, to=present_v, name=f"{name}/value")
        scale = add.constant(helper.get_node_attr_value(node, "scale"))
        # before the product, whose sums would else leave float16 at 65504
        scaled = add("Mul", q, scale, to=f"{name}/scaled")
        grouped = add("Reshape", scaled, add.ints(1, kv_heads, -1, size), to=f"{name}/grouped")
        columns = add("Transpose", present_k, to=f"{name}/columns", perm=[0, 1, 3, 2])
        products = add("MatMul", grouped, columns, to=f"{name}/products")  # (1, kv_heads, groups · S, C)
        scores = add("Reshape", products, add.ints(1, heads, -1, 0), to=f"{name}/scores")  # 0: C, as it is
        masked = self._island("Add", scores, mask, to=f"{name}/masked")
        weights = self._island("Softmax", masked, to=f"{name}/weights", axis=-1)
        together = add("Reshape", weights, add.ints(1, kv_heads, -1, 0), to=f"{name}/together")
        sums = add("MatMul", together, present_v, to=f"{name}/sums")  # (1, kv_heads, groups · S, H)
        add("Reshape", sums, add.ints(1, heads, -1, size), to=out, name=f"{name}/out")

    def _rotary(self, node: NodeProto) -> None:
        add, half = self.add, self._shape.head_dim // 2
        for part, value, result in zip("qk", node.input, node.output, strict=True):
            name = f"{node.name}/{part}"
            low, high = (
                add("Slice", value, add.ints(start), add.ints(start + half), add.ints(-1), to=f"{name}/{side}")
                for start, side in ((0, "low"), (half, "high"))
            )
            products = {
                (side, table): add("Mul", value, table, to=f"{name}/{side}_{table.rpartition('/')[2]}")
                for side, value in (("low", low), ("high", high))
                for table in (_COS, _SIN)
            }
            first = add("Sub", products["low", _COS], products["high", _SIN], to=f"{name}/first")
            second = add("Add", products["high", _COS], products["low", _SIN], to=f"{name}/second")
            add("Concat", first, second, to=result, name=name, axis=-1)

    def _norm(self, node: NodeProto) -> None:
        x, weight = node.input
        name, epsilon = node.name, self.add.constant(helper.get_node_attr_value(node, "epsilon"))
        squares = self._island("Mul", x, x, to=f"{name}/squares")
        mean = self._island("ReduceMean", squares, self.add.ints(-1), to=f"{name}/mean", keepdims=1)
        added = self._island("Add", mean, epsilon, to=f"{name}/added")
        root = self._island("Sqrt", added, to=f"{name}/root")
        unit = self._island("Div", x, root, to=f"{name}/unit")
        self.add("Mul", unit, weight, to=node.output[0], name=name)

    def _island(self, op: str, *inputs: str, to: str, **attributes: Any) -> str:
        self.add(op, *inputs, to=to, **attributes)
        island(self.add.nodes[-1])
        return to
