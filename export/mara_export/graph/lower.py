"""Rewriting the traced `mara` nodes for an engine. Every lowering keeps the inputs and outputs.

| lowering | attention, cache, rotary embedding, norms become | runs on |
|---|---|---|
| `ort` | com.microsoft MultiHeadAttention on groups of heads, ScatterND; see grouped.py, fuse.py | ONNX Runtime |
| `portable` | standard Attention, TensorScatter, RotaryEmbedding, RMSNormalization | ONNX Runtime, TensorRT ≥ 10.15 |
| `decomposed` | basic operators, not in place; see decomposed.py | ONNX Runtime, TensorRT ≥ 10.3 |
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export.graph import decomposed, grouped
from mara_export.graph.fuse import drop_dead, fuse_residuals, join_projections
from mara_export.graph.grouped import Tables
from mara_export.graph.nodes import MICROSOFT, NODE, NORM, ROTARY, Traced, set_nodes
from mara_export.graph.weights import Weights
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape, Tensor

_COS, _SIN = "rotary/cos", "rotary/sin"


def lower(model: onnx.ModelProto, weights: Weights, shape: ModelShape, lowering: str, rotary: Tables) -> None:
    """Rewrite a traced graph in place for `lowering`, one of LOWERINGS.

    rotary: cosines and sines (positions, head_dim / 2), for as many positions as a row may have.
    """
    graph = Traced(model.graph)
    rewrite = {"ort": _ort, "portable": _portable, "decomposed": _decomposed}[lowering]
    nodes, constants, opsets = rewrite(graph, weights, shape, len(rotary[0]))
    set_nodes(model.graph, nodes)
    del model.graph.value_info[:], model.graph.input[:], model.graph.output[:], model.opset_import[:]
    model.graph.input.extend(value_info(t) for t in tensors.llm_inputs(shape))
    model.graph.output.extend(value_info(t) for t in tensors.llm_outputs(shape))
    tables = grouped.with_still_row(rotary, shape) if lowering == "ort" else rotary
    for name, table in zip((_COS, _SIN), tables, strict=True):
        weights.add(numpy_helper.from_array(np.ascontiguousarray(table), name))
    for tensor in constants:
        weights.add(tensor)
    model.opset_import.extend(opsets)
    model.ir_version = max(10, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    model.producer_name, model.producer_version, model.doc_string = "mara-export", "", ""
    drop_dead(model.graph)
    if lowering == "ort":
        join_projections(model.graph, weights)
        fuse_residuals(model.graph)
        weights.drop_unused()


_Lowered = tuple[list[NodeProto], Iterable[TensorProto], list[onnx.OperatorSetIdProto]]


def _portable(graph: Traced, weights: Weights, shape: ModelShape, positions: int) -> _Lowered:
    def rewrite(node: NodeProto) -> list[NodeProto]:
        q, k, v, past_k, past_v, mask, write = node.input
        out, present_k, present_v = node.output

        def scatter(part: str, past: str, new: str, present: str) -> NodeProto:
            name = f"{node.name}/{part}"
            return helper.make_node("TensorScatter", [past, new, write], [present], name, axis=-2, mode="linear")

        return [
            scatter("key", past_k, k, present_k),
            scatter("value", past_v, v, present_v),
            helper.make_node(
                "Attention",
                [q, present_k, present_v, mask],
                [out],
                f"{node.name}/attention",
                scale=helper.get_node_attr_value(node, "scale"),
            ),
        ]

    nodes: list[NodeProto] = []
    for node in graph.nodes:
        nodes += {NODE: rewrite, ROTARY: _rotations}.get(node.op_type, _norm)(node)
    return nodes, (), [helper.make_opsetid("", 24)]


def _decomposed(graph: Traced, weights: Weights, shape: ModelShape, positions: int) -> _Lowered:
    parts = decomposed.Decomposed(shape, (_COS, _SIN))
    for node in graph.nodes:
        parts.rewrite(node)
    return parts.add.nodes, parts.add.constants, [helper.make_opsetid("", decomposed.OPSET)]


def _ort(graph: Traced, weights: Weights, shape: ModelShape, positions: int) -> _Lowered:
    parts = grouped.Grouped(graph, weights, shape, (_COS, _SIN), still=positions)
    for node in graph.nodes:
        if node.op_type == NODE:
            parts.rewrite(node)
        elif node.op_type != ROTARY and not parts.replaces(node):
            parts.add.nodes += _norm(node)
    return parts.add.nodes, parts.add.constants, [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]


def _rotations(node: NodeProto) -> list[NodeProto]:
    """The rotary embedding of q and k as an operator each."""
    return [
        helper.make_node("RotaryEmbedding", [value, _COS, _SIN, tensors.POSITION_IDS], [result], f"{node.name}/{part}")
        for part, value, result in zip("qk", node.input, node.output, strict=True)
    ]


def _norm(node: NodeProto) -> list[NodeProto]:
    """A traced norm as the standard operator; any other node as it is."""
    if node.op_type != NORM:
        return [node]
    epsilon = helper.get_node_attr_value(node, "epsilon")
    return [helper.make_node("RMSNormalization", node.input, node.output, node.name, axis=-1, epsilon=epsilon)]


def value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    """A tensor of mara_runtime.tensors as ONNX declares it."""
    element = (
        helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)) if tensor.dtype != "bfloat16" else TensorProto.BFLOAT16
    )
    return helper.make_tensor_value_info(tensor.name, element, tensor.shape)
