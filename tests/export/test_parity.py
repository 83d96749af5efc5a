"""The parity gate: it lets good exports through, and stops each of the ways in which an export can be wrong."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from mara_export import parity
from mara_export.errors import ParityError
from mara_export.export import export, finish
from mara_export.hf import checkpoint as hf_checkpoint
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import reference
from mara_export.parity.compare import RANKS
from mara_export.tracing import trace
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort_cpu import CpuEngine
from tests.checkpoints import ARCHITECTURES, named
from tests.export.conftest import copy_model
from tests.export.damages import AGENTS, DAMAGES, Damage, before_the_norm, perturb

GATE = parity.GATES["fp32"]
SMALL = ExportOptions(max_context=64, max_candidates=8)


# --- finished graphs, damaged ----------------------------------------------------------------------------------------


@pytest.fixture
def gate(bundle, traced, tmp_path) -> Callable[..., list[str]]:
    """(damage, architecture="qwen2", lowering="ort", precision="fp32") → what the gate finds wrong with the graph."""

    def failures(
        damage: Damage,
        architecture: str = "qwen2",
        lowering: str = "ort",
        precision: str = "fp32",
        prompts: int = 4,
        damage_agent: Callable[[Path], object] = bool,
    ) -> list[str]:
        original = Bundle.open(bundle(architecture, lowering, precision), verify=False)
        shutil.copytree(original.folder / "agents", tmp_path / "agents", dirs_exist_ok=True)
        model = onnx.load(original.path("step.onnx"))
        damage(model)
        damage_agent(tmp_path / original.manifest.agents[0].file)
        onnx.save(model, tmp_path / "step.onnx")
        cases = traced(architecture).reference.cases[-prompts:]
        return compared(Bundle(tmp_path, original.manifest), cases, parity.GATES[precision])

    return failures


def compared(bundle: Bundle, cases: Sequence[parity.Case], gate: parity.Gate, engine: type = CpuEngine) -> list[str]:
    opened = engine(bundle, threads=1)
    opened.use([agent.name for agent in bundle.manifest.agents])
    sides = [*parity.run_engine(opened, cases, 1)]
    return parity.compare(cases, sides, gate).failures + parity.compare_agent(cases, sides, 0, gate).failures


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
    found = gate(lambda model: None, precision=precision, damage_agent=damage)
    about = {failure.partition(":")[0] for failure in found}
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
        ("llama", "rope_scaling", {"rope_type": "default"}),
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
        right = getattr(config, setting)
        assert right != value
        base = {"rope_theta": right["rope_theta"]} if isinstance(right, dict) and "rope_theta" in right else {}
        setattr(config, setting, {**base, **value} if base else value)  # transformers 5 has the base there, too
        return config

    monkeypatch.setattr(hf_checkpoint, "read_config", misread)
    with pytest.raises(ParityError, match="differ from Hugging Face"):
        export(resolve_model(str(checkpoint(architecture))), named(agent(architecture)), tmp_path / "out", SMALL)


def test_a_checkpoint_of_transformers_5_passes(checkpoint, agent, tmp_path) -> None:
    scaling = json.loads((checkpoint("llama") / "config.json").read_text())["rope_scaling"]
    five = {"rope_parameters": {**scaling, "rope_theta": 500.0}, "rope_scaling": ..., "rope_theta": ...}
    folder = copy_model(checkpoint("llama"), tmp_path / "five", **five)
    bundle = export(resolve_model(str(folder)), named(agent("llama")), tmp_path / "out", SMALL)
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
    report, agent = manifest["parity"], manifest["agents"][0]["parity"]
    assert report["passed"] is agent["passed"] is True
    assert report["prompts"] == agent["prompts"] == reference.PROMPTS
    for name in ("hidden", "logits"):
        assert GATE.least_cosine <= report[name]["least_cosine"] <= 1 + 1e-12
        assert 0 < report[name]["greatest_difference"] <= GATE.greatest_difference
    assert 0 < report["noise"]["logits"] < 0.1
    assert 0 < agent["noise"]["margins"] < 0.1
    assert (manifest["noise"], manifest["agents"][0]["noise"]) == (report["noise"]["logits"], agent["noise"]["margins"])
    rows = report["rows"]
    assert rows > reference.PROMPTS * parity.SIBLINGS
    for counts, count in ((report["first"], rows), (report["ranks"], rows * RANKS), (agent["decisions"], rows)):
        assert counts["compared"] + counts["within_noise"] == count
        assert counts["compared"] > 0.9 * count
        assert counts["differing"] == 0
        assert counts["changed"] <= counts["within_noise"]
    assert report["perplexity"]["exported"] == pytest.approx(report["perplexity"]["reference"], rel=1e-3)


def test_the_smallest_capacity_passes_too(checkpoint, agent, tmp_path) -> None:
    (tmp_path / "trace").mkdir()
    sizes = {"max_context": 2, "max_candidates": 1}
    source = resolve_model(str(checkpoint("qwen2")))
    traced = trace(source, named(agent("qwen2")), tmp_path / "trace", **sizes)
    assert finish(traced, ExportOptions(**sizes), tmp_path / "out").manifest.parity["passed"] is True


# --- every weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.long if name != "qwen2" else ()) for name in ARCHITECTURES]
)
def test_no_weight_of_any_layer_can_be_a_thousandth_off(bundle, gate, architecture) -> None:
    original = Bundle.open(bundle(architecture), verify=False)
    model = onnx.load(original.path("step.onnx"))
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    floats = [t for t in floats if not t.name.startswith(("step/", "agents/"))]  # constants of the join
    weights = [t.name for t in floats if np.prod(t.dims) > 16]
    # two norms and the matrices, of which three are one; embedding, last norm
    assert len(weights) >= 7 * original.manifest.model.shape.num_layers + 2
    # What a bias adds to all keys alike falls out of the softmax.
    by = {name: 1e-2 if name.endswith("k_proj.bias") else 1e-3 for name in weights}
    assert [name for name in weights if not gate(perturb(name, by[name]), architecture, prompts=2)] == []


def test_no_parameter_of_the_agent_can_be_a_thousandth_off(bundle, gate) -> None:
    original = Bundle.open(bundle("qwen2"), verify=False)
    state = load_file(original.path(original.manifest.agents[0].file))

    def nudge(name: str) -> Callable[[Path], None]:
        value = state[name].numpy()
        share = 3e-2 if name.endswith("bias") else 1e-3  # the agent's biases are small
        noise = share * np.random.default_rng(0).standard_normal(value.shape, np.float32)
        return lambda path: save_file({**state, name: torch.tensor(value * (1 + noise))}, path)

    assert len(state) == 8
    assert [n for n in state if not gate(lambda model: None, prompts=2, damage_agent=nudge(n))] == []
