"""A graph's weights: read and written one at a time, so that no stage holds a second copy of the model."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mara_export.graph.nodes import set_nodes

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph's own file."""
_M_MMAP_THRESHOLD = -3
_ALIGNMENT = 4096
"""Of tensors in the data file, so that an engine may map them into memory."""


def load(path: Path) -> tuple[onnx.ModelProto, Weights]:
    """A graph without its weights, and what reads them."""
    model = onnx.load(str(path), load_external_data=False)
    folder = str(path.parent)
    for node in model.graph.node:  # constants are values that the graph's rewriting reads
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_location == TensorProto.EXTERNAL:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t, folder)))
    _read_themselves(model.graph)
    return model, Weights(model.graph, path.parent)


def _read_themselves(graph: onnx.GraphProto) -> None:
    """Of several equal weights the tracer keeps one, and Identity for the others: let all read the one."""
    kept = {tensor.name: tensor.name for tensor in graph.initializer}
    ends = {output.name for output in graph.output}
    nodes = []
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in kept and node.output[0] not in ends:
            kept[node.output[0]] = kept[node.input[0]]
            continue
        for i, name in enumerate(node.input):
            node.input[i] = kept.get(name, name)
        nodes.append(node)
    set_nodes(graph, nodes)


def return_large_blocks() -> None:
    """From now on, let freed matrices go back to the system at once.

    glibc learns from the first ones freed to keep such blocks, and its heap then grows to three times the model.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or Windows, has no such habit
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class Weights:
    """The initializers of a graph that was loaded without its external data, which lies in `folder`."""

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self._graph = graph
        self._folder = str(folder)
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._made: dict[str, Callable[[], NDArray[Any]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a weight, without reading it."""
        return tuple(self._tensors[name].dims)

    def read(self, name: str) -> NDArray[Any]:
        """A weight's values."""
        return self._made[name]() if name in self._made else numpy_helper.to_array(self._tensors[name], self._folder)

    def add(self, tensor: TensorProto) -> None:
        """Enter a new weight, unless there is one of that name: it was made of the same."""
        if tensor.name in self._tensors:
            return
        self._graph.initializer.append(tensor)
        self._tensors[tensor.name] = self._graph.initializer[-1]

    def make(self, name: str, shape: Sequence[int], values: Callable[[], NDArray[Any]]) -> None:
        """Enter a new weight of float32 numbers that are computed whenever they are read."""
        self.add(TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape))
        self._made[name] = values

    def replace(self, tensor: TensorProto) -> None:
        """Give the weight of that name other values."""
        self._made.pop(tensor.name, None)
        self._tensors[tensor.name].CopyFrom(tensor)

    def _bytes(self, tensor: TensorProto) -> Any:
        """A tensor as ONNX lays it out; numbers of four bits are packed in pairs there, and not in NumPy."""
        if tensor.HasField("raw_data"):
            return tensor.raw_data
        return np.ascontiguousarray(self.read(tensor.name)).reshape(-1).view(np.uint8).data

    def drop_unused(self) -> None:
        """Leave out the weights that no node reads."""
        used = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        # those that are left out stay known: others may be made of them
        self._tensors |= {tensor.name: tensor for tensor in self._graph.initializer}

    def save(self, model: onnx.ModelProto, path: Path) -> None:
        """Write the graph to `path` and its weights to `path`.data; equal bytes are stored once. Checks the result."""
        data = path.with_name(f"{path.name}.data")
        places: dict[bytes, int] = {}
        references: list[tuple[TensorProto, TensorProto]] = []  # put in last: others may be made of a weight
        self._tensors |= {tensor.name: tensor for tensor in self._graph.initializer}  # others have entered some, too
        for tensor in self._graph.initializer:
            if tensor.name in self._made and 4 * int(np.prod(tensor.dims)) < INLINE_BYTES:
                self.replace(numpy_helper.from_array(self.read(tensor.name), tensor.name))
        with data.open("wb") as file:
            for tensor in self._graph.initializer:
                here = tensor.data_location != TensorProto.EXTERNAL and tensor.name not in self._made
                if here and tensor.ByteSize() < INLINE_BYTES:
                    continue
                raw = self._bytes(tensor)
                digest = hashlib.sha256(raw).digest()
                if digest not in places:
                    file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                    places[digest] = file.tell()
                    file.write(raw)
                reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
                reference.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", places[digest]), ("length", len(raw))):
                    reference.external_data.add(key=key, value=str(value))
                references.append((tensor, reference))
        for tensor, reference in references:
            tensor.CopyFrom(reference)
        onnx.save(model, str(path))
        onnx.checker.check_model(str(path))


def tie_head(graph: onnx.GraphProto, weights: Weights) -> None:
    """Let the LM head read the embedding's table where the two are one matrix, as it is in most small models.

    The tracer writes the table (V, D) for the Gather and its transpose for the MatMul.
    """
    head = next(node for node in reversed(graph.node) if node.op_type == "MatMul" and node.input[1] in weights)
    turned = weights.shape(head.input[1])[::-1]
    lookups = (node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in weights)
    table = next((name for name in lookups if weights.shape(name) == turned), None)  # others hold the rotary embedding
    if table is not None and np.array_equal(weights.read(table), weights.read(head.input[1]).T):
        head.CopyFrom(helper.make_node("Gemm", [head.input[0], table], list(head.output), head.name, transB=1))
