"""Joining the traced LLM and the traced agent into one graph, the step (its interface: mara_runtime.tensors).

What the join adds is the choice: which candidate the agent's margins elect, the LM head on that row alone, and of the
head's row the best tokens. So one run of the graph is one step of decoding, and neither hidden states nor a row as
wide as the vocabulary need leave the engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from mara_export.graph.lower import value_info
from mara_export.graph.nodes import Nodes, set_nodes
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

LARGEST = 3.4e38
"""Sums of a state from here on are taken for infinite, in float32."""
_CHOSEN = "step/rows"
"""(R,) rows for the LM head."""
_EXISTS = "step/exists"
"""(1,) is somebody elected, or the fallback?"""
_NOBODY = np.finfo(np.float32).min
"""A score below that of every accepted row, unless its priority says never."""


def join(
    llm: onnx.ModelProto,
    agent: onnx.ModelProto,
    shape: ModelShape,
    max_candidates: int,
    *,
    cache: str = "float32",
    always_head: bool = False,
) -> None:
    """Make `llm`, a lowered LLM, the step graph, in place. agent: a traced agent of the same hidden size.

    cache: type of the KV cache. always_head: put one row through the LM head even when nobody is chosen, so that all
    sizes follow from the inputs' sizes, as TensorRT and CUDA graphs want it.
    """
    top = tensors.top_tokens(max_candidates, shape.vocab_size)
    graph = llm.graph
    body, head = _split(graph)
    for node in head:  # `rows` is what the step tells of them
        for i, name in enumerate(node.input):
            node.input[i] = _CHOSEN if name == tensors.ROWS else name
    parts = {name: Nodes(f"step/{name}") for name in ("mask", "choice", "top")}
    _mask(parts["mask"])
    _agent(parts["choice"], agent, shape)
    _choice(parts["choice"], always_head)
    _best_tokens(parts["top"], top, pad=not always_head)
    set_nodes(graph, [*parts["mask"].nodes, *body, *parts["choice"].nodes, *head, *parts["top"].nodes])
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.extend(value_info(t) for t in tensors.step_inputs(shape, cache))
    graph.output.extend(value_info(t) for t in tensors.step_outputs(shape, top, cache))
    graph.initializer.extend(agent.graph.initializer)
    for part in parts.values():
        graph.initializer.extend(part.constants)


def _mask(add: Nodes) -> None:
    """Row i sees the slots below its position and its own."""
    slots = add("Shape", tensors.past(0, "key"), start=2, end=3)
    own = add.written_slots(add.rows())
    below = add("Less", add.count_to(slots), add("Transpose", tensors.POSITION_IDS, perm=[1, 0]))
    itself = add("Equal", add.count_to(slots), add("Unsqueeze", own, add.ints(1)))
    additive = add("Where", add("Or", below, itself), add.constant(0.0), add.constant(tensors.MASKED))
    add("Unsqueeze", additive, add.ints(0, 1), to=tensors.ATTENTION_MASK)


def _agent(add: Nodes, agent: onnx.ModelProto, shape: ModelShape) -> None:
    """The agent on the rows asked for. A state that is not finite must not become a margin that is."""
    states = add("Reshape", tensors.LAST_HIDDEN_STATE, add.ints(-1, shape.hidden_size), to="step/states")
    asked = add("Gather", states, tensors.AGENT_ROWS, axis=0)
    names = {tensors.AGENT_STATES: asked}
    for tensor in agent.graph.initializer:
        names[tensor.name] = tensor.name = f"agent/{tensor.name}"
    for node in agent.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, f"agent/{name}")
        for i, name in enumerate(node.output):
            node.output[i] = f"agent/{name}"
        node.name = f"agent/{node.name}"
        add.nodes.append(node)
    # a ReLU may turn NaN into 0, and TensorRT may take NaN times 0 for 0: so a comparison, which NaN fails
    sums = add("ReduceSum", asked, add.ints(1), keepdims=0)
    finite = add("Less", add("Abs", sums), add.constant(LARGEST))
    add("Where", finite, f"agent/{tensors.AGENT_MARGIN}", add.constant(np.nan), to=tensors.MARGINS)


def _choice(add: Nodes, always_head: bool) -> None:
    """Rows for the LM head: those asked for, then the elected one or the fallback, if there is either."""
    accepted = add("Greater", tensors.MARGINS, tensors.THRESHOLD)
    score = add("Add", tensors.PRIORITIES, add("Mul", tensors.MARGINS, tensors.MARGIN_WEIGHT))
    # behind the rows stands nobody, better than a rejected one: so there is a greatest, and a finite one, in any case
    score = add("Where", accepted, score, add.constant([-np.inf]))
    score = add("Concat", score, add.constant([_NOBODY]), axis=0)
    row = add("Unsqueeze", score, add.ints(0))  # TensorRT takes no arg-max of a vector
    rows = add("Concat", tensors.AGENT_ROWS, tensors.FALLBACK_ROW, axis=0)
    one = add("Gather", rows, add("ArgMax", row, axis=1, keepdims=0), axis=0)
    add("Concat", tensors.HEAD_ROWS, one, axis=0, to=tensors.ROWS)
    exists = add("Greater", one, add.ints(-1), to=_EXISTS)
    some_row = add("Where", exists, one, add.ints(0)) if always_head else add("Compress", one, exists, axis=0)
    add("Concat", tensors.HEAD_ROWS, some_row, axis=0, to=_CHOSEN)


def _best_tokens(add: Nodes, top: int, pad: bool) -> None:
    """Of each row of logits the best tokens, and the normaliser (ReduceLogSumExp is ten times slower on a CPU).

    pad: the rows may be one fewer than is told of them.
    """
    values, ids = _top_k(add, top, ["step/top_logits", "step/top_ids"], maybe_none=pad)
    greatest = add("Slice", values, add.ints(0), add.ints(1), add.ints(1))
    total = add("ReduceSum", add("Exp", add("Sub", tensors.LOGITS, greatest)), add.ints(1), keepdims=1)
    normaliser = add("Squeeze", add("Add", add("Log", total), greatest), add.ints(1))
    behind = add("Where", _EXISTS, add.ints(0, 0), add.ints(0, 1)) if pad else ""
    for value, nothing, name in (
        (ids, 0, tensors.TOP_IDS),
        (values, 0.0, tensors.TOP_LOGITS),
        (normaliser, 0.0, tensors.LOG_NORMALISER),
    ):
        if pad:
            add("Pad", value, behind, add.constant(nothing), add.ints(0), to=name)
        else:
            add("Identity", value, to=name)


def _top_k(add: Nodes, top: int, names: list[str], *, maybe_none: bool) -> list[str]:
    """Values and indices of the greatest logits; maybe_none: there may be no row."""
    inputs = [tensors.LOGITS, add.ints(top)]
    how: dict[str, Any] = {"axis": -1, "largest": 1, "sorted": 1}
    if not maybe_none:
        return add.several("TopK", inputs, names, **how)
    types = {"values": TensorProto.FLOAT, "indices": TensorProto.INT64}
    outputs = [helper.make_tensor_value_info(name, kind, [None, top]) for name, kind in types.items()]
    some = [helper.make_node("TopK", inputs, list(types), **how)]
    none = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, [0, top], []))
        for name, kind in types.items()
    ]
    # in ONNX Runtime before 1.31, TopK of no row divides by zero, which ends the process
    return add.several(
        "If",
        [add("Greater", add("Size", _CHOSEN), add.constant(0))],
        names,
        then_branch=helper.make_graph(some, "some row", [], outputs),
        else_branch=helper.make_graph(none, "no row", [], outputs),
    )


def _split(graph: onnx.GraphProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes of the LLM without and with a dependence on which rows go through the LM head."""
    behind = {tensors.ROWS}
    body, head = [], []
    for node in graph.node:
        if behind & set(node.input):
            behind |= set(node.output)
            head.append(node)
        else:
            body.append(node)
    return body, head
