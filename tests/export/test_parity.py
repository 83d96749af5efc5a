"""The parity gate: it lets good exports through, and stops each of the ways in which an export can be wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mara_deploy.commands import inspect
from mara_export import parity
from mara_export.errors import ParityError
from mara_export.export import finish, trace
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import reference
from mara_export.parity.compare import (
    NOISE_FACTOR,
    NOISE_FLOOR,
    RANKS,
    compare_decisions,
    compare_ranks,
    least_cosine,
    perplexity,
)
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort import CpuEngine
from mara_runtime.manifest import Noise
from tests import checkpoints

GATE = parity.GATES["fp32"]
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


def perturb_a_matrix(model: onnx.ModelProto) -> None:
    perturb(next(t.name for t in model.graph.initializer if t.name.startswith("onnx::MatMul")))(model)


def change_scale(model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.op_type in ("MultiHeadAttention", "Attention")]
    assert nodes
    for attribute in [a for n in nodes[:1] for a in n.attribute if a.name == "scale"]:
        attribute.f *= 1.01


def is_mask(node: NodeProto) -> bool:
    return node.name.startswith("step/mask/")


def constant(name: str, value: Any) -> NodeProto:
    return helper.make_node("Constant", [], [name], name, value=numpy_helper.from_array(np.asarray(value), name))


def shift_late_positions(model: onnx.ModelProto) -> None:
    """Rotate all from position 6 on one step too far. (Every one alike would change nothing: RoPE is relative.)"""
    one_more = [
        constant("t/five", np.int64(5)),
        helper.make_node("Less", ["t/five", tensors.POSITION_IDS], ["t/late"], "t/late"),
        helper.make_node("Cast", ["t/late"], ["t/shift"], "t/shift", to=TensorProto.INT64),
        helper.make_node("Add", [tensors.POSITION_IDS, "t/shift"], ["t/positions"], "t/positions"),
    ]
    insert(model, one_more, tensors.POSITION_IDS, "t/positions", but=is_mask)


def rotate_by_slot(model: onnx.ModelProto) -> None:
    """Rotate a sibling by the slot it is written to, not by the position it shares."""
    by_slot = [
        helper.make_node("Shape", [tensors.INPUT_IDS], ["t/rows"], "t/rows", start=1, end=2),
        *(constant(f"t/{name}", value) for name, value in (("zero", 0), ("one", 1), ("axis", [0]))),
        helper.make_node("Squeeze", ["t/rows", "t/axis"], ["t/count"], "t/count"),
        helper.make_node("Range", ["t/zero", "t/count", "t/one"], ["t/range"], "t/range"),
        helper.make_node("Add", ["t/range", tensors.WRITE_INDICES], ["t/slots"], "t/slots"),
        helper.make_node("Unsqueeze", ["t/slots", "t/axis"], ["t/positions"], "t/positions"),
    ]
    insert(model, by_slot, tensors.POSITION_IDS, "t/positions", but=is_mask)


def insert(
    model: onnx.ModelProto, nodes: list[NodeProto], old: str, new: str, but: Callable[[NodeProto], bool]
) -> None:
    """Put nodes first, and let everybody but some read `new` for `old`."""
    graph = model.graph
    rest = [copy.deepcopy(node) for node in graph.node]
    read = 0
    for node in rest:
        if not but(node):
            read += list(node.input).count(old)
            node.input[:] = [new if name == old else name for name in node.input]
    assert read
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


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


DAMAGES = {
    "a matrix": perturb_a_matrix,
    "embedding": perturb("model.embed_tokens.weight"),
    "scale": change_scale,
    "late positions": shift_late_positions,
    "positions by slot": rotate_by_slot,
    "before the norm": before_the_norm,
    "two tokens": swap_two_tokens,
}


# --- damages of the mask ---------------------------------------------------------------------------------------------


def siblings_see_each_other(model: onnx.ModelProto) -> None:
    """Those in later slots the ones before them: by slot, where a row sees by position."""
    (own,) = [node for node in model.graph.node if is_mask(node) and node.op_type == "Equal"]
    own.op_type = "LessOrEqual"


def a_row_does_not_see_itself(model: onnx.ModelProto) -> None:
    (either,) = [node for node in model.graph.node if is_mask(node) and node.op_type == "Or"]
    either.op_type = "And"


def masked_where(slot: int, *change: NodeProto) -> Damage:
    """Of every row's additive mask "t/mask", one slot's value becomes "t/other"."""

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
            *change,
            helper.make_node("Where", ["t/there", "t/other", "t/mask"], [tensors.ATTENTION_MASK], "t/changed"),
        ]
        for offset, node in enumerate(nodes, start=1):
            model.graph.node.insert(made + offset, node)

    return damage


MASKS = {
    "one slot inverted": masked_where(3, helper.make_node("Sub", ["t/masked", "t/mask"], ["t/other"], "t/other")),
    "first token unseen": masked_where(0, helper.make_node("Identity", ["t/masked"], ["t/other"], "t/other")),
    "siblings see each other": siblings_see_each_other,
    "a row does not see itself": a_row_does_not_see_itself,
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
    "negated": change_agent(lambda w, b: (w[::-1], b[::-1])),
    "nudged": change_agent(lambda w, b: (w, np.add(b, [0.0, 0.3]))),
    "doubled": change_agent(lambda w, b: (2 * w, 2 * b)),
    "not a number": change_agent(lambda w, b: (w * np.nan, b)),
}


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
@pytest.mark.parametrize("damage", {**DAMAGES, **MASKS})
def test_a_wrong_graph_is_stopped(gate, damage, lowering) -> None:
    failures = gate({**DAMAGES, **MASKS}[damage], lowering=lowering)
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


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("change", AGENTS)
def test_a_wrong_agent_is_stopped_by_every_gate(gate, change, precision) -> None:
    about = [failure.partition(":")[0] for failure in gate(AGENTS[change], precision=precision)]
    assert set(about) <= {"margins", "decisions"}
    assert {"negated": "decisions", "nudged": "decisions", "doubled": "margins", "not a number": "margins"}[
        change
    ] in about


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_wrong_state_is_stopped_by_the_wider_gates_too(gate, precision) -> None:
    assert any("hidden: least cosine" in failure for failure in gate(before_the_norm, precision=precision))


def test_a_wrong_order_of_cache_slots_is_stopped(bundle, traced) -> None:
    class Shifted(CpuEngine):
        def run(self, work: Pass) -> StepOutput:
            tokens, positions = work.tokens, work.positions
            rows = list(range(len(tokens)))[::-1] if len(tokens) == parity.SIBLINGS else list(range(len(tokens)))
            return super().run(replace(work, tokens=[tokens[r] for r in rows], positions=[positions[r] for r in rows]))

    assert compared(Bundle.open(bundle("qwen2")), traced("qwen2").reference.cases, GATE, Shifted)


# --- through the whole export ----------------------------------------------------------------------------------------


def test_a_bundle_that_fails_the_gate_is_not_written(traced, tmp_path) -> None:
    wrong = copy.deepcopy(traced("qwen2").reference)
    wrong.cases[1].reference.rows.logits[3, :2] = wrong.cases[1].reference.rows.logits[3, 1::-1]
    with pytest.raises(ParityError, match=r"^qwen2: .*logits: greatest difference .*; nothing was written$"):
        finish(replace(traced("qwen2"), reference=wrong), ExportOptions(), tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_float16_does_not_hold_are_stopped_where_it_has_to(traced, tmp_path) -> None:
    """The CPU, which computes in float32, does not show it."""
    large = replace(traced("qwen2"), reference=replace(traced("qwen2").reference, largest_activation=65505.0))
    with pytest.raises(ParityError, match="activations reach 65,505, and float16 ends at 65,504: use bf16 or fp32"):
        finish(large, ExportOptions(target="tensorrt"), tmp_path / "out")
    assert finish(large, ExportOptions(precision="fp16"), tmp_path / "cpu").manifest.parity["passed"]


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


@pytest.mark.parametrize(("max_context", "max_candidates"), [(2, 1), (2, 64), (9, 3)])
def test_small_capacities_pass_too(checkpoint, agent, tmp_path, max_context, max_candidates) -> None:
    (tmp_path / "trace").mkdir()
    sizes = {"max_context": max_context, "max_candidates": max_candidates}
    source = resolve_model(str(checkpoint("qwen2")))
    traced = trace(source, agent("qwen2"), "agent", tmp_path / "trace", **sizes)
    assert finish(traced, ExportOptions(**sizes), tmp_path / "out").manifest.parity["passed"] is True


# --- every weight ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture", ["qwen2", "qwen3", *(pytest.param(a, marks=pytest.mark.long) for a in ("llama", "mistral"))]
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


# --- the comparison itself -------------------------------------------------------------------------------------------


def side(hidden: Any, logits: Any, margins: Any, recomputed: int = 1, moved: float = 0.0) -> parity.Side:
    rows = parity.Rows(*(np.array(value, np.float32) for value in (hidden, logits, margins)))
    tail = rows.tail(recomputed)
    return parity.Side(rows, parity.Rows(tail.hidden + moved, tail.logits + moved, tail.margins + moved))


def hand_made() -> tuple[list[parity.Case], list[parity.Side]]:
    rng = np.random.default_rng(0)
    hidden, logits = rng.standard_normal((5, 8)), 10 * rng.permuted(np.tile(np.arange(60.0), (5, 1)), axis=1)
    values = hidden, logits, [1.0, -1.0, 2.0, -2.0, 3.0]
    return [parity.Case([1, 2, 3, 4], [5], side(*values))], [side(*values)]


def test_equal_sides_pass() -> None:
    report = parity.compare(*hand_made(), GATE)
    assert report.failures == []
    assert report.to_json()["first"] == {"compared": 5, "within_noise": 0, "differing": 0, "changed": 0}
    assert report.to_json()["ranks"] == {"compared": 5 * 40, "within_noise": 0, "differing": 0, "changed": 0}
    assert report.to_json()["decisions"] == {"compared": 5, "within_noise": 0, "differing": 0, "changed": 0}
    rows = hand_made()[0][0].reference.rows
    floor = {name: NOISE_FLOOR * float(np.abs(getattr(rows, name)).max()) for name in parity.NAMES}
    assert report.to_json()["noise"] == floor  # recomputed rows agree to the last bit
    assert report.engine_noise == Noise(floor["margins"], floor["logits"])


@pytest.mark.parametrize("where", ["found", "reference"])
@pytest.mark.parametrize("route", ["rows", "recomputed"])
@pytest.mark.parametrize("name", ["hidden", "logits", "margins"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_fails(where, route, name, value) -> None:
    cases, found = hand_made()
    getattr(getattr((found[0] if where == "found" else cases[0].reference), route), name)[0] = value
    assert parity.compare(cases, found, GATE).failures


@pytest.mark.parametrize("name", ["hidden", "logits", "margins"])
def test_recomputed_rows_are_compared_with_the_reference_too(name) -> None:
    """One schedule runs candidates in one pass, another one at a time: each of them decodes."""
    cases, found = hand_made()
    getattr(found[0].recomputed, name)[:] *= -1
    failures = parity.compare(cases, found, GATE).failures
    assert any(failure.startswith(f"{name}: ") for failure in failures)


def test_no_amount_of_noise_hides_a_wrong_agent() -> None:
    """An engine whose agent answers at random is noisy, and its decisions may not be excused by that."""
    cases, found = hand_made()
    found[0].rows.margins[:] = -found[0].rows.margins
    found[0].recomputed.margins[:] = 1000.0
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
    assert report.noise["logits"] == NOISE_FACTOR * 0.25
    assert report.noise["margins"] == pytest.approx(NOISE_FLOOR * 3.0)
    # A difference between the sides is no noise.
    cases, found = hand_made()
    found[0].rows.logits[:] += 0.25
    found[0].recomputed.logits[:] += 0.25
    assert parity.compare(cases, found, GATE).noise == parity.compare(*hand_made(), GATE).noise


def perturbed(by: float) -> list[parity.Side]:
    """The hand-made engine, its margins and logits moved in the perturbed run."""
    (found,) = hand_made()[1]
    rows = found.rows
    return [replace(found, perturbed=parity.Rows(rows.hidden, rows.logits + by, rows.margins + np.float32(2 * by)))]


def test_level_flips_are_noise_to_decoding_and_excuse_nothing() -> None:
    cases, found = hand_made()
    plain, report = parity.compare(cases, found, GATE), parity.compare(cases, perturbed(0.25), GATE)
    assert report.engine_noise == Noise(margins=NOISE_FACTOR * 0.5, logits=NOISE_FACTOR * 0.25)
    assert report.to_json() == plain.to_json()
    assert parity.compare(cases, perturbed(1e-9), GATE).engine_noise == plain.engine_noise  # the floor is the same


@pytest.mark.parametrize("name", ["logits", "margins"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_in_a_perturbed_row_fails(name) -> None:
    found = perturbed(0.25)
    getattr(found[0].perturbed, name)[2] = np.nan
    assert parity.compare(hand_made()[0], found, GATE).failures == [f"{name}: not finite in a perturbed row"]


@pytest.mark.parametrize("lowering", ["ort", "portable"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_move_by_less_than_the_recorded_noise_where_levels_flip(traced, tmp_path, precision, lowering) -> None:
    """Of a text longer than the gate's, one row at a time; last bits of the cache move as on other processors."""
    options = ExportOptions(precision=precision, lowering=lowering, gate=False)
    engine = CpuEngine(finish(traced("qwen2"), options, tmp_path / "out"), threads=1)
    cases = traced("qwen2").reference.cases
    sides = [parity.run_engine(engine, case, parity.perturber(engine)) for case in cases]
    recorded = parity.compare(cases, sides, parity.GATES[precision]).engine_noise
    generator = np.random.default_rng(1)
    moved = dict.fromkeys(("margins", "logits"), 0.0)
    for tokens in checkpoints.random_prompts(4, seed=5, length=150):
        engine.cache.clear()
        straight = engine.run(Pass.full_outputs(tokens, range(len(tokens)), 0))
        expected = {name: getattr(straight, name).copy() for name in moved}
        for slot, token in enumerate(tokens):
            row = engine.run(Pass.full_outputs([token], [slot], slot))
            for name in moved:
                moved[name] = max(moved[name], float(np.abs(getattr(row, name)[0] - expected[name][slot]).max()))
            entries = engine.memory.entries[:, :, :, slot]
            entries[...] = entries * (1 + 2e-7 * generator.standard_normal(entries.shape))
    assert 0.1 < moved["logits"] < recorded.logits  # last bits alone move them by less than 0.001
    assert 0.001 < moved["margins"] < recorded.margins


