"""Choosing an engine, what every engine promises, by the one that is a table, and the search for what is no number."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.config import ENGINES, DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines import tensorrt as trt_engine
from mara_runtime.engines.base import Pass, StepOutput, check_row, float32_below, is_finite
from mara_runtime.errors import EngineError, NumericsError, OptionError
from mara_runtime.tensors import DRAFT_ROWS, TOP_SPARE, spare_slots, top_tokens
from tests.table_engine import TableEngine
from tests.unit import helpers


class FakeEngine(TableEngine):
    """Stands for OrtEngine: no graph is loaded."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        super().__init__(helpers.scripted({}, {}), helpers.sum_agent, slots=32 + spare_slots(8))
        self.opened = (name, threads)

    def describe(self) -> dict[str, Any]:
        return {"name": self.opened[0]}


def have(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    """A machine whose ONNX Runtime has these providers."""
    fake = SimpleNamespace(get_available_providers=lambda: list(providers))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(ort_engine, "OrtEngine", FakeEngine)


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def bundle_for(folder: Path, *targets: str) -> Bundle:
    return Bundle.open(helpers.make_bundle(folder, targets=targets))


def not_for(*engines: str, targets: str = "cpu, cuda") -> dict[str, str]:
    """What engines say that a bundle of these targets was not made for."""
    return dict.fromkeys(engines, f"the bundle was not exported for it (targets: {targets})")


def opened(
    bundle: Bundle, name: str = "auto", threads: int | None = None
) -> tuple[tuple[str, int | None], dict[str, str]]:
    engine, declined = open_engine(bundle, name, threads)
    assert isinstance(engine, FakeEngine)
    return engine.opened, declined


def test_auto_takes_the_preferred_one_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CUDA, CPU)
    assert ENGINES == ("tensorrt", "tensorrt-rtx", "cuda", "cpu")
    assert opened(bundle_for(tmp_path, "cpu", "cuda")) == (("cuda", None), not_for("tensorrt", "tensorrt-rtx"))


def test_auto_says_why_the_preferred_one_declined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    engine, declined = opened(bundle_for(tmp_path / "both", "cpu", "cuda"), threads=3)
    assert engine == ("cpu", 3)
    assert list(declined) == ["tensorrt", "tensorrt-rtx", "cuda"]
    assert f"no {CUDA} (it has {CPU})" in declined["cuda"]

    have(monkeypatch, CUDA, CPU)
    engine, declined = opened(bundle_for(tmp_path / "cpu", "cpu"))
    assert engine == ("cpu", None)
    assert declined == not_for("tensorrt", "tensorrt-rtx", "cuda", targets="cpu")


def test_a_named_engine_is_that_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    bundle = bundle_for(tmp_path, "cpu", "cuda")
    assert opened(bundle, "cpu") == (("cpu", None), {})
    with pytest.raises(EngineError) as caught:
        open_engine(bundle, "cuda")
    assert f"cuda: this ONNX Runtime has no {CUDA}" in str(caught.value)
    assert "cpu:" not in str(caught.value)  # it was not asked


@pytest.mark.parametrize("name", ["tensor-rt", "", "CPU", "auto,cpu"])
def test_an_unknown_engine_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        OptionError, match=rf"^--engine is {name!r}; it must be one of auto, tensorrt, tensorrt-rtx, cuda, cpu$"
    ):
        open_engine(bundle_for(tmp_path, "cpu"), name)


@pytest.mark.parametrize("name", ["auto", "tensorrt"])
def test_threads_are_refused_where_the_engine_would_ignore_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    have(monkeypatch, CPU)
    monkeypatch.setattr(trt_engine, "why_not", lambda bundle, name: None)
    with pytest.raises(OptionError, match=r"^--threads is for an engine on a CPU, and this is tensorrt: leave it out$"):
        open_engine(bundle_for(tmp_path, "cpu"), name, threads=4)


