"""Computing in float16 or bfloat16: every float of a lowered LLM, its KV cache included.

What the step adds stays float32: the agent, its margins, the logits and what is made of them. So do the *islands* that
a lowering marks, with a Cast at each border: norms and softmax, where they are made of basic operators. The fused
RMSNormalization keeps to float32 within, by its `stash_type`. What a fused attention sums in is the engine's matter:
TensorRT's sums in float16, unless query, key and value are widened in front of it (release notes of 11.3), which may be
slower. tests/gpu compares what becomes of that after a long context.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export.graph.nodes import set_nodes
from mara_export.graph.weights import Weights
from mara_runtime import tensors

NARROW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_MARK = ("mara.compute", "float32")
_WIDE_INPUTS = (tensors.ATTENTION_MASK,)
_WIDE_OUTPUTS = (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)


def island(node: NodeProto) -> None:
    """Mark a node as one that computes in float32 always. Its inputs are floats, or constants."""
    node.metadata_props.add(key=_MARK[0], value=_MARK[1])


def narrow(graph: onnx.GraphProto, weights: Weights, dtype: str) -> None:
    """Rewrite a lowered LLM in place. dtype: one of NARROW. Its inputs and outputs but the cache stay float32."""
    element = NARROW[dtype]
    outside = {name for node in graph.node if not _is_island(node) for name in node.input}
    for tensor in list(graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and tensor.name in outside:
            weights.replace(numpy_helper.from_array(_cast(weights.read(tensor.name), dtype), tensor.name))
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    wide = {name for node in graph.node if _is_island(node) for name in node.output}
    wide |= {*_WIDE_INPUTS, *_WIDE_OUTPUTS, *(name for name, kind in constants.items() if kind == TensorProto.FLOAT)}
    casts: dict[str, str] = {}
    nodes: list[NodeProto] = []

    def converted(name: str, to_wide: bool) -> str:
        if name not in casts:
            casts[name] = f"{name}_{'wide' if to_wide else 'narrow'}"
            nodes.append(_convert(name, casts[name], TensorProto.FLOAT if to_wide else element))
        return casts[name]

    for node in graph.node:
        computes_wide = _is_island(node)
        for i, name in enumerate(node.input):
            is_float = constants.get(name, element) in (element, TensorProto.FLOAT)
            if is_float and (name in wide) != computes_wide:
                node.input[i] = converted(name, computes_wide)
        if not computes_wide:
            _narrow_attributes(node, dtype)
        shown = [name for name in node.output if name in _WIDE_OUTPUTS]
        for i, name in enumerate(node.output):
            if name in shown:
                node.output[i] = casts[name] = f"{name}_narrow"
        nodes.append(node)
        nodes += [_convert(casts[name], name, TensorProto.FLOAT) for name in shown]
    set_nodes(graph, nodes)


def _is_island(node: NodeProto) -> bool:
    return _MARK in ((entry.key, entry.value) for entry in node.metadata_props)


def _narrow_attributes(node: NodeProto, dtype: str) -> None:
    """The values of a Constant, and what a Cast makes."""
    for attribute in node.attribute:
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(_cast(values, dtype), attribute.t.name))
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = NARROW[dtype]


def _convert(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"narrow/{target}", to=element)


def _cast(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # a weight that does not fit becomes infinite, and the parity gate says so
        return values.astype(_DTYPES[dtype])
