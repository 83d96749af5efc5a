"""The comparison behind the parity gate, by hand: what is a difference, what is noise, and where each gate ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mara_deploy.commands import inspect
from mara_export import parity
from mara_export.export import finish
from mara_export.options import ExportOptions
from mara_export.parity.compare import (
    NOISE_FACTOR,
    NOISE_FLOOR,
    Counts,
    compare_decisions,
    compare_ranks,
    cosines,
    perplexity,
)
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort_cpu import CpuEngine
from tests import checkpoints
from tests.unit.manifests import parity_json

GATE = parity.GATES["fp32"]


def f32(*rows: Any) -> Any:
    return np.array(rows, np.float32)


def side(hidden: Any, logits: Any, margins: Any) -> parity.Side:
    """Both routes agree; the last row is recomputed."""
    rows = parity.Rows(*(np.array(value, np.float32) for value in (hidden, logits, np.array(margins)[:, None])))
    return parity.Side(rows, copied(rows.tail(1)))


def copied(rows: parity.Rows) -> parity.Rows:
    return parity.Rows(rows.hidden.copy(), rows.logits.copy(), rows.margins.copy())


def hand_made() -> tuple[list[parity.Case], list[parity.Side]]:
    rng = np.random.default_rng(0)
    hidden, logits = rng.standard_normal((5, 8)), 10 * rng.permuted(np.tile(np.arange(60.0), (5, 1)), axis=1)
    values = hidden, logits, [1.0, -1.0, 2.0, -2.0, 3.0]
    return [parity.Case([1, 2, 3, 4], [5], side(*values))], [side(*values)]


def failures(cases: list[parity.Case], found: list[parity.Side], gate: parity.Gate = GATE) -> list[str]:
    return parity.compare(cases, found, gate).failures + agent_report(cases, found, gate).failures


def agent_report(cases: list[parity.Case], found: list[parity.Side], gate: parity.Gate = GATE) -> parity.Report:
    """Of the only agent."""
    return parity.compare_agent(cases, found, 0, gate)


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_equal_sides_pass() -> None:
    cases, found = hand_made()
    report, agent = parity.compare(cases, found, GATE), agent_report(cases, found)
    assert report.failures == agent.failures == []
    assert report.outcomes == {"first": Counts(5, 0, 0, 0), "ranks": Counts(5 * 40, 0, 0, 0)}
    assert agent.outcomes == {"decisions": Counts(5, 0, 0, 0)}
    rows = cases[0].reference.rows
    floor = {name: NOISE_FLOOR * float(np.abs(getattr(rows, name)).max()) for name in parity.NAMES}
    assert report.noise | agent.noise == floor  # recomputed rows agree to the last bit
    assert (agent.engine_noise, report.engine_noise) == (floor["margins"], floor["logits"])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_fails() -> None:
    for name in parity.NAMES:
        for value in (np.nan, np.inf):
            for route, row in (("rows", 1), ("recomputed", 0)):  # row 1 is rejected: NaN changes no decision there
                for index in (0, 1):
                    cases, found = hand_made()
                    getattr(getattr((found[0], cases[0].reference)[index], route), name)[row] = value
                    assert failures(cases, found), (name, value, route, index)


@pytest.mark.parametrize("name", parity.NAMES)
def test_recomputed_rows_are_compared_with_the_reference_too(name) -> None:
    """One schedule runs candidates in one pass, another one at a time: each of them decodes."""
    cases, found = hand_made()
    getattr(found[0].recomputed, name)[:] *= -1
    assert any(failure.startswith(f"{name}: ") for failure in failures(cases, found))


def test_the_numbers_are_worst_cases_over_rows() -> None:
    cases, found = hand_made()
    found[0].rows.hidden[2, 3] += 0.5
    report = parity.compare(cases, found, GATE)
    hidden = cases[0].reference.rows.hidden
    a, b = hidden[2].astype(np.float64), found[0].rows.hidden[2].astype(np.float64)
    assert report.numbers["hidden"] == {
        "greatest_difference": pytest.approx(0.5 / np.abs(hidden).max(), rel=1e-5),
        "least_cosine": pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6),
    }
    assert report.numbers["logits"]["greatest_difference"] == 0.0
    assert [failure.split(":")[0] for failure in report.failures] == ["hidden", "hidden"]


def test_a_scaled_hidden_state_has_the_right_cosine_and_fails_all_the_same() -> None:
    cases, found = hand_made()
    found[0].rows.hidden[:] *= np.float32(1.001)
    (failure,) = failures(cases, found)
    assert failure.startswith("hidden: greatest difference")


@pytest.mark.parametrize(("precision", "experts", "share"), [("fp16", 4, 0.5), ("fp16", 0, 0.0), ("fp32", 4, 0.0)])
def test_rounding_may_give_half_of_the_rows_other_experts(precision, experts, share) -> None:
    cases, found = hand_made()
    for each in found:
        each.rows.hidden[1::3] += 5.0
    report = parity.compare(cases, found, gate := parity.gate_of(precision, experts))
    assert report.to_json()["rerouted"] == gate.rerouted == share
    assert bool(report.failures) is (share == 0)
    for each in found:
        each.rows.hidden[:] += 5.0
    assert parity.compare(cases, found, gate).failures


def test_rows_of_zeros_have_no_direction() -> None:
    zero, one = f32([0.0, 0.0]), f32([1.0, 0.0])
    assert (*cosines(zero, zero), *cosines(zero, one)) == (1.0, 0.0)


def test_activations_beyond_float16_fail_where_float16_has_to_hold_them() -> None:
    """The CPU, which computes in float32, does not show it."""
    cases, found = hand_made()
    assert parity.compare(cases, found, GATE, 65504.0).failures == []
    (failure,) = parity.compare(cases, found, GATE, 65505.0).failures
    assert "activations reach 65,505, and float16 ends at 65,504: use bf16 or fp32" in failure
    assert parity.compare(cases, found, GATE, float("nan")).failures


def test_perplexity_is_of_each_token_after_those_before_it() -> None:
    logits = np.log(f32([0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1.0, 1.0, 1.0]))
    assert perplexity([([2, 1, 2], logits)]) == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-6)
    cases, found = hand_made()
    steep = [[0.0, *[-1e3] * 59]] * 5  # no number holds its perplexity
    for each in (cases[0].reference, found[0]):
        each.rows.logits[:], each.recomputed.logits[:] = steep, steep[0]
    assert parity.compare(cases, found, GATE).perplexity is None


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_measured_on_each_side_alone() -> None:
    cases, found = hand_made()
    found[0].recomputed.logits[:] += 0.25
    noise = parity.compare(cases, found, GATE).noise
    assert noise["logits"] == NOISE_FACTOR * 0.25
    assert agent_report(cases, found).noise["margins"] == pytest.approx(NOISE_FLOOR * 3.0)
    # A difference between the sides is not noise.
    found[0].rows.logits[:] += 0.25
    assert parity.compare(cases, found, GATE).noise == parity.compare(*hand_made(), GATE).noise


def test_no_amount_of_noise_hides_a_wrong_agent() -> None:
    """An engine whose agent answers at random is noisy, and its decisions may not be excused by that."""
    cases, found = hand_made()
    found[0].rows.margins[:] *= -1
    found[0].recomputed.margins[:] = 1000.0
    assert failures(cases, found)


def perturbed(by: float) -> list[parity.Side]:
    """The hand-made engine, its margins and logits moved in the perturbed run."""
    (found,) = hand_made()[1]
    rows = found.rows
    return [replace(found, perturbed=parity.Rows(rows.hidden, rows.logits + by, rows.margins + np.float32(2 * by)))]


def test_level_flips_are_noise_to_decoding_and_excuse_nothing() -> None:
    cases, found = hand_made()
    for compare, noise in ((parity.compare, NOISE_FACTOR * 0.25), (agent_report, NOISE_FACTOR * 0.5)):
        plain, report = compare(cases, found, GATE), compare(cases, perturbed(0.25), GATE)
        assert report.engine_noise == noise
        assert report.to_json() == plain.to_json()
        assert compare(cases, perturbed(1e-9), GATE).engine_noise == plain.engine_noise  # the floor is the same


@pytest.mark.parametrize("name", ["logits", "margins"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_in_a_perturbed_row_fails(name) -> None:
    found = perturbed(0.25)
    getattr(found[0].perturbed, name)[2] = np.nan
    assert failures(hand_made()[0], found) == [f"{name}: not finite in a perturbed row"]


@pytest.mark.parametrize(
    ("precision", "lowering"),
    [
        ("int8", "ort"),
        ("int4", "portable"),
        *(pytest.param(*pair, marks=pytest.mark.long) for pair in (("int4", "ort"), ("int8", "portable"))),
    ],
)
def test_rows_move_by_less_than_the_recorded_noise_where_levels_flip(traced, tmp_path, precision, lowering) -> None:
    """Of a text longer than the gate's, one row at a time; last bits of the cache move as on other processors."""
    options = ExportOptions(precision=precision, lowering=lowering, gate=False)
    engine = CpuEngine(finish(traced("qwen2"), options, tmp_path / "out"), threads=1)
    cases = traced("qwen2").reference.cases
    engine.use([traced("qwen2").agents[0].name])
    sides = [*parity.run_engine(engine, cases, 1, parity.perturber(engine))]
    gate = parity.GATES[precision]
    recorded = {"logits": parity.compare(cases, sides, gate), "margins": agent_report(cases, sides, gate)}
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
            (entries,) = engine.memory.places[0].entries
            entries[:, :, slot] *= 1 + 2e-7 * generator.standard_normal(entries[:, :, slot].shape)
    assert 0.1 < moved["logits"] < recorded["logits"].engine_noise  # last bits alone move them by less than 0.001
    assert 0.001 < moved["margins"] < recorded["margins"].engine_noise


