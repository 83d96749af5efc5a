"""int8 and int4 weights for ONNX Runtime. Activations and the KV cache stay floats.

Blocks of `block_size` weights share a scale; com.microsoft MatMulNBits multiplies by them as they are, and
GatherBlockQuantized looks up embeddings in them, QMoE multiplies by those of chosen experts. The quantisers are ONNX
Runtime's own; they take and return protobuf.

Nothing here quantises activations over several rows at once: that would let candidates of one pass influence each
other. (`accuracy_level=4` lets the CPU kernel round each row's own blocks to int8, one row at a time.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mara_export.graph.experts import MOE
from mara_export.graph.nodes import (
    MICROSOFT,
    Builder,
    GraphContext,
    dims,
    is_weight,
    matrix_products,
    replace_node,
)
from mara_export.graph.packed import packed_of
from mara_export.graph.weights import read
from mara_export.hf.packed import PackedMatrix
from mara_export.options import Quantisation
from mara_runtime.errors import OptionError, first_line

SLICE_COLUMNS = 16384
"""Columns of a matrix that are quantised at a time."""


@dataclass(frozen=True)
class Blocks:
    """A matrix (K, N) as MatMulNBits takes it."""

    attributes: dict[str, int]
    arrays: Sequence[NDArray[Any]]
    """integers (N, blocks, bytes), scales, and with some quantisers zero points"""


def quantise(graph: ir.Graph, context: GraphContext) -> None:
    """Replace the matrices and the embedding table by blocks of small integers.

    Raises OptionError for a `keep` that matches nothing and for a matrix that the quantiser cannot take.
    """
    quantisation = context.quantisation
    assert quantisation is not None
    tables = _embeddings(graph)
    matrices, experts = matrix_products(graph), [node for node in graph if node.op_type == MOE]
    quantisation.check_keep([str(node.name) for node in (*matrices, *tables, *experts)])
    # hqq makes fractional zero points, which the lookup does not take; a tied head shares its bytes with the table
    for_tables = replace(quantisation, quantiser="rtn") if quantisation.quantiser == "hqq" else quantisation
    vocabulary = {dims(node.inputs[0])[0] for node in tables}
    add = Builder(graph, "quantised")
    for node in context.progress.parts([*matrices, *experts]):
        if quantisation.keeps(str(node.name)):
            continue
        if node.op_type == MOE:
            _quantise_experts(add, node, quantisation)
        else:
            is_head = dims(node.inputs[1])[1] in vocabulary
            _quantise_matrix(add, node, for_tables if is_head else quantisation)
    for node in tables:
        # table rows must be whole blocks: the lookup reads what the multiplication would pad
        whole = dims(node.inputs[0])[1] % quantisation.block_size == 0
        if whole and not quantisation.keeps(str(node.name)):
            _quantise_table(add, node, for_tables)
    graph.opset_imports.setdefault(MICROSOFT, 1)


def _embeddings(graph: ir.Graph) -> list[ir.Node]:
    return [
        node
        for node in graph
        if node.op_type == "Gather" and is_weight(node.inputs[0]) and len(dims(node.inputs[0])) == 2
    ]


def _quantise_matrix(add: Builder, node: ir.Node, quantisation: Quantisation) -> None:
    weight, name, packed = node.inputs[1], str(node.name), packed_of(node.inputs[1])
    assert weight is not None
    blocks = quantise_blocks(read(weight), name, quantisation) if packed is None else as_blocks(packed.read())
    stored = _stored(add, weight, blocks.arrays)
    out = f"{name}/product"
    product = add("MatMulNBits", node.inputs[0], *stored, out=out, name=name, domain=MICROSOFT, **blocks.attributes)
    replace_node(node, product)


def _quantise_experts(add: Builder, node: ir.Node, quantisation: Quantisation) -> None:
    """MoE → QMoE, each expert's matrices quantised like any other. Zero points have no kernel before 1.24."""
    name, size = str(node.name), quantisation.block_size
    x, logits, up, up_bias, down, down_bias = (*node.inputs, None)[:6]
    if quantisation.quantiser != "rtn":
        raise OptionError(f"--quantiser is {quantisation.quantiser!r}; the experts at {name} support rtn: leave it out")
    if odd := [inputs for _, _, inputs in map(dims, (up, down)) if inputs % size]:
        raise OptionError(
            f"--block-size is {size}, which does not divide the {odd[0]} inputs of the experts at {name}: use a "
            f"smaller one, or --keep {name}"
        )
    stored = [_quantised_stack(add, stack, name, quantisation) for stack in (up, down)]
    result = add(
        "QMoE",
        *(x, logits, *stored[0], up_bias, *stored[1], down_bias),
        out=f"{name}/quantised",
        name=name,
        domain=MICROSOFT,
        expert_weight_bits=quantisation.bits,
        block_size=size,
        **{key: each.value for key, each in node.attributes.items()},
    )
    replace_node(node, result)


