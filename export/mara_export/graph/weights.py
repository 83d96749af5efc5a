"""A graph's weights: read and written one at a time, so that no stage holds a second copy of the model."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from mara_export.graph.nodes import Builder, GraphContext, dims, is_weight, matrix_products, replace_node

if TYPE_CHECKING:
    from mara_export.hf.weights import Weights

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph's own file."""
_ALIGNMENT = 4096
"""Of tensors in the data file, so that an engine may map them into memory."""
_M_MMAP_THRESHOLD = -3


def load(path: Path) -> ir.Model:
    """A traced graph without constants as nodes."""
    model = ir.load(path)
    ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
    )(model)
    for node in model.graph:
        for value in node.outputs:  # types would be wrong after a change of precision
            value.type = value.shape = None
    return model


def fill(graph: ir.Graph, inputs: Sequence[str], weights: Weights) -> None:
    """Make what a traced graph takes beside `inputs` its weights, which are read when they are asked for."""
    for value in [value for value in graph.inputs if value.name not in inputs]:
        graph.inputs.remove(value)
        assert value.shape is not None
        name, dtype = str(value.name), value.dtype or ir.DataType.FLOAT
        value.const_value = lazy(name, value.shape.numpy(), partial(weights.read, name), dtype)
        if value.uses():
            graph.register_initializer(value)


def read(weight: ir.Value | ir.TensorProtocol | None) -> NDArray[Any]:
    """The values of a weight, without keeping its file mapped into memory."""
    tensor = weight.const_value if isinstance(weight, ir.Value) else weight
    assert tensor is not None
    if isinstance(tensor, ir.ExternalTensor):
        array = np.array(tensor.numpy())
        tensor.release()
        return array
    return tensor.numpy()


def lazy(
    name: str, shape: Sequence[int], values: Callable[[], NDArray[Any]], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.LazyTensor:
    """A tensor that is computed whenever it is read."""
    return ir.LazyTensor(lambda: ir.Tensor(values(), dtype=dtype), dtype, ir.Shape(shape), name=name)


def tie_head(graph: ir.Graph, context: GraphContext) -> None:
    """Let the LM head read the embedding's table where the two are one matrix, as in most small models.

    The Gather reads the table (V, D), and the MatMul its transpose.
    """
    lookups = [node.inputs[0] for node in graph if node.op_type == "Gather" and is_weight(node.inputs[0])]
    by_shape = {dims(weight)[::-1]: weight for weight in lookups if len(dims(weight)) == 2}
    add = Builder(graph, "head")
    for head in matrix_products(graph):
        table = by_shape.get(dims(head.inputs[1]))
        if table is not None and np.array_equal(read(table), read(head.inputs[1]).T):
            name = str(head.name)
            rows = add("Reshape", head.inputs[0], add.ints(-1, dims(table)[1]), out=f"{name}/rows")
            replace_node(head, add("Gemm", rows, table, out=f"{name}/tied", name=name, transB=1))


def save(model: ir.Model, path: Path) -> None:
    """Write the graph to `path` and its weights to `path`.data, equal bytes once. Checks the result.

    onnx-ir's own writer merges equal tensors only if they have the same type and shape; a quantised table and its tied
    head are the same bytes in different shapes.
    """
    data = path.with_name(f"{path.name}.data")
    offsets: dict[bytes, int] = {}
    stored: list[tuple[ir.Value, ir.ExternalTensor]] = []
    with data.open("wb") as file:
        for weight in model.graph.initializers.values():
            tensor = weight.const_value
            assert tensor is not None
            if tensor.nbytes < INLINE_BYTES:
                weight.const_value = ir.Tensor(read(tensor), dtype=tensor.dtype, name=weight.name)
                continue
            raw = _raw(tensor)
            digest = hashlib.sha256(raw).digest()
            if digest not in offsets:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                offsets[digest] = file.tell()
                file.write(raw)
            shape, name = ir.Shape(dims(weight)), str(weight.name)
            place = ir.ExternalTensor(data.name, offsets[digest], len(raw), tensor.dtype, shape=shape, name=name)
            stored.append((weight, place))
            del raw
    for weight, place in stored:  # after the loop: lazy tensors may be computed from other weights
        weight.const_value = place
    ir.save(model, path)
    onnx.checker.check_model(str(path))


def _raw(tensor: ir.TensorProtocol) -> Any:
    """A tensor's bytes as ONNX stores them, without a copy where that is possible."""
    if tensor.dtype.bitwidth < 8:  # packed in ONNX, and not in NumPy
        return tensor.tobytes()
    return np.ascontiguousarray(read(tensor)).reshape(-1).view(np.uint8).data


def return_large_blocks() -> None:
    """From now on, let freed matrices go back to the system at once.

    glibc learns from the first ones freed to keep such blocks, and its heap then grows to three times the model.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries do not have the habit
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