# --- the documented limits -------------------------------------------------------------------------------------------

LIMITS = {
    "fp32": (0.99999, 1e-4, 0, 0.0),
    "fp16": (0.9999, 0.02, 2, 0.05),
    "bf16": (0.999, 0.1, 5, 0.2),
    "int8": (0.99, 0.2, 5, 0.25),
    "int4": (0.7, 1.0, 20, 1.0),
}
"""docs/reference/bundle.md: least cosine, greatest difference, of 100 rows those that may differ, lead in nats."""
each_gate = pytest.mark.parametrize("precision", LIMITS)


def fails(name: str, precision: str, change: Callable[[parity.Rows], None]) -> bool:
    """Whether the gate stops something of 100 rows that are right but for a change, on both routes."""
    rng = np.random.default_rng(0)
    logits = np.tile(10 * np.arange(60.0), (100, 1))
    values = rng.standard_normal((100, 64)), logits, np.where(np.arange(100) % 2, 3.0, -3.0)
    rows = side(*values).rows
    change(rows)
    found = [parity.Side(rows, copied(rows.tail(1)))]
    about = failures([parity.Case([1, 2], [5], side(*values))], found, parity.GATES[precision])
    return any(failure.startswith(name) for failure in about)


@each_gate
def test_each_gate_has_the_documented_limits_of_numbers(precision) -> None:
    least, greatest, _, _ = LIMITS[precision]
    for share in (0.8, 1.2):

        def turn(rows: parity.Rows, share: float = share) -> None:
            row, cosine = rows.hidden[7].astype(np.float64), 1 - share * (1 - least)
            across = np.random.default_rng(1).standard_normal(64)
            across -= across @ row / (row @ row) * row
            across *= np.linalg.norm(row) / np.linalg.norm(across)
            rows.hidden[7] = cosine * row + np.sqrt(1 - cosine**2) * across

        def move(rows: parity.Rows, share: float = share) -> None:
            rows.margins[7] += 3.0 * share * greatest

        assert fails("hidden: least cosine", precision, turn) is (share > 1)
        assert fails("margins: greatest difference", precision, move) is (share > 1)


