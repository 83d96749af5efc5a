"""Fewer and larger nodes for ONNX Runtime: a pass of one row is short, and every node wakes all threads again.

join_projections  the matrices that one value is multiplied by become one: those for q, k and v; gate and up
fuse_residuals    an addition and the norm of its sum become com.microsoft SkipSimplifiedLayerNormalization
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

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
from mara_export.graph.packed import Packed, packed_of
from mara_export.graph.weights import lazy, read

_JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def join_projections(graph: ir.Graph, context: GraphContext) -> None:
    """Multiply a value by all its matrices at once. What is concatenated again after them is not split."""
    add = Builder(graph, "joined")
    groups: dict[tuple[ir.Value | None, bool, int], list[tuple[ir.Node, ir.Node | None]]] = {}
    for node in matrix_products(graph):
        bias, packed = _bias(node), packed_of(node.inputs[1])
        blocks = 0 if packed is None else packed.block_size
        groups.setdefault((node.inputs[0], bias is None, blocks), []).append((node, bias))  # a bias joins biases only
    for group in groups.values():
        if len(group) == 1:
            continue
        joined, parts = _join(add, *zip(*group, strict=True))
        for (node, bias), part in zip(group, parts, strict=True):
            replace((bias or node).outputs[0], part)
        for concat in [node for node, _ in parts[0].uses() if node.op_type == "Concat"]:
            if (
                list(concat.inputs) == parts
                and attribute(concat, "axis") == -1
                and not concat.outputs[0].is_graph_output()
            ):
                concat.outputs[0].replace_all_uses_with(joined)


def _bias(product: ir.Node) -> ir.Node | None:
    """The addition of a bias, if nothing else reads the product."""
    readers = product.outputs[0].consumers()
    if len(readers) == 1 and readers[0].op_type == "Add" and not product.outputs[0].is_graph_output():
        return readers[0] if any(map(is_weight, readers[0].inputs)) else None
    return None


def _join(
    add: Builder, products: Sequence[ir.Node], biases: Sequence[ir.Node | None]
) -> tuple[ir.Value, list[ir.Value]]:
    """One product, with one bias if there are any; and a Split into what the products computed."""
    paths = [str(product.name).split("/") for product in products]
    at = next(i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1)
    last = tuple(path[-2] for path in paths)  # before the operator's name
    name = "/".join([*paths[0][:at], _JOINED.get(last, "+".join(last))])

    matrices = [product.inputs[1] for product in products]
    columns = [dims(matrix)[1] for matrix in matrices]
    packed = [found for matrix in matrices if (found := packed_of(matrix)) is not None]
    if packed:
        weight = Packed.joined(packed).tensor(f"{name}/weight")
    else:
        weight = _concatenated(f"{name}/weight", (dims(matrices[0])[0], sum(columns)), matrices)
    result = add("MatMul", products[0].inputs[0], add.initializer(weight), out=f"{name}/product", name=f"{name}/MatMul")
    vectors = [next(filter(is_weight, bias.inputs)) for bias in biases if bias is not None]
    if vectors:
        bias = _concatenated(f"{name}/bias", (sum(columns),), vectors)
        result = add("Add", result, add.initializer(bias), out=f"{name}/sum", name=f"{name}/Add")
    sizes = add.weight(f"{name}/sizes", np.array(columns, np.int64))
    outs = [f"{name}/{'/'.join(path[at:-1])}" for path in paths]
    return result, list(add.several("Split", [result, sizes], outs, name=f"{name}/Split", axis=-1))


def _concatenated(name: str, shape: tuple[int, ...], weights: Sequence[ir.Value | None]) -> ir.LazyTensor:
    """Weights, by their last axis."""
    sources = [weight.const_value for weight in weights if weight is not None]  # not the values, which lose theirs
    return lazy(name, shape, lambda: np.concatenate([read(source) for source in sources], axis=-1))


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
