"""The parity gate: it lets good exports through, and stops each of the ways in which an export can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_export import parity
from mara_export.errors import ParityError
from mara_export.export import export, finish, trace
from mara_export.hf import checkpoint as hf_checkpoint
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import reference
from mara_export.parity.compare import RANKS
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort import CpuEngine
from tests.checkpoints import ARCHITECTURES
from tests.export.conftest import copy_model

GATE = parity.GATES["fp32"]
SMALL = ExportOptions(max_context=64, max_candidates=8)
Damage = Callable[[onnx.ModelProto], None]


# --- what the gate is to find: damages of a finished graph, its weights in it -----------------------------------------


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
        helper.make_node("Shape", [tensors.INPUT_IDS], ["t/rows"], "t/rows", start=1, end=2),
        *(constant(f"t/{name}", value) for name, value in (("zero", 0), ("one", 1), ("axis", [0]))),
        helper.make_node("Squeeze", ["t/rows", "t/axis"], ["t/count"], "t/count"),
        helper.make_node("Range", ["t/zero", "t/count", "t/one"], ["t/range"], "t/range"),
        helper.make_node("Add", ["t/range", tensors.WRITE_INDICES], ["t/slots"], "t/slots"),
        helper.make_node("Unsqueeze", ["t/slots", "t/axis"], ["t/positions"], "t/positions"),
    ]
    del graph.node[:]
    graph.node.extend([*by_slot, *rest])


def before_the_norm(model: onnx.ModelProto) -> None:
    """Hand the agent the state that goes into the final norm; the logits stay right."""
    graph = model.graph
    normed = {tensors.LAST_HIDDEN_STATE: "t/hidden"}
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
    graph.node.insert(place + 1, helper.make_node("Identity", [state], [tensors.LAST_HIDDEN_STATE], "t/before"))


def swap_two_tokens(model: onnx.ModelProto) -> None:
    """Of the head alone: all numbers but two of a row are right."""
    (head,) = [n for n in model.graph.node if tensors.LOGITS in n.output]
    value = numpy_helper.to_array(weight(model, head.input[1])).copy()
    tokens = (slice(None),) * (value.shape[0] < value.shape[1]) + ([100, 101],)  # (D, V), or (V, D) where it is tied
    value[tokens] = value[tokens][..., ::-1] if len(tokens) > 1 else value[[101, 100]]
    model.graph.initializer.append(numpy_helper.from_array(value, "t/head"))
    head.input[1] = "t/head"


def siblings_see_each_other(model: onnx.ModelProto) -> None:
    """Those in later slots the ones before them: by slot, where a row sees by position."""
    (own,) = [node for node in model.graph.node if is_mask(node) and node.op_type == "Equal"]
    own.op_type = "LessOrEqual"


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
    "a row does not see itself": a_row_does_not_see_itself,
    "first token unseen": mask_inverted_at(0),
    "a later token seen by the wrong rows": mask_inverted_at(3),
}


# --- damages of the agent --------------------------------------------------------------------------------------------


def change_agent(change: Callable[[Any, Any], tuple[Any, Any]]) -> Damage:
    """Change weight (2, width) and bias (2,) of the agent's last layer."""

    def damage(model: onnx.ModelProto) -> None:
        layer = "agent/agent.output_linear"
        tensors_ = [weight(model, f"{layer}.{part}") for part in ("weight", "bias")]
        for tensor, value in zip(tensors_, change(*map(numpy_helper.to_array, tensors_)), strict=True):
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), tensor.name))

    return damage


AGENTS = {
    "negated": (change_agent(lambda w, b: (w[::-1], b[::-1])), "decisions"),
    "nudged": (change_agent(lambda w, b: (w, np.add(b, [0.0, 0.3]))), "decisions"),
    "doubled": (change_agent(lambda w, b: (2 * w, 2 * b)), "margins"),
    "not a number": (change_agent(lambda w, b: (w * np.nan, b)), "margins"),
}
"""Damage, and what the gate must name."""


# --- finished graphs, damaged ----------------------------------------------------------------------------------------


