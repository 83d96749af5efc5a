"""Every engine against the table: a model that is written down twice (tests/unit/written_model.py).

ONNX Runtime runs itself, TensorRT on a double of it (tests/double).
"""

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.decode import Session, decode
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines.base import Engine, Pass, StepOutput, is_finite
from mara_runtime.engines.ort import OrtEngine
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError, NumericsError, OptionError
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, Schedule
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from tests.double.machine import Machine
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.sequential import sequential
from tests.unit.written_model import (
    CANDIDATES,
    CONTEXT,
    FINE,
    INFINITE,
    SIZES,
    SLOTS,
    add_engines,
    judge,
    table,
    write_bundle,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("bundle"), always_head=False))


@pytest.fixture(scope="module")
def trt_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Bundle]:
    """By whether passes write the cache in place."""
    folders = {in_place: tmp_path_factory.mktemp("bundle") for in_place in (True, False)}
    return {
        in_place: add_engines(write_bundle(folder, always_head=True), SIZES, in_place)
        for in_place, folder in folders.items()
    }


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A GPU, from which everything taken is given back at the end."""
    machine = Machine()
    machine.install(monkeypatch)
    yield machine
    machine.check_given_back()


def test_top_k_never_has_no_row(bundle: Bundle) -> None:
    """ONNX Runtime before 1.31 then divides by zero, which ends the process."""
    graph = onnx.load(bundle.path(bundle.manifest.step.file)).graph
    assert "TopK" not in {node.op_type for node in graph.node}
    (choice,) = (node for node in graph.node if node.op_type == "If")
    branches = {a.name: [node.op_type for node in a.g.node] for a in choice.attribute}
    assert branches == {"then_branch": ["TopK"], "else_branch": ["Constant", "Constant"]}
    out = OrtEngine(bundle).run(Pass([1], [0], 0))
    assert len(out.rows) == len(out.top_ids) == len(out.top_logits) == len(out.log_normaliser) == 0


def begin_with(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the caches of OrtEngine be so small at first."""
    monkeypatch.setattr(ort_engine, "FIRST_SLOTS", slots)