def test_when_none_fits_every_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    bundle = bundle_for(tmp_path, "cuda")
    with pytest.raises(EngineError) as caught:
        open_engine(bundle)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"cuda: this ONNX Runtime has no {CUDA} (it has {CPU})" in message
    assert "cpu: the bundle was not exported for it (targets: cuda)" in message
    assert "\n" not in message


def test_without_onnx_runtime_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what makes an import fail
    with pytest.raises(EngineError) as caught:
        open_engine(bundle_for(tmp_path, "cpu", "cuda"))
    assert "cuda: ONNX Runtime is not installed: pip install 'mara-deploy[gpu]'" in str(caught.value)
    assert "cpu: ONNX Runtime is not installed: pip install 'mara-deploy[cpu]'" in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_1_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: [CPU]))
    with pytest.raises(OptionError, match=f"^--threads is {threads}; it must lie between 1 and 1024"):
        open_engine(bundle_for(tmp_path, "cpu"), "cpu", threads)


@pytest.mark.parametrize(("name", "options"), [("cpu", {}), ("cuda", {"use_tf32": "0"})])
def test_float32_is_not_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str]
) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def session(path: str, how: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        asked.extend(providers)
        raise RuntimeError("that is enough")

    fake = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=session)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(EngineError, match="that is enough"):
        ort_engine.OrtEngine(bundle_for(tmp_path, name), name)
    assert asked == [(ort_engine.PROVIDERS[name], options)]


def test_the_decoder_records_which_engine_and_why_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, CPU)
    decoder = AlignedDecoder(bundle_for(tmp_path, "cpu"), cost=helpers.COST)
    result = decoder.generate([1], DecodeConfig(top_k=2, max_new_tokens=1))
    assert result.to_json()["stats"]["engine"] == {
        "name": "cpu",
        "declined": not_for("tensorrt", "tensorrt-rtx", "cuda", targets="cpu"),
    }


# ── rows, slots and positions ────────────────────────────────────────────────────────────────────────────────────────

MINUS = -math.inf