LIMITS = {
    "fp32": (0.99999, 1e-4, 0, 0.0),
    "fp16": (0.9999, 0.02, 2, 0.05),
    "bf16": (0.999, 0.1, 5, 0.2),
    "int8": (0.99, 0.2, 5, 0.25),
    "int4": (0.7, 1.0, 20, 1.0),
}
"""docs/reference/bundle.md: least cosine, greatest difference, of 100 rows those that may differ, lead in nats."""


def failures_of(name: str, precision: str, change: Callable[[parity.Rows], None]) -> list[str]:
    """What the gate says of one of the things it looks at, where 100 rows are right but for a change."""
    rng = np.random.default_rng(0)
    logits = np.tile(10 * np.arange(60.0), (100, 1))
    values = rng.standard_normal((100, 64)), logits, np.where(np.arange(100) % 2, 3.0, -3.0)
    found = side(*values)
    change(found.rows)
    tail = found.rows.tail(1)  # the other route agrees
    found = parity.Side(found.rows, parity.Rows(tail.hidden.copy(), tail.logits.copy(), tail.margins.copy()))
    report = parity.compare([parity.Case([1, 2], [5], side(*values))], [found], parity.GATES[precision])
    return [failure for failure in report.failures if failure.startswith(name)]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(("share", "stopped"), [(0.8, False), (1.2, True)])
