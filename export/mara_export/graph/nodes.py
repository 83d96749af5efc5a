"""Building and changing graphs (onnx-ir): the custom nodes of a trace, what every pass receives, and a node builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mara_export.options import ExportOptions, Quantisation
from mara_export.progress import Progress
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

DOMAIN = "mara"
ATTENTION, TABLE, ROTARY, NORM, LINEAR = "Attention", "RotaryTable", "Rotary", "RMSNorm", "Linear"
EXPERTS = "Experts"
"""Nodes of a trace; seam.py says what each computes."""
CACHED_ATTENTION = "CachedAttention"
"""Attention with a KV cache, as lowerings take it; traced.py says what it computes."""
HEADS_LAST = [0, 2, 1, 3]
"""(1, heads, S, head_dim) ↔ (1, S, heads, head_dim)"""
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

Tables = Mapping[tuple[str, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Cosines and sines (positions, W) of each RotaryTable, by its attributes module and layer_type."""


@dataclass(frozen=True)
class GraphContext:
    """What passes know beside the graph."""

    shape: ModelShape
    rotary: Tables
    """for as many positions as a row may have, as the model's own code makes them"""
    max_context: int
    options: ExportOptions
    agents: Path
    """the agents' traced graph"""
    progress: Progress
    quantisation: Quantisation | None = None
    """as the options ask for it and the checkpoint is; None: weights stay floats"""


GraphPass = Callable[[ir.Graph, GraphContext], None]
"""Rewrites a graph in place. The pipeline removes what nothing reads any more, and sorts the nodes in the end."""


