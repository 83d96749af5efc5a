"""From a trace, whichever door it came through, to the nodes that lowerings take.

`CachedAttention` (q, k, v, sinks, past_key, past_value, mask, write_indices → out, present_key, present_value;
attributes `scale`, `softcap` and the sizes) writes keys and values into a cache, then attends over all of it; one
without k and v attends to what another has written. Layers with the same window have the same mask. Sinks (heads,), if
any, are scores without a slot. `Rotary` (x, cos, sin → x; attributes `interleaved`, `head_dim`) turns the first W
numbers of each head by the angles of its rows' positions, which the lowered graph looks up in weights (positions,
W / 2). `RMSNorm` multiplies by its weight alone. Linear maps are MatMul and Add.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mara_export.errors import ModelError
from mara_export.graph.nodes import (
    ATTENTION,
    CACHED_ATTENTION,
    DOMAIN,
    LINEAR,
    NORM,
    ROTARY,
    TABLE,
    Builder,
    GraphContext,
    GraphPass,
    attribute,
    custom_nodes,
    is_weight,
    mask_name,
    produced_by,
    replace_node,
)
from mara_export.graph.packed import packed_of
from mara_export.graph.probes import said_once
from mara_export.graph.weights import lazy, read
from mara_runtime import tensors


def named(graph: ir.Graph, context: GraphContext) -> None:
    """Name nodes after the parts of the model that they come from, as --keep and error messages do."""
    for node in graph:
        if node.domain == DOMAIN and "name" in node.attributes:
            node.name = f"{_path(attribute(node, 'name'))}/{node.op_type}"
        elif node.op_type == "Gather" and is_weight(node.inputs[0]):
            assert node.inputs[0] is not None
            node.name = f"{_path(str(node.inputs[0].name).removesuffix('.weight'))}/Gather"


def _path(name: str) -> str:
    """The path of a module: /model/layers.0/mlp of model.layers.0.mlp."""
    parts: list[str] = []
    for part in name.split("."):
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "".join(f"/{part}" for part in parts)


def linear_maps(graph: ir.Graph, context: GraphContext) -> None:
    """Linear → MatMul by the transposed weight (N, K), and Add."""
    add = Builder(graph, "linear")
    for node in custom_nodes(graph, LINEAR):
        x, weight, *bias = node.inputs
        assert weight is not None
        tensor, path = weight.const_value, str(node.name).rpartition("/")[0]
        assert tensor is not None
        count, size = tensor.shape.numpy()
        name, packed = f"{weight.name}/transposed", packed_of(weight)
        transposed = _transposed(name, (size, count), tensor) if packed is None else packed.tensor(name)
        result = add("MatMul", x, add.initializer(transposed), out=f"{path}/product", name=f"{path}/MatMul")
        if bias:
            result = add("Add", result, bias[0], out=f"{path}/sum", name=f"{path}/Add")
        replace_node(node, result)


def _transposed(name: str, shape: tuple[int, int], tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return lazy(name, shape, lambda: read(tensor).T)


def norms(graph: ir.Graph, context: GraphContext) -> None:
    """Add the offset of a norm to its weight, or make it the weight of one without."""
    add = Builder(graph, "norms")
    for node in custom_nodes(graph, NORM):
        offset, size = np.float32(attribute(node, "offset")), attribute(node, "size")
        if len(node.inputs) == 1:
            node.resize_inputs(2)
            node.replace_input_with(1, add.weight(f"norms/ones_{size}", np.full(size, offset)))
        elif offset:
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(1, add.weight(f"{weight.name}/offset", read(weight) + offset))


def rotations(graph: ir.Graph, context: GraphContext) -> None:
    """Let Rotary read its angles from weights. What else reads a table looks up its rows' angles."""
    add = Builder(graph, "rotary")

    def weights(table: ir.Node, layout: str) -> list[ir.Value]:
        key = attribute(table, "module"), attribute(table, "layer_type")
        path = "/".join(filter(None, (_path(key[0]), key[1])))[1:]
        return [
            add.weight(f"{path}/{part}/{layout}", np.ascontiguousarray(said_once(angles, layout)))
            for part, angles in zip(("cos", "sin"), context.rotary[key], strict=True)
        ]

    for node in custom_nodes(graph, ROTARY):
        table = produced_by(TABLE, node.inputs[1])
        if table is None or list(node.inputs[1:]) != list(table.outputs):
            raise ModelError("the model changes the angles of its rotary embedding, which is not supported")
        for index, weight in enumerate(weights(table, attribute(node, "layout")), start=1):
            node.replace_input_with(index, weight)
    for table in custom_nodes(graph, TABLE):
        if any(value.uses() for value in table.outputs):
            found = [add("Gather", weight, table.inputs[0], axis=0) for weight in weights(table, "once")]
            replace_node(table, *found)


def caches(graph: ir.Graph, context: GraphContext) -> None:
    """Attention → CachedAttention over its cache, which becomes inputs and outputs of the graph. Raises ModelError."""
    add, shape = Builder(graph, "caches"), context.shape
    nodes = custom_nodes(graph, ATTENTION)
    if [attribute(node, "layer") for node in nodes] != list(range(shape.num_layers)):
        raise ModelError(
            f"the model has {shape.num_layers} layers, and attention in {len(nodes)}; supported is one in each"
        )
    parts = ("key", "value")
    written: dict[int, Sequence[ir.Value]] = {}
    for node in nodes:
        layer, cache, window = (attribute(node, each) for each in ("layer", "cache", "window"))
        q, *entries, sinks = (*node.inputs, None)[:4]
        mask = add.input(mask_name(window if window < context.max_context else 0))
        write = add.input(tensors.WRITE_INDICES)
        name = f"{_path(f'model.layers.{layer}.self_attn')}/{CACHED_ATTENTION}"
        new = [tensors.present(cache, part) for part in parts]
        if cache in written:
            entries, past, new = [None, None], written[cache], []
        else:
            past = [add.input(tensors.past(cache, part)) for part in parts]
        out, *present = add.several(
            CACHED_ATTENTION,
            [q, *entries, sinks, *past, mask, write],
            [name, *new],
            name=name,
            domain=DOMAIN,
            **{each: attribute(node, each) for each in ("scale", "softcap", "heads", "kv_heads", "head_dim")},
        )
        replace_node(node, out)
        if present:
            written[cache] = present
    graph.outputs.extend(written[cache][part] for cache in sorted(written) for part in range(2))


PASSES: tuple[GraphPass, ...] = (named, linear_maps, norms, rotations, caches)
