"""Joining the traced LLM and the traced agent into one graph, the step (its interface: mara_runtime.tensors).

What the join adds is the choice: which candidate the agent's margins elect, the LM head on that row alone, and of the
head's row the best tokens. So one run of the graph is one step of decoding, and neither hidden states nor a row as
wide as the vocabulary need leave the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export.lower import value_info
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
    parts = {name: _Nodes(name) for name in ("mask", "choice", "top")}
    _mask(parts["mask"])
    _agent(parts["choice"], agent, shape)
    _choice(parts["choice"], always_head)
    _best_tokens(parts["top"], top, pad=not always_head)
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend([*parts["mask"].nodes, *body, *parts["choice"].nodes, *head, *parts["top"].nodes])
    graph.input.extend(value_info(t) for t in tensors.step_inputs(shape, cache))
    graph.output.extend(value_info(t) for t in tensors.step_outputs(shape, top, cache))
    graph.initializer.extend(agent.graph.initializer)
    for part in parts.values():
        graph.initializer.extend(part.constants)


def _mask(add: _Nodes) -> None:
    """Row i sees the slots below its position and its own."""
    slots = add("Shape", tensors.past(0, "key"), start=2, end=3)
    rows = add("Shape", tensors.INPUT_IDS, start=1, end=2)
    own = add("Add", add.count_to(rows), tensors.WRITE_INDICES)
    below = add("Less", add.count_to(slots), add("Transpose", tensors.POSITION_IDS, perm=[1, 0]))
    itself = add("Equal", add.count_to(slots), add("Unsqueeze", own, add.constant([1])))
    additive = add("Where", add("Or", below, itself), add.constant(0.0), add.constant(tensors.MASKED))
    add("Unsqueeze", additive, add.constant([0, 1]), to=tensors.ATTENTION_MASK)


def _agent(add: _Nodes, agent: onnx.ModelProto, shape: ModelShape) -> None:
    """The agent on the rows asked for. A state that is not finite must not become a margin that is."""
    states = add("Reshape", tensors.LAST_HIDDEN_STATE, add.constant([-1, shape.hidden_size]), to="step/states")
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
    sums = add("ReduceSum", asked, add.constant([1]), keepdims=0)
    finite = add("Less", add("Abs", sums), add.constant(LARGEST))
    add("Where", finite, f"agent/{tensors.AGENT_MARGIN}", add.constant(np.nan), to=tensors.MARGINS)


def _choice(add: _Nodes, always_head: bool) -> None:
    """Rows for the LM head: those asked for, then the elected one or the fallback, if there is either."""
    accepted = add("Greater", tensors.MARGINS, tensors.THRESHOLD)
    score = add("Add", tensors.PRIORITIES, add("Mul", tensors.MARGINS, tensors.MARGIN_WEIGHT))
    # behind the rows stands nobody, better than a rejected one: so there is a greatest, and a finite one, in any case
    score = add("Where", accepted, score, add.constant([-np.inf]))
    score = add("Concat", score, add.constant([_NOBODY]), axis=0)
    row = add("Unsqueeze", score, add.constant([0]))  # TensorRT takes no arg-max of a vector
    rows = add("Concat", tensors.AGENT_ROWS, tensors.FALLBACK_ROW, axis=0)
    one = add("Gather", rows, add("ArgMax", row, axis=1, keepdims=0), axis=0)
    add("Concat", tensors.HEAD_ROWS, one, axis=0, to=tensors.ROWS)
    exists = add("Greater", one, add.constant([-1]), to=_EXISTS)
    some_row = add("Where", exists, one, add.constant([0])) if always_head else add("Compress", one, exists, axis=0)
    add("Concat", tensors.HEAD_ROWS, some_row, axis=0, to=_CHOSEN)


def _best_tokens(add: _Nodes, top: int, pad: bool) -> None:
    """Of each row of logits the best tokens, and the normaliser (ReduceLogSumExp is ten times slower on a CPU).

    pad: the rows may be one fewer than is told of them.
    """
    values, ids = add.several(
        "TopK", [tensors.LOGITS, add.constant([top])], ["step/top_logits", "step/top_ids"], axis=-1, largest=1, sorted=1
    )
    greatest = add("Slice", values, add.constant([0]), add.constant([1]), add.constant([1]))
    total = add("ReduceSum", add("Exp", add("Sub", tensors.LOGITS, greatest)), add.constant([1]), keepdims=1)
    normaliser = add("Squeeze", add("Add", add("Log", total), greatest), add.constant([1]))
    behind = add("Where", _EXISTS, add.constant([0, 0]), add.constant([0, 1])) if pad else ""
    for value, nothing, name in (
        (ids, 0, tensors.TOP_IDS),
        (values, 0.0, tensors.TOP_LOGITS),
        (normaliser, 0.0, tensors.LOG_NORMALISER),
    ):
        if pad:
            add("Pad", value, behind, add.constant(nothing), add.constant([0]), to=name)
        else:
            add("Identity", value, to=name)


class _Nodes:
    """Nodes in the making: each call adds one and returns the name of its result."""

    def __init__(self, name: str) -> None:
        self._name = f"step/{name}"
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def __call__(self, op: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        return self.several(op, inputs, [to or f"{self._name}/{op}_{len(self.nodes)}"], **attributes)[0]

    def several(self, op: str, inputs: Sequence[str], outputs: list[str], **attributes: Any) -> list[str]:
        name = f"{self._name}/{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, outputs, name, **attributes))
        return outputs

    def constant(self, value: Any) -> str:
        array = np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"{self._name}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def count_to(self, size: str) -> str:
        """0, 1, … below `size` (1,)."""
        end = self("Squeeze", size, self.constant([0]))
        return self("Range", self.constant(0), end, self.constant(1))


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
