"""Between tracing and lowering: names of the custom nodes (trace.py says what each computes), the graph's edges, and
nodes in the making.

Apart from both, as whoever makes a graph without tracing one needs neither Optimum nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_runtime import tensors

DOMAIN, NODE, ROTARY, NORM = "mara", "CachedAttention", "Rotary", "RMSNorm"
MICROSOFT = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


class Traced:
    """A graph, as traced or on its way, and who makes and who reads a value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def readers(self, name: str) -> list[NodeProto]:
        """The nodes that read a value."""
        return self._readers.get(name, [])

    def joined(self, name: str) -> str | None:
        """What Transpose and Reshape make of an attention's result, if nothing else reads it."""
        for op in ("Transpose", "Reshape"):
            readers = self.readers(name)
            if len(readers) != 1 or readers[0].op_type != op:
                return None
            name = readers[0].output[0]
        return name

    def made_by(self, op: str, name: str) -> NodeProto | None:
        """The node that makes a value, if it is such a one."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == op else None

    def rotated(self, name: str) -> tuple[str, bool]:
        """A value, or what it was before the rotary embedding, and whether there was one."""
        node = self.made_by(ROTARY, name)
        return (node.input[list(node.output).index(name)], True) if node is not None else (name, False)


def set_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    """Give a graph other nodes, among which there may be its own."""
    del graph.node[:]
    graph.node.extend(nodes)


class Nodes:
    """Nodes and constants in the making: each call adds a node and returns the name of its result.

    prefix: of names that are made up here.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], TensorProto] = {}
        self._prefix = prefix

    @property
    def constants(self) -> list[TensorProto]:
        """Those that the nodes read."""
        return list(self._constants.values())

    def __call__(self, op: str, *inputs: str, to: str = "", name: str = "", **attributes: Any) -> str:
        """to: name of the result; name: of the node."""
        result = to or f"{self._prefix}/{op}_{len(self.nodes)}"
        name = name or (result if "/" in result else f"{self._prefix}/{result}")  # those of the step have none
        self.nodes.append(helper.make_node(op, inputs, [result], name, **attributes))
        return result

    def several(self, op: str, inputs: Sequence[str], to: list[str], **attributes: Any) -> list[str]:
        """A node with several results."""
        self.nodes.append(helper.make_node(op, inputs, to, f"{to[0]}_{op.lower()}", **attributes))
        return to

    def constant(self, value: Any) -> str:
        """Whole numbers as int64, others as float32, or truth values. Equal ones are one."""
        array = np.asarray(value)
        if array.dtype != bool:
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self._prefix}/constant_{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return str(self._constants[key].name)

    def ints(self, *values: int) -> str:
        """A list of whole numbers, as sizes and axes are given."""
        return self.constant(values)

    def count_to(self, size: str) -> str:
        """0, 1, … below `size` (1,)."""
        return self("Range", self.constant(0), self("Squeeze", size, self.ints(0)), self.constant(1))

    def rows(self) -> str:
        """(1,) S, how many rows the pass has."""
        return self("Shape", tensors.INPUT_IDS, start=1, end=2)

    def written_slots(self, rows: str) -> str:
        """(S,) the slot that each of the `rows` (1,) is written to."""
        return self("Add", self.count_to(rows), tensors.WRITE_INDICES)
