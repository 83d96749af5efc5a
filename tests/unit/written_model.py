"""A model small enough to be written down twice: as a table by prefix, and as a graph behind the real step graph.

The hidden state of a row is the sum, over the slots it sees, of its tokens' vectors times a weight of their positions.
All are whole numbers, so all engines agree to the last bit whatever the width of a pass, and ties abound. Two caches of
different sizes hold the same numbers, and each gives half of the sum; a third layer would read one of them.
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mara_export.graph import step
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.tensors import DRAFT_ROWS, CacheGroup, ModelShape, spare_slots
from tests.double.machine import write_engine
from tests.unit import helpers

F32 = NDArray[np.float32]

CACHES = CacheGroup(1, 1, 4), CacheGroup(1, 2, 2)
SHAPE = ModelShape(hidden_size=4, vocab_size=24, num_layers=3, num_heads=2, caches=CACHES)
CANDIDATES, CONTEXT = 5, 58
"""With the spare slots a multiple of 16, as engines on a device have (tests/gpu)."""
SLOTS = CONTEXT + spare_slots(CANDIDATES)
FINE, INFINITE = 23, 23
"""Tokens below the first are fine; the vector of the second is infinite."""
_rng = np.random.default_rng(3)
VECTORS = _rng.integers(-2, 3, (SHAPE.vocab_size, SHAPE.hidden_size)).astype(np.float32)
VECTORS[INFINITE] = np.inf
HEAD = _rng.integers(-1, 2, (SHAPE.hidden_size, SHAPE.vocab_size)).astype(np.float32)
HEAD[:, INFINITE] = 0
AGENTS = {
    "agent": ([0.25, -0.5, 0.25, 0.0], 1.0),
    "other": ([0.0, 0.25, 0.25, -0.5], 1.0),
    "endless": ([0.25] * 4, 3e38),
}
"""Vector and scale of each; the margins of the last are infinite, or 0."""
PERIOD = 5


@cache
def table(prefix: tuple[int, ...]) -> tuple[F32, F32]:
    """The model by prefix."""
    with np.errstate(invalid="ignore"):
        weights = np.arange(len(prefix), dtype=np.float32) % PERIOD + 1
        hidden = (VECTORS[list(prefix)] * weights[:, None]).sum(axis=0, dtype=np.float32)
        return hidden @ HEAD, hidden


def judged_by(name: str) -> helpers.Judge:
    """An agent's margins."""
    vector, scale = AGENTS[name]

    def judge(hidden: F32) -> F32:
        with np.errstate(over="ignore", invalid="ignore"):
            margins: F32 = hidden @ np.array(vector, np.float32) * np.float32(scale) * np.float32(scale)
        return margins

    return judge


JUDGES = {name: judged_by(name) for name in AGENTS}


