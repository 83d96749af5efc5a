"""Computing in float16 or bfloat16: every float of a lowered LLM, its KV cache included.

What the step adds stays float32: the agent, its margins, the logits and what is made of them. RMSNormalization computes
in float32 whatever it reads (`stash_type`), and so does every engine's attention when it sums.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export.weights import Weights
from mara_runtime import tensors

NARROW = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def narrow(graph: onnx.GraphProto, weights: Weights, dtype: str) -> None:
    """Rewrite a lowered LLM in place. dtype: one of NARROW. Its inputs and outputs but the cache stay float32."""
    element = NARROW[dtype]
    for tensor in list(graph.initializer):
        if tensor.data_type == TensorProto.FLOAT:
            weights.replace(numpy_helper.from_array(_cast(weights.read(tensor.name), dtype), tensor.name))
    nodes: list[NodeProto] = [_convert(tensors.ATTENTION_MASK, f"{tensors.ATTENTION_MASK}_narrow", element)]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == tensors.ATTENTION_MASK:
                node.input[i] = nodes[0].output[0]
            elif name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE):
                node.input[i] = f"{name}_narrow"
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                values = numpy_helper.to_array(attribute.t)
                attribute.t.CopyFrom(numpy_helper.from_array(_cast(values, dtype), attribute.t.name))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = element
        wide = [name for name in node.output if name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)]
        for i, name in enumerate(node.output):
            if name in wide:
                node.output[i] = f"{name}_narrow"
        nodes.append(node)
        nodes += [_convert(f"{name}_narrow", name, TensorProto.FLOAT) for name in wide]
    del graph.node[:]
    graph.node.extend(nodes)


def _convert(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], f"narrow/{target}", to=element)


def _cast(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and the parity gate says so
        return values.astype(_DTYPES[dtype])