def test_each_gate_has_the_limits_of_the_numbers_that_are_documented(precision, share, stopped) -> None:
    least_cosine, greatest_difference, _, _ = LIMITS[precision]

    def turn(rows: parity.Rows) -> None:
        row, cosine = rows.hidden[7].astype(np.float64), 1 - share * (1 - least_cosine)
        beside = np.random.default_rng(1).standard_normal(64)
        beside -= beside @ row / (row @ row) * row
        beside *= np.linalg.norm(row) / np.linalg.norm(beside)
        rows.hidden[7] = cosine * row + np.sqrt(1 - cosine**2) * beside

    def move(rows: parity.Rows) -> None:
        rows.margins[7] += 3.0 * share * greatest_difference

    assert bool(failures_of("hidden: least cosine", precision, turn)) is stopped
    assert bool(failures_of("margins: greatest difference", precision, move)) is stopped


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("more", [0, 1])
def test_each_gate_has_the_limits_of_the_outcomes_that_are_documented(precision, more) -> None:
    _, _, differing, _ = LIMITS[precision]

    def decide(rows: parity.Rows) -> None:
        rows.margins[: differing + more] *= -1

    def swap(rows: parity.Rows) -> None:
        rows.logits[: differing + more, [-1, -2]] = rows.logits[: differing + more, [-2, -1]]

    assert bool(failures_of("decisions: ", precision, decide)) is bool(more)
    assert bool(failures_of("first: ", precision, swap)) is bool(more)


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize(("share", "compared"), [(0.9, 0), (1.1, 4)])
def test_a_best_token_that_does_not_lead_enough_is_counted_all_the_same(precision, share, compared) -> None:
    lead = LIMITS[precision][-1] or 2 * NOISE_FLOOR
    reference = np.zeros((4, 60))
    reference[:, 0], reference[:, 1] = 1.0 + share * lead, 1.0
    if precision == "fp32":
        reference[:, 0] = 1.0 + share * NOISE_FLOOR
    other = reference.copy()
    other[:2, [0, 1]] = other[:2, [1, 0]]
    rest = np.eye(4), np.array([1.0, -1.0, 1.0, -1.0])
    cases = [parity.Case([1, 2], [5], side(rest[0], reference, rest[1]))]
    report = parity.compare(cases, [side(rest[0], other, rest[1])], parity.GATES[precision])
    differing = 2 if compared else 0
    expected = {"compared": compared, "within_noise": 4 - compared, "differing": differing, "changed": 2}
    assert report.to_json()["first"] == expected
    assert report.to_json()["min_gap"]["first"] == pytest.approx(LIMITS[precision][-1] or NOISE_FLOOR, rel=1e-3)
    assert any(failure.startswith("first: ") for failure in report.failures) is bool(compared)


