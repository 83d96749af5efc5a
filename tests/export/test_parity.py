"""The parity gate: it lets good exports through, and stops each of the ways in which an export can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import mara_runtime.ort_engine
from mara_export import export as export_module
from mara_export import parity
from mara_export.errors import ParityError
from mara_export.export import export
from mara_export.sources import resolve_model
from mara_runtime import engine as engine_module
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.ort_engine import OrtEngine
from tests import checkpoints

GATE = parity.GATES["fp32"]
Damage = Callable[[onnx.ModelProto], None]


# --- what the gate is to find: damages of a lowered graph ------------------------------------------------------------


def perturb(name: str, by: float = 1e-3) -> Damage:
    """Every value of a weight off by about a thousandth of it. (One factor for all would pass through a norm.)"""

    def damage(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        value = numpy_helper.to_array(tensor)
        noise = by * np.random.default_rng(0).standard_normal(value.shape)
        tensor.CopyFrom(numpy_helper.from_array((value * (1 + noise)).astype(np.float32), name))

    return damage


def perturb_a_matrix(model: onnx.ModelProto) -> None:
    perturb(next(t.name for t in model.graph.initializer if t.name.startswith("onnx::MatMul")))(model)


def change_scale(model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.op_type in ("GroupQueryAttention", "Attention")]
    assert nodes
    for attribute in [a for n in nodes[:1] for a in n.attribute if a.name == "scale"]:
        attribute.f *= 1.01


def shift_late_positions(model: onnx.ModelProto) -> None:
    """Rotate all from position 6 on one step too far. (Every one alike would change nothing: RoPE is relative.)"""
    one_more = [
        helper.make_node("Constant", [], ["t/five"], value=helper.make_tensor("", onnx.TensorProto.INT64, [], [5])),
        helper.make_node("Less", ["t/five", tensors.POSITION_IDS], ["t/late"]),
        helper.make_node("Cast", ["t/late"], ["t/shift"], to=onnx.TensorProto.INT64),
        helper.make_node("Add", [tensors.POSITION_IDS, "t/shift"], ["t/positions"]),
    ]
    insert(model, one_more, tensors.POSITION_IDS, "t/positions")


def rotate_by_slot(model: onnx.ModelProto) -> None:
    """Rotate a sibling by the slot it is written to, not by the position it shares."""
    by_slot = [
        helper.make_node("Shape", [tensors.INPUT_IDS], ["t/rows"], start=1, end=2),
        *(
            helper.make_node("Constant", [], [name], value=helper.make_tensor("", onnx.TensorProto.INT64, dims, [v]))
            for name, dims, v in (("t/zero", [], 0), ("t/one", [], 1), ("t/axis", [1], 0))
        ),
        helper.make_node("Squeeze", ["t/rows", "t/axis"], ["t/count"]),
        helper.make_node("Range", ["t/zero", "t/count", "t/one"], ["t/range"]),
        helper.make_node("Add", ["t/range", tensors.WRITE_INDICES], ["t/slots"]),
        helper.make_node("Unsqueeze", ["t/slots", "t/axis"], ["t/positions"]),
    ]
    insert(model, by_slot, tensors.POSITION_IDS, "t/positions")


def insert(model: onnx.ModelProto, nodes: list[onnx.NodeProto], old: str, new: str) -> None:
    graph = model.graph
    rest = [copy.deepcopy(node) for node in graph.node]
    for node in rest:
        node.input[:] = [new if name == old else name for name in node.input]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def before_the_norm(model: onnx.ModelProto) -> None:
    """Hand the agent the state that goes into the final norm; the logits stay right."""
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["t/hidden" if name == tensors.LAST_HIDDEN_STATE else name for name in node.input]
        node.output[:] = ["t/hidden" if name == tensors.LAST_HIDDEN_STATE else name for name in node.output]
    (square,) = [n for n in graph.node if n.name == "/model/norm/Pow"]
    graph.node.append(helper.make_node("Identity", [square.input[0]], [tensors.LAST_HIDDEN_STATE]))


def swap_two_tokens(model: onnx.ModelProto) -> None:
    """Two columns of the head: all numbers but two of a row are right."""
    graph = model.graph
    (head,) = [n for n in graph.node if tensors.LOGITS in n.output]
    (tensor,) = [t for t in graph.initializer if t.name in head.input]
    value = numpy_helper.to_array(tensor).copy()
    value[:, [100, 101]] = value[:, [101, 100]]
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


DAMAGES = {
    "a matrix": perturb_a_matrix,
    "embedding": perturb("model.embed_tokens.weight"),
    "scale": change_scale,
    "late positions": shift_late_positions,
    "positions by slot": rotate_by_slot,
    "before the norm": before_the_norm,
    "two tokens": swap_two_tokens,
}


# --- damages of masks, as an engine would make them ------------------------------------------------------------------

MASK = engine_module.attention_mask


def one_slot_inverted(positions: Any, slot: int, slots: int) -> Any:
    mask = MASK(positions, slot, slots)
    mask[..., 3] = tensors.MASKED - mask[..., 3]
    return mask


def siblings_see_each_other(positions: Any, slot: int, slots: int) -> Any:
    return MASK(range(slot, slot + len(positions)), slot, slots)


def first_token_unseen(positions: Any, slot: int, slots: int) -> Any:
    mask = MASK(positions, slot, slots)
    mask[0, 0, 1:, 0] = tensors.MASKED
    return mask


MASKS = {f.__name__.replace("_", " "): f for f in (one_slot_inverted, siblings_see_each_other, first_token_unseen)}


# --- damages of the agent --------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    def __init__(self, agent: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.agent, self.change = agent, change

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.change(self.agent(states))


AGENTS = {
    "negated": lambda scores: scores[:, [1, 0]],
    "nudged": lambda scores: scores + torch.tensor([0.0, 0.3]),
    "doubled": lambda scores: 2 * scores,
    "not a number": lambda scores: scores * torch.tensor(float("nan")),
}


# --- through the whole export ----------------------------------------------------------------------------------------


@pytest.fixture
def attempt(checkpoint, agent, tmp_path) -> Callable[..., Bundle]:
    def run(architecture: str = "qwen2", lowering: str = "ort", **options: Any) -> Bundle:
        return export(
            resolve_model(str(checkpoint(architecture))),
            agent(architecture),
            "agent",
            tmp_path / "new" / "out",
            lowering=lowering,
            max_context=128,
            **options,
        )

    return run


def assert_stopped(attempt: Callable[..., Bundle], tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ParityError) as caught:
        attempt(**options)
    assert list(tmp_path.iterdir()) == []
    message = str(caught.value)
    assert "the exported graphs differ from Hugging Face eager" in message
    assert "nothing was written" in message
    return message


@pytest.mark.parametrize("lowering", ["ort", "portable"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_graph_is_stopped(attempt, tmp_path, monkeypatch, damage, lowering) -> None:
    real = export_module.lower

    def lower(model: onnx.ModelProto, *rest: Any) -> None:
        real(model, *rest)
        DAMAGES[damage](model)

    monkeypatch.setattr(export_module, "lower", lower)
    message = assert_stopped(attempt, tmp_path, lowering=lowering)
    if damage == "before the norm":
        assert "logits: least cosine" not in message
        assert "hidden: least cosine" in message
    if damage == "two tokens":
        assert "hidden" not in message


@pytest.mark.parametrize("mask", MASKS)
def test_a_wrong_mask_is_stopped(attempt, tmp_path, monkeypatch, mask) -> None:
    monkeypatch.setattr(mara_runtime.ort_engine, "attention_mask", MASKS[mask])
    assert_stopped(attempt, tmp_path)


@pytest.mark.parametrize("change", AGENTS)
def test_a_wrong_agent_is_stopped(attempt, tmp_path, monkeypatch, change) -> None:
    real = export_module.trace_agent
    monkeypatch.setattr(export_module, "trace_agent", lambda agent, *rest: real(Wrapped(agent, AGENTS[change]), *rest))
    message = assert_stopped(attempt, tmp_path)
    assert "hidden: " not in message
    if change == "negated":
        assert "decisions: " in message


def test_a_wrong_order_of_cache_slots_is_stopped(attempt, tmp_path, monkeypatch) -> None:
    class Shifted(OrtEngine):
        def forward(self, tokens: Any, positions: Any, slot: int, logits_rows: Any) -> Any:
            rows = list(range(len(tokens)))[::-1] if len(tokens) == parity.SIBLINGS else list(range(len(tokens)))
            return super().forward([tokens[r] for r in rows], [positions[r] for r in rows], slot, logits_rows)

    monkeypatch.setattr(export_module, "OrtEngine", Shifted)
    assert_stopped(attempt, tmp_path)


def test_a_good_export_passes_and_its_report_is_in_the_manifest(attempt) -> None:
    bundle = attempt()
    report = json.loads((bundle.folder / "manifest.json").read_text(encoding="utf-8"))["parity"]
    assert report == bundle.manifest.parity
    assert report["passed"] is True
    assert report["prompts"] == parity.PROMPTS
    for name in ("hidden", "logits"):
        assert GATE.least_cosine <= report[name]["least_cosine"] <= 1 + 1e-12
        assert 0 < report[name]["greatest_difference"] <= GATE.greatest_difference
    assert 0 < report["noise"]["logits"] < 0.1
    assert 0 < report["noise"]["margins"] < 0.1
    rows = report["rows"]
    assert rows > parity.PROMPTS * parity.SIBLINGS
    for name, count in (("ranks", rows * parity.RANKS), ("decisions", rows)):
        assert report[name]["compared"] + report[name]["within_noise"] == count
        assert report[name]["compared"] > 0.9 * count
        assert report[name]["differing"] == 0


def test_without_the_gate_the_manifest_says_so(attempt, monkeypatch) -> None:
    monkeypatch.setattr(parity, "compare", None)
    assert attempt(gate=False).manifest.parity is None


@pytest.mark.parametrize(("max_context", "max_candidates"), [(2, 1), (2, 64), (8, 1), (9, 3), (49, 1)])
def test_small_capacities_pass_too(checkpoint, agent, tmp_path, max_context, max_candidates) -> None:
    bundle = export(
        resolve_model(str(checkpoint("qwen2"))),
        agent("qwen2"),
        "agent",
        tmp_path / "out",
        max_context=max_context,
        max_candidates=max_candidates,
    )
    assert bundle.manifest.parity["passed"] is True


# --- every weight ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(checkpoint, reference, agent) -> Callable[[str], list[parity.Case]]:
    def cases(architecture: str) -> list[parity.Case]:
        prompts = checkpoints.random_prompts(2, seed=3, length=40)
        return [parity.reference_case(reference(architecture), agent(architecture), prompt) for prompt in prompts]

    return cases


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_no_weight_of_any_layer_can_be_a_thousandth_off(bundle, judged, tmp_path, architecture) -> None:
    original = Bundle.open(bundle(architecture, "ort"))
    model = onnx.load(original.path("llm.onnx"))
    cases = judged(architecture)
    manifest = replace(original.manifest, llm=replace(original.manifest.llm, file="damaged.onnx"))
    (tmp_path / "agent.onnx").write_bytes(original.path("agent.onnx").read_bytes())

    def failures(damage: Damage) -> list[str]:
        damaged = copy.deepcopy(model)
        damage(damaged)
        onnx.save(damaged, tmp_path / "damaged.onnx")
        engine = OrtEngine(Bundle(tmp_path, manifest), threads=1)
        return parity.compare(cases, [parity.engine_side(engine, case) for case in cases], GATE).failures

    assert failures(lambda _: None) == []
    weights = [t.name for t in model.graph.initializer if np.prod(t.dims) > 16]
    assert len(weights) >= 9 * original.manifest.model.shape.num_layers + 3
    # What a bias adds to all keys alike falls out of the softmax; the rest of it is small.
    by = {name: 1e-2 if name.endswith("k_proj.bias") else 1e-3 for name in weights}
    assert [name for name in weights if not failures(perturb(name, by[name]))] == []


# --- the comparison itself -------------------------------------------------------------------------------------------


def side(hidden: Any, logits: Any, margins: Any, again: int = 1, moved: float = 0.0) -> parity.Side:
    rows = parity.Rows(*(np.array(value, np.float32) for value in (hidden, logits, margins)))
    tail = rows.tail(again)
    return parity.Side(rows, parity.Rows(tail.hidden + moved, tail.logits + moved, tail.margins + moved))


def hand_made() -> tuple[list[parity.Case], list[parity.Side]]:
    rng = np.random.default_rng(0)
    hidden, logits = rng.standard_normal((5, 8)), 10 * rng.permuted(np.tile(np.arange(60.0), (5, 1)), axis=1)
    values = hidden, logits, [1.0, -1.0, 2.0, -2.0, 3.0]
    return [parity.Case([1, 2, 3, 4], [5], side(*values))], [side(*values)]


def test_equal_sides_pass() -> None:
    report = parity.compare(*hand_made(), GATE)
    assert report.failures == []
    assert report.to_json()["ranks"] == {"compared": 5 * 40, "within_noise": 0, "differing": 0}
    assert report.to_json()["decisions"] == {"compared": 5, "within_noise": 0, "differing": 0}
    rows = hand_made()[0][0].reference.rows
    floor = {name: parity.NOISE_FLOOR * float(np.abs(getattr(rows, name)).max()) for name in parity.NAMES}
    assert report.to_json()["noise"] == floor  # the two routes agree to the last bit


@pytest.mark.parametrize("where", ["found", "reference"])
@pytest.mark.parametrize("route", ["rows", "siblings_again"])
@pytest.mark.parametrize("name", ["hidden", "logits", "margins"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_fails(where, route, name, value) -> None:
    cases, found = hand_made()
    getattr(getattr((found[0] if where == "found" else cases[0].reference), route), name)[0] = value
    assert parity.compare(cases, found, GATE).failures


@pytest.mark.parametrize("name", ["hidden", "logits", "margins"])
def test_both_routes_are_held_against_the_reference(name) -> None:
    """One schedule runs candidates in one pass, another one at a time: each of them decodes."""
    cases, found = hand_made()
    getattr(found[0].siblings_again, name)[:] *= -1
    failures = parity.compare(cases, found, GATE).failures
    assert any(failure.startswith(f"{name}: ") for failure in failures)


def test_no_amount_of_noise_hides_a_wrong_agent() -> None:
    """An engine whose agent answers at random is noisy, and its decisions may not be excused by that."""
    cases, found = hand_made()
    found[0].rows.margins[:] = -found[0].rows.margins
    found[0].siblings_again.margins[:] = 1000.0
    assert parity.compare(cases, found, GATE).failures


def test_the_numbers_are_worst_cases_over_rows() -> None:
    cases, found = hand_made()
    found[0].rows.hidden[2, 3] += 0.5
    report = parity.compare(cases, found, GATE)
    reference = cases[0].reference.rows.hidden
    assert report.numbers["hidden"]["greatest_difference"] == pytest.approx(0.5 / np.abs(reference).max(), rel=1e-5)
    a, b = reference[2].astype(np.float64), found[0].rows.hidden[2].astype(np.float64)
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert report.numbers["hidden"]["least_cosine"] == pytest.approx(cosine, rel=1e-6)
    assert report.numbers["logits"]["greatest_difference"] == 0.0
    assert [failure.split(":")[0] for failure in report.failures] == ["hidden", "hidden"]


def test_a_scaled_hidden_state_has_the_right_cosine_and_fails_all_the_same() -> None:
    cases, found = hand_made()
    found[0].rows.hidden[:] *= np.float32(1.001)
    (failure,) = parity.compare(cases, found, GATE).failures
    assert failure.startswith("hidden: greatest difference")


def test_the_noise_is_of_each_side_alone() -> None:
    cases, found = hand_made()
    rows = found[0].rows
    found = [parity.Side(rows, parity.Rows(rows.tail(1).hidden, rows.tail(1).logits + 0.25, rows.tail(1).margins))]
    report = parity.compare(cases, found, GATE)
    assert report.noise["logits"] == parity.NOISE_FACTOR * 0.25
    assert report.noise["margins"] == pytest.approx(parity.NOISE_FLOOR * 3.0)
    # A difference between the sides is no noise.
    cases, found = hand_made()
    found[0].rows.logits[:] += 0.25
    found[0].siblings_again.logits[:] += 0.25
    assert parity.compare(cases, found, GATE).noise["logits"] == parity.compare(*hand_made(), GATE).noise["logits"]


def f32(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


def test_ranks_by_hand() -> None:
    reference = f32([5.0, 4.0, 3.9, 1.0])  # three ranks: the last value is only the third's neighbour
    swapped = f32([5.0, 3.9, 4.0, 1.0])
    other_best = f32([4.0, 5.0, 3.9, 1.0])
    compare = parity.compare_ranks
    assert compare(reference, reference, 0.0) == {"compared": 3, "within_noise": 0, "differing": 0}
    assert compare(reference, swapped, 0.0) == {"compared": 3, "within_noise": 0, "differing": 2}
    assert compare(reference, swapped, 0.2) == {"compared": 1, "within_noise": 2, "differing": 0}
    assert compare(reference, other_best, 0.2) == {"compared": 1, "within_noise": 2, "differing": 1}
    assert compare(reference, other_best, 1.5) == {"compared": 0, "within_noise": 3, "differing": 0}
    two = np.concatenate([reference, reference])
    assert compare(two, np.concatenate([reference, swapped]), 0.0) == {"compared": 6, "within_noise": 0, "differing": 2}


def test_only_the_best_forty_ranks_count() -> None:
    reference = -np.arange(100, dtype=np.float32)[None]
    found = reference.copy()
    found[0, [40, 41]] = found[0, [41, 40]]
    assert parity.compare_ranks(reference, found, 0.5) == {"compared": 40, "within_noise": 0, "differing": 0}
    found[0, [39, 41]] = found[0, [41, 39]]
    assert parity.compare_ranks(reference, found, 0.5)["differing"] == 1


def test_equal_logits_are_within_any_noise() -> None:
    assert parity.compare_ranks(f32([2.0, 2.0, 1.0]), f32([2.0, 2.0, 1.0]), 0.0) == {
        "compared": 0,
        "within_noise": 2,
        "differing": 0,
    }


def test_decisions_by_hand() -> None:
    reference = np.array([1.0, -1.0, 0.1, -0.1, 0.0], np.float32)
    compare = parity.compare_decisions
    assert compare(reference, reference, 0.0) == {"compared": 4, "within_noise": 1, "differing": 0}
    assert compare(reference, -reference, 0.0) == {"compared": 4, "within_noise": 1, "differing": 4}
    assert compare(reference, -reference, 0.5) == {"compared": 2, "within_noise": 3, "differing": 2}
    # A margin of exactly 0 rejects.
    assert compare(np.array([1.0], np.float32), np.array([0.0], np.float32), 0.5)["differing"] == 1
    assert compare(np.array([-1.0], np.float32), np.array([0.0], np.float32), 0.5)["differing"] == 0
