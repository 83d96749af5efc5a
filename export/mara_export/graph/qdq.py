"""Weight-only int8 and int4 in standard operators, as TensorRT reads them: DequantizeLinear in front of each MatMul.

Symmetric, rounded to nearest. int4 has blocks along the input dimension, of a size that TensorRT's documentation names;
int8 a scale for each column, as TensorRT 10.3's DequantizeLinear takes no blocks of it (NvInfer.h, IDequantizeLayer).
The embedding's table stays as it is: an engine would widen all of it to look one row up.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from mara_export.graph.nodes import set_nodes
from mara_export.graph.weights import Weights
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import BLOCK_SIZES_OF, COLUMN
from mara_runtime.errors import OptionError

_INTEGERS: dict[int, Any] = {4: ml_dtypes.int4, 8: np.int8}
_BLOCK_OPSET = 21
"""Blocks, and numbers of four bits, came with it; TensorRT 10.3 reads them, though it says no more than opset 20."""


def quantise_qdq(model: onnx.ModelProto, weights: Weights, how: Quantisation, parts: Any = iter) -> None:
    """Replace in place the matrices of a lowered LLM by integers and their scales.

    parts: wraps the sequence of matrices, for a progress bar. Raises OptionError when `keep` matches nothing, and when
    a matrix is no whole number of blocks.
    """
    graph = model.graph
    matrices = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    how.check_keep([node.name for node in matrices])
    kept = [node for node in matrices if how.keeps(node.name)]
    column = how.block_size == COLUMN
    where: dict[str, Any] = {"axis": 1} if column else {"axis": 0, "block_size": how.block_size}
    made: dict[str, list[NodeProto]] = {}
    for node in parts([node for node in matrices if node not in kept]):
        name = node.input[1]
        integers, scale, wide = f"{name}_int{how.bits}", f"{name}_scale", f"{name}_wide"
        node.input[1] = wide
        if integers in weights:  # of equal matrices there is one
            continue
        values, scales = quantised(weights.read(name), node.name, how)
        weights.add(numpy_helper.from_array(values, integers))
        weights.add(numpy_helper.from_array(scales, scale))
        made[node.name] = [
            helper.make_node("DequantizeLinear", [integers, scale], [wide], f"{node.name}/widen", **where)
        ]
    nodes = [part for node in graph.node for part in (*made.get(node.name, ()), node)]
    set_nodes(graph, nodes)
    if not column:
        (standard,) = (opset for opset in model.opset_import if opset.domain == "")
        standard.version = max(standard.version, _BLOCK_OPSET)


def check_blocks(model: onnx.ModelProto, weights: Weights, options: ExportOptions) -> None:
    """Refuse blocks of which a matrix is no whole number, naming what would do. Raises OptionError."""
    size, how = options.block_size, options.quantisation
    if size is None or size == COLUMN or how is None:
        return
    matrices = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    how.check_keep([node.name for node in matrices])
    inputs = {node.name: weights.shape(node.input[1])[0] for node in matrices if not how.keeps(node.name)}
    odd = next((name for name, rows in inputs.items() if rows % size), None)
    if odd is None:
        return
    sizes = sorted(BLOCK_SIZES_OF[options.target][options.precision])
    fit = [str(size) for size in sizes if not any(rows % size for rows in inputs.values())]
    by_column = options.precision != "int8" and BLOCK_SIZES_OF[options.target]["int8"] == (COLUMN,)
    way_out = (
        f"take {' or '.join(fit)}"
        if fit
        else f"none that --target {options.target} has ({', '.join(map(str, sizes))}) divides the sizes of this model: "
        f"take --precision {'int8 or fp16' if by_column else 'fp16'}"
    )
    raise OptionError(
        f"--block-size is {size}, and {odd} has {inputs[odd]} inputs, which is no multiple of it: {way_out}"
    )


def quantised(matrix: NDArray[np.float32], name: str, how: Quantisation) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Integers (K, N) of a matrix (K, N), and its scales: (N,), or with blocks (K / block_size, N)."""
    rows, columns = matrix.shape
    size = rows if how.block_size == COLUMN else how.block_size
    if rows % size:
        raise OptionError(
            f"--block-size is {size}, and {name} has {rows} inputs, which is no multiple of it: take another, or "
            "leave the matrix as it is with --keep"
        )
    most = 2 ** (how.bits - 1) - 1
    blocks = matrix.reshape(rows // size, size, columns)
    scales = np.abs(blocks).max(axis=1) / np.float32(most)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    integers = np.clip(np.rint(blocks / scales[:, None]), -most, most).reshape(rows, columns)
    if how.block_size == COLUMN:
        scales = scales[0]
    return integers.astype(np.int8).astype(_INTEGERS[how.bits]), scales
