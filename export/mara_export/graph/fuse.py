"""Fewer and larger nodes, for ONNX Runtime: a pass of one row is short, and every node starts all threads once more.

projections  the matrices that a value is multiplied by as one: those for q, k and v, and gate and up
residuals    an addition and the norm of its sum as com.microsoft SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from mara_export.graph.nodes import MICROSOFT, Traced, set_nodes
from mara_export.graph.weights import Weights


def drop_dead(graph: onnx.GraphProto) -> None:
    """Leave out the nodes whose results nobody reads; those of a graph are in the order of computation."""
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    set_nodes(graph, kept[::-1])


# ── projections ──────────────────────────────────────────────────────────────────────────────────────────────────────

_JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


@dataclass(frozen=True)
class _Projection:
    """A matrix product by a weight, with or without a bias."""

    product: NodeProto
    sum: NodeProto | None
    bias: str | None

    @property
    def result(self) -> str:
        """What it makes."""
        return str((self.sum or self.product).output[0])


def join_projections(graph: onnx.GraphProto, weights: Weights) -> None:
    """Multiply a value by all its matrices at once. What is put together again behind them is not taken apart."""
    instead: dict[str, list[NodeProto]] = {}  # by the names of what the nodes make
    parts: dict[tuple[str, ...], str] = {}
    for group in _groups(graph, weights):
        nodes = _joined(group, weights)
        instead[group[0].product.output[0]] = nodes
        parts[tuple(nodes[-1].output)] = nodes[-2].output[0]
        for one in group:
            instead |= {node.output[0]: [] for node in (one.product, one.sum) if node and node.output[0] not in instead}
    nodes = [other for node in graph.node for other in instead.get(node.output[0], [node])]
    ends = {output.name for output in graph.output}
    renamed = {
        node.output[0]: parts[tuple(node.input)]
        for node in nodes
        if node.op_type == "Concat"
        and tuple(node.input) in parts
        and node.attribute[0].i == -1
        and node.output[0] not in ends
    }
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    set_nodes(graph, nodes)
    drop_dead(graph)


def _groups(graph: onnx.GraphProto, weights: Weights) -> list[list[_Projection]]:
    """The projections of one value each, where there are several; such with a bias and such without do not mix."""
    edges = Traced(graph)
    found: dict[tuple[str, bool], list[_Projection]] = {}
    for node in edges.nodes:
        if node.op_type == "MatMul" and node.input[1] in weights and len(weights.shape(node.input[1])) == 2:
            behind = edges.readers(node.output[0])
            biases = [name for name in behind[0].input if name in weights] if len(behind) == 1 else []
            if biases and behind[0].op_type == "Add":
                one = _Projection(node, behind[0], biases[0])
            else:
                one = _Projection(node, None, None)
            found.setdefault((node.input[0], one.bias is None), []).append(one)
    return [group for group in found.values() if len(group) > 1]


def _joined(group: list[_Projection], weights: Weights) -> list[NodeProto]:
    """One product, one sum, and a Split into what the group made."""
    paths = [one.product.name.split("/") for one in group]
    at = next(i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    own = tuple(path[at] for path in paths)
    name = "/".join([*paths[0][:at], _JOINED.get(own, "+".join(own))])

    matrices = [one.product.input[1] for one in group]
    columns = [weights.shape(matrix)[1] for matrix in matrices]
    weights.make(
        f"{name}/weight",
        (weights.shape(matrices[0])[0], sum(columns)),
        lambda: np.concatenate([weights.read(matrix) for matrix in matrices], axis=1),
    )
    weights.add(numpy_helper.from_array(np.array(columns, np.int64), f"{name}/sizes"))
    nodes = [
        helper.make_node("MatMul", [group[0].product.input[0], f"{name}/weight"], [f"{name}/product"], f"{name}/MatMul")
    ]
    biases = [one.bias for one in group if one.bias is not None]
    if biases:
        weights.make(f"{name}/bias", (sum(columns),), lambda: np.concatenate([weights.read(bias) for bias in biases]))
        nodes.append(helper.make_node("Add", [f"{name}/product", f"{name}/bias"], [f"{name}/sum"], f"{name}/Add"))
    results = [one.result for one in group]
    nodes.append(helper.make_node("Split", [nodes[-1].output[0], f"{name}/sizes"], results, f"{name}/Split", axis=-1))
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
            nodes.append(
                helper.make_node(
                    "SkipSimplifiedLayerNormalization",
                    [*node.input, norm.input[1]],
                    [norm.output[0], "", "", node.output[0]],
                    norm.name,
                    domain=MICROSOFT,
                    epsilon=helper.get_node_attr_value(norm, "epsilon"),
                )
            )
        elif node.output[0] not in fused:
            nodes.append(node)
    set_nodes(graph, nodes)
