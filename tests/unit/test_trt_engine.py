"""What only TensorRT engines do, on a double of TensorRT and CUDA: graphs, growth, interrupts, refusals.

What every engine does: tests/conformance.py.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Session, decode
from mara_runtime.engines import open_engine, trt_file, trt_memory, trt_plan
from mara_runtime.engines import tensorrt as trt_engine
from mara_runtime.engines.base import Pass
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError
from mara_runtime.schedule import calibrate
from mara_runtime.schedule.base import Fixed
from mara_runtime.stats import Stats
from tests.conformance import SCHEDULES, Conformance, DeviceConformance, chain, filled, judged, request, siblings
from tests.double.machine import Machine
from tests.double.trt import ICudaEngine, IExecutionContext
from tests.unit.written_model import CONTEXT, FINE, HEAD_ROWS, SHAPE, SIZES, SLOTS, add_engines, table, write_bundle

INSTALLED = "10.16.1.11"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A GPU, to which everything taken is given back at the end."""
    machine = Machine()
    machine.install(monkeypatch)
    yield machine
    machine.check_given_back()


def bundle(folder: Path, in_place: bool = True, slots: tuple[int, ...] = (SLOTS,), **facts: Any) -> Bundle:
    return add_engines(write_bundle(folder, always_head=True), slots, in_place, **facts)


Open = Callable[..., TrtEngine]


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


# ── CUDA graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_place", [True, False])
def test_a_repeated_shape_runs_as_a_graph(start: Open, machine: Machine, in_place: bool) -> None:
    engine, launched = start(in_place), []
    for position in range(12):
        advance(engine, position)
        launched.append(machine.cuda.launched)
    eager = 2 if in_place else 4  # two passes for each copy of the cache
    assert launched == [0] * eager + list(range(1, 13 - eager))
    assert engine.describe()["cuda_graphs"] is True


def test_prompts_are_not_captured(start: Open, machine: Machine) -> None:
    engine = start()
    for _ in range(4):
        engine.run(chain([1] * 30, head_rows=[29]))
    assert machine.cuda.launched == 0


def repeat(engine: TrtEngine, token: int, width: int) -> None:
    assert is_right(engine.run(siblings([token] * width, 0, head_rows=[0])), token)


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
    for _ in range(30):  # another has become the usual one
        repeat(engine, 1, 3)
    assert machine.cuda.launched > 2 * (10 - 2) + 10
    assert machine.in_use()["graphs"] <= 2


def test_counts_of_shapes_fade(start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_plan, "KEPT_SHAPES", 2)
    monkeypatch.setattr(trt_plan, "_FADING", 3)
    engine = start()
    for turn in range(4):
        for width in (1, 2, 3, 4):
            for _ in range(4):
                repeat(engine, turn, width)
        assert machine.in_use()["graphs"] <= 2
    assert machine.cuda.launched > 8


