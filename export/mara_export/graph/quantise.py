"""Weight-only precisions: what the matrices are stored as. Activations and the KV cache stay float32.

int4, int8  blocks of `block_size` weights share a scale; com.microsoft MatMulNBits multiplies by them as they are, and
            GatherBlockQuantized looks embeddings up in them. The quantisers are ONNX Runtime's own.
fp16        stored as float16 and widened to float32 when the graph is loaded: half the bundle, not half the memory.

Nothing here quantises activations over several rows at once: that would let candidates of one pass influence each
other. (`accuracy_level=4` lets the CPU kernel round each row's own blocks to int8, one row at a time.)
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export.graph.nodes import MICROSOFT, set_nodes
from mara_export.graph.weights import INLINE_BYTES, Weights
from mara_export.options import Quantisation
from mara_runtime.errors import OptionError, first_line

SLICE_COLUMNS = 16384
"""Columns of a matrix that are quantised at a time."""


def quantise(model: onnx.ModelProto, weights: Weights, how: Quantisation, parts: Any = iter) -> None:
    """Replace in place the matrices of a lowered LLM, and its embedding table, by blocks of small integers.

    parts: wraps the sequence of matrices, for a progress bar. Raises OptionError when `keep` matches nothing.
    """
    graph = model.graph
    tables = _embeddings(graph, weights)
    # hqq makes zero points that are not whole, which the lookup does not take; a tied head shares its bytes
    for_tables = replace(how, quantiser="rtn") if how.quantiser == "hqq" else how
    vocabulary = {weights.shape(node.input[0])[0] for node in tables}
    matrices = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    how.check_keep([node.name for node in (*matrices, *tables)])
    for node in parts(matrices):
        if not how.keeps(node.name):
            is_head = weights.shape(node.input[1])[1] in vocabulary
            matrix = weights.read(node.input[1])
            quantised, tensors = _blocks(node, matrix, for_tables if is_head else how)
            node.CopyFrom(quantised)
            for tensor in tensors:
                weights.add(tensor)
    for node in tables:
        columns = weights.shape(node.input[0])[1]
        # rows of the table must be whole blocks: the lookup reads what the multiplication would pad
        if columns % how.block_size == 0 and not how.keeps(node.name):
            _quantise_table(node, weights, for_tables)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def halve(graph: onnx.GraphProto, weights: Weights) -> None:
    """Store matrices as float16, widened again where they are read."""
    wide = {name for node in graph.node for name in node.input if name in weights and len(weights.shape(name)) == 2}
    nodes: list[NodeProto] = []
    widened = {}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name not in wide or 4 * int(np.prod(weights.shape(name))) < INLINE_BYTES:
                continue
            half = f"{name}_fp16"
            if half not in weights:
                with np.errstate(over="ignore"):
                    weights.add(numpy_helper.from_array(weights.read(name).astype(np.float16), half))
            if node.op_type == "Gather":  # the looked-up rows are widened, not the table
                output = node.output[0]
                node.input[i], node.output[0] = half, f"{output}_fp16"
                nodes += [node, _widen(node.output[0], output)]
                break
            if name not in widened:
                widened[name] = f"{name}_fp32"
                nodes.append(_widen(half, widened[name]))
            node.input[i] = widened[name]
        else:
            nodes.append(node)
    set_nodes(graph, nodes)


def _widen(source: str, target: str) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"widen/{target}", to=TensorProto.FLOAT)


def _embeddings(graph: onnx.GraphProto, weights: Weights) -> list[NodeProto]:
    return [
        node
        for node in graph.node
        if node.op_type == "Gather" and node.input[0] in weights and len(weights.shape(node.input[0])) == 2
    ]


def _quantise_table(node: NodeProto, weights: Weights, how: Quantisation) -> None:
    """A table (V, D) in the layout of a matrix (D, V): tied with the LM head, both are the same bytes."""
    rows = weights.shape(node.input[0])[0]
    matrix = helper.make_node("MatMul", ["unused", node.input[0]], ["unused_too"], node.name)
    _, (packed, *rest) = _blocks(matrix, weights.read(node.input[0]).T, how)
    names = []
    for tensor, sizes in zip((packed, *rest), ((rows, -1),) * 3, strict=False):
        values = numpy_helper.to_array(tensor).reshape(sizes)
        names.append(f"{tensor.name}_rows")
        weights.add(numpy_helper.from_array(values, names[-1]))
    node.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            [names[0], node.input[1], *names[1:]],
            list(node.output),
            node.name,
            domain=MICROSOFT,
            bits=how.bits,
            block_size=how.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
    )


def _blocks(node: NodeProto, matrix: Any, how: Quantisation) -> tuple[NodeProto, list[TensorProto]]:
    """MatMulNBits in the place of a MatMul by `matrix` (K, N): the node, and its weights: packed, scales, zeros.

    Columns are quantised each by itself, so a wide matrix goes through in slices.
    """
    columns = matrix.shape[1]
    slices = [
        _quantised_slice(node, np.ascontiguousarray(matrix[:, start : start + SLICE_COLUMNS]), how)
        for start in range(0, columns, SLICE_COLUMNS)
    ]
    quantised = slices[0][0]
    for attribute in quantised.attribute:
        if attribute.name == "N":
            attribute.i = columns
    if len(slices) == 1:
        return slices[0]
    joined = [
        numpy_helper.from_array(np.concatenate([numpy_helper.to_array(t) for t in parts]), parts[0].name)
        for parts in zip(*(tensors for _, tensors in slices), strict=True)
    ]
    return quantised, joined


def _quantised_slice(node: NodeProto, matrix: Any, how: Quantisation) -> tuple[NodeProto, list[TensorProto]]:
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    # the quantisers work on models: one with this MatMul alone
    algorithm = {
        "rtn": lambda: ort.DefaultWeightOnlyQuantConfig(
            block_size=how.block_size, is_symmetric=True, accuracy_level=4, bits=how.bits
        ),
        "hqq": lambda: ort.HQQWeightOnlyQuantConfig(block_size=how.block_size, bits=how.bits),
        "k-quant": lambda: ort.KQuantWeightOnlyQuantConfig(customized_weight_config={node.name: {"bits": how.bits}}),
    }[how.quantiser]()
    alone = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, ["M", matrix.shape[0]])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["M", matrix.shape[1]])],
        [numpy_helper.from_array(matrix, node.input[1])],
    )
    quantizer = ort.MatMulNBitsQuantizer(
        helper.make_model(alone, opset_imports=[helper.make_opsetid("", 21)], ir_version=10),
        bits=how.bits,
        block_size=how.block_size,
        is_symmetric=how.quantiser == "rtn",
        accuracy_level=4,
        algo_config=algorithm,
    )
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(None), warnings.catch_warnings():  # it draws a bar of its own for each matrix
            warnings.simplefilter("ignore")
            quantizer.process()
    except ValueError as error:  # k-quant at 4 bits takes an even number of blocks only
        raise OptionError(
            f"--quantiser {how.quantiser} cannot take {node.name}, a matrix of {matrix.shape[0]} rows: ONNX Runtime "
            f"says {first_line(error)}; take --quantiser rtn, or --keep it"
        ) from error
    finally:
        logging.disable(previous)
    graph = quantizer.model.model.graph
    (quantised,) = graph.node
    made = {tensor.name: tensor for tensor in graph.initializer}
    return quantised, [made[name] for name in quantised.input[1:] if name]