@pytest.fixture
def gate(bundle, traced, tmp_path) -> Callable[..., list[str]]:
    """(damage, architecture="qwen2", lowering="ort", precision="fp32") → what the gate finds wrong with the graph."""

    def failures(
        damage: Damage, architecture: str = "qwen2", lowering: str = "ort", precision: str = "fp32", prompts: int = 4
    ) -> list[str]:
        original = Bundle.open(bundle(architecture, lowering, precision), verify=False)
        model = onnx.load(original.path("step.onnx"))
        damage(model)
        onnx.save(model, tmp_path / "step.onnx")
        cases = traced(architecture).reference.cases[-prompts:]
        return compared(Bundle(tmp_path, original.manifest), cases, parity.GATES[precision])

    return failures


def compared(bundle: Bundle, cases: Sequence[parity.Case], gate: parity.Gate, engine: type = CpuEngine) -> list[str]:
    opened = engine(bundle, threads=1)
    return parity.compare(cases, [parity.run_engine(opened, case) for case in cases], gate).failures


@pytest.mark.parametrize("lowering", ["ort", pytest.param("portable", marks=pytest.mark.long)])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_graph_is_stopped(gate, damage, lowering) -> None:
    failures = gate(DAMAGES[damage], lowering=lowering)
    assert failures
    about = {failure.partition(":")[0] for failure in failures}
    if damage == "before the norm":
        assert about >= {"hidden", "margins"}
        assert "logits" not in about
    if damage == "two tokens":
        assert about.isdisjoint({"hidden", "margins"})


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_an_undamaged_graph_goes_the_same_way_and_passes(gate, lowering) -> None:
    assert gate(lambda model: None, lowering=lowering) == []


@pytest.mark.parametrize("precision", ["fp32", "int8", pytest.param("fp16", marks=pytest.mark.long)])
@pytest.mark.parametrize("change", AGENTS)
def test_a_wrong_agent_is_stopped_by_every_gate(gate, change, precision) -> None:
    damage, shown = AGENTS[change]
    about = {failure.partition(":")[0] for failure in gate(damage, precision=precision)}
    assert shown in about
    assert about <= {"margins", "decisions"}


def test_a_wrong_state_is_stopped_by_the_widest_gate_too(gate) -> None:
    assert any("hidden: least cosine" in failure for failure in gate(before_the_norm, precision="int8"))


def test_a_wrong_order_of_cache_slots_is_stopped(bundle, traced) -> None:
    class Shifted(CpuEngine):
        def run(self, work: Pass) -> StepOutput:
            tokens, positions = work.tokens, work.positions
            rows = list(range(len(tokens)))[::-1] if len(tokens) == parity.SIBLINGS else list(range(len(tokens)))
            return super().run(replace(work, tokens=[tokens[r] for r in rows], positions=[positions[r] for r in rows]))

    assert compared(Bundle.open(bundle("qwen2")), traced("qwen2").reference.cases, GATE, Shifted)


# --- settings that the export reads wrongly --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "setting", "value"),
    [
        ("llama", "rope_scaling", None),
        pytest.param("qwen2", "rope_theta", 500.0, marks=pytest.mark.long),
        pytest.param("qwen3", "rms_norm_eps", 0.1, marks=pytest.mark.long),
        pytest.param("mistral", "hidden_act", "gelu", marks=pytest.mark.long),
    ],
)
def test_a_setting_that_the_export_reads_wrongly_is_stopped(
    checkpoint, agent, tmp_path, monkeypatch, architecture, setting, value
) -> None:
    """The reference is the model as transformers reads the folder, so both sides cannot have the same fault."""
    read = hf_checkpoint.read_config

    def misread(source: ModelSource) -> Any:
        config = read(source)
        assert getattr(config, setting) != value
        setattr(config, setting, value)
        return config

    monkeypatch.setattr(hf_checkpoint, "read_config", misread)
    with pytest.raises(ParityError, match="differ from Hugging Face"):
        export(resolve_model(str(checkpoint(architecture))), agent(architecture), "a", tmp_path / "out", SMALL)