class Builder:
    """Appends nodes and constants to a graph; each call returns the value that the node produces.

    prefix: of the names that are generated here.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self._prefix, self._count = graph, prefix, 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._inputs = {value.name: value for value in graph.inputs}

    def __call__(self, op: str, *inputs: ir.Value | None, out: str = "", name: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output. out: name of the value; name: of the node."""
        self._count += 1
        out = out or f"{self._prefix}/{op}_{self._count}"
        name = name or (out if "/" in out else f"{self._prefix}/{out}")  # graph outputs have no path
        return self.several(op, inputs, [out], name=name, **attributes)[0]

    def several(
        self, op: str, inputs: Sequence[ir.Value | None], outs: Sequence[str], name: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs; "" for one that is not needed."""
        domain = attributes.pop("domain", "")
        outputs = [ir.Value(name=out) for out in outs]
        name = name or f"{outs[0]}_{op.lower()}"
        self.graph.append(ir.node(op, inputs, attributes, domain=domain, outputs=outputs, name=name))
        return outputs

    def input(self, name: str) -> ir.Value:
        """An input of the graph, added if it has none of that name."""
        if name not in self._inputs:
            self._inputs[name] = ir.Value(name=name)
            self.graph.inputs.append(self._inputs[name])
        return self._inputs[name]

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer, unless there is one of that name: it was made from the same values."""
        return self.initializer(ir.Tensor(array, name=name))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """As `weight`, for a tensor."""
        name = str(tensor.name)
        if name not in self.graph.initializers:
            value = ir.val(name, tensor.dtype, tensor.shape.numpy(), const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def constant(self, value: Any) -> ir.Value:
        """Integers as int64, other numbers as float32, or booleans. Equal constants are one."""
        array = np.asarray(value)
        if array.dtype != bool:
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(f"{self._prefix}/constant_{len(self._constants)}", array)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A vector of integers, as sizes and axes are given."""
        return self.constant(values)

    def count_to(self, size: ir.Value) -> ir.Value:
        """0, 1, … below `size` (1,)."""
        return self("Range", self.constant(0), self("Squeeze", size, self.ints(0)), self.constant(1))

    def written(self) -> tuple[ir.Value, ir.Value]:
        """(S,) each: the conversation of each row, and the slot there that it is written to."""
        grid, seats = self.input(tensors.GRID), self("Squeeze", self.input(tensors.SEATS), self.ints(0))
        # by seat first: arithmetic of sizes and rows would have ONNX Runtime copy the sizes to the GPU in each pass
        numbers = self.count_to(self("Shape", grid, start=1, end=2))
        slots = self("Add", self("Unsqueeze", self.input(tensors.WRITE_INDICES), self.ints(1)), numbers)  # (B, M)
        conversations = self("Unsqueeze", self.count_to(self("Shape", grid, start=0, end=1)), self.ints(1))
        by_seat = self("Expand", conversations, self("Shape", grid)), slots
        conversation, slot = (self("Gather", self("Reshape", each, self.ints(-1)), seats) for each in by_seat)
        return conversation, slot

    def seated(self, heads: ir.Value | None, name: str) -> ir.Value:
        """(1, heads, S, head_dim) rows as (B, heads, M, head_dim), where attention wants them."""
        by_head = self("Gather", heads, self.input(tensors.GRID), out=f"{name}_grid", axis=2)  # (1, heads, B, M, H)
        apart = self("Squeeze", by_head, self.ints(0), out=f"{name}_apart")
        return self("Transpose", apart, out=f"{name}_seated", perm=[1, 0, 2, 3])


@dataclass(frozen=True)
class Heads:
    """Of one attention."""

    count: int
    """of queries"""
    kv: int
    size: int

    @staticmethod
    def of(attention: ir.Node) -> Heads:
        """Those of an Attention or CachedAttention."""
        return Heads(*(attribute(attention, name) for name in ("heads", "kv_heads", "head_dim")))

    @property
    def groups(self) -> int:
        """Queries that share keys and values."""
        return self.count // self.kv


def mask_name(window: int) -> str:
    """Of the mask that lets a row see its last `window` tokens, or all before it (0)."""
    return f"{tensors.ATTENTION_MASK}.{window}" if window else tensors.ATTENTION_MASK


def is_mask(name: str | None) -> bool:
    """Is this a name that `mask_name` gives?"""
    return name is not None and name.partition(".")[0] == tensors.ATTENTION_MASK


def mask_window(name: str | None) -> int:
    """What `mask_name` was given."""
    return int((name or "").partition(".")[2] or 0)


def put_together(add: Builder, attention: ir.Node, attended: ir.Value) -> ir.Value:
    """Make rows of the pass of what an attention returns by seats, (B, M, …), its heads side by side.

    They take the place of what the model puts together by itself. Returns the rows, in the shape that the traced
    attention returns, (1, heads, S, head_dim), unless nothing else reads that.
    """
    name, heads = attention.name, Heads.of(attention)
    flat = add("Reshape", attended, add.ints(-1, heads.count * heads.size), out=f"{name}/by_seat")
    rows = add("Gather", flat, add.input(tensors.SEATS), out=f"{name}/by_row", axis=0)  # (1, S, width)
    merged = merged_heads(attention.outputs[0])
    if merged is not None:
        replace(merged, rows)
        return rows  # what the model made of it is dead
    apart = add("Reshape", rows, add.ints(0, 0, heads.count, heads.size), out=f"{name}/apart")
    return add("Transpose", apart, out=f"{name}/transposed", perm=HEADS_LAST)


def merged_heads(out: ir.Value) -> ir.Value | None:
    """What Transpose and Reshape make of an attention's result, if nothing else reads it."""
    for op in ("Transpose", "Reshape"):
        readers = out.consumers()
        if len(readers) != 1 or readers[0].op_type != op:
            return None
        out = readers[0].outputs[0]
    return out


def custom_nodes(graph: ir.Graph, op: str) -> list[ir.Node]:
    """The traced nodes of a kind, in the graph's order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == op]


def matrix_products(graph: ir.Graph) -> list[ir.Node]:
    """The MatMuls by a matrix of weights."""
    products = [node for node in graph if node.op_type == "MatMul" and is_weight(node.inputs[1])]
    return [node for node in products if len(dims(node.inputs[1])) == 2]


def is_weight(value: ir.Value | None) -> bool:
    """Is a value stored in the graph?"""
    return value is not None and value.is_initializer()


def dims(weight: ir.Value | None) -> tuple[int, ...]:
    """The shape of a weight."""
    assert weight is not None
    assert weight.const_value is not None
    return tuple(weight.const_value.shape.numpy())


def produced_by(op: str, value: ir.Value | None) -> ir.Node | None:
    """The node that produces a value, if it is of that kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op else None


def attribute(node: ir.Node, name: str) -> Any:
    """The value of an attribute."""
    return node.attributes[name].value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, which becomes an output of the graph if `old` is one."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}/replaced"
        new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def replace_node(node: ir.Node, *values: ir.Value) -> None:
    """Let values take the place of a node's outputs, and remove it."""
    for old, new in zip(node.outputs, values, strict=True):
        replace(old, new)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
