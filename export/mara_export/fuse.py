"""Fewer and larger nodes, for ONNX Runtime: a pass of one row is short, and every node starts all threads once more.

projections  the three matrices in front of an attention as one, which GroupQueryAttention takes apart itself
residuals    an addition and the norm of its sum as com.microsoft SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mara_export.weights import Weights

_MICROSOFT = "com.microsoft"


def fuse(graph: onnx.GraphProto, weights: Weights) -> None:
    """Rewrite a graph of the `ort` lowering in place."""
    _fuse_projections(graph, weights)
    _fuse_residuals(graph)
    drop_dead(graph)
    weights.drop_unused()


def drop_dead(graph: onnx.GraphProto) -> None:
    """Leave out the nodes whose results nobody reads; those of a graph are in the order of computation."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    _set_nodes(graph, kept[::-1])


def _set_nodes(graph: onnx.GraphProto, nodes: list[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────────────────


_Projection = tuple[str, str, str | None]


def _fuse_projections(graph: onnx.GraphProto, weights: Weights) -> None:
    makers = {name: node for node in graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            found = [_projection(makers.get(name), makers, weights) for name in node.input[:3]]
            parts = [part for part in found if part is not None]
            # a norm between them, as Qwen3 has it, leaves them apart
            if len(parts) == 3 and len({(value, bias is None) for value, _, bias in parts}) == 1:
                nodes += _joined(node, parts, weights)
                node.input[0], node.input[1], node.input[2] = nodes[-1].output[0], "", ""
        nodes.append(node)
    _set_nodes(graph, nodes)


def _projection(node: NodeProto | None, makers: dict[str, NodeProto], weights: Weights) -> _Projection | None:
    """(input, matrix, bias) of a matrix product, with or without a bias."""
    bias = None
    if node is not None and node.op_type == "Add":
        bias, product = sorted(node.input, key=lambda name: name not in weights)
        if bias not in weights:
            return None
        node = makers.get(product)
    if node is None or node.op_type != "MatMul" or node.input[1] not in weights:
        return None
    return node.input[0], node.input[1], bias


def _joined(attention: NodeProto, parts: list[_Projection], weights: Weights) -> list[NodeProto]:
    name = attention.name.replace("CachedAttention/attention", "qkv_proj")
    matrix, product = f"{name}/weight", f"{name}/product"
    weights.add(numpy_helper.from_array(np.concatenate([weights.read(part[1]) for part in parts], axis=1), matrix))
    nodes = [helper.make_node("MatMul", [parts[0][0], matrix], [product], f"{name}/MatMul")]
    biases = [weights.read(bias) for _, _, bias in parts if bias is not None]
    if biases:
        weights.add(numpy_helper.from_array(np.concatenate(biases), f"{name}/bias"))
        nodes.append(helper.make_node("Add", [product, f"{name}/bias"], [f"{name}/sum"], f"{name}/Add"))
    return nodes


# ── residuals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fuse_residuals(graph: onnx.GraphProto) -> None:
    made = {name for node in graph.node for name in node.output}
    sums = {node.output[0] for node in graph.node if node.op_type == "Add" and made.issuperset(node.input)}
    norms = {node.input[0]: node for node in graph.node if node.op_type == "RMSNormalization" and node.input[0] in sums}
    fused = {norm.output[0] for norm in norms.values()}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Add" and node.output[0] in norms:
            norm = norms[node.output[0]]
            epsilon = next(a.f for a in norm.attribute if a.name == "epsilon")
            nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    [*node.input, norm.input[1]],
                    [norm.output[0], "", "", node.output[0]],
                    norm.name,
                    domain=_MICROSOFT,
                    epsilon=epsilon,
                )
            )
        elif node.output[0] not in fused:
            nodes.append(node)
    _set_nodes(graph, nodes)
