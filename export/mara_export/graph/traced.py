"""From a trace, whichever door it came through, to the nodes that lowerings take.

`CachedAttention` (q, k, v, past_key, past_value, mask, write_indices → out, present_key, present_value; attribute
`scale`) writes keys and values into the cache, then attends over all of it. `Rotary` turns x by the angles of its rows'
positions, which the lowered graph looks up. `RMSNorm` multiplies by its weight alone. Linear maps are MatMul and Add.
"""

from __future__ import annotations

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
    replace_node,
)
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
        transposed = _transposed(f"{weight.name}/transposed", (size, count), tensor)
        result = add("MatMul", x, add.initializer(transposed), out=f"{path}/product", name=f"{path}/MatMul")
        if bias:
            result = add("Add", result, bias[0], out=f"{path}/sum", name=f"{path}/Add")
        replace_node(node, result)


def _transposed(name: str, shape: tuple[int, int], tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return lazy(name, shape, lambda: np.ascontiguousarray(read(tensor).T))


def norms(graph: ir.Graph, context: GraphContext) -> None:
    """Add the offset of a norm to its weight."""
    add = Builder(graph, "norms")
    for node in custom_nodes(graph, NORM):
        weight, offset = node.inputs[1], attribute(node, "offset")
        if offset and weight is not None:
            node.replace_input_with(1, add.weight(f"{weight.name}/offset", read(weight) + np.float32(offset)))


def rotations(graph: ir.Graph, context: GraphContext) -> None:
    """Let Rotary take x alone. Raises ModelError for what lowerings have no word for."""
    tables = custom_nodes(graph, TABLE)
    kinds = {(attribute(node, "module"), attribute(node, "layer_type")) for node in tables}
    turning = custom_nodes(graph, ROTARY)
    for node in turning:
        if attribute(node, "interleaved") or attribute(node, "layout") != "halves":
            raise ModelError(
                "the model turns neighbouring numbers of a head by its rotary embedding, which is not supported"
            )
        node.resize_inputs(1)
    if len(kinds) > 1:
        raise ModelError(f"the model has {len(kinds)} rotary embeddings; models with one are supported")
    if any(value.uses() for node in tables for value in node.outputs):
        raise ModelError("the model uses the angles of its rotary embedding in a way that is not supported")


def caches(graph: ir.Graph, context: GraphContext) -> None:
    """Attention → CachedAttention over its layer's cache, which becomes inputs and outputs of the graph.

    Raises ModelError for what lowerings have no word for.
    """
    add, shape = Builder(graph, "caches"), context.shape
    nodes = custom_nodes(graph, ATTENTION)
    if [attribute(node, "layer") for node in nodes] != list(range(shape.num_layers)):
        raise ModelError(
            f"the model has {shape.num_layers} layers, and attention in {len(nodes)}; supported is one in each"
        )
    for node in nodes:
        layer = attribute(node, "layer")
        if (cap := attribute(node, "softcap")) != 0:
            raise ModelError(f"layer {layer} caps its scores at {cap:g}, which is not supported")
        if 0 < (window := attribute(node, "window")) < context.max_context:
            raise ModelError(
                f"layer {layer} has a sliding window of {window} tokens, less than the context of "
                f"{context.max_context}; export with --max-context {window} or less"
            )
        parts = ("key", "value")
        past = [add.input(tensors.past(layer, part)) for part in parts]
        mask, write = add.input(tensors.ATTENTION_MASK), add.input(tensors.WRITE_INDICES)
        name = f"{_path(f'model.layers.{layer}.self_attn')}/{CACHED_ATTENTION}"
        out, *present = add.several(
            CACHED_ATTENTION,
            [*node.inputs, *past, mask, write],
            [name, *(tensors.present(layer, part) for part in parts)],
            name=name,
            domain=DOMAIN,
            scale=attribute(node, "scale"),
        )
        replace_node(node, out)
        graph.outputs.extend(present)


PASSES: tuple[GraphPass, ...] = (named, linear_maps, norms, rotations, caches)