@each_gate
def test_each_gate_has_the_documented_limits_of_outcomes(precision) -> None:
    differing = LIMITS[precision][2]
    for count in (differing, differing + 1):

        def decide(rows: parity.Rows, count: int = count) -> None:
            rows.margins[:count] *= -1

        def swap(rows: parity.Rows, count: int = count) -> None:
            rows.logits[:count, [-1, -2]] = rows.logits[:count, [-2, -1]]

        assert fails("decisions: ", precision, decide) is (count > differing)
        assert fails("first: ", precision, swap) is (count > differing)


@each_gate
def test_a_best_token_that_does_not_lead_enough_is_counted_but_not_compared(precision) -> None:
    lead = LIMITS[precision][-1] or NOISE_FLOOR
    for share, compared in ((0.9, 0), (2.1, 4)):
        reference = np.zeros((4, 60))
        reference[:, 0], reference[:, 1] = 1.0 + share * lead, 1.0
        other = reference.copy()
        other[:2, [0, 1]] = other[:2, [1, 0]]
        hidden, margins = np.eye(4), [1.0, -1.0, 1.0, -1.0]
        case = parity.Case([1, 2], [5], side(hidden, reference, margins))
        report = parity.compare([case], [side(hidden, other, margins)], parity.GATES[precision])
        assert report.outcomes["first"] == Counts(compared, 4 - compared, 2 if compared else 0, 2)
        assert any(failure.startswith("first: ") for failure in report.failures) is bool(compared)