class Seeing:
    """A table that notes the prefixes it is asked for. A state is (number of tokens, last token), a logit their sum."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.seen.append(prefix)
        logits = np.arange(5, dtype=np.float32) + sum(prefix)
        return logits, np.array([len(prefix), prefix[-1]], np.float32)


def seeing(prompt: Sequence[int], slots: int = 24) -> tuple[TableEngine, list[tuple[int, ...]]]:
    """An engine that holds a prompt, and the prefixes it will be asked for."""
    table = Seeing()
    engine = TableEngine(table, helpers.sum_agent, slots)
    engine.run(Pass(prompt, range(len(prompt)), 0))
    table.seen.clear()
    return engine, table.seen


def test_a_prompt_is_a_chain() -> None:
    engine, seen = seeing([4])
    engine.run(Pass([5, 6, 7], [1, 2, 3], 1))
    assert seen == [(4, 5), (4, 5, 6), (4, 5, 6, 7)]


def test_siblings_see_the_prefix_and_themselves() -> None:
    engine, seen = seeing([4, 5])
    engine.run(Pass([1, 2, 3], [2, 2, 2], 2))
    engine.run(Pass([6], [2], 5))  # a sibling of a later pass
    assert seen == [(4, 5, 1), (4, 5, 2), (4, 5, 3), (4, 5, 6)]


def test_a_chain_under_the_first_of_several_siblings() -> None:
    engine, seen = seeing([4])
    engine.run(Pass([1, 2, 3, 8, 9], [1, 2, 3, 1, 1], 1))
    assert seen == [(4, 1), (4, 1, 2), (4, 1, 2, 3), (4, 8), (4, 9)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 6), st.integers(0, 5), st.integers(1, 5))
def test_a_row_sees_the_slots_below_its_position_and_its_own(
    prompt: list[int], offset: int, chain: int, siblings: int
) -> None:
    length = len(prompt)
    engine, seen = seeing(prompt)
    chain = 0 if offset else chain  # a chain stands where its prefix does
    tokens = [*range(20, 21 + chain), *range(30, 30 + siblings)]
    positions = [*range(length, length + 1 + chain), *[length] * siblings]
    engine.run(Pass(tokens, positions, length + offset))
    drafted = [tuple(prompt) + tuple(range(20, 21 + i)) for i in range(chain + 1)]
    assert seen == [*drafted, *((*prompt, 30 + i) for i in range(siblings))]


def test_move_makes_an_entry_that_of_another_slot() -> None:
    engine, seen = seeing([4])
    engine.run(Pass([1, 2, 3], [1, 1, 1], 1))
    engine.move(3, 1)
    engine.run(Pass([9], [2], 2))
    assert seen[-1] == (4, 3, 9)


def test_clear_leaves_nothing() -> None:
    engine, _ = seeing([4, 5])
    engine.clear()
    with pytest.raises(IndexError, match="slot 0 holds None"):
        engine.run(Pass([9], [2], 2))


def test_table_engine_refuses_a_prefix_with_a_hole_or_a_sibling_in_it() -> None:
    engine, _ = seeing([1, 2], slots=8)
    with pytest.raises(IndexError, match="slot 2 holds None"):
        engine.run(Pass([3], [3], 3, [0]))
    engine.run(Pass([5, 6], [2, 2], 2))  # siblings in slots 2 and 3
    with pytest.raises(IndexError, match="slot 3 holds"):
        engine.run(Pass([7], [4], 4, [0]))
    with pytest.raises(IndexError):
        engine.run(Pass([7, 7], [2, 2], 7, [0]))  # beyond the cache


def test_the_spare_slots_hold_a_decision_a_draft_and_a_fallback_fed_again() -> None:
    assert spare_slots(8) == 8 + DRAFT_ROWS + 1


# ── what a pass returns ──────────────────────────────────────────────────────────────────────────────────────────────


def pass_of(margins: Sequence[float], **options: Any) -> StepOutput:
    """Siblings with these margins after a prompt of one token."""
    table = helpers.scripted({}, {(0, i + 1): margin for i, margin in enumerate(margins)}, vocab_size=20)
    engine = TableEngine(table, helpers.sum_agent, 40)
    engine.run(Pass([0], [0], 0))
    count = len(margins)
    return engine.run(Pass(range(1, count + 1), [1] * count, 1, **options))


def elected(margins: Sequence[float], priorities: Sequence[float], **options: Any) -> list[int]:
    """Rows through the LM head when all are shown to the agent."""
    out = pass_of(margins, agent_rows=range(len(margins)), priorities=priorities, **options)
    assert out.margins.tolist() == list(margins)
    rows: list[int] = out.rows.tolist()
    assert len(out.top_ids) == len(out.top_logits) == len(out.log_normaliser) == len(rows)
    return rows


def test_the_accepted_one_of_the_greatest_priority_is_elected() -> None:
    assert elected([-1.0, 2.0, 3.0], [0.0, -1.0, -2.0]) == [1]
    assert elected([1.0, 2.0, 3.0], [0.0, -1.0, -2.0]) == [0]
    assert elected([1.0, 2.0, 3.0], [-2.0, -1.0, 0.0]) == [2]


def test_with_a_weight_the_margin_counts_too() -> None:
    assert elected([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], margin_weight=1.0) == [2]
    assert elected([1.0, 2.0, 3.0], [2.0, 1.0, 0.5], margin_weight=0.5) == [0]
    assert elected([1.0, 2.0, 3.0], [2.0, 2.0, 0.0], margin_weight=1.0) == [1]


def test_the_first_of_equals_is_elected() -> None:
    assert elected([1.0, 2.0, 2.0], [0.0, 0.0, 0.0], margin_weight=1.0) == [1]
    assert elected([-1.0, 2.0, 3.0], [0.0, 0.0, 0.0]) == [1]


def test_who_does_not_exceed_the_threshold_is_not_elected() -> None:
    assert elected([0.0, -1.0], [0.0, 0.0]) == []
    assert elected([0.5, 0.75], [0.0, -1.0], threshold=0.5) == [1]
    assert elected([-1.0, -2.0], [-1.0, 0.0], threshold=-1.5) == [0]


def test_a_priority_of_minus_infinity_is_never_elected() -> None:
    assert elected([1.0, 2.0], [MINUS, MINUS]) == []
    assert elected([1.0, 2.0], [MINUS, MINUS], fallback_row=0) == [0]
    assert elected([9.0, 1.0], [MINUS, -5.0], margin_weight=1.0) == [1]


def test_the_fallback_is_elected_when_nobody_is() -> None:
    assert elected([-1.0, -2.0], [0.0, 0.0], fallback_row=1) == [1]
    assert elected([-1.0, 2.0, -2.0], [0.0, -1.0, -2.0], fallback_row=0) == [1]


def test_the_elected_row_comes_after_those_that_were_asked_for() -> None:
    assert elected([1.0, -1.0, 2.0], [MINUS, 0.0, 0.0], head_rows=[2, 0]) == [2, 0, 2]
    assert elected([-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], head_rows=[1], fallback_row=0) == [1, 0]
    assert elected([-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], head_rows=[1, 2]) == [1, 2]


def test_only_the_rows_asked_for_are_shown_to_the_agent() -> None:
    out = pass_of([1.0, 2.0, 3.0], agent_rows=[2, 0], priorities=[-1.0, 0.0])
    assert out.margins.tolist() == [3.0, 1.0]
    assert out.rows.tolist() == [0]  # a row of the pass, not of the agent's
    assert pass_of([1.0, 2.0], head_rows=[1]).margins.tolist() == []


def test_a_threshold_is_compared_in_full() -> None:
    # The decode loop compares the same margin with the same threshold in float64; float32_below does the rest.
    margin = float(np.float32(0.1))
    assert elected([margin], [0.0], threshold=0.1) == [0]  # float32(0.1) > 0.1
    assert elected([float(np.float32(0.7))], [0.0], threshold=0.7) == []  # float32(0.7) < 0.7


@given(st.floats(-1e30, 1e30), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_float32_margin_exceeds_the_threshold_of_a_graph_when_it_exceeds_the_option_s(
    threshold: float, margin: float
) -> None:
    assert (np.float32(margin) > float32_below(threshold)) == (margin > threshold)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float32_margin_beside_the_threshold(threshold: float) -> None:
    with np.errstate(over="ignore"):
        near = np.float32(threshold)
        below = float32_below(threshold)
        beside = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    for margin in beside:
        assert (margin > below) == (float(margin) > threshold)


def test_the_best_tokens_and_their_normaliser() -> None:
    logits: dict[tuple[int, ...], dict[int, float]] = {(0,): {3: 1.0, 1: 2.0, 4: 2.0, 2: -1.0}}
    engine = TableEngine(helpers.scripted(logits, {}, vocab_size=30), helpers.sum_agent, 8, max_candidates=3)
    out = engine.run(Pass([0], [0], 0, [0]))
    assert out.top_ids.shape == out.top_logits.shape == (1, 3 + TOP_SPARE)
    assert out.top_ids[0, :4].tolist() == [1, 4, 3, 2]
    assert out.top_logits[0, :4].tolist() == [2.0, 2.0, 1.0, -1.0]
    assert (out.top_logits[0, 4:] == MINUS).all()
    assert out.log_normaliser[0] == pytest.approx(math.log(2 * math.e**2 + math.e + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize(("candidates", "vocab", "expected"), [(8, 12, 12), (4, 12, 12), (3, 12, 11), (40, 10**5, 48)])
def test_how_many_tokens_a_step_returns(candidates: int, vocab: int, expected: int) -> None:
    assert top_tokens(candidates, vocab) == expected


def test_evaluate_returns_all_and_writes_the_same_entries() -> None:
    engine, seen = seeing([4])
    everything = engine.evaluate([1, 2], [1, 1], 1)
    assert everything.hidden.tolist() == [[2.0, 1.0], [2.0, 2.0]]
    assert everything.margins.tolist() == [3.0, 4.0]
    assert everything.logits.tolist() == [[5, 6, 7, 8, 9], [6, 7, 8, 9, 10]]
    engine.run(Pass([3], [2], 3))
    assert seen[-1] == (4, 1, 3)


def test_a_state_that_is_not_finite_has_no_margin() -> None:
    # Not even if the agent makes one of it, as max(0, NaN) may.
    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.zeros(4, np.float32), np.array([[0.0, np.nan, np.inf][prefix[-1]], 1.0], np.float32)

    engine = TableEngine(lookup, lambda hidden: np.ones(len(hidden), np.float32), 8)
    out = engine.run(Pass([0, 1, 2], [0, 0, 0], 0, (), [0, 1, 2], [0.0, 1.0, 2.0]))
    assert np.isnan(out.margins).tolist() == [False, True, True]
    assert np.isnan(engine.evaluate([0, 1, 2], [0, 0, 0], 0).margins).tolist() == [False, True, True]


# ── what is not finite ───────────────────────────────────────────────────────────────────────────────────────────────


FINE = StepOutput(
    np.zeros(2, np.float32), np.arange(2), np.zeros((2, 3), int), np.zeros((2, 3), np.float32), np.ones(2, np.float32)
)
NOT_FINITE = [math.nan, math.inf, MINUS]


def test_a_sound_pass_is_finite() -> None:
    assert is_finite(FINE)
    assert is_finite(replace(FINE, margins=FINE.margins[:0], log_normaliser=FINE.log_normaliser[:0]))
    assert is_finite(replace(FINE, top_logits=np.full((2, 3), MINUS, np.float32)))  # tokens ruled out


@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", ["margins", "log_normaliser"])
def test_a_pass_with_one_number_that_is_none_is_not(name: str, at: int, bad: float) -> None:
    array = getattr(FINE, name).copy()
    array[at] = bad
    assert not is_finite(replace(FINE, **{name: array}))


def row_of(hidden: Sequence[float], logits: Sequence[float], margin: float) -> TableEngine:
    """An engine of one slot whose only row gives these."""
    row = np.array(logits, np.float32), np.array(hidden, np.float32)
    return TableEngine(lambda prefix: row, lambda states: np.full(len(states), margin, np.float32), 5)


def complaint(engine: TableEngine, margin: bool = True) -> str:
    with pytest.raises(NumericsError) as caught:
        check_row(engine, 7, 0, 4, margin=margin)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_row_is_passed_over_and_leaves_its_entry() -> None:
    for logits in ([1.0, 2.0], [MINUS, 2.0]):
        engine = row_of([0.0, 1.0], logits, 3.0)
        check_row(engine, 7, 0, 4, margin=True)
        assert engine._entries == [None] * 4 + [(7, 0)]


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_hidden_state_is_named_first(bad: float) -> None:
    engine = row_of([0.0, bad], [math.nan, math.nan], math.nan)
    assert "the hidden state at position 0 (token 7) is not finite" in complaint(engine)


@pytest.mark.parametrize("logits", [[1.0, math.nan], [MINUS, math.nan], [1.0, math.inf], [MINUS, MINUS]], ids=str)
def test_logits_are_named_before_the_margin(logits: list[float]) -> None:
    assert "the logits after position 0 are not finite" in complaint(row_of([0.0, 1.0], logits, math.nan))


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_margin_is_named_where_it_counts(bad: float) -> None:
    engine = row_of([0.0, 1.0], [1.0, 2.0], bad)
    assert "the agent's margin at position 0 is not finite" in complaint(engine)
    check_row(engine, 7, 0, 4, margin=False)
