"""Joining the lowered LLM and the traced agents into one graph, the step (its interface: mara_runtime.tensors).

What the join adds is the choice: which candidate the agents' margins elect, the LM head on that row alone, and the best
tokens of that row. So one run of the graph is one step of decoding, and neither hidden states nor a row as wide as the
vocabulary need to leave the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mara_export.graph.nodes import Builder, GraphContext, is_mask, mask_window
from mara_export.graph.weights import load
from mara_export.targets import TARGETS
from mara_runtime import tensors
from mara_runtime.tensors import ModelShape

LARGEST = 3.4e38
"""Sums of a state from here on count as infinite, in float32."""
_NOBODY = np.nextafter(np.finfo(np.float32).min, np.float32(0))
"""A score below that of every accepted row, unless its priority says never. The lowest number but one: a search for the
greatest that starts from the lowest, and takes only what is greater, finds this one too."""


def join_agents(graph: ir.Graph, context: GraphContext) -> None:
    """Make a lowered LLM the step graph."""
    options = context.options
    join(
        graph,
        load(context.agents).graph,
        context.shape,
        options.max_candidates,
        cache=options.cache,
        always_head=TARGETS[options.target].fixed_shapes,
    )


def join(
    graph: ir.Graph,
    agents: ir.Graph,
    shape: ModelShape,
    max_candidates: int,
    *,
    cache: str = "float32",
    always_head: bool = False,
) -> None:
    """Make `graph`, a lowered LLM, the step graph. agents: as traced, for the same hidden size; they are used up.

    cache: type of the KV cache. always_head: put one row through the LM head even when none is elected, so that all
    sizes follow from the inputs' sizes, as TensorRT and CUDA graphs need.
    """
    top = tensors.top_tokens(max_candidates, shape.vocab_size)
    results = {str(value.name): value for value in graph.outputs}
    masks = [value for value in graph.inputs if is_mask(value.name)]
    _make_masks(Builder(graph, "step/mask"), masks)
    choice = Builder(graph, "step/choice")
    hidden = results[tensors.LAST_HIDDEN_STATE]
    hidden.name = "step/hidden"
    states = choice("Reshape", hidden, choice.ints(-1, shape.hidden_size), out="step/states")  # (S, D)
    results[tensors.LAST_HIDDEN_STATE] = choice("Gather", states, choice.input(tensors.HIDDEN_ROWS), axis=0)
    results[tensors.MARGINS] = _margins(choice, agents, states)
    results[tensors.ROWS], chosen, missing = _choose(choice, results[tensors.MARGINS], always_head)
    results |= _best_tokens(Builder(graph, "step/top"), results[tensors.LOGITS], chosen, missing, top)

    inputs = {str(value.name): value for value in graph.inputs}
    if tensors.ROWS in inputs:
        inputs[tensors.ROWS].replace_all_uses_with(chosen)
    step_inputs = tensors.step_inputs(shape, cache)
    graph.inputs[:] = [inputs.get(t.name) or choice.input(t.name) for t in step_inputs]
    step_outputs = tensors.step_outputs(shape, top, cache)
    graph.outputs[:] = [results[t.name] for t in step_outputs]
    declare(graph, step_inputs, step_outputs)


def declare(graph: ir.Graph, inputs: Sequence[tensors.Tensor], outputs: Sequence[tensors.Tensor]) -> None:
    """Give a graph's inputs and outputs the names, types and shapes of mara_runtime.tensors."""
    for value, tensor in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name, value.shape = tensor.name, ir.Shape(tensor.shape)
        value.dtype = ir.DataType[{"float32": "FLOAT"}.get(tensor.dtype, tensor.dtype.upper())]


def _make_masks(add: Builder, masks: Sequence[ir.Value]) -> None:
    """Compute the masks that a graph takes, (B, 1, M, C) additive: row i sees the slots below its position and its own.

    A sliding window, which the mask's name states, hides all slots but the last ones before the position.
    """
    slots = add.count_to(add("Shape", add.input(tensors.past(0, "key")), start=2, end=3))
    _, own = add.written()
    positions = add("Transpose", add.input(tensors.POSITION_IDS), perm=[1, 0])
    below = add("Less", slots, positions)
    itself = add("Equal", slots, add("Unsqueeze", own, add.ints(1)))
    for mask in masks:
        seen, window = below, mask_window(mask.name)
        if window:
            seen = add("And", below, add("Greater", slots, add("Sub", positions, add.constant(window))))
        additive = add("Where", add("Or", seen, itself), add.constant(0.0), add.constant(tensors.MASKED))
        seated = add("Gather", additive, add.input(tensors.GRID), axis=0)
        mask.replace_all_uses_with(add("Unsqueeze", seated, add.ints(1), out=str(mask.name)))


def _margins(add: Builder, agents: ir.Graph, states: ir.Value) -> ir.Value:
    """(N,) the agents on the rows they are shown. A state that is not finite must not become a margin that is."""
    shown = add("Gather", states, add.input(tensors.AGENT_ROWS), axis=0)
    margins = _inline(add, agents, {tensors.AGENT_STATES: shown})
    # a ReLU may turn NaN into 0, and TensorRT may take NaN times 0 for 0: so a comparison, which NaN fails
    sums = add("ReduceSum", shown, add.ints(1), keepdims=0)
    finite = add("Less", add("Abs", sums), add.constant(LARGEST))
    return add("Where", finite, margins, add.constant(np.nan), out=tensors.MARGINS)


