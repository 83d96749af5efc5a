"""Fewer and larger nodes, for ONNX Runtime: a pass of one row is short, and every node starts all threads once more.

projections  the three matrices in front of an attention as one
residuals    an addition and the norm of its sum as com.microsoft SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mara_export.grouped import MICROSOFT, Grouped, Projection, projection
from mara_export.weights import Weights


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


def join_projections(parts: Grouped, weights: Weights) -> None:
    """Multiply by the matrices for q, k and v at once, where nothing lies between (a norm, as Qwen3 has it)."""
    makers = {name: node for node in parts.nodes for name in node.output}
    joined: dict[str, list[NodeProto]] = {}  # by the names of what the nodes make
    for name, values in parts.projected.items():
        found = [projection(value, makers, weights) for value in values]
        three = [one for one in found if one is not None]
        if len(three) == 3 and len({(one.value, one.bias is None) for one in three}) == 1:
            nodes = _joined(name.replace("CachedAttention", "qkv_proj"), three, values, weights)
            joined |= dict.fromkeys(values, nodes)
    kept: list[NodeProto] = []
    for node in parts.nodes:
        instead = joined.get(node.output[0])
        if instead is None:
            kept.append(node)
        elif node.output[0] == instead[-1].output[0]:  # of the three the first
            kept += instead
    parts.nodes = kept


def _joined(name: str, three: list[Projection], values: Sequence[str], weights: Weights) -> list[NodeProto]:
    matrix, product = f"{name}/weight", f"{name}/product"
    matrices = [weights.read(one.product.input[1]) for one in three]
    weights.add(numpy_helper.from_array(np.concatenate(matrices, axis=1), matrix))
    sizes = np.array([values.shape[1] for values in matrices], np.int64)
    weights.add(numpy_helper.from_array(sizes, f"{name}/sizes"))
    nodes = [helper.make_node("MatMul", [three[0].value, matrix], [product], f"{name}/MatMul")]
    biases = [weights.read(one.bias) for one in three if one.bias is not None]
    if biases:
        weights.add(numpy_helper.from_array(np.concatenate(biases), f"{name}/bias"))
        nodes.append(helper.make_node("Add", [product, f"{name}/bias"], [f"{name}/sum"], f"{name}/Add"))
    nodes.append(helper.make_node("Split", [nodes[-1].output[0], f"{name}/sizes"], values, f"{name}/Split", axis=-1))
    return nodes


# ── residuals ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fuse_residuals(graph: onnx.GraphProto) -> None:
    """Make one node of an addition and the norm of its sum."""
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
                    domain=MICROSOFT,
                    epsilon=epsilon,
                )
            )
        elif node.output[0] not in fused:
            nodes.append(node)
    _set_nodes(graph, nodes)