def test_the_report_on_the_screen_says_how_much_changed_and_does_not_call_it_noise() -> None:
    counts = {"compared": 128, "within_noise": 72, "differing": 1, "changed": 20}
    min_gap = {"first": 1.0, "ranks": 0.01, "decisions": 0.0123}
    report = {"passed": True, "prompts": 4, "rows": 200, "first": counts, "decisions": counts, "min_gap": min_gap}
    text = "\n".join(inspect._parity_lines(report))
    assert "best token: 1 of 128 that lead by more than 1 nat differ; 20 of all 200 changed" in text
    assert "decisions: 1 of 128 decided by more than 0.012 nats differ; 20 of all 200 changed" in text
    assert "noise" not in text


def test_perplexity_is_of_each_token_after_those_before_it() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]], np.float32))
    assert perplexity([([2, 1, 2], logits)]) == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-6)


def test_a_perplexity_that_no_number_holds_is_left_out() -> None:
    cases, found = hand_made()
    steep = [[0.0, *[-1e3] * 59]] * 5
    for side_ in (cases[0].reference, found[0]):
        side_.rows.logits[:], side_.recomputed.logits[:] = steep, steep[0]
    assert parity.compare(cases, found, GATE).perplexity is None


def test_rows_of_zeros_have_no_direction() -> None:
    zero, one = f32([0.0, 0.0]), f32([1.0, 0.0])
    assert (least_cosine(zero, zero), least_cosine(zero, one)) == (1.0, 0.0)


