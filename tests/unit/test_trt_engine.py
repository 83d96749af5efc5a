"""What only TensorRT engines do while they run, on a double of TensorRT and CUDA: graphs, growth, interrupts.

What every engine does: tests/conformance.py. How one is opened: test_trt_open.py.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Session, decode
from mara_runtime.engines import trt_memory, trt_plan
from mara_runtime.engines.base import Pass
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError
from mara_runtime.schedule import calibrate
from mara_runtime.schedule.base import Fixed
from mara_runtime.stats import Stats
from tests.conformance import chain, filled, judged, request, siblings
from tests.double.machine import Machine
from tests.double.trt import ICudaEngine
from tests.double.trt_context import IExecutionContext
from tests.unit.written_model import CONTEXT, FINE, HEAD_ROWS, SIZES, SLOTS, add_engines, table, write_bundle

Open = Callable[..., TrtEngine]
sides = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "two copies"])


def bundle(folder: Path, in_place: bool = True, slots: tuple[int, ...] = (SLOTS,), **facts: Any) -> Bundle:
    return add_engines(write_bundle(folder, always_head=True), slots, in_place, **facts)


@pytest.fixture
def start(machine: Machine, tmp_path: Path) -> Iterator[Open]:
    """Opens the engine of a bundle of so many slots; see `bundle`."""
    engines = []

    def start(
        in_place: bool = True, slots: tuple[int, ...] = (SLOTS,), *, graphs: bool = True, **facts: Any
    ) -> TrtEngine:
        engines.append(TrtEngine(bundle(tmp_path, in_place, slots, **facts), "tensorrt", graphs=graphs))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def row(position: int) -> Pass:
    return chain([position % FINE], position, head_rows=[0])


def is_right(out: Any, *prefix: int) -> bool:
    return bool(out.top_logits[0, 0] == table(prefix)[0].max())


def advance(engine: TrtEngine, *positions: int) -> None:
    """Run the text 0 1 2 …, and check what comes back."""
    for position in positions:
        assert is_right(engine.run(row(position)), *(i % FINE for i in range(position + 1)))


def repeat(engine: TrtEngine, token: int, width: int) -> None:
    assert is_right(engine.run(siblings([token] * width, 0, head_rows=[0])), token)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


# ── CUDA graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@sides
def test_a_repeated_shape_runs_as_a_graph_and_a_prompt_does_not(start: Open, machine: Machine, in_place: bool) -> None:
    engine, launched = start(in_place), []
    for position in range(12):
        advance(engine, position)
        launched.append(machine.cuda.launched)
    eager = 2 if in_place else 4  # two passes for each copy of the cache
    assert launched == [0] * eager + list(range(1, 13 - eager))
    assert engine.describe()["cuda_graphs"] is True
    for _ in range(4):
        engine.run(chain([1] * 30, head_rows=[29]))
    assert machine.cuda.launched == launched[-1]


def test_graphs_are_bounded_and_the_usual_shapes_keep_theirs(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_plan, "KEPT_SHAPES", 2)
    engine = start()
    for turn in range(10):  # shapes that take turns do not evict each other
        for width in (1, 2, 3):
            repeat(engine, turn, width)
        assert machine.in_use()["graphs"] <= 2
        assert machine.in_use()["contexts"] <= 3  # one that the others share
    assert machine.cuda.launched == 2 * (10 - 2)
    monkeypatch.setattr(trt_plan, "FADING", 4)  # what was usual long ago gives way to what is usual now
    for _ in range(12):
        repeat(engine, 1, 3)
    assert machine.cuda.launched > 2 * (10 - 2) + 5
    assert machine.in_use()["graphs"] <= 2


def test_what_fails_around_a_capture_costs_no_pass(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    advance(engine, 0)
    with monkeypatch.context() as patch:  # the first pass of the shape's own context: it is not captured yet
        patch.setattr(IExecutionContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(EngineError, match="cannot run a pass"):
            engine.run(row(1))
    advance(engine, 1)
    real = Cuda.begin_capture
    with monkeypatch.context() as patch:  # it leaves no capture
        patch.setattr(Cuda, "begin_capture", lambda self: interrupt(real(self)))
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(2))
    advance(engine, 2, 3)
    assert machine.cuda.launched == 2
    assert engine.describe()["cuda_graphs"] is True


def test_a_shape_that_was_refused_half_way_is_set_again(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(graphs=False)
    advance(engine, 0)
    real = IExecutionContext.set_input_shape
    for refused in (tensors.INPUT_IDS, tensors.AGENT_ROWS):

        def set_input_shape(self: IExecutionContext, name: str, shape: Any, refused: str = refused) -> bool:
            return name != refused and real(self, name, shape)

        with monkeypatch.context() as patch:
            patch.setattr(IExecutionContext, "set_input_shape", set_input_shape)
            with pytest.raises(EngineError, match=refused):
                engine.run(chain([0, 1], head_rows=[1]))
        advance(engine, 0)


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ("capture", "cudaErrorStreamCaptureInvalidated"),
        ("contexts", "no execution context"),
        ("graphs", "switched off"),
    ],
)
def test_without_graphs_passes_run_all_the_same_and_the_reason_is_recorded(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch, without: str, reason: str
) -> None:
    machine.cuda.refuse_capture = without == "capture"
    engine = start(graphs=without != "graphs")
    advance(engine, 0)
    if without == "contexts":  # passes share the first
        monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda *_: None)
    advance(engine, *range(1, 6))
    assert reason in engine.describe()["cuda_graphs"]
    assert machine.in_use()["graphs"] == machine.cuda.launched == 0


# ── the KV cache ─────────────────────────────────────────────────────────────────────────────────────────────────────


@sides
def test_one_engine_file_is_open_and_clearing_goes_back_to_the_smallest(
    start: Open, machine: Machine, in_place: bool
) -> None:
    engine = start(in_place, SIZES)
    assert (engine.cache.capacity, engine.memory.slots) == (SLOTS, SIZES[0])
    for before in range(2):  # after an odd number of passes, the second of two copies grows
        sizes = []
        advance(engine, *[0] * before)
        for position in range(CONTEXT):
            advance(engine, position)
            sizes.append(engine.memory.slots)
            assert machine.in_use()["engines"] == 1
        assert sorted(set(sizes)) == list(SIZES)
        assert sizes.index(SIZES[1]) == SIZES[0]  # no earlier than needed
        engine.memory.places[0].move(0, 1, 0)
        engine.cache.clear()
        assert engine.memory.slots == SIZES[0]


def test_a_failed_growth_leaves_an_engine_that_goes_on(start: Open, tmp_path: Path) -> None:
    engine = start(slots=SIZES)
    advance(engine, *range(SIZES[0]))
    larger = tmp_path / "engines" / "tensorrt" / f"step-{SIZES[1]}.engine"
    content = larger.read_bytes()
    larger.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot open"):
            engine.run(row(SIZES[0]))
        assert engine.memory.slots == SIZES[0]
        advance(engine, SIZES[0] - 1)  # what fits the smaller one goes on
    larger.write_bytes(content)
    advance(engine, SIZES[0])


@sides
def test_an_interrupted_growth_leaves_the_larger_cache(
    start: Open, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    engine = start(in_place, SIZES)
    advance(engine, *range(SIZES[0]))
    real = trt_memory.DeviceCache.close
    with monkeypatch.context() as patch:  # a signal arrives when the smaller one has been freed
        patch.setattr(trt_memory.DeviceCache, "close", lambda cache: interrupt(real(cache)))
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(SIZES[0]))
    assert engine.memory.slots == SIZES[1]
    advance(engine, SIZES[0])


def test_an_interrupted_pass_leaves_its_row_pending(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next pass would see the entry of a candidate that was not chosen."""
    engine = start(in_place=False)
    filled([engine], [0])
    engine.run(siblings([7, 8], 1))
    engine.cache.commit(8, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.run(chain([5], 2, head_rows=[0]))  # it runs on after the interrupt, and reads its inputs
    out = engine.run(chain([3], 2, head_rows=[0]))
    assert is_right(out, 0, 8, 3)
    assert not is_right(out, 0, 7, 3)


def test_a_pending_row_survives_growth_and_makes_no_pass_too_wide(start: Open) -> None:
    engine, last = start(slots=SIZES), SIZES[0] - 2
    text = [position % FINE for position in range(last)]
    filled([engine], text)
    engine.run(siblings([7, 8], last))
    engine.cache.commit(8, last + 1)
    out = engine.run(siblings([1, 2], last + 1, head_rows=[1], **judged(2, threshold=99.0)))
    assert out.rows.tolist() == [1]
    assert is_right(out, *text, 8, 2)
    engine.cache.clear()
    engine.run(siblings([3, 4], 0))
    engine.cache.commit(4, 1)
    out = engine.run(chain([5] * 32, 1, head_rows=[31]))
    assert out.rows.tolist() == [31]
    assert is_right(out, 4, *[5] * 32)


def test_a_pass_may_be_of_arrays_and_is_refused_beyond_the_engine_s_bounds(start: Open) -> None:
    engine, none, both = start(), np.arange(0), np.arange(2)
    assert engine.run(Pass(both, both, 0, none, none, none)).rows.tolist() == []
    assert engine.run(Pass(both, both, 0, both, both, np.full(2, -np.inf))).rows.tolist() == [0, 1]
    for rows, heads in ((33, 0), (20, HEAD_ROWS + 1)):
        with pytest.raises(EngineError, match=f"{rows} rows, {heads} of them .* 32 and {HEAD_ROWS} "):
            engine.run(chain([1] * rows, head_rows=range(heads)))
    advance(engine, 0)


def test_every_size_is_measured_once(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CONTEXTS", (2, 20, 60))
    monkeypatch.setattr(calibrate, "WIDTHS", (1, 2, 3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = bundle(tmp_path / "bundle", True, SIZES)
    engine = TrtEngine(made, "tensorrt")
    seen: list[tuple[int, int]] = []
    real = TrtEngine.run

    def run(self: TrtEngine, work: Pass) -> Any:
        out = real(self, work)
        seen.append((work.slot, self.memory.slots))
        return out

    monkeypatch.setattr(TrtEngine, "run", run)
    cost = calibrate.measured_cost(made, engine)
    assert set(seen) == set(zip((2, 20, 60), SIZES, strict=True))
    assert engine.memory.slots == SIZES[0]
    seen.clear()
    engine.run(row(SIZES[0]))  # larger now, which does not ask for another measurement
    assert calibrate.measured_cost(made, engine) == cost
    assert len(seen) == 1
    engine.close()


# ── what is given back ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@sides
def test_memory_is_constant_over_many_steps(start: Open, machine: Machine, in_place: bool) -> None:
    engine = start(in_place)
    session, config = Session(engine.cache, Fixed(2)), DecodeConfig(top_k=3, top_p=1.0, max_new_tokens=CONTEXT - 2)
    counts = []
    for turn in range(12):
        list(decode(engine, session, request([1, turn % 3], config), Stats()))
        counts.append(machine.in_use())
    assert counts[-1] == counts[8]  # every shape has come by then
    assert machine.cuda.launched > 300


def test_an_engine_gives_everything_back_when_dropped_and_closes_once(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path)
    engine = TrtEngine(made, "tensorrt")
    advance(engine, 0)
    del engine
    machine.check_given_back()
    engine = TrtEngine(made, "tensorrt")
    engine.close()
    engine.close()


def test_an_error_while_closing_leaves_nothing_else_open(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    advance(engine, *range(4))
    real = machine.cuda.cudaGraphExecDestroy

    def fails(graph: Any) -> Any:
        real(graph)
        return (machine.cuda.cudaError_t.cudaErrorInvalidValue,)

    monkeypatch.setattr(machine.cuda, "cudaGraphExecDestroy", fails)
    with pytest.raises(EngineError, match="cudaGraphExecDestroy") as caught:
        engine.close()
    del caught  # it refers to what the failing frames hold
    gc.collect()
    machine.check_given_back()
