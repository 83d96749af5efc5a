"""Float precisions: what an LLM computes in, and what its matrices are stored as.

`narrow` makes every float of a lowered LLM float16 or bfloat16, its KV cache included. What the step graph adds stays
float32: the agents, their margins, the logits and what is made of them. So do *islands*, nodes that a lowering marks:
norms and softmax, where they are made of basic operators, with a Cast at each border. The fused RMSNormalization
computes in float32 internally, by its `stash_type`. In what precision a fused attention accumulates is up to the
engine: TensorRT accumulates in float16 unless query, key and value are widened in front of it (release notes of 11.3),
which may be slower. tests/gpu compares what becomes of that after a long context.

`store_float16` halves the bundle where the LLM computes in float32: matrices are widened when the graph is loaded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mara_export.graph.nodes import Builder, GraphContext, dims, is_mask, is_weight
from mara_export.graph.weights import INLINE_BYTES, lazy, read
from mara_runtime import tensors

DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_ISLAND = "mara.island"
_FLOAT = ir.DataType.FLOAT


def island(value: ir.Value) -> ir.Value:
    """Mark the node that produces a value as one that always computes in float32. Its inputs are all floats."""
    node = value.producer()
    assert node is not None
    node.meta[_ISLAND] = True
    return value


def _is_island(node: ir.Node | None) -> bool:
    return node is not None and _ISLAND in node.meta


def narrow(graph: ir.Graph, context: GraphContext) -> None:
    """Compute in the type of the KV cache. Inputs and outputs other than the cache stay float32."""
    dtype, add = DTYPES[context.options.cache], Builder(graph, "narrow")
    for weight in list(graph.initializers.values()):
        if weight.dtype == _FLOAT and not all(map(_is_island, weight.consumers())):
            _cast_weight(weight, dtype)
    wide_outputs = [value for value in graph.outputs if value.name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)]
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value, dtype) and _is_wide(value) != _is_island(node):
                if value not in casts:
                    to, suffix = (dtype, "narrow") if _is_wide(value) else (_FLOAT, "wide")
                    out = f"{value.name}_{suffix}"
                    casts[value] = add("Cast", value, out=out, name=f"narrow/{out}", to=to)
                node.replace_input_with(index, casts[value])
        if node.op_type == "Cast" and not _is_island(node) and node.attributes["to"].value == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", dtype)
    for value in wide_outputs:
        name = str(value.name)
        value.name = f"{name}_narrow"
        graph.outputs[graph.outputs.index(value)] = add("Cast", value, out=name, name=f"narrow/{name}", to=_FLOAT)


def _is_float(value: ir.Value, dtype: ir.DataType) -> bool:
    """Weights know their type. Of other values only floats reach an island, and only floats are wide."""
    return not is_weight(value) or value.dtype in (dtype, _FLOAT)


def _is_wide(value: ir.Value) -> bool:
    """Is a value float32 in the narrowed graph?"""
    if is_weight(value):
        return value.dtype == _FLOAT
    return _is_island(value.producer()) or is_mask(value.name)


def _cast_weight(weight: ir.Value, dtype: ir.DataType) -> None:
    """Change the type of a weight, one at a time, when it is written."""
    tensor = weight.const_value
    assert tensor is not None

    def cast() -> np.ndarray:
        with np.errstate(over="ignore"):  # a weight that does not fit becomes infinite, and the parity gate says so
            return read(tensor).astype(dtype.numpy())

    weight.const_value = lazy(str(weight.name), dims(weight), cast, dtype)
    weight.dtype = dtype


def store_float16(graph: ir.Graph, context: GraphContext) -> None:
    """Store matrices as float16, and widen them where they are read."""
    add = Builder(graph, "widen")
    for weight in list(graph.initializers.values()):
        if weight.dtype != _FLOAT or len(dims(weight)) not in (2, 3) or 4 * int(np.prod(dims(weight))) < INLINE_BYTES:
            continue
        name, uses = weight.name, list(weight.uses())
        _cast_weight(weight, ir.DataType.FLOAT16)
        lookups = [node for node, _ in uses if node.op_type == "Gather"]
        for node in lookups:  # the looked-up rows are widened, not the table
            rows = node.outputs[0]
            readers = list(rows.uses())
            wide = add("Cast", rows, out=f"{rows.name}_fp32", name=f"widen/{rows.name}", to=_FLOAT)
            for reader, index in readers:
                reader.replace_input_with(index, wide)
        others = [(node, index) for node, index in uses if node not in lookups]
        if others:
            wide = add("Cast", weight, out=f"{name}_fp32", name=f"widen/{name}", to=_FLOAT)
            for node, index in others:
                node.replace_input_with(index, wide)
