"""Rewriting the traced `mara` nodes for an engine. Every lowering keeps the inputs and outputs.

| lowering | attention, cache, rotary embedding, norms become | runs on |
|---|---|---|
| `ort` | com.microsoft GroupQueryAttention, in place on a preallocated cache; see fuse.py | ONNX Runtime |
| `portable` | standard Attention, TensorScatter, RotaryEmbedding, RMSNormalization | ONNX Runtime, TensorRT ≥ 10.15 |
| `decomposed` | basic operators, not in place; see decomposed.py | ONNX Runtime, TensorRT ≥ 10.3 |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export import decomposed
from mara_export.fuse import drop_dead, fuse
from mara_export.nodes import DOMAIN, NODE, NORM, ROTARY
from mara_export.weights import Weights
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape, Tensor

LOWERINGS = ("ort", "portable", "decomposed")
_MICROSOFT = "com.microsoft"
_COS, _SIN = "rotary/cos", "rotary/sin"
_INSIDE = 16
"""GroupQueryAttention rotates heads whose size is a multiple of this."""
_HEADS_LAST = [0, 2, 1, 3]  # (1, heads, S, head_dim) ↔ (1, S, heads, head_dim)

Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


def lower(model: onnx.ModelProto, weights: Weights, shape: ModelShape, lowering: str, rotary: Tables) -> None:
    """Rewrite a traced graph in place for `lowering`, one of LOWERINGS.

    rotary: cosines and sines (positions, head_dim / 2), for as many positions as a row may have.
    """
    graph = _Graph(model.graph)
    nodes, constants, opsets = {"ort": _ort, "portable": _portable, "decomposed": _decomposed}[lowering](graph, shape)
    del model.graph.node[:], model.graph.value_info[:], model.graph.input[:], model.graph.output[:]
    del model.opset_import[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(value_info(t) for t in tensors.llm_inputs(shape))
    model.graph.output.extend(value_info(t) for t in tensors.llm_outputs(shape))
    for name, table in zip((_COS, _SIN), rotary, strict=True):
        weights.add(numpy_helper.from_array(np.ascontiguousarray(table), name))
    for tensor in constants:
        weights.add(tensor)
    model.opset_import.extend(opsets)
    model.ir_version = max(10, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    model.producer_name, model.producer_version, model.doc_string = "mara-export", "", ""
    drop_dead(model.graph)
    if lowering == "ort":
        fuse(model.graph, weights)


_Lowered = tuple[list[NodeProto], Iterable[TensorProto], list[onnx.OperatorSetIdProto]]


class _Graph:
    """The traced graph, and who makes and who reads a value."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.maker = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def joined(self, name: str) -> str | None:
        """What Transpose and Reshape make of an attention's result, if nothing else reads it."""
        for op in ("Transpose", "Reshape"):
            readers = self._readers.get(name, [])
            if len(readers) != 1 or readers[0].op_type != op:
                return None
            name = readers[0].output[0]
        return name

    def made_by(self, op: str, name: str) -> NodeProto | None:
        """The node that makes a value, if it is such a one."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == op else None

    def rotated(self, name: str) -> tuple[str, bool]:
        """A value, or what it was before the rotary embedding, and whether there was one."""
        node = self.made_by(ROTARY, name)
        return (node.input[list(node.output).index(name)], True) if node is not None else (name, False)

    def others(self) -> Iterator[tuple[NodeProto, bool]]:
        """Every node, and whether it is the attention."""
        for node in self.nodes:
            yield node, node.domain == DOMAIN and node.op_type == NODE


def _portable(graph: _Graph, shape: ModelShape) -> _Lowered:
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
                "Attention",
                [q, present_k, present_v, mask],
                [out],
                f"{node.name}/attention",
                scale=_scale(node),
            ),
        ]

    nodes: list[NodeProto] = []
    for node, attends in graph.others():
        nodes += rewrite(node) if attends else _rotations(node) if node.op_type == ROTARY else [_norm(node)]
    return nodes, (), [helper.make_opsetid("", 24)]


def _decomposed(graph: _Graph, shape: ModelShape) -> _Lowered:
    parts = decomposed.Decomposed(shape, (_COS, _SIN))
    for node in graph.nodes:
        parts.rewrite(node)
    return parts.nodes, parts.constants.values(), [helper.make_opsetid("", decomposed.OPSET)]


def _ort(graph: _Graph, shape: ModelShape) -> _Lowered:
    # The operator takes (1, S, heads · head_dim) and counts slots: the last one written, and the cache's size.
    def constant(name: str, values: list[int]) -> NodeProto:
        value = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [name], name, value=value)

    nodes = [
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

    def packed(value: str, name: str) -> str:
        """(1, heads, S, head_dim) as (1, S, heads · head_dim): what it was before the model split it, if it did."""
        apart = graph.made_by("Transpose", value)
        if apart is not None and list(apart.attribute[0].ints) == _HEADS_LAST:
            rows = apart.input[0]
            split = graph.made_by("Reshape", rows)
            if split is not None:
                return str(split.input[0])
        else:
            rows = f"{name}_rows"
            nodes.append(helper.make_node("Transpose", [value], [rows], rows, perm=_HEADS_LAST))
        nodes.append(helper.make_node("Reshape", [rows, "mara/pack"], [f"{name}_packed"], f"{name}_packed"))
        return f"{name}_packed"

    def rewrite(node: NodeProto) -> None:
        *qkv, past_k, past_v, mask, _ = node.input
        out, present_k, present_v = node.output
        values, rotates = qkv, False
        if inside:
            values, (rotates, *_) = zip(*(graph.rotated(value) for value in qkv), strict=True)
        inputs = [packed(value, f"{node.name}/{part}") for part, value in zip("qkv", values, strict=True)]
        joined = graph.joined(out)  # the model's own Transpose and Reshape to (1, S, heads · head_dim)
        result = f"{node.name}/out"
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [
                    *inputs,
                    past_k,
                    past_v,
                    "mara/seqlens_k",
                    "mara/total",
                    *((_COS, _SIN, tensors.POSITION_IDS) if rotates else ("", "", "")),
                    mask,
                ],
                [joined or f"{result}_packed", present_k, present_v],
                f"{node.name}/attention",
                domain=_MICROSOFT,
                num_heads=shape.num_heads,
                kv_num_heads=shape.num_kv_heads,
                do_rotary=int(rotates),
                scale=_scale(node),
            )
        )
        if joined is None:
            nodes.append(
                helper.make_node("Reshape", [f"{result}_packed", "mara/unpack"], [f"{result}_rows"], f"{result}_rows")
            )
            nodes.append(helper.make_node("Transpose", [f"{result}_rows"], [out], result, perm=_HEADS_LAST))
        else:
            replaced.add(joined)

    inside = shape.head_dim % _INSIDE == 0
    replaced: set[str] = set()
    for node, attends in graph.others():
        if attends:
            rewrite(node)
        elif node.op_type == ROTARY:
            if not inside:
                nodes.extend(_rotations(node, _MICROSOFT))
        elif not replaced & set(node.output):
            nodes.append(_norm(node))
    return nodes, (), [helper.make_opsetid("", 23), helper.make_opsetid(_MICROSOFT, 1)]


def _rotations(node: NodeProto, domain: str = "") -> list[NodeProto]:
    """The rotary embedding of q and k as an operator each, of the standard or of com.microsoft."""
    tables = [_COS, _SIN, tensors.POSITION_IDS] if domain == "" else [tensors.POSITION_IDS, _COS, _SIN]
    return [
        helper.make_node("RotaryEmbedding", [value, *tables], [result], f"{node.name}/{part}", domain=domain)
        for part, value, result in zip("qk", node.input, node.output, strict=True)
    ]


def _norm(node: NodeProto) -> NodeProto:
    """A traced norm as the standard operator; any other node as it is."""
    if node.op_type != NORM:
        return node
    epsilon = next(float(a.f) for a in node.attribute if a.name == "epsilon")
    return helper.make_node("RMSNormalization", node.input, node.output, node.name, axis=-1, epsilon=epsilon)


def _scale(node: NodeProto) -> float:
    return next(float(a.f) for a in node.attribute if a.name == "scale")


def value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    """A tensor of mara_runtime.tensors as ONNX declares it."""
    element = (
        helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)) if tensor.dtype != "bfloat16" else TensorProto.BFLOAT16
    )
    return helper.make_tensor_value_info(tensor.name, element, tensor.shape)
