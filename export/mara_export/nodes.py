"""Between tracing and lowering: names of the custom nodes (trace.py says what each computes), the graph's edges, and
nodes in the making.

Apart from both, as whoever makes a graph without tracing one needs neither Optimum nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

DOMAIN, NODE, ROTARY, NORM = "mara", "CachedAttention", "Rotary", "RMSNorm"


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

    def others(self) -> Iterator[tuple[NodeProto, bool]]:
        """Every node, and whether it is the attention."""
        for node in self.nodes:
            yield node, node.domain == DOMAIN and node.op_type == NODE


class Parts:
    """Nodes and constants in the making, to take the place of traced ones. prefix: of the constants' names."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._prefix = prefix

    def _add(self, op: str, inputs: Sequence[str], output: str, name: str | None = None, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name or output, **attributes))
        return output

    def _several(self, op: str, inputs: Sequence[str], outputs: list[str], **attributes: Any) -> list[str]:
        self.nodes.append(helper.make_node(op, inputs, outputs, f"{outputs[0]}_{op.lower()}", **attributes))
        return outputs

    def _ints(self, *values: int) -> str:
        return self._constant("ints/" + "_".join(map(str, values)), np.array(values, np.int64))

    def _whole(self, value: int) -> str:
        return self._constant(f"whole/{value}", np.array(value, np.int64))

    def _constant(self, name: str, value: Any) -> str:
        full = f"{self._prefix}/{name}"
        if full not in self.constants:
            self.constants[full] = numpy_helper.from_array(np.asarray(value), full)
        return full
