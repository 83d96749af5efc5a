"""Fewer and larger nodes for ONNX Runtime: a pass of one row is short, and every node wakes all threads again.

join_projections  the matrices that one value is multiplied by become one: those for q, k and v; gate and up
fuse_residuals    an addition and the norm of its sum become com.microsoft SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mara_export.graph.nodes import (
    MICROSOFT,
    Builder,
    GraphContext,
    attribute,
    dims,
    is_weight,
    matrix_products,
    produced_by,
    replace,
    replace_node,
)
from mara_export.graph.weights import lazy, read

_JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


@dataclass(frozen=True)
class _Projection:
    """A matrix product by a weight, with or without a bias."""

    product: ir.Node
    bias_node: ir.Node | None
    bias: ir.Value | None

    @property
    def result(self) -> ir.Value:
        """Its output."""
        return (self.bias_node or self.product).outputs[0]


def join_projections(graph: ir.Graph, context: GraphContext) -> None:
    """Multiply a value by all its matrices at once. What is concatenated again after them is not split."""
    remove_dead(graph)
    add = Builder(graph, "joined")
    for group in _groups(graph):
        joined, parts = _join(add, group)
        old = [projection.result for projection in group]
        for value, part in zip(old, parts, strict=True):
            replace(value, part)
        for concat in [node for node, _ in parts[0].uses() if node.op_type == "Concat"]:
            if (
                list(concat.inputs) == parts
                and attribute(concat, "axis") == -1
                and not concat.outputs[0].is_graph_output()
            ):
                concat.outputs[0].replace_all_uses_with(joined)
    remove_dead(graph)


def remove_dead(graph: ir.Graph) -> None:
    """Remove nodes and weights that nothing reads."""
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))


def _groups(graph: ir.Graph) -> list[list[_Projection]]:
    """The projections of one value each, where there are several; those with and without a bias do not mix."""
    groups: dict[tuple[ir.Value | None, bool], list[_Projection]] = {}
    for node in matrix_products(graph):
        if len(dims(node.inputs[1])) != 2:
            continue
        readers = node.outputs[0].consumers()
        biases = [value for value in readers[0].inputs if is_weight(value)] if len(readers) == 1 else []
        if biases and readers[0].op_type == "Add" and not node.outputs[0].is_graph_output():
            projection = _Projection(node, readers[0], biases[0])
        else:
            projection = _Projection(node, None, None)
        groups.setdefault((node.inputs[0], projection.bias is None), []).append(projection)
    return [group for group in groups.values() if len(group) > 1]


def _join(add: Builder, group: list[_Projection]) -> tuple[ir.Value, list[ir.Value]]:
    """One product, with one bias; and a Split into what the group computed."""
    paths = [str(projection.product.name).split("/") for projection in group]
    at = next(i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    own = tuple(path[at] for path in paths)
    name = "/".join([*paths[0][:at], _JOINED.get(own, "+".join(own))])

    matrices = [projection.product.inputs[1] for projection in group]
    columns = [dims(matrix)[1] for matrix in matrices]
    sources = [matrix.const_value for matrix in matrices if matrix is not None]
    weight = lazy(
        f"{name}/weight",
        (dims(matrices[0])[0], sum(columns)),
        lambda: np.concatenate([read(source) for source in sources], axis=1),
    )
    result = add(
        "MatMul", group[0].product.inputs[0], add.initializer(weight), out=f"{name}/product", name=f"{name}/MatMul"
    )
    biases = [projection.bias.const_value for projection in group if projection.bias is not None]
    if biases:
        bias = lazy(f"{name}/bias", (sum(columns),), lambda: np.concatenate([read(bias) for bias in biases]))
        result = add("Add", result, add.initializer(bias), out=f"{name}/sum", name=f"{name}/Add")
    sizes = add.weight(f"{name}/sizes", np.array(columns, np.int64))
    outs = [f"{name}/{part}" for part in own]
    return result, list(add.several("Split", [result, sizes], outs, name=f"{name}/Split", axis=-1))


def fuse_residuals(graph: ir.Graph, context: GraphContext) -> None:
    """Make one node of an addition and the norm of its sum."""
    add = Builder(graph, "fused")
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        residual = produced_by("Add", norm.inputs[0])
        if residual is None or any(value is None or value.producer() is None for value in residual.inputs):
            continue
        total = residual.outputs[0]
        if any(node.op_type == "RMSNormalization" and node is not norm for node in total.consumers()):
            continue  # one norm per sum
        out, name = f"{norm.name}/normalised", str(norm.name)
        normalised, _, _, summed = add.several(
            "SkipSimplifiedLayerNormalization",
            [*residual.inputs, norm.inputs[1]],
            [out, "", "", f"{name}/sum"],
            name=name,
            domain=MICROSOFT,
            epsilon=attribute(norm, "epsilon"),
        )
        replace_node(norm, normalised)
        replace_node(residual, summed)