def _inline(add: Builder, agents: ir.Graph, known: dict[str, ir.Value]) -> ir.Value:
    """Move the agents' nodes and constants into the graph, all names prefixed; returns their margins.

    known: inputs of the agents that the graph computes; the others become inputs of the graph.
    """
    (margins,) = agents.outputs
    nodes, weights = list(agents), list(agents.initializers.values())
    for source in agents.inputs:
        name = str(source.name)
        source.replace_all_uses_with(known[name] if name in known else add.input(name))
    agents.outputs.clear()
    agents.remove(nodes)
    agents.initializers.clear()
    for node in nodes:
        node.name = f"agents/{node.name}"
        for value in node.outputs:
            value.name = f"agents/{value.name}"
    for weight in weights:
        weight.name = f"agents/{weight.name}"
        add.graph.register_initializer(weight)
    add.graph.extend(nodes)
    return margins


def _choose(add: Builder, margins: ir.Value, always_head: bool) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Rows of the outputs; rows for the LM head: those asked for, then those elected; how many fewer the second are.

    The last is None with always_head: then row 0 stands for nobody.
    """
    by_agent, priorities = add("Unsqueeze", margins, add.ints(0)), add.input(tensors.PRIORITIES)
    threshold = add.input(tensors.THRESHOLD)
    accepted = add("Greater", by_agent, threshold)  # (B, N)
    # in these words, or an infinite margin of one conversation makes NaN of another's score
    eligible = add("And", accepted, add("Greater", priorities, add.constant(_NOBODY)))
    score = add("Add", priorities, add("Mul", by_agent, add.input(tensors.MARGIN_WEIGHT)))
    score = add("Where", eligible, score, add.constant([[-np.inf]]))
    # after the rows comes nobody, better than a rejected one: so there always is a greatest, and a finite one
    nobody = add("Expand", add.constant([[_NOBODY]]), add("Shape", threshold))
    score = add("Concat", score, nobody, axis=1)
    rows = add("Concat", add.input(tensors.AGENT_ROWS), add.ints(-1), axis=0)
    best = add("Gather", rows, add("ArgMax", score, axis=1, keepdims=0), axis=0)
    elected = add("Where", add("Greater", best, add.ints(-1)), best, add.input(tensors.FALLBACK_ROW))
    exists = add("Greater", elected, add.ints(-1), out="step/exists")
    head_rows = add.input(tensors.HEAD_ROWS)
    if always_head:
        some = add("Where", exists, elected, add.ints(0))
        reported = add("Concat", head_rows, elected, axis=0, out=tensors.ROWS)
        return reported, add("Concat", head_rows, some, axis=0, out="step/rows"), None
    some = add("Compress", elected, exists, axis=0)
    chosen = add("Concat", head_rows, some, axis=0, out="step/rows")
    missing = add("Concat", add.ints(0), add("Sub", add("Shape", elected), add("Shape", some)), axis=0)
    return add("Pad", chosen, missing, add.constant(-1), out=tensors.ROWS), chosen, missing


def _best_tokens(
    add: Builder, logits: ir.Value, rows: ir.Value, missing: ir.Value | None, top: int
) -> dict[str, ir.Value]:
    """Of each row of logits the best tokens, and the normaliser (ReduceLogSumExp is ten times slower on a CPU).

    missing: how far to pad them, where there may be fewer rows than are reported.
    """
    values, ids = _top_k(add, logits, rows, top, maybe_none=missing is not None)
    greatest = add("Slice", values, add.ints(0), add.ints(1), add.ints(1))
    total = add("ReduceSum", add("Exp", add("Sub", logits, greatest)), add.ints(1), keepdims=1)
    normaliser = add("Squeeze", add("Add", add("Log", total), greatest), add.ints(1))
    results: dict[str, ir.Value] = {}
    for value, filler, name in (
        (ids, 0, tensors.TOP_IDS),
        (values, 0.0, tensors.TOP_LOGITS),
        (normaliser, 0.0, tensors.LOG_NORMALISER),
    ):
        if missing is None:
            results[name] = add("Identity", value, out=name)
        else:
            results[name] = add("Pad", value, missing, add.constant(filler), add.ints(0), out=name)
    return results


def _top_k(add: Builder, logits: ir.Value, rows: ir.Value, top: int, *, maybe_none: bool) -> Sequence[ir.Value]:
    """Values and indices of the greatest logits; maybe_none: there may be no row."""
    outs = ["step/top_logits", "step/top_ids"]
    attributes: dict[str, Any] = {"axis": -1, "largest": 1, "sorted": 1}
    count = add.ints(top)
    if not maybe_none:
        return add.several("TopK", [logits, count], outs, **attributes)
    # in ONNX Runtime before 1.31, TopK of no row divides by zero, which ends the process
    dtypes = {"values": ir.DataType.FLOAT, "indices": ir.DataType.INT64}

    def outputs() -> list[ir.Value]:
        return [ir.val(name, dtype, [None, top]) for name, dtype in dtypes.items()]

    best = ir.node("TopK", [logits, count], attributes, outputs=outputs())
    empty = [
        ir.node("Constant", [], {"value": ir.Tensor(np.zeros((0, top), dtype.numpy()))}, outputs=[value])
        for value, dtype in zip(outputs(), dtypes.values(), strict=True)
    ]
    any_row = add("Greater", add("Size", rows), add.constant(0))
    return add.several(
        "If",
        [any_row],
        outs,
        then_branch=ir.Graph([], best.outputs, nodes=[best], name="some row"),
        else_branch=ir.Graph([], [node.outputs[0] for node in empty], nodes=empty, name="no row"),
    )
