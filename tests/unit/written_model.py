"""A model small enough to be written down twice: as a table by prefix, and as a graph behind the real step graph.

The hidden state of a row is the sum, over the slots it sees, of its tokens' vectors times a weight of their positions.
All are whole numbers, so all engines agree to the last bit whatever the width of a pass, and ties abound.
"""

import hashlib
import platform
from collections.abc import Sequence
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
from mara_runtime.tensors import DRAFT_ROWS, ModelShape, spare_slots
from tests.double.machine import write_engine
from tests.unit import helpers

F32 = NDArray[np.float32]

SHAPE = ModelShape(hidden_size=4, vocab_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
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
AGENT = np.array([0.25, -0.5, 0.25, 0.0], np.float32)
PERIOD = 5


@cache
def table(prefix: tuple[int, ...]) -> tuple[F32, F32]:
    """The model by prefix."""
    with np.errstate(invalid="ignore"):
        weights = np.arange(len(prefix), dtype=np.float32) % PERIOD + 1
        hidden = (VECTORS[list(prefix)] * weights[:, None]).sum(axis=0, dtype=np.float32)
        return hidden @ HEAD, hidden


def judge(hidden: F32) -> F32:
    """The agent's margins."""
    margins: F32 = hidden @ AGENT
    return margins


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


def traced_llm() -> onnx.ModelProto:
    """The model as a graph. Keys hold the weights of positions, values the vectors of tokens."""
    add = Nodes()
    zero, one, first, last = add.constant(0), add.constant(1), add.constant([0]), add.constant([2])
    period = add.constant(PERIOD)
    whole = add("Mul", add("Div", tensors.POSITION_IDS, period), period)
    place = add("Add", add("Sub", tensors.POSITION_IDS, whole), one)
    weights = add("Unsqueeze", add("Cast", place, to=TensorProto.FLOAT), last)  # (1, S, 1)
    vectors = add("Gather", add.constant(VECTORS, "float32"), tensors.INPUT_IDS)  # (1, S, D)
    count = add("Squeeze", add("Shape", tensors.INPUT_IDS, start=1, end=2))
    slots = add("Unsqueeze", add("Add", add("Range", zero, count, one), tensors.WRITE_INDICES), add.constant([1]))
    indices = add("Concat", add("Mul", slots, zero), add("Mul", slots, zero), slots, axis=1)  # (S, 3)
    for part, value in (("key", add("Expand", weights, add("Shape", vectors))), ("value", vectors)):
        add("ScatterND", tensors.past(0, part), indices, add("Squeeze", value, first), result=tensors.present(0, part))
    entries = add("Mul", tensors.present(0, "key"), tensors.present(0, "value"))
    seen = add("MatMul", add("Exp", tensors.ATTENTION_MASK), entries)  # (1, 1, S, D)
    hidden = add("Squeeze", seen, first, result=tensors.LAST_HIDDEN_STATE)
    states = add("Gather", add("Squeeze", hidden, first), tensors.ROWS)
    add("MatMul", states, add.constant(HEAD, "float32"), result=tensors.LOGITS)
    return add.model(tensors.llm_inputs(SHAPE), tensors.llm_outputs(SHAPE))


def traced_agent() -> onnx.ModelProto:
    """The agent as a graph that makes 0 of NaN, as a ReLU may: the step graph must see to it by itself."""
    add = Nodes()
    zero = add.constant(0.0, "float32")
    column = add("MatMul", tensors.AGENT_STATES, add.constant(AGENT[:, None], "float32"))
    margin = add("Squeeze", column, add.constant([1], "int64"))
    above = add("Where", add("Greater", margin, zero), margin, zero)
    below = add("Where", add("Less", margin, zero), margin, zero)
    add("Add", above, below, result=tensors.AGENT_MARGIN)
    return add.model(tensors.agent_inputs(SHAPE.hidden_size), tensors.agent_outputs())


DECODE_ROWS, HEAD_ROWS = spare_slots(CANDIDATES) + 1, DRAFT_ROWS + 1
SIZES = (16, 40, SLOTS)
"""Slots of the engines of a bundle that has several."""


def write_bundle(folder: Path, *, always_head: bool, **options: Any) -> Path:
    """A bundle of the model, with a graph whose head runs always or when it is needed."""
    model, agent = (ir.from_proto(proto) for proto in (traced_llm(), traced_agent()))
    step.join(model.graph, agent.graph, SHAPE, CANDIDATES, always_head=always_head)
    model.graph.sort()
    sizes = {"vocab_size": SHAPE.vocab_size, "hidden_size": SHAPE.hidden_size}
    most = {"max_context": CONTEXT, "max_candidates": CANDIDATES}
    return helpers.make_bundle(folder, graph=ir.to_proto(model).SerializeToString(), **sizes, **most, **options)


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
        known = {"slots": size, **rows, "in_place": in_place}
        write_engine(folder / name, folder / "step.onnx", **{**known, **(file or {})})
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["engines"].append({"target": target, "file": name, **known, **built, **facts})
    manifest["targets"] = [target]
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)