# --- outcomes by hand ------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    reference = f32([5.0, 4.0, 3.9, 1.0])  # three ranks: the last value is only the third's neighbour
    swapped, other_best = f32([5.0, 3.9, 4.0, 1.0]), f32([4.0, 5.0, 3.9, 1.0])
    assert compare_ranks(reference, reference, 0.0) == Counts(3, 0, 0, 0)
    assert compare_ranks(reference, swapped, 0.0) == Counts(3, 0, 2, 2)
    assert compare_ranks(reference, swapped, 0.2) == Counts(1, 2, 0, 2)
    assert compare_ranks(reference, other_best, 0.2) == Counts(1, 2, 1, 2)
    assert compare_ranks(reference, other_best, 1.5) == Counts(0, 3, 0, 2)
    assert compare_ranks(np.tile(reference, (2, 1)), np.concatenate([reference, swapped]), 0.0) == Counts(6, 0, 2, 2)
    equal = f32([2.0, 2.0, 1.0])
    assert compare_ranks(equal, equal, 0.0) == Counts(0, 2, 0, 0)  # within any noise


def test_only_the_best_forty_ranks_count() -> None:
    reference = -np.arange(100, dtype=np.float32)[None]
    found = reference.copy()
    found[0, [40, 41]] = found[0, [41, 40]]
    assert compare_ranks(reference, found, 0.5) == Counts(40, 0, 0, 0)
    found[0, [39, 41]] = found[0, [41, 39]]
    assert compare_ranks(reference, found, 0.5).differing == 1


def test_decisions_by_hand() -> None:
    reference = np.array([1.0, -1.0, 0.1, -0.1, 0.0], np.float32)
    assert compare_decisions(reference, reference, 0.0) == Counts(4, 1, 0, 0)
    assert compare_decisions(reference, -reference, 0.0) == Counts(4, 1, 4, 4)
    assert compare_decisions(reference, -reference, 0.5) == Counts(2, 3, 2, 4)
    # A margin of exactly 0 rejects.
    assert compare_decisions(f32(1.0), f32(0.0), 0.5).differing == 1
    assert compare_decisions(f32(-1.0), f32(0.0), 0.5).differing == 0


def test_the_report_on_the_screen_says_how_much_changed_and_does_not_call_it_noise() -> None:
    counts = {"compared": 128, "within_noise": 72, "differing": 1, "changed": 20}
    min_gap = {"first": 1.0, "ranks": 0.01, "decisions": 0.0123}
    report = {**parity_json(), "rows": 200, "first": counts, "decisions": counts, "min_gap": min_gap}
    text = "\n".join([*inspect.parity_lines(report), *inspect.compared(report, (), ["decisions"])])
    assert "best token: 1 of 128 that lead by more than 1 nat differ; 20 of all 200 changed" in text
    assert "decisions: 1 of 128 decided by more than 0.012 nats differ; 20 of all 200 changed" in text
    assert "noise" not in text