def f32(*rows: list[float]) -> Any:
    return np.array(rows, np.float32)


def counted(compare: Callable[..., Any]) -> Callable[..., dict[str, int]]:
    return lambda *values: asdict(compare(*values))


def test_ranks_by_hand() -> None:
    reference = f32([5.0, 4.0, 3.9, 1.0])  # three ranks: the last value is only the third's neighbour
    swapped = f32([5.0, 3.9, 4.0, 1.0])
    other_best = f32([4.0, 5.0, 3.9, 1.0])
    compare = counted(compare_ranks)
    assert compare(reference, reference, 0.0) == {"compared": 3, "within_noise": 0, "differing": 0, "changed": 0}
    assert compare(reference, swapped, 0.0) == {"compared": 3, "within_noise": 0, "differing": 2, "changed": 2}
    assert compare(reference, swapped, 0.2) == {"compared": 1, "within_noise": 2, "differing": 0, "changed": 2}
    assert compare(reference, other_best, 0.2) == {"compared": 1, "within_noise": 2, "differing": 1, "changed": 2}
    assert compare(reference, other_best, 1.5) == {"compared": 0, "within_noise": 3, "differing": 0, "changed": 2}
    two = np.concatenate([reference, reference])
    assert compare(two, np.concatenate([reference, swapped]), 0.0) == {
        "compared": 6,
        "within_noise": 0,
        "differing": 2,
        "changed": 2,
    }