def out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine `cuda` as on a GPU, with a cache that the host cannot reach, on the provider that is here."""
    monkeypatch.setitem(ort_engine.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setitem(ort_engine.DEVICES, "cuda", "cpu")


ENGINES = {
    "ort, one size": 512,
    "ort, growing": 4,
    "ort, out of reach": "cuda",
    "trt, in place": (True, True),
    "trt, in place, no graphs": (True, False),
    "trt, two sides": (False, True),
    "trt, two sides, no graphs": (False, False),
}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def engine(
    bundle: Bundle,
    trt_bundles: dict[bool, Bundle],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    if isinstance(request.param, int):
        begin_with(request.param, monkeypatch)
        yield OrtEngine(bundle, threads=1)
        return
    if request.param == "cuda":
        out_of_reach(monkeypatch)
        monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 4)
        yield OrtEngine(bundle, "cuda", threads=1)
        return
    in_place, graphs = request.param
    machine: Machine = request.getfixturevalue("machine")
    engine = TrtEngine(trt_bundles[in_place], "tensorrt", graphs=graphs)
    yield engine
    assert (machine.cuda.launched > 0) <= graphs
    engine.close()


@pytest.fixture(params=["cpu", "cuda", "trt, in place", "trt, two sides"])
def growing_and_whole(
    bundle: Bundle,
    trt_bundles: dict[bool, Bundle],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Any, Any]]:
    """An engine that begins small, and one that begins with all its slots."""
    if request.param.startswith("trt"):
        request.getfixturevalue("machine")
        several = trt_bundles[request.param == "trt, in place"]
        trt = [TrtEngine(made, "tensorrt") for made in (several, largest_only(several))]
        yield trt[0], trt[1]
        for engine in trt:
            engine.close()
        return
    out_of_reach(monkeypatch)
    ort = []
    for slots in (SLOTS, 4):  # the one that grows last: how it does is looked up when it does
        begin_with(slots, monkeypatch)
        ort.append(OrtEngine(bundle, request.param, threads=1))
    yield ort[1], ort[0]


def largest_only(bundle: Bundle) -> Bundle:
    """The bundle with the largest of its engines alone."""
    largest = max(bundle.manifest.engines, key=lambda engine: engine.slots)
    return replace(bundle, manifest=replace(bundle.manifest, engines=(largest,)))


def twin() -> TableEngine:
    return TableEngine(table, judge, SLOTS, CANDIDATES)


def same(found: StepOutput, expected: StepOutput) -> None:
    np.testing.assert_array_equal(found.margins, expected.margins)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.top_logits, expected.top_logits)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)  # both: of equal logits the lower id first
    np.testing.assert_allclose(found.log_normaliser, expected.log_normaliser, rtol=1e-6)
    assert found.margins.dtype == found.top_logits.dtype == found.log_normaliser.dtype == np.float32
    assert found.top_ids.shape == (len(found.rows), CANDIDATES + tensors.TOP_SPARE)


# ── the step, pass by pass ───────────────────────────────────────────────────────────────────────────────────────────


def some_pass(rng: random.Random, length: int, placed: int) -> Pass:
    """Candidates of a position, a chain under the first of them where it may stand, and a choice among them."""
    chain = 0 if placed else rng.randint(0, 3)
    siblings = rng.randint(0, 4)
    rows = 1 + chain + siblings
    asked = rng.sample(range(rows), rng.randint(0, rows))
    return Pass(
        tokens=[rng.randrange(FINE) for _ in range(rows)],
        positions=[*range(length, length + 1 + chain), *[length] * siblings],
        slot=length + placed,
        head_rows=rng.sample(range(rows), rng.randint(0, min(rows, 3))),
        agent_rows=asked,
        priorities=[rng.choice([-math.inf, 0.0, 0.0, -1.0, -2.0]) for _ in asked],
        margin_weight=rng.choice([0.0, 0.0, 1.0]),
        threshold=rng.choice([-2.0, 0.0, 0.0, 0.25, 0.1, 1e9]),
        fallback_row=rng.choice([None, rng.randrange(rows)]),
    )


@pytest.mark.parametrize("part", range(10))
def test_any_pass_gives_what_the_table_gives(engine: Engine, part: int) -> None:
    rng = random.Random(part)
    for _ in range(4):
        engine.clear()
        expected = twin()
        length = 0
        while length < CONTEXT - 10:
            prompt = [rng.randrange(FINE) for _ in range(rng.randint(1, 6))]
            work = Pass(prompt, range(length, length + len(prompt)), length, [len(prompt) - 1])
            same(engine.run(work), expected.run(work))
            length += len(prompt)
            placed = 0
            for _ in range(rng.randint(0, 3)):
                work = some_pass(rng, length, placed)
                same(engine.run(work), expected.run(work))
                placed += len(work.tokens)
            if placed:  # one of the last pass goes on
                row = rng.choice([i for i, position in enumerate(work.positions) if position == length])
                for e in (engine, expected):
                    e.move(work.slot + row, length)
                length += 1
            if rng.random() < 0.3 and length:
                everything, wanted = (e.evaluate([1, 2, 3], [length] * 3, length) for e in (engine, expected))
                np.testing.assert_array_equal(everything.hidden, wanted.hidden)
                np.testing.assert_array_equal(everything.logits, wanted.logits)
                np.testing.assert_array_equal(everything.margins, wanted.margins)


def test_a_threshold_is_not_rounded(engine: Engine) -> None:
    # A margin of 0.25 exceeds whatever is below it in float64, though float32 may not tell them apart.
    tokens = range(FINE)
    margins = engine.evaluate(tokens, [0] * FINE, 0).margins.tolist()
    at = margins.index(0.25)
    for threshold, elected in ((0.25, []), (0.25 - 1e-12, [at]), (0.25 + 1e-12, [])):
        work = Pass(tokens, [0] * FINE, 0, (), [at], [0.0], threshold=threshold)
        assert engine.run(work).rows.tolist() == elected


def test_a_row_sees_the_slots_below_its_position_and_its_own(engine: Engine) -> None:
    engine.run(Pass([1, 2, 3], [0, 1, 2], 0))
    for position in range(4):
        for slot in range(position, 9):
            hidden = engine.evaluate([4, 5], [position, position], slot).hidden
            engine.run(Pass([1, 2, 3], [0, 1, 2], 0))
            prefix = (1, 2, 3)[:position]
            if slot == position:  # elsewhere its own slot may lie among those of another sequence
                np.testing.assert_array_equal(hidden[0], table((*prefix, 4))[1])
            np.testing.assert_array_equal(hidden[1], table((*prefix, 5))[1])


# ── whole answers ────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEDULES: dict[str, Schedule] = {
    "one-by-one": Fixed(1),
    "together": Fixed(None),
    "in pairs, drafted": Fixed(2, 16),
    "adaptive": Adaptive(helpers.COST),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_answers_are_those_of_the_sequential_procedure(engine: Engine, name: str) -> None:
    rng = random.Random(name)
    session = Session(engine, SCHEDULES[name], NGrams())
    moved = confirmed = reused = 0
    prompt: list[int] = []
    for _ in range(25):
        prompt = [*(prompt if rng.random() < 0.5 else []), *(rng.randrange(FINE) for _ in range(rng.randint(1, 8)))][
            :30
        ]
        strategy = rng.choice(["top1", *STRATEGIES])
        config = DecodeConfig(
            align=rng.random() < 0.8,
            top_k=rng.randint(1, CANDIDATES),
            top_p=1.0,
            strategy=strategy,
            order=rng.choice(ORDERS) if strategy != "top1" else "ranked",
            threshold=rng.choice([-2.0, 0.0, 0.0, 3.0]),
            max_new_tokens=rng.randint(1, CONTEXT - 30),
            seed=rng.randrange(100),
        )
        fallback, eos = rng.choice(FALLBACKS), {rng.randrange(40)}
        expected = sequential(table, prompt, config, fallback, eos, config.max_new_tokens, judge)
        stats, limit = Stats(), config.max_new_tokens
        steps = list(decode(session, prompt, config, fallback=fallback, eos_token_ids=eos, limit=limit, stats=stats))
        assert [s.token for s in steps] == expected.tokens
        assert [s.margins for s in steps] == [position.margins for position in expected.positions]
        assert stats.algorithm() == expected.counts[-1]
        moved += sum(s.rank > 1 for s in steps)
        confirmed += stats.confirmed
        reused += stats.reused_tokens
    assert min(moved, reused) > 20
    assert confirmed > 5 or name in ("one-by-one", "together")


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cache_grows_and_keeps_what_it_holds(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 4)
    engine = OrtEngine(bundle, threads=1)
    assert (engine.slots, engine.allocated_slots) == (SLOTS, 4)
    sizes = []
    for position in range(CONTEXT):
        out = engine.run(Pass([position % FINE], [position], position, [0]))
        prefix = tuple(i % FINE for i in range(position + 1))
        assert out.top_logits[0, 0] == table(prefix)[0].max()
        sizes.append(engine.allocated_slots)
    assert sorted(set(sizes)) == list(range(4, CONTEXT + 3, 4))
    assert all(position < size for position, size in enumerate(sizes))
    engine.run(Pass([1] * 20, [CONTEXT] * 20, CONTEXT))
    assert engine.allocated_slots == SLOTS  # no more than may be wanted


def test_what_lies_beyond_the_cache_is_refused(engine: Engine) -> None:
    engine.run(Pass([1], [0], 0))
    engine.run(Pass([1, 1], [1, 1], SLOTS - 2))
    with pytest.raises(EngineError, match=f"{SLOTS + 1} slots are needed; the KV cache has {SLOTS}"):
        engine.run(Pass([1, 1], [1, 1], SLOTS - 1))
    with pytest.raises(EngineError, match="slots are needed"):
        engine.evaluate([1, 1], [1, 1], SLOTS - 1)


def test_clear_makes_the_cache_small_and_zero(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 4)
    engine = OrtEngine(bundle, threads=1)
    engine.run(Pass([INFINITE] * 9, range(9), 0))
    engine.clear()
    assert engine.allocated_slots == 4
    work = Pass([1, 2], [0, 1], 0, [0, 1])
    same(engine.run(work), twin().run(work))


def test_an_entry_is_moved_in_both_its_parts(engine: Engine) -> None:
    engine.run(Pass([1, 2, 3, 4], [0, 1, 1, 1], 0))
    engine.move(3, 1)
    work = Pass([5], [2], 2, [0])
    expected = twin()
    expected.run(Pass([1, 4], [0, 1], 0))
    same(engine.run(work), expected.run(work))


def test_passes_of_one_shape_again_and_again(engine: Engine) -> None:
    # The binding is kept: an answer must not come from the pass before, nor fill a place of another size.
    expected = twin()
    for e in (engine, expected):
        e.run(Pass([1], [0], 0))
    for threshold in (-99.0, 99.0, -99.0, 99.0, 99.0):  # elected, nobody, …
        for first in (2, 7, 11):
            work = Pass([first, first + 1], [1, 1], 1, (), [0, 1], [0.0, -1.0], threshold=threshold)
            same(engine.run(work), expected.run(work))
            same(engine.run(replace(work, head_rows=[1])), expected.run(replace(work, head_rows=[1])))
            same(engine.run(replace(work, fallback_row=1)), expected.run(replace(work, fallback_row=1)))


@pytest.mark.parametrize("heads", [[], [1], [2, 0]], ids=str)
def test_where_nobody_is_elected_only_the_rows_asked_for_come_back(engine: Engine, heads: list[int]) -> None:
    expected = twin()
    nobody: list[dict[str, Any]] = [
        {"agent_rows": [0, 1, 2], "priorities": [0.0, -1.0, -2.0], "threshold": 1e9},
        {"agent_rows": [0, 1, 2], "priorities": [0.0, -1.0, -2.0], "threshold": 1e9, "margin_weight": 1.0},
        {"agent_rows": [2, 1], "priorities": [-math.inf] * 2, "threshold": -1e9},
        {},
    ]
    for e in (engine, expected):
        e.run(Pass([1], [0], 0))
    for position, options in enumerate(nobody, 1):
        work = Pass([2, 3, 4], [position] * 3, position, heads, **options)
        found = engine.run(work)
        assert found.rows.tolist() == heads
        assert len(found.margins) == len(work.agent_rows)
        same(found, expected.run(work))
        for e in (engine, expected):  # so that the next pass may begin with a row that is owed
            e.move(position + 2, position)


def test_an_engine_that_grows_keeps_every_slot(growing_and_whole: tuple[Any, Any]) -> None:
    growing, whole = growing_and_whole
    expected, sizes = twin(), set()
    for position in range(CONTEXT):  # a row at a time fills the last slot before the next size
        work = Pass([position % FINE], [position], position, [0])
        wanted = expected.run(work)
        same(growing.run(work), wanted)
        same(whole.run(work), wanted)
        sizes.add(growing.allocated_slots)
    assert len(sizes) > 2
    assert whole.allocated_slots == SLOTS


@pytest.mark.parametrize("kept", [0, 1, 9])
def test_a_text_begins_with_what_is_kept(engine: Engine, kept: int) -> None:
    expected = twin()
    for position in range(CONTEXT):
        for e in (engine, expected):
            e.run(Pass([position % FINE], [position], position))
    for e in (engine, expected):
        e.begin(kept, kept + 3)
    for position in range(kept, CONTEXT):
        work = Pass([(3 * position + 1) % FINE], [position], position, [0])
        same(engine.run(work), expected.run(work))


def test_on_a_cpu_the_cache_is_as_large_as_a_text_needs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    begin_with(4, monkeypatch)
    engine = OrtEngine(bundle, threads=1)
    sizes = []
    for kept, slots in ((0, 30), (8, 20), (8, 13), (0, CONTEXT), (3, 2 * SLOTS)):
        engine.begin(kept, slots)
        sizes.append(engine.allocated_slots)
    assert sizes == [32, 32, 16, 60, SLOTS]  # smaller where that halves it


def test_a_growth_that_is_interrupted_leaves_the_cache_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(4, monkeypatch)
    engine, whole = OrtEngine(bundle, threads=1), OrtEngine(bundle, threads=1)
    works = [Pass([(3 * p + 1) % FINE], [p], p, [0]) for p in range(9)]
    expected = [whole.run(work).top_logits.copy() for work in works]
    for work in works[:4]:
        engine.run(work)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", stop)
        with pytest.raises(KeyboardInterrupt):
            engine.run(works[4])
    assert engine.allocated_slots == 4
    for work, wanted in zip(works[4:], expected[4:], strict=True):
        np.testing.assert_array_equal(engine.run(work).top_logits, wanted)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("before", [0, 1])
def test_an_engine_that_has_grown_gives_the_tokens_of_one_that_never_did(
    growing_and_whole: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, ahead: int, before: int
) -> None:
    growing, whole = growing_and_whole
    monkeypatch.setattr(whole, "begin", lambda kept, slots: None)  # for a short text a cache on a CPU becomes smaller
    for _ in range(before):  # where a cache has two sides, it then grows from the other one
        growing.run(Pass([3], [0], 0))
    smallest = growing.allocated_slots
    assert smallest < whole.allocated_slots == whole.slots == growing.slots
    config = DecodeConfig(top_k=CANDIDATES, top_p=1.0, max_new_tokens=CONTEXT - 8)
    options: dict[str, Any] = {"fallback": "last", "eos_token_ids": set(), "limit": config.max_new_tokens}
    sessions = [Session(engine, Fixed(2, ahead), NGrams()) for engine in (growing, whole)]
    ranks = set()
    for prompt in ([1, 2, 3, 1, 2], [4], [1, 2, 9]):  # the later ones in an engine that has grown
        expected = sequential(table, prompt, config, "last", set(), config.max_new_tokens, judge)
        for session in sessions:
            steps = list(decode(session, prompt, config, **options, stats=Stats()))
            assert [s.token for s in steps] == expected.tokens
            assert [s.margins for s in steps] == [position.margins for position in expected.positions]
            ranks |= {s.rank for s in steps}
    assert max(ranks) > 1  # entries were moved
    assert smallest < growing.allocated_slots <= whole.allocated_slots == whole.slots


# ── what is not finite ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fallback", [None, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_who_sees_what_is_not_finite_has_no_margin_and_is_not_accepted(
    engine: Engine, weight: float, fallback: int | None
) -> None:
    engine.run(Pass([1, INFINITE], [0, 1], 0))
    work = Pass([2, 3, 4], [2] * 3, 2, [1], range(3), [0.0, -1.0, -2.0], weight, -1e30, fallback)
    for _ in range(3):  # also as a CUDA graph
        out = engine.run(work)
        assert np.isnan(out.margins).all()
        assert out.rows.tolist() == [1, *([] if fallback is None else [fallback])]
        assert np.isnan(out.log_normaliser).all()
        assert not is_finite(out)
    assert np.isnan(engine.evaluate([5], [2], 5).margins).all()


def test_a_candidate_that_is_not_finite_is_not_elected(engine: Engine) -> None:
    engine.run(Pass([1], [0], 0))
    out = engine.run(Pass([2, INFINITE, 3], [1] * 3, 1, (), range(3), [-1.0, 0.0, -2.0], threshold=-1e30))
    assert np.isnan(out.margins[1])  # whether the others are infected is the kernel's own matter
    assert np.isfinite(out.margins[out.rows]).all()
    assert not is_finite(out)


@pytest.mark.parametrize("owed", [False, True])
def test_clear_makes_an_engine_sound_again(engine: Engine, owed: bool) -> None:
    engine.run(Pass([1], [0], 0))
    engine.run(Pass([2, INFINITE, *range(6)], [1] * 8, 1))
    if owed:
        engine.move(2, 1)
    else:
        assert np.isnan(engine.run(Pass([3], [3], 3, [0])).log_normaliser).all()
    engine.clear()
    expected, first = twin(), Pass([5], [0], 0, [0])  # it leaves the slots behind its own as they are
    same(engine.run(first), expected.run(first))
    for position in range(1, 9):  # past every slot that held it
        work = Pass([5, 6], [position] * 2, position, [0], [0, 1], [0.0, -1.0], threshold=99.0, fallback_row=1)
        found = engine.run(work)
        assert is_finite(found)
        same(found, expected.run(work))


def test_a_slot_that_is_masked_infects_until_the_cache_is_cleared(bundle: Bundle) -> None:
    # What `clear` after an error is for, and why a prompt is searched row by row. Other kernels may skip such a slot.
    engine = OrtEngine(bundle, threads=1)
    engine.run(Pass([1], [0], 0))
    out = engine.run(Pass([2, INFINITE], [1, 1], 1, [0], [0, 1], [0.0, 0.0]))
    assert np.isnan(out.margins).all()
    assert np.isnan(out.log_normaliser).all()
    assert np.isnan(engine.run(Pass([2], [1], 1, [0])).log_normaliser).all()
    engine.clear()
    engine.run(Pass([1], [0], 0))
    assert np.isfinite(engine.run(Pass([2], [1], 1, [0])).log_normaliser).all()


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_prompt_that_is_not_finite_is_named_and_forgotten(engine: Engine, at: int) -> None:
    session = Session(engine, Fixed(None))
    prompt = [1, 2, 3, 4, 5, 6, 7]
    options: dict[str, Any] = {"fallback": "first", "eos_token_ids": set(), "limit": 5}
    config = DecodeConfig(top_k=3)
    for _ in range(2):
        bad = [*prompt[:at], INFINITE, *prompt[at + 1 :]]
        with pytest.raises(NumericsError, match=rf"position {at} \(token {INFINITE}\) is not finite"):
            list(decode(session, bad, config, **options, stats=Stats()))
        assert session.held == []
        steps = list(decode(session, prompt, config, **options, stats=Stats()))
        assert [s.token for s in steps] == sequential(table, prompt, config, "first", set(), 5, judge).tokens


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_ran_is_described(bundle: Bundle) -> None:
    facts = OrtEngine(bundle, threads=1).describe()
    assert {k: facts[k] for k in ("name", "lowering", "precision", "threads")} == {
        "name": "cpu",
        "lowering": "ort",
        "precision": "int4",
        "threads": 1,
    }
    assert facts["version"].startswith("onnxruntime ")


def test_what_a_session_allocates_goes_into_huge_pages(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    told, opened = [], []
    session = onnxruntime.InferenceSession

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        before = len(opened)
        yield
        told.append(len(opened) - before)

    monkeypatch.setattr(ort_engine, "huge_pages", watched)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(0) or session(*a, **k))
    OrtEngine(bundle, threads=1)
    assert told == [1]


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_onnx_runtime_replaces_in_silence_is_refused(bundle: Bundle) -> None:
    # As where CUDA's libraries are missing; here the whole provider is.
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(EngineError, match="cannot use its CUDAExecutionProvider"):
        OrtEngine(bundle, "cuda")


def test_a_graph_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot load .*step\.onnx") as caught:
        OrtEngine(Bundle.open(helpers.make_bundle(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"vocab_size": 30, "hidden_size": 4}, "top_ids|logits"),
        ({"vocab_size": 24, "hidden_size": 8}, "last_hidden_state"),
        ({"vocab_size": 24, "hidden_size": 4, "max_candidates": 6}, "top_ids"),
    ],
    ids=str,
)
def test_a_graph_of_other_sizes_than_its_manifest_is_refused(
    bundle: Bundle, tmp_path: Path, sizes: dict[str, Any], named: str
) -> None:
    content = bundle.path("step.onnx").read_bytes()
    options = {"max_candidates": CANDIDATES, **sizes}
    other = Bundle.open(helpers.make_bundle(tmp_path, graph=content, **options))
    with pytest.raises(EngineError, match=rf"does not fit its manifest: ({named}) should have"):
        OrtEngine(other)


@pytest.mark.parametrize(("threads", "found"), [(None, 0), (1, 1), (3, 3)])
def test_the_session_has_the_threads_that_are_asked_for(bundle: Bundle, threads: int | None, found: int) -> None:
    options = OrtEngine(bundle, threads=threads)._session.get_session_options()
    assert options.intra_op_num_threads == found  # 0: ONNX Runtime's own choice


@pytest.mark.parametrize("threads", [0, 1025])
def test_threads_out_of_range(bundle: Bundle, threads: int) -> None:
    with pytest.raises(OptionError, match="--threads"):
        OrtEngine(bundle, threads=threads)