def test_a_checkpoint_of_transformers_5_passes(checkpoint, agent, tmp_path) -> None:
    scaling = json.loads((checkpoint("llama") / "config.json").read_text())["rope_scaling"]
    five = {"rope_parameters": {**scaling, "rope_theta": 500.0}, "rope_scaling": ..., "rope_theta": ...}
    folder = copy_model(checkpoint("llama"), tmp_path / "five", **five)
    bundle = export(resolve_model(str(folder)), agent("llama"), "a", tmp_path / "out", SMALL)
    assert bundle.manifest.parity["passed"]


# --- through the whole export ----------------------------------------------------------------------------------------


def test_a_bundle_that_fails_the_gate_is_not_written(traced, tmp_path) -> None:
    wrong = copy.deepcopy(traced("qwen2").reference)
    wrong.cases[1].reference.rows.logits[3, :2] = wrong.cases[1].reference.rows.logits[3, 1::-1]
    with pytest.raises(ParityError, match=r"^qwen2: .*logits: greatest difference .*; nothing was written$"):
        finish(replace(traced("qwen2"), reference=wrong), ExportOptions(), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_good_export_passes_and_its_report_is_in_the_manifest(bundle) -> None:
    manifest = json.loads((bundle("qwen2") / "manifest.json").read_text(encoding="utf-8"))
    report = manifest["parity"]
    assert report["passed"] is True
    assert report["prompts"] == reference.PROMPTS
    for name in ("hidden", "logits"):
        assert GATE.least_cosine <= report[name]["least_cosine"] <= 1 + 1e-12
        assert 0 < report[name]["greatest_difference"] <= GATE.greatest_difference
    assert 0 < report["noise"]["logits"] < 0.1
    assert 0 < report["noise"]["margins"] < 0.1
    assert manifest["noise"] == {name: report["noise"][name] for name in ("margins", "logits")}
    rows = report["rows"]
    assert rows > reference.PROMPTS * parity.SIBLINGS
    for name, count in (("first", rows), ("ranks", rows * RANKS), ("decisions", rows)):
        assert report[name]["compared"] + report[name]["within_noise"] == count
        assert report[name]["compared"] > 0.9 * count
        assert report[name]["differing"] == 0
        assert report[name]["changed"] <= report[name]["within_noise"]
    assert report["perplexity"]["exported"] == pytest.approx(report["perplexity"]["reference"], rel=1e-3)


def test_the_smallest_capacity_passes_too(checkpoint, agent, tmp_path) -> None:
    (tmp_path / "trace").mkdir()
    sizes = {"max_context": 2, "max_candidates": 1}
    source = resolve_model(str(checkpoint("qwen2")))
    traced = trace(source, agent("qwen2"), "agent", tmp_path / "trace", **sizes)
    assert finish(traced, ExportOptions(**sizes), tmp_path / "out").manifest.parity["passed"] is True


# --- every weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.long if name != "qwen2" else ()) for name in ARCHITECTURES]
)
def test_no_weight_of_any_layer_can_be_a_thousandth_off(bundle, gate, architecture) -> None:
    original = Bundle.open(bundle(architecture), verify=False)
    model = onnx.load(original.path("step.onnx"))
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    floats = [t for t in floats if not t.name.startswith("step/")]  # constants of the join
    weights = [t.name for t in floats if np.prod(t.dims) > 16]
    # two norms and the matrices, of which three are one; embedding, last norm; the agent's
    assert len(weights) >= 7 * original.manifest.model.shape.num_layers + 2 + 5
    assert {name.partition("/")[0] for name in weights} >= {"agent"}
    # What a bias adds to all keys alike falls out of the softmax; the rest of it is small, as the agent's biases are.
    small = {"k_proj.bias": 1e-2, "ln.bias": 3e-2, "linear1.bias": 3e-2, "linear2.bias": 3e-2}
    by = {name: next((by for end, by in small.items() if name.endswith(end)), 1e-3) for name in weights}
    assert [name for name in weights if not gate(perturb(name, by[name]), architecture, prompts=2)] == []