def _quantised_stack(add: Builder, stack: ir.Value | None, name: str, quantisation: Quantisation) -> list[ir.Value]:
    """Matrices (E, outputs, inputs) as QMoE takes them: integers (E, outputs, bytes), scales (E, outputs, blocks)."""
    assert stack is not None
    count, rows, _ = dims(stack)
    parts = [quantise_blocks(matrix.T, name, quantisation).arrays for matrix in read(stack)]
    return _stored(add, stack, [np.stack(arrays).reshape(count, rows, -1) for arrays in zip(*parts, strict=True)])


def _quantise_table(add: Builder, node: ir.Node, quantisation: Quantisation) -> None:
    """A table (V, D) in the layout of a matrix (D, V): tied with the LM head, both are the same bytes."""
    table, indices = node.inputs
    assert table is not None
    blocks = quantise_blocks(read(table).T, str(node.name), quantisation)
    quantised, *scales = _stored(add, table, [array.reshape(dims(table)[0], -1) for array in blocks.arrays])
    rows = add(
        "GatherBlockQuantized",
        *(quantised, indices, *scales),
        out=f"{node.name}/rows",
        name=str(node.name),
        domain=MICROSOFT,
        bits=quantisation.bits,
        block_size=quantisation.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    replace_node(node, rows)


def _stored(add: Builder, weight: ir.Value, arrays: Sequence[NDArray[Any]]) -> list[ir.Value]:
    parts = ("quantised", "scales", "zero_points")
    return [add.weight(f"{weight.name}_{part}", array) for part, array in zip(parts, arrays, strict=False)]


def as_blocks(matrix: PackedMatrix) -> Blocks:
    """A matrix that is small integers already."""
    (rows, columns), size, bits = matrix.integers.shape, matrix.block_size, matrix.bits
    arrays: list[NDArray[Any]] = [_in_bytes(matrix.integers.reshape(rows, -1, size), bits), matrix.scales]
    if matrix.zero_points is not None:
        arrays.append(_in_bytes(matrix.zero_points, bits))
    return Blocks({"K": columns, "N": rows, "bits": bits, "block_size": size, "accuracy_level": 4}, arrays)


def _in_bytes(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Numbers of 4 bits two by two along the last axis, the first one low, the last of an odd count alone."""
    if bits == 8:
        return numbers
    low: NDArray[np.uint8] = numbers[..., ::2].copy()
    high = numbers[..., 1::2]
    low[..., : high.shape[-1]] |= high << 4
    return low


def quantise_blocks(matrix: NDArray[Any], name: str, quantisation: Quantisation) -> Blocks:
    """Quantise a matrix (K, N). Columns are independent, so a wide matrix is done in slices.

    name: of the node, for messages. Raises OptionError.
    """
    slices = [
        _quantise_slice(np.ascontiguousarray(matrix[:, start : start + SLICE_COLUMNS]), name, quantisation)
        for start in range(0, matrix.shape[1], SLICE_COLUMNS)
    ]
    arrays = [np.concatenate(parts) for parts in zip(*(part.arrays for part in slices), strict=True)]
    return Blocks({**slices[0].attributes, "N": matrix.shape[1]}, arrays)


def _quantise_slice(matrix: NDArray[Any], name: str, quantisation: Quantisation) -> Blocks:
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    bits, block_size, quantiser = quantisation.bits, quantisation.block_size, quantisation.quantiser
    attributes = {"K": matrix.shape[0], "bits": bits, "block_size": block_size, "accuracy_level": 4}
    if quantiser == "rtn":  # takes arrays
        config = ort.DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
        integers, scales, _ = ort.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
        return Blocks(attributes, [integers, scales.reshape(len(integers), -1)])
    if quantiser == "hqq":
        algorithm = ort.HQQWeightOnlyQuantConfig(block_size=block_size, bits=bits)
    else:
        algorithm = ort.KQuantWeightOnlyQuantConfig(customized_weight_config={name: {"bits": bits}})
    graph = helper.make_graph(  # these work on models: one with this MatMul alone
        [helper.make_node("MatMul", ["x", "weight"], ["y"], name)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", matrix.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, "weight")],
    )
    quantizer = ort.MatMulNBitsQuantizer(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        bits=bits,
        block_size=block_size,
        is_symmetric=False,
        accuracy_level=4,
        algo_config=algorithm,
    )
    try:
        with contextlib.redirect_stdout(None), warnings.catch_warnings():  # a progress bar of its own for each matrix
            warnings.simplefilter("ignore")
            quantizer.process()
    except ValueError as error:  # k-quant at 4 bits takes an even number of blocks only
        raise OptionError(
            f"--quantiser {quantiser} cannot quantise {name}, a matrix of {matrix.shape[0]} rows: ONNX "
            f"Runtime reports {first_line(error)}; use --quantiser rtn, or --keep {name}"
        ) from error
    result = quantizer.model.model.graph
    (node,) = result.node
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.initializer}
    return Blocks(attributes, [arrays[source] for source in node.input[1:] if source])
