"""int8 and int4 weights in standard operators, as TensorRT reads them: DequantizeLinear in front of each MatMul.

Symmetric, rounded to nearest. int4 has blocks along the input dimension; int8 a scale per output column.
The embedding's table stays as it is: an engine would dequantise all of it to look up one row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mara_export.graph.nodes import Builder, GraphContext, dims, matrix_products
from mara_export.graph.packed import packed_of
from mara_export.graph.weights import read
from mara_export.hf.packed import PackedMatrix
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import COLUMN, TARGETS
from mara_runtime.errors import OptionError

_DTYPES = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_BLOCK_OPSET = 21
"""Introduced blocks and 4-bit integers; TensorRT 10.3 reads them, though it documents opset 20 as its last."""


def quantise_qdq(graph: ir.Graph, context: GraphContext) -> None:
    """Replace the matrices of a lowered LLM by integers and their scales.

    Raises OptionError for a `keep` that matches nothing, and for blocks that do not divide a matrix.
    """
    quantisation = context.quantisation
    assert quantisation is not None
    matrices = matrix_products(graph)
    quantisation.check_keep([str(node.name) for node in matrices])
    matrices = [node for node in matrices if not quantisation.keeps(str(node.name))]
    check_blocks({str(node.name): dims(node.inputs[1])[0] for node in matrices}, context.options, quantisation)
    by_column = quantisation.block_size == COLUMN
    add = Builder(graph, "qdq")
    dequantised: dict[ir.Value, ir.Value] = {}
    for node in context.progress.parts(matrices):
        weight = node.inputs[1]
        assert weight is not None
        if weight not in dequantised:
            packed, name, dtype = packed_of(weight), str(weight.name), _DTYPES[quantisation.bits]
            if packed is None:
                integers, scales = quantise_matrix(read(weight), quantisation)
                zeros = None
            else:
                integers, scales, zeros = as_signed(packed.read(), by_column)
            parts = [
                add.initializer(ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=f"{name}_{part}"))
                for part, array in ((f"int{quantisation.bits}", integers), ("zero_points", zeros))
                if array is not None
            ]
            size = dims(weight)[0] // len(scales)
            blocks: dict[str, int] = {"axis": 1} if by_column else {"axis": 0, "block_size": size}
            dequantised[weight] = add(
                "DequantizeLinear",
                parts[0],
                add.weight(f"{name}_scale", scales),
                *parts[1:],
                out=f"{name}_dequantised",
                name=f"{node.name}/dequantise",
                **blocks,
            )
        node.replace_input_with(1, dequantised[weight])
    if not by_column:
        graph.opset_imports[""] = max(graph.opset_imports[""], _BLOCK_OPSET)


def check_blocks(inputs: dict[str, int], options: ExportOptions, quantisation: Quantisation) -> None:
    """Raise OptionError, naming block sizes that fit, where blocks do not divide a matrix.

    inputs: rows of each matrix, by its node's name.
    """
    size, target = quantisation.block_size, TARGETS[options.target]
    if size == COLUMN:
        return
    odd = next((name for name, rows in inputs.items() if rows % size), None)
    if odd is None:
        return
    sizes = sorted(target.block_sizes[options.precision])
    fitting = [str(size) for size in sizes if not any(rows % size for rows in inputs.values())]
    if fitting:
        remedy = f"use {' or '.join(fitting)}"
    else:
        others = [p for p in target.precisions if p == "fp16" or target.block_sizes.get(p) == (COLUMN,)]
        remedy = (
            f"no block size of --target {options.target} ({', '.join(map(str, sizes))}) divides the sizes of this "
            f"model: use --precision {' or '.join(reversed(others))}"
        )
    raise OptionError(f"--block-size is {size}, which does not divide the {inputs[odd]} inputs of {odd}: {remedy}")


def as_signed(
    matrix: PackedMatrix, by_column: bool
) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.int8] | None]:
    """A matrix that is small integers already: integers (K, N), scales and zero points (blocks, N); by column (N,)."""
    least = 1 << matrix.bits - 1

    def signed(numbers: NDArray[np.uint8]) -> NDArray[np.int8]:
        return np.ascontiguousarray((numbers.astype(np.int16) - least).astype(np.int8).T)

    zeros, scales = matrix.zero_points, np.ascontiguousarray(matrix.scales.T)
    return signed(matrix.integers), scales[0] if by_column else scales, None if zeros is None else signed(zeros)


def quantise_matrix(
    matrix: NDArray[np.float32], quantisation: Quantisation
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers (K, N) of a matrix (K, N), and its scales: (N,), or with blocks (K / block_size, N)."""
    rows, columns = matrix.shape
    size = rows if quantisation.block_size == COLUMN else quantisation.block_size
    largest = 2 ** (quantisation.bits - 1) - 1
    blocks = matrix.reshape(rows // size, size, columns)
    scales = np.abs(blocks).max(axis=1) / np.float32(largest)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    integers: NDArray[Any] = np.clip(np.rint(blocks / scales[:, None]), -largest, largest).reshape(rows, columns)
    return integers.astype(np.int8), scales[0] if quantisation.block_size == COLUMN else scales