class Nodes:
    """A graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, value: Any, dtype: str = "int64") -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"constant_{len(self.constants)}"))
        return str(self.constants[-1].name)

    def __call__(self, op: str, *inputs: str, result: str | None = None, **attributes: Any) -> str:
        name = result or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"node_{len(self.nodes)}", **attributes))
        return name

    def model(self, inputs: Sequence[tensors.Tensor], outputs: Sequence[tensors.Tensor]) -> onnx.ModelProto:
        kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        io = [
            [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in side] for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *io, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def lowered_llm() -> onnx.ModelProto:
    """The model as a lowered graph. Keys hold the weights of positions, values the vectors of tokens."""
    add = Nodes()
    zero, one, first, last = add.constant(0), add.constant(1), add.constant([0]), add.constant([2])
    period = add.constant(PERIOD)
    whole = add("Mul", add("Div", tensors.POSITION_IDS, period), period)
    place = add("Add", add("Sub", tensors.POSITION_IDS, whole), one)
    weights = add("Unsqueeze", add("Cast", place, to=TensorProto.FLOAT), last)  # (1, S, 1)
    vectors = add("Gather", add.constant(VECTORS, "float32"), tensors.INPUT_IDS)  # (1, S, D)
    seats, width = add("Squeeze", tensors.SEATS, first), add("Shape", tensors.GRID, start=1, end=2)
    conversation = add("Div", seats, width)
    number = add("Sub", seats, add("Mul", conversation, width))
    slot = add("Add", add("Gather", tensors.WRITE_INDICES, conversation), number)
    halves = []
    for i, group in enumerate(CACHES):
        heads = add.constant([[[0, head, 0] for head in range(group.kv_heads)]])
        row = [add("Unsqueeze", part, add.constant([1, 2])) for part in (conversation, add("Mul", slot, zero), slot)]
        indices = add("Add", add("Concat", *row, axis=2), heads)  # (S, heads, 3)
        apart = add.constant([-1, group.kv_heads, group.head_dim])
        for part, value in (("key", add("Expand", weights, add("Shape", vectors))), ("value", vectors)):
            rows = add("Reshape", value, apart)
            add("ScatterND", tensors.past(i, part), indices, rows, result=tensors.present(i, part))
        entries = add("Mul", tensors.present(i, "key"), tensors.present(i, "value"))
        seen = add("MatMul", add("Exp", tensors.ATTENTION_MASK), entries)  # (B, heads, M, D / heads)
        by_seat = add("Reshape", add("Transpose", seen, perm=[0, 2, 1, 3]), add.constant([-1, SHAPE.hidden_size]))
        halves.append(add("Mul", by_seat, add.constant(0.5, "float32")))
    by_seat = add("Add", *halves)
    hidden = add("Gather", by_seat, tensors.SEATS, result=tensors.LAST_HIDDEN_STATE)  # (1, S, D)
    states = add("Gather", add("Squeeze", hidden, first), tensors.ROWS)
    add("MatMul", states, add.constant(HEAD, "float32"), result=tensors.LOGITS)
    read = {tensors.INPUT_IDS, tensors.POSITION_IDS, tensors.WRITE_INDICES, tensors.GRID, tensors.SEATS}
    read |= {past for past, _ in tensors.kv_names(SHAPE.num_caches)}
    inputs = [t for t in tensors.step_inputs(SHAPE) if t.name in read]
    inputs += [
        tensors.Tensor(tensors.ATTENTION_MASK, "float32", ("B", 1, "M", "C")),
        tensors.Tensor(tensors.ROWS, "int64", ("R",)),
    ]
    outputs = [
        tensors.Tensor(tensors.LOGITS, "float32", ("R", SHAPE.vocab_size)),
        tensors.Tensor(tensors.LAST_HIDDEN_STATE, "float32", (1, "S", SHAPE.hidden_size)),
    ]
    caches = {present for _, present in tensors.kv_names(SHAPE.num_caches)}
    outputs += [t for t in tensors.step_outputs(SHAPE, 1) if t.name in caches]
    return add.model(inputs, outputs)


def traced_agents() -> onnx.ModelProto:
    """The agents as a graph that makes 0 of NaN, as a ReLU may: the step graph must see to it by itself.

    It does not normalise, which would take the whole numbers away.
    """
    add = Nodes()
    zero, names = add.constant(0.0, "float32"), [t.name for t in tensors.agent_weights(SHAPE.hidden_size)]
    x = add("Transpose", tensors.AGENT_STATES, perm=[1, 0])
    for weight, bias in zip(names[::2], names[1::2], strict=True):
        x = add("Add", add("MatMul", weight, x), bias)
        if weight != names[-2]:
            x = add("Where", add("Greater", x, zero), x, zero)
    mixed = add("Mul", tensors.AGENT_MIX, add("Squeeze", x, add.constant([1])))  # (A, N)
    kept = add("Where", add("Equal", tensors.AGENT_MIX, zero), zero, mixed)
    add("ReduceSum", kept, add.constant([0]), keepdims=0, result=tensors.MARGINS)
    return add.model(tensors.agent_inputs(SHAPE.hidden_size), tensors.agent_outputs())


MOST_AGENTS, MOST_WIDTHS = 2, (5, 4)
"""Of the engines of a bundle; wider than its agents."""
DECODE_ROWS, HEAD_ROWS = spare_slots(CANDIDATES) + 1, DRAFT_ROWS + 1
PLACES, SHARED_ROWS = 4, 8
"""Conversations in one pass, and rows of each."""
SIZES = (16, 48, SLOTS)
"""Slots of the engines of a bundle that has several."""


def write_bundle(folder: Path, *, always_head: bool, **options: Any) -> Path:
    """A bundle of the model, with a graph whose head runs always or when it is needed."""
    model, agents = (ir.from_proto(proto) for proto in (lowered_llm(), traced_agents()))
    step.join(model.graph, agents.graph, SHAPE, CANDIDATES, always_head=always_head)
    model.graph.sort()
    sizes = {"vocab_size": SHAPE.vocab_size, "hidden_size": SHAPE.hidden_size, "shape": asdict(SHAPE)}
    most = {"max_context": CONTEXT, "max_candidates": CANDIDATES}
    files = {name: helpers.agent_file(*agent) for name, agent in AGENTS.items()}
    graph = ir.to_proto(model).SerializeToString()
    return helpers.make_bundle(folder, graph=graph, agents=files, **sizes, **most, **options)


def add_engines(
    folder: Path,
    slots: Sequence[int],
    in_place: bool,
    file: dict[str, Any] | None = None,
    target: str = "tensorrt",
    **facts: Any,
) -> Bundle:
    """Give a bundle engines of the double.

    file: what the engine files say differently. facts: what the manifest says of the engines differently.
    """
    manifest = helpers.read_manifest(folder)
    here = f"{platform.system()}-{platform.machine()}".lower()
    built = {"version": "10.16.1.11", "compute_capability": "8.7", "platform": here, "options": {}}
    for size in slots:
        name = f"engines/{target}/step-{size}.engine"
        rows = {"decode_rows": DECODE_ROWS, "prefill_rows": min(32, size), "head_rows": HEAD_ROWS}
        rows |= {"places": PLACES, "shared_rows": SHARED_ROWS}
        known = {"slots": size, **rows, "agents": MOST_AGENTS, "agent_widths": list(MOST_WIDTHS), "in_place": in_place}
        write_engine(folder / name, folder / "step.onnx", **{**known, **(file or {})})
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["engines"].append({"target": target, "file": name, **known, **built, **facts})
    manifest["targets"] = [target]
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)
