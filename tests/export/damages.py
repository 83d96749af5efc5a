"""What the parity gate is to find: damages of a finished graph, its weights in it, and of an agent's file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from mara_runtime import tensors

Damage = Callable[[onnx.ModelProto], None]


def weight(model: onnx.ModelProto, name: str) -> TensorProto:
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return tensor


def perturb(name: str, by: float = 1e-3) -> Damage:
    """Every value of a weight off by about a thousandth of it. (One factor for all would pass through a norm.)"""

    def damage(model: onnx.ModelProto) -> None:
        tensor = weight(model, name)
        value = numpy_helper.to_array(tensor)
        noise = by * np.random.default_rng(0).standard_normal(value.shape)
        tensor.CopyFrom(numpy_helper.from_array((value * (1 + noise)).astype(np.float32), name))

    return damage


def change_scale(model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.op_type in ("MultiHeadAttention", "Attention")]
    assert nodes
    for attribute in [a for n in nodes[:1] for a in n.attribute if a.name == "scale"]:
        attribute.f *= 1.01


def is_mask(node: NodeProto) -> bool:
    return node.name.startswith("step/mask/")


def constant(name: str, value: Any) -> NodeProto:
    return helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(np.asarray(value), name))


def rotate_by_slot(model: onnx.ModelProto) -> None:
    """Rotate a sibling by the slot it is written to, not by the position it shares."""
    graph = model.graph
    rest = [copy.deepcopy(node) for node in graph.node]
    for node in rest:
        if not is_mask(node):
            node.input[:] = ["t/positions" if name == tensors.POSITION_IDS else name for name in node.input]
    assert any("t/positions" in node.input for node in rest)
    by_slot = [
        helper.make_node("Shape", [tensors.GRID], ["t/width"], "t/width", start=1, end=2),
        helper.make_node("Div", [tensors.SEATS, "t/width"], ["t/conversation"], "t/conversation"),
        helper.make_node("Mul", ["t/conversation", "t/width"], ["t/first"], "t/first"),
        helper.make_node("Sub", [tensors.SEATS, "t/first"], ["t/number"], "t/number"),
        helper.make_node("Gather", [tensors.WRITE_INDICES, "t/conversation"], ["t/start"], "t/start"),
        helper.make_node("Add", ["t/start", "t/number"], ["t/positions"], "t/positions"),
    ]
    del graph.node[:]
    graph.node.extend([*by_slot, *rest])


def before_the_norm(model: onnx.ModelProto) -> None:
    """Hand the agent the state that goes into the final norm; the logits stay right."""
    graph = model.graph
    normed = {"step/hidden": "t/hidden"}
    for node in graph.node:
        if not node.name.startswith("step/"):
            node.input[:] = [normed.get(name, name) for name in node.input]
            node.output[:] = [normed.get(name, name) for name in node.output]
    weights = {t.name for t in graph.initializer}
    first = next(node for node in graph.node if node.name.startswith("/model/norm/"))
    if first.op_type == "SkipSimplifiedLayerNormalization":  # its last output is the sum that it norms
        state = first.output[3]
    else:
        (state,) = {name for name in first.input if name not in weights}
    place = next(i for i, node in enumerate(graph.node) if "t/hidden" in node.output)
    graph.node.insert(place + 1, helper.make_node("Identity", [state], ["step/hidden"], "t/before"))


def swap_two_tokens(model: onnx.ModelProto) -> None:
    """Of the head alone: all numbers but two of a row are right."""
    (head,) = [n for n in model.graph.node if n.name == "/lm_head/MatMul"]
    value = numpy_helper.to_array(weight(model, head.input[1])).copy()
    tokens = (slice(None),) * (value.shape[0] < value.shape[1]) + ([100, 101],)  # (D, V), or (V, D) where it is tied
    value[tokens] = value[tokens][..., ::-1] if len(tokens) > 1 else value[[101, 100]]
    model.graph.initializer.append(numpy_helper.from_array(value, "t/head"))
    head.input[1] = "t/head"


def siblings_see_each_other(model: onnx.ModelProto) -> None:
    """Those in later slots the ones before them: by slot, where a row sees by position."""
    (own,) = [node for node in model.graph.node if is_mask(node) and node.op_type == "Equal"]
    own.op_type = "LessOrEqual"


def conversations_written_from_one_slot(model: onnx.ModelProto) -> None:
    """All of them from the first one's: where several share a pass, only the first is right."""
    nodes = [node for node in model.graph.node if tensors.WRITE_INDICES in node.input]
    assert nodes
    for node in nodes:
        node.input[:] = ["t/starts" if name == tensors.WRITE_INDICES else name for name in node.input]
    model.graph.node.insert(0, constant("t/axis", [0]))
    model.graph.node.insert(1, constant("t/one", [1]))
    ends = ["t/axis", "t/one", "t/axis"]
    model.graph.node.insert(2, helper.make_node("Slice", [tensors.WRITE_INDICES, *ends], ["t/first"], "t/first"))
    model.graph.node.insert(3, helper.make_node("Shape", [tensors.WRITE_INDICES], ["t/count"], "t/count"))
    model.graph.node.insert(4, helper.make_node("Expand", ["t/first", "t/count"], ["t/starts"], "t/starts"))