def test_a_failed_pass_is_not_captured_before_one_that_ran(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, launched = start(), []
    advance(engine, 0)
    with monkeypatch.context() as patch:  # the first pass of the shape's own context
        patch.setattr(IExecutionContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(EngineError, match="cannot run a pass"):
            engine.run(row(1))
    for position in (1, 2, 3):
        advance(engine, position)
        launched.append(machine.cuda.launched)
    assert launched == [0, 1, 2]
    assert engine.describe()["cuda_graphs"] is True


def test_an_interrupt_as_a_capture_begins_leaves_no_capture(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    advance(engine, 0, 1)
    real = Cuda.begin_capture

    def interrupted(self: Cuda) -> None:
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(2))
    advance(engine, 2, 3)
    assert machine.cuda.launched == 2


def test_a_shape_that_was_refused_half_way_is_set_again(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(graphs=False)
    advance(engine, 0)
    real = IExecutionContext.set_input_shape
    for refused in (tensors.INPUT_IDS, tensors.AGENT_ROWS):
        with monkeypatch.context() as patch:
            patch.setattr(
                IExecutionContext,
                "set_input_shape",
                lambda self, name, shape, refused=refused: name != refused and real(self, name, shape),
            )
            with pytest.raises(EngineError, match=refused):
                engine.run(chain([0, 1], head_rows=[1]))
        advance(engine, 0)


def test_where_capture_fails_passes_run_without_graphs_and_the_reason_is_recorded(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cuda.refuse_capture = True
    engine = start()
    advance(engine, *range(6))
    assert "cudaErrorStreamCaptureInvalidated" in engine.describe()["cuda_graphs"]
    assert machine.in_use()["graphs"] == machine.cuda.launched == 0


def test_without_a_second_context_passes_share_the_first(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    advance(engine, 0)
    monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda *_: None)
    advance(engine, *range(1, 8))
    assert "no execution context" in engine.describe()["cuda_graphs"]


def test_graphs_that_are_switched_off_are_recorded(start: Open, machine: Machine) -> None:
    engine = start(graphs=False)
    advance(engine, *range(5))
    assert machine.cuda.launched == 0
    assert engine.describe()["cuda_graphs"] == "switched off"


# ── equal numbers ────────────────────────────────────────────────────────────────────────────────────────────────────


def prefer_the_last_of_equals(folder: Path) -> None:
    """Change a bundle's graph: of equal logits the highest id comes first, of equal scores the last row is elected."""
    model = onnx.load(folder / "step.onnx")
    graph, last = model.graph, SHAPE.vocab_size - 1
    values = {"backwards": np.arange(last, -1, -1), "last": np.array(last)}
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    for node in [node for node in graph.node if node.op_type == "ArgMax"]:
        node.attribute.append(helper.make_attribute("select_last_index", 1))
    (at,) = [i for i, node in enumerate(graph.node) if node.op_type == "TopK"]
    top = graph.node[at]
    around = ("Gather", [top.input[0], "backwards"], "turned"), ("Sub", ["last", "turned_ids"], top.output[1])
    before, after = (helper.make_node(op, source, [target]) for op, source, target in around)
    before.attribute.append(helper.make_attribute("axis", 1))
    top.input[0], top.output[1] = "turned", "turned_ids"
    graph.node.insert(at + 1, after)
    graph.node.insert(at, before)
    onnx.save(model, folder / "step.onnx")


@pytest.mark.slow
def test_the_device_suite_asks_for_no_order_of_equal_numbers(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path)
    prefer_the_last_of_equals(tmp_path)
    engine = TrtEngine(made, "tensorrt")
    with pytest.raises(AssertionError):
        Conformance().test_any_sequence_of_passes_gives_what_the_table_gives(engine, 0)
    suite = DeviceConformance()
    for part in range(4):
        suite.test_any_sequence_of_passes_gives_what_the_table_gives(engine, part)
    for name in SCHEDULES:
        suite.test_answers_are_those_of_the_sequential_procedure(engine, name)
    engine.close()


# ── TensorRT for RTX ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_kernels_are_compiled_for_repeated_shapes_and_kept(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = bundle(tmp_path / "bundle", target="tensorrt-rtx")

    def compiled() -> int:
        """Kernels compiled in one run of a program."""
        before = machine.trt.compiled
        engine = TrtEngine(made, "tensorrt-rtx")
        for turn in range(4):
            for width in (1, 2, 3)[: 3 if turn else 2]:
                engine.run(siblings([1] * width, 0, head_rows=[0]))
        engine.run(siblings([1] * 4, 0, head_rows=[0]))  # once: not worth a kernel
        engine.close()
        return machine.trt.compiled - before

    assert compiled() == 3
    (path,) = (tmp_path / "cache" / "mara-deploy").iterdir()
    assert compiled() == 0
    machine.trt.__version__ = "10.16.2"
    later = tuple(replace(facts, version="10.16.2") for facts in made.manifest.engines)
    made = replace(made, manifest=replace(made.manifest, engines=later))
    assert compiled() == 3
    path.write_bytes(b"damaged")
    assert compiled() == 3
    assert compiled() == 0


# ── the KV cache ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_place", [True, False])
def test_one_engine_file_is_open_and_clearing_goes_back_to_the_smallest(
    start: Open, machine: Machine, in_place: bool
) -> None:
    engine = start(in_place, SIZES)
    assert (engine.cache.capacity, engine.memory.slots) == (SLOTS, SIZES[0])
    for _ in range(2):
        sizes = []
        for position in range(CONTEXT):
            advance(engine, position)
            sizes.append(engine.memory.slots)
            assert machine.in_use()["engines"] == 1
        assert sorted(set(sizes)) == list(SIZES)
        assert sizes.index(SIZES[1]) == SIZES[0]  # no earlier than needed
        engine.memory.move(0, 1, 0)
        engine.cache.clear()
        assert engine.memory.slots == SIZES[0]


def test_a_failed_growth_leaves_an_engine_that_goes_on(start: Open) -> None:
    engine = start(slots=SIZES)
    advance(engine, *range(SIZES[0]))
    made = engine._bundle
    larger = made.path(made.manifest.engines[1].file)
    content = larger.read_bytes()
    larger.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot open"):
            engine.run(row(SIZES[0]))
        assert engine.memory.slots == SIZES[0]
        advance(engine, SIZES[0] - 1)  # what fits the smaller one goes on
    larger.write_bytes(content)
    advance(engine, SIZES[0])


@pytest.mark.parametrize("in_place", [True, False])
def test_an_interrupt_while_the_smaller_cache_is_freed_leaves_the_larger_one(
    start: Open, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    engine = start(in_place, SIZES)
    advance(engine, *range(SIZES[0]))
    real = trt_memory.DeviceCache.close

    def close(cache: Any) -> None:
        real(cache)
        raise KeyboardInterrupt  # a signal arrives when the call returns

    with monkeypatch.context() as patch:
        patch.setattr(trt_memory.DeviceCache, "close", close)
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(SIZES[0]))
    assert engine.memory.slots == SIZES[1]
    advance(engine, SIZES[0])


def test_an_interrupted_pass_leaves_its_row_pending(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next pass would see the entry of a candidate that was not chosen."""
    engine = start(in_place=False)
    filled([engine], [0])
    engine.run(siblings([7, 8], 1))
    engine.cache.commit(8, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.run(chain([5], 2, head_rows=[0]))  # it runs on after the interrupt, and reads its inputs
    out = engine.run(chain([3], 2, head_rows=[0]))
    assert is_right(out, 0, 8, 3)
    assert not is_right(out, 0, 7, 3)


def test_a_row_stays_pending_across_growth(start: Open) -> None:
    engine, last = start(slots=SIZES), SIZES[0] - 2
    text = [position % FINE for position in range(last)]
    filled([engine], text)
    engine.run(siblings([7, 8], last))
    engine.cache.commit(8, last + 1)
    out = engine.run(siblings([1, 2], last + 1, head_rows=[1], **judged(2, threshold=99.0)))
    assert out.rows.tolist() == [1]
    assert is_right(out, *text, 8, 2)


def test_a_pending_row_makes_no_pass_too_wide(start: Open) -> None:
    engine = start()
    engine.run(siblings([3, 4], 0))
    engine.cache.commit(4, 1)
    out = engine.run(chain([5] * 32, 1, head_rows=[31]))
    assert out.rows.tolist() == [31]
    assert is_right(out, 4, *[5] * 32)


def test_a_pass_beyond_the_engine_s_bounds_is_refused(start: Open) -> None:
    engine = start()
    for rows, heads in ((33, 0), (20, HEAD_ROWS + 1)):
        with pytest.raises(EngineError, match=f"{rows} rows, {heads} of them .* 32 and {HEAD_ROWS} "):
            engine.run(chain([1] * rows, head_rows=range(heads)))
    advance(engine, 0)


def test_rows_may_be_arrays(start: Open) -> None:
    engine, none, both = start(), np.arange(0), np.arange(2)
    assert engine.run(Pass(both, both, 0, none, none, none)).rows.tolist() == []
    assert engine.run(Pass(both, both, 0, both, both, np.full(2, -np.inf))).rows.tolist() == [0, 1]


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


@pytest.mark.parametrize("in_place", [True, False])
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
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
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


# ── streamed weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fits", [True, False])
def test_weights_are_streamed_only_where_they_do_not_fit(start: Open, machine: Machine, fits: bool) -> None:
    machine.trt.automatic_budget = 3000
    size = 5000 if fits else machine.cuda.total_bytes
    engine = start(file={"streamable_weights_bytes": size})
    advance(engine, *range(6))
    facts = engine.describe()
    assert facts["memory"]["streamed_weight_bytes"] == (0 if fits else size - 3000)
    assert facts["cuda_graphs"] is True if fits else "streamed" in facts["cuda_graphs"]


@pytest.mark.parametrize("room", [0, 1])
def test_weights_fit_only_with_the_activations(start: Open, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(Cuda, "free_bytes", lambda self: 5000 + 4096 + room)
    engine = start(file={"streamable_weights_bytes": 5000, "activation_bytes": 4096})
    assert engine.describe()["memory"]["streamed_weight_bytes"] == (0 if room else 5000)


def test_a_refused_budget_streams_all_weights_or_refuses_the_engine(
    start: Open, tmp_path: Path, machine: Machine
) -> None:
    machine.trt.automatic_budget, machine.trt.refused_budgets = 3000, {3000}
    size = machine.cuda.total_bytes
    engine = start(file={"streamable_weights_bytes": size})
    advance(engine, 0)
    assert engine.describe()["memory"]["streamed_weight_bytes"] == size
    engine.close()
    machine.trt.refused_budgets = {0, 3000}
    with pytest.raises(EngineError, match=f"3,000 bytes .* mara-build {tmp_path} --target tensorrt$"):
        TrtEngine(engine._bundle, "tensorrt")


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_auto_opens_the_engine_and_describes_it(tmp_path: Path, machine: Machine) -> None:
    engine, declined = open_engine(bundle(tmp_path), "auto")
    assert isinstance(engine, TrtEngine)
    assert declined == {}
    facts = engine.describe()
    assert {k: facts[k] for k in ("name", "version", "gpu", "compute_capability", "driver")} == {
        "name": "tensorrt",
        "version": f"tensorrt {INSTALLED}",
        "gpu": "Double",
        "compute_capability": "8.7",
        "driver": "13.2",
    }
    memory = facts["memory"]
    assert (memory["slots"], memory["activation_bytes"]) == (SLOTS, 4096)
    assert memory["kv_cache_bytes"] >= 2 * SLOTS * 4 * 4
    engine.close()


COMPATIBLE = {"version_compatible": True}


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"version": "10.3.0"}, ("TensorRT 10.3.0", INSTALLED)),
        ({"version": "11.1.0", "options": COMPATIBLE}, ("TensorRT 11.1.0", INSTALLED)),
        ({"version": "10.17.0", "options": COMPATIBLE}, ("TensorRT 10.17.0", INSTALLED)),
        ({"compute_capability": "9.0"}, ("9.0", "8.7")),
        ({"compute_capability": "8.9+"}, ("8.9+", "8.7")),
        ({"compute_capability": "8.6, 8.9"}, ("8.6, 8.9", "8.7")),
        ({"platform": "linux-riscv"}, ("linux-riscv",)),
    ],
    ids=str,
)
def test_an_engine_for_another_machine_is_refused_with_the_command_that_builds_it(
    tmp_path: Path, machine: Machine, facts: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(EngineError) as caught:
        TrtEngine(bundle(tmp_path, **facts), "tensorrt")
    message = str(caught.value)
    assert all(each in message for each in named)
    assert message.endswith(f"mara-build {tmp_path} --target tensorrt")
    assert "\n" not in message


@pytest.mark.parametrize(
    "facts",
    [
        {"version": "10.14.0", "options": COMPATIBLE},
        {"compute_capability": "8.0+"},
        {"compute_capability": "8.6, 8.7"},
    ],
    ids=str,
)
def test_an_engine_that_this_machine_may_run_is_opened(start: Open, facts: dict[str, Any]) -> None:
    advance(start(file={"lean_runtime": "options" in facts}, **facts), 0)


def test_what_is_missing_is_named(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle(tmp_path)

    def reason(**manifest: Any) -> str:
        return str(trt_engine.why_not(replace(made, manifest=replace(made.manifest, **manifest)), "tensorrt"))

    assert "targets: cpu" in reason(engines=(), targets=("cpu",))
    assert f"mara-build {tmp_path}" in reason(engines=())
    with monkeypatch.context() as patch:
        lost = machine.cuda.cudaError_t.cudaErrorNoDevice
        patch.setattr(machine.cuda, "cudaDeviceGetAttribute", lambda *_: (lost, 0))
        assert "cudaDeviceGetAttribute" in reason()
    machine.cuda.devices = 0
    assert "cudaErrorNoDevice (100)" in reason()

    def missing(target: str) -> Any:
        raise ImportError(f"No module named {target!r}")

    monkeypatch.setattr(trt_file, "load", missing)
    assert "No module named 'tensorrt'" in reason()
    assert "pip install" in reason()


def test_auto_goes_on_to_the_next_engine_when_one_cannot_be_opened(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path)
    path = made.path(made.manifest.engines[0].file)
    path.write_bytes(b"not an engine")
    made = replace(made, manifest=replace(made.manifest, targets=("tensorrt", "cpu")))
    engine, declined = open_engine(made)
    assert engine.describe()["name"] == "cpu"
    assert f"cannot open {path}" in declined["tensorrt"]


def test_a_runtime_that_does_not_start_is_one_line(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(logger: Any) -> Any:
        logger.log(machine.trt.ILogger.Severity.ERROR, "CUDA initialization failure\nwith error 3")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(machine.trt, "Runtime", none)
    with pytest.raises(EngineError, match=r": CUDA initialization failure with error 3$"):
        TrtEngine(bundle(tmp_path), "tensorrt")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (b"", r"Serialization assertion failed \(magicTag\)"),
        (b"not an engine", r"Serialization assertion failed \(magicTag\)"),
        ({"in_place": False}, "present.0.key"),
        ({"slots": SLOTS + 1}, rf"past_key_values.0.key .* \(1, 1, {SLOTS}, 4\)"),
        ({"profiles": 1}, "profile 1"),
        ({"activation_bytes": 1 << 40}, "MiB"),
    ],
    ids=str,
)
def test_a_file_that_is_damaged_unfit_or_too_large_is_refused_in_one_line(
    tmp_path: Path, machine: Machine, file: Any, named: str
) -> None:
    made = bundle(tmp_path, **({} if isinstance(file, bytes) else {"file": file}))
    path = made.path(made.manifest.engines[0].file)
    if isinstance(file, bytes):
        path.write_bytes(file)
    with pytest.raises(EngineError, match=named) as caught:
        TrtEngine(made, "tensorrt").run(chain([1] * 30, head_rows=[29]))
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    machine.check_given_back()


@pytest.mark.parametrize("total", [1000, 60_000])
def test_too_little_memory_at_any_stage_is_refused_and_given_back(tmp_path: Path, machine: Machine, total: int) -> None:
    made = bundle(tmp_path, file={"activation_bytes": 1 << 30})
    machine.cuda.total_bytes = total
    with pytest.raises(EngineError, match=r"the GPU has no [\d,]+ MiB for .*0 MiB are free"):
        TrtEngine(made, "tensorrt")
    machine.check_given_back()
