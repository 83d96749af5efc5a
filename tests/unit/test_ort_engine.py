"""Every engine against the table: one model, small enough to be written down twice, behind the real step graph.

ONNX Runtime runs itself, TensorRT on a double of it (tests/double).

The hidden state of a row is the sum, over the slots it sees, of its tokens' vectors times a weight of their positions.
All are whole numbers, so both engines agree to the last bit whatever the width of a pass, and ties abound.
"""

import gc
import hashlib
import math
import platform
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mara_export import step
from mara_export.lower import value_info
from mara_runtime import ort_engine, tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.decode import Session, decode
from mara_runtime.drafts import NGrams
from mara_runtime.engine import Engine, Outcome, Pass
from mara_runtime.errors import EngineError, NumericsError, OptionError
from mara_runtime.ort_engine import OrtEngine
from mara_runtime.schedule import Adaptive, Fixed, Schedule
from mara_runtime.stats import Stats
from mara_runtime.table_engine import TableEngine
from mara_runtime.tensors import DRAFT_ROWS, ModelShape, spare_slots
from mara_runtime.trt_engine import TrtEngine
from tests.double.machine import Machine, write_engine
from tests.unit import helpers
from tests.unit.sequential import sequential

F32 = NDArray[np.float32]

SHAPE = ModelShape(hidden_size=4, vocab_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
CANDIDATES, CONTEXT = 5, 60
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
        io = [value_info(t) for t in inputs], [value_info(t) for t in outputs]
        graph = helper.make_graph(self.nodes, "graph", *io, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def traced_llm() -> onnx.ModelProto:
    """The model as a graph. Keys hold the weights of positions, values the vectors of tokens."""
    add = Nodes()
    zero, one, first, last = add.constant(0), add.constant(1), add.constant([0]), add.constant([2])
    place = add("Add", add("Mod", tensors.POSITION_IDS, add.constant(PERIOD)), one)
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
    add = Nodes()
    add("MatMul", tensors.AGENT_STATES, add.constant(AGENT, "float32"), result=tensors.AGENT_MARGIN)
    return add.model(tensors.agent_inputs(SHAPE.hidden_size), tensors.agent_outputs())


DECODE_ROWS, HEAD_ROWS = spare_slots(CANDIDATES) + 1, DRAFT_ROWS + 1
SIZES = (16, 40, SLOTS)
"""Slots of the engines of a bundle that has several."""


def write_bundle(folder: Path, *, always_head: bool, **options: Any) -> Path:
    """A bundle of the model, with a graph whose head runs always or when it is needed."""
    model = traced_llm()
    step.join(model, traced_agent(), SHAPE, CANDIDATES, always_head=always_head)
    sizes = {"vocab_size": SHAPE.vocab_size, "hidden_size": SHAPE.hidden_size}
    most = {"max_context": CONTEXT, "max_candidates": CANDIDATES}
    return helpers.make_bundle(folder, graph=model.SerializeToString(), **sizes, **most, **options)


def add_engines(folder: Path, slots: Sequence[int], in_place: bool, **facts: Any) -> Bundle:
    """Give a bundle engines of the double; facts: those of EngineFacts that differ from what the double is."""
    manifest = helpers.read_manifest(folder)
    for size in slots:
        file = f"engines/tensorrt/step-{size}.engine"
        rows = {"decode_rows": DECODE_ROWS, "prefill_rows": min(32, size), "head_rows": HEAD_ROWS}
        known = {"slots": size, **rows, "in_place": in_place}
        write_engine(folder / file, folder / "step.onnx", **known, **facts.get("options", {}))
        content = (folder / file).read_bytes()
        entry = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["files"][file] = entry
        here = f"{platform.system()}-{platform.machine()}".lower()
        built = {"version": "10.16.1.11", "compute_capability": "8.7", "platform": here, "options": {}}
        manifest["engines"].append({"target": "tensorrt", "file": file, **known, **built, **facts})
    manifest["targets"] = ["tensorrt"]
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)


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
    gc.collect()
    machine.check_given_back()


ENGINES = {
    "ort, one size": 512,
    "ort, growing": 4,
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
        monkeypatch.setattr(ort_engine, "FIRST_SLOTS", request.param)
        yield OrtEngine(bundle, threads=1)
        return
    in_place, graphs = request.param
    machine: Machine = request.getfixturevalue("machine")
    engine = TrtEngine(trt_bundles[in_place], "tensorrt", graphs=graphs)
    yield engine
    assert (machine.cuda.launched > 0) <= graphs
    engine.close()


def twin() -> TableEngine:
    return TableEngine(table, judge, SLOTS, CANDIDATES)


def same(found: Outcome, expected: Outcome) -> None:
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
    assert sorted(set(sizes)) == [4, 8, 16, 32, 64]
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


# ── what is not finite ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_slot_that_is_masked_infects_until_the_cache_is_cleared(engine: Engine) -> None:
    # What `clear` after an error is for, and why a prompt is searched row by row.
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


@pytest.mark.parametrize("threads", [0, 1025])
def test_threads_out_of_range(bundle: Bundle, threads: int) -> None:
    with pytest.raises(OptionError, match="--threads"):
        OrtEngine(bundle, threads=threads)