def rows_seated_with_others(model: onnx.ModelProto) -> None:
    """What attention returns to the rows of a pass, as if all were the first conversation's: by number, not by seat."""
    nodes = [n for n in model.graph.node if n.op_type == "Gather" and n.input[1] == tensors.SEATS]
    assert nodes
    for node in nodes:
        node.input[1] = "t/numbers"
    model.graph.node.insert(0, helper.make_node("Shape", [tensors.GRID], ["t/most"], "t/most", start=1, end=2))
    model.graph.node.insert(1, helper.make_node("Mod", [tensors.SEATS, "t/most"], ["t/numbers"], "t/numbers"))


def a_row_does_not_see_itself(model: onnx.ModelProto) -> None:
    (either,) = [node for node in model.graph.node if is_mask(node) and node.op_type == "Or"]
    either.op_type = "And"


def mask_inverted_at(slot: int) -> Damage:
    """What every row sees of one slot, turned round: of slot 0, that the first token is unseen."""

    def damage(model: onnx.ModelProto) -> None:
        (made,) = [i for i, node in enumerate(model.graph.node) if tensors.ATTENTION_MASK in node.output]
        model.graph.node[made].output[0] = "t/mask"
        nodes = [
            constant("t/slot", slot),
            *(constant(f"t/{name}", value) for name, value in (("zero", 0), ("one", 1), ("axis", [0]))),
            constant("t/masked", np.float32(tensors.MASKED)),
            helper.make_node("Shape", [tensors.past(0, "key")], ["t/count"], "t/count", start=2, end=3),
            helper.make_node("Squeeze", ["t/count", "t/axis"], ["t/end"], "t/end"),
            helper.make_node("Range", ["t/zero", "t/end", "t/one"], ["t/slots"], "t/slots"),
            helper.make_node("Equal", ["t/slots", "t/slot"], ["t/there"], "t/there"),
            helper.make_node("Sub", ["t/masked", "t/mask"], ["t/other"], "t/other"),
            helper.make_node("Where", ["t/there", "t/other", "t/mask"], [tensors.ATTENTION_MASK], "t/changed"),
        ]
        for offset, node in enumerate(nodes, start=1):
            model.graph.node.insert(made + offset, node)

    return damage


DAMAGES = {
    "scale": change_scale,
    "positions by slot": rotate_by_slot,
    "before the norm": before_the_norm,
    "two tokens": swap_two_tokens,
    "siblings see each other": siblings_see_each_other,
    "conversations written from one slot": conversations_written_from_one_slot,
    "rows seated with others": rows_seated_with_others,
    "a row does not see itself": a_row_does_not_see_itself,
    "first token unseen": mask_inverted_at(0),
    "a later token seen by the wrong rows": mask_inverted_at(3),
}


def change_agent(change: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Path], None]:
    """Change weight (2, width) and bias (2,) of the last layer in an agent's file."""

    def damage(path: Path) -> None:
        state = load_file(path)
        names = [f"output_linear.{part}" for part in ("weight", "bias")]
        changed = change(*(state[name].numpy() for name in names))
        state |= {n: torch.tensor(np.ascontiguousarray(v, np.float32)) for n, v in zip(names, changed, strict=True)}
        save_file(state, path)

    return damage


AGENTS = {
    "negated": (change_agent(lambda w, b: (w[::-1], b[::-1])), "decisions"),
    "nudged": (change_agent(lambda w, b: (w, np.add(b, [0.0, 0.3]))), "decisions"),
    "doubled": (change_agent(lambda w, b: (2 * w, 2 * b)), "margins"),
}
"""Damage, and what the gate must name."""
