"""Rewriting the traced `mara::CachedAttention` nodes for an engine. Every lowering keeps the inputs and outputs.

| lowering | becomes | runs on |
|---|---|---|
| `ort` | com.microsoft GroupQueryAttention, in place on a preallocated cache | ONNX Runtime |
| `portable` | TensorScatter and Attention of the ONNX standard, opset 24 | ONNX Runtime, TensorRT ≥ 10.15 |
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import NodeProto, TensorProto, helper

from mara_export.trace import DOMAIN, NODE
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape, Tensor

LOWERINGS = ("ort", "portable")
_MICROSOFT = "com.microsoft"


def lower(model: onnx.ModelProto, shape: ModelShape, lowering: str) -> None:
    """Rewrite a traced graph in place for `lowering`, one of LOWERINGS."""
    graph = model.graph
    rewrite, prologue, opsets = {"ort": _ort, "portable": _portable}[lowering](shape)
    nodes: list[NodeProto] = list(prologue)
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == NODE:
            nodes += rewrite(node)
        else:
            nodes.append(node)
    del graph.node[:], graph.value_info[:], graph.input[:], graph.output[:], model.opset_import[:]
    graph.node.extend(nodes)
    graph.input.extend(_value_info(t) for t in tensors.llm_inputs(shape))
    graph.output.extend(_value_info(t) for t in tensors.llm_outputs(shape))
    model.opset_import.extend(opsets)
    model.ir_version = max(10, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    model.producer_name, model.producer_version, model.doc_string = "mara-export", "", ""


_Rewrite = Callable[[NodeProto], list[NodeProto]]
_Lowering = tuple[_Rewrite, list[NodeProto], list[onnx.OperatorSetIdProto]]


def _portable(shape: ModelShape) -> _Lowering:
    def rewrite(node: NodeProto) -> list[NodeProto]:
        q, k, v, past_k, past_v, mask, write = node.input
        out, present_k, present_v = node.output

        def scatter(part: str, past: str, new: str, present: str) -> NodeProto:
            name = f"{node.name}/{part}"
            return helper.make_node("TensorScatter", [past, new, write], [present], name, axis=-2, mode="linear")

        return [
            scatter("key", past_k, k, present_k),
            scatter("value", past_v, v, present_v),
            helper.make_node(
                "Attention", [q, present_k, present_v, mask], [out], f"{node.name}/attention", scale=_scale(node)
            ),
        ]

    return rewrite, [], [helper.make_opsetid("", 24)]


def _ort(shape: ModelShape) -> _Lowering:
    # The operator takes (1, S, heads · head_dim) and counts slots: the last one written, and the cache's size.
    def constant(name: str, values: list[int]) -> NodeProto:
        value = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [name], name, value=value)

    prologue = [
        constant("mara/one", [1]),
        constant("mara/first", [0]),
        constant("mara/pack", [0, 0, -1]),
        constant("mara/unpack", [0, 0, shape.num_heads, shape.head_dim]),
        helper.make_node("Shape", [tensors.INPUT_IDS], ["mara/rows"], "mara/rows", start=1, end=2),
        helper.make_node("Add", [tensors.WRITE_INDICES, "mara/rows"], ["mara/end"], "mara/end"),
        helper.make_node("Sub", ["mara/end", "mara/one"], ["mara/last"], "mara/last"),
        helper.make_node("Cast", ["mara/last"], ["mara/seqlens_k"], "mara/seqlens_k", to=TensorProto.INT32),
        helper.make_node("Shape", [tensors.past(0, "key")], ["mara/slots"], "mara/slots", start=2, end=3),
        helper.make_node("Squeeze", ["mara/slots", "mara/first"], ["mara/slots_scalar"], "mara/slots_scalar"),
        helper.make_node("Cast", ["mara/slots_scalar"], ["mara/total"], "mara/total", to=TensorProto.INT32),
    ]

    def rewrite(node: NodeProto) -> list[NodeProto]:
        *qkv, past_k, past_v, mask, _ = node.input
        out, present_k, present_v = node.output
        nodes, packed = [], []
        for part, value in zip("qkv", qkv, strict=True):
            name = f"{node.name}/{part}"
            nodes += [
                helper.make_node("Transpose", [value], [f"{name}_rows"], f"{name}_rows", perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"{name}_rows", "mara/pack"], [f"{name}_packed"], f"{name}_packed"),
            ]
            packed.append(f"{name}_packed")
        name = f"{node.name}/out"
        nodes += [
            helper.make_node(
                "GroupQueryAttention",
                # rotary caches and position_ids stay empty: the traced graph rotates by itself
                [*packed, past_k, past_v, "mara/seqlens_k", "mara/total", "", "", "", mask],
                [f"{name}_packed", present_k, present_v],
                f"{node.name}/attention",
                domain=_MICROSOFT,
                num_heads=shape.num_heads,
                kv_num_heads=shape.num_kv_heads,
                do_rotary=0,
                scale=_scale(node),
            ),
            helper.make_node("Reshape", [f"{name}_packed", "mara/unpack"], [f"{name}_rows"], f"{name}_rows"),
            helper.make_node("Transpose", [f"{name}_rows"], [out], name, perm=[0, 2, 1, 3]),
        ]
        return nodes

    return rewrite, prologue, [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]


def _scale(node: NodeProto) -> float:
    return next(float(a.f) for a in node.attribute if a.name == "scale")


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    element = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}[tensor.dtype]
    return helper.make_tensor_value_info(tensor.name, element, tensor.shape)