def test_only_the_best_forty_ranks_count() -> None:
    reference = -np.arange(100, dtype=np.float32)[None]
    found = reference.copy()
    found[0, [40, 41]] = found[0, [41, 40]]
    assert asdict(compare_ranks(reference, found, 0.5)) == {
        "compared": 40,
        "within_noise": 0,
        "differing": 0,
        "changed": 0,
    }
    found[0, [39, 41]] = found[0, [41, 39]]
    assert compare_ranks(reference, found, 0.5).differing == 1


def test_equal_logits_are_within_any_noise() -> None:
    assert asdict(compare_ranks(f32([2.0, 2.0, 1.0]), f32([2.0, 2.0, 1.0]), 0.0)) == {
        "compared": 0,
        "within_noise": 2,
        "differing": 0,
        "changed": 0,
    }


def test_decisions_by_hand() -> None:
    reference = np.array([1.0, -1.0, 0.1, -0.1, 0.0], np.float32)
    compare = counted(compare_decisions)
    assert compare(reference, reference, 0.0) == {"compared": 4, "within_noise": 1, "differing": 0, "changed": 0}
    assert compare(reference, -reference, 0.0) == {"compared": 4, "within_noise": 1, "differing": 4, "changed": 4}
    assert compare(reference, -reference, 0.5) == {"compared": 2, "within_noise": 3, "differing": 2, "changed": 4}
    # A margin of exactly 0 rejects.
    assert compare(np.array([1.0], np.float32), np.array([0.0], np.float32), 0.5)["differing"] == 1
    assert compare(np.array([-1.0], np.float32), np.array([0.0], np.float32), 0.5)["differing"] == 0
