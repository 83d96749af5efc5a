"""What only TensorRT engines do, on a double of TensorRT and CUDA: graphs, growth, owed rows, refusals.

What every engine does: tests/unit/test_ort_engine.py.
"""

import gc
import re
from collections.abc import Iterator
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
from mara_runtime.engines import open_engine, trt_plan
from mara_runtime.engines import tensorrt as trt_engine
from mara_runtime.engines.base import Pass
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError
from mara_runtime.schedule import calibrate
from mara_runtime.schedule.base import Fixed
from mara_runtime.stats import Stats
from tests.double.machine import Machine
from tests.double.trt import ICudaEngine, IExecutionContext
from tests.gpu.test_conformance import promised, suite
from tests.unit.written_model import CONTEXT, FINE, HEAD_ROWS, SHAPE, SIZES, SLOTS, add_engines, table, write_bundle

INSTALLED = "10.16.1.11"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    machine.install(monkeypatch)
    yield machine
    machine.check_given_back()


def bundle(folder: Path, in_place: bool = True, slots: tuple[int, ...] = (SLOTS,), **facts: Any) -> Bundle:
    return add_engines(write_bundle(folder, always_head=True), slots, in_place, **facts)


def row(position: int) -> Pass:
    return Pass([position % FINE], [position], position, [0])


def right(out: Any, position: int) -> bool:
    return bool(out.top_logits[0, 0] == table(tuple(i % FINE for i in range(position + 1)))[0].max())


# ── CUDA graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shape_that_comes_back_twice_is_launched_from_then_on(
    tmp_path: Path, machine: Machine, in_place: bool
) -> None:
    engine = TrtEngine(bundle(tmp_path, in_place), "tensorrt")
    launched = []
    for position in range(12):
        assert right(engine.run(row(position)), position)
        launched.append(machine.cuda.launched)
    eager = 2 if in_place else 4  # twice for each side of the cache
    assert launched == [0] * eager + list(range(1, 13 - eager))
    assert engine.describe()["cuda_graphs"] is True
    engine.close()


def test_a_wide_pass_is_no_graph(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    for _ in range(4):
        engine.run(Pass([1] * 30, range(30), 0, [29]))
    assert machine.cuda.launched == 0
    engine.close()


def test_no_more_shapes_are_kept_than_there_is_room_for(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_plan, "KEPT_SHAPES", 2)
    monkeypatch.setattr(trt_plan, "_FADING", 3)
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    for turn in range(4):
        for width in (1, 2, 3, 4):
            for _ in range(4):
                out = engine.run(Pass([turn] * width, [0] * width, 0, [0]))
                assert out.top_logits[0, 0] == table((turn,))[0].max()
        assert machine.held()["graphs"] <= 2
        assert machine.held()["contexts"] <= 3
    assert machine.cuda.launched > 8
    engine.close()


def test_shapes_that_take_turns_do_not_drive_each_other_out(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_plan, "KEPT_SHAPES", 2)
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    made = []
    real = trt_plan.Plan._new_context
    monkeypatch.setattr(trt_plan.Plan, "_new_context", lambda *args, **how: made.append(1) or real(*args, **how))
    for _ in range(10):
        for width in (1, 2, 3):
            engine.run(Pass([1] * width, [0] * width, 0, [0]))
    assert len(made) == 3  # one they share, and two of their own
    assert machine.cuda.launched == 2 * (10 - 2)
    for _ in range(30):  # another has become the usual one
        engine.run(Pass([1] * 3, [0] * 3, 0, [0]))
    assert len(made) == 4
    assert machine.cuda.launched > 2 * (10 - 2) + 10
    engine.close()


def test_a_pass_that_fails_is_captured_only_after_one_that_ran(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    engine.run(row(0))
    with monkeypatch.context() as patch:  # the first of the context of its own
        patch.setattr(IExecutionContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(EngineError, match="cannot run a pass"):
            engine.run(row(1))
    launched = []
    for position in (1, 2, 3):
        assert right(engine.run(row(position)), position)
        launched.append(machine.cuda.launched)
    assert launched == [0, 1, 2]
    assert engine.describe()["cuda_graphs"] is True
    engine.close()


def test_an_interrupt_as_a_capture_begins_leaves_no_capture(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    for position in range(2):
        engine.run(row(position))
    real = Cuda.begin_capture

    def interrupted(self: Cuda) -> None:
        real(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(2))
    for position in (2, 3):
        assert right(engine.run(row(position)), position)
    assert machine.cuda.launched == 2
    engine.close()


def test_a_profile_that_is_refused_is_one_line(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path, file={"profiles": 1}), "tensorrt")
    assert right(engine.run(row(0)), 0)
    with pytest.raises(EngineError, match=r"^TensorRT refuses the optimisation profile 1: there is no profile 1$"):
        engine.run(Pass([1] * 30, range(30), 0, [29]))
    assert right(engine.run(row(0)), 0)
    engine.close()


def test_a_shape_that_was_refused_half_way_is_set_again(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt", graphs=False)
    engine.run(row(0))
    real = IExecutionContext.set_input_shape
    for refused in (tensors.INPUT_IDS, tensors.POSITION_IDS, tensors.AGENT_ROWS):
        with monkeypatch.context() as patch:
            patch.setattr(
                IExecutionContext,
                "set_input_shape",
                lambda self, name, shape, refused=refused: name != refused and real(self, name, shape),
            )
            with pytest.raises(EngineError, match=f"refuses the shape .* of {refused}"):
                engine.run(Pass([0, 1], [0, 1], 0, [1]))
        assert right(engine.run(row(0)), 0)
    engine.close()


# ── equal numbers ────────────────────────────────────────────────────────────────────────────────────────────────────


def of_equals_the_last(folder: Path) -> None:
    """Change a bundle's graph: of equal logits the highest id comes first, of equal scores the last is elected."""
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


def test_the_suite_asks_a_device_for_no_order_of_equal_numbers(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/gpu, on a device that returns them the other way round; the suite as it is for a CPU finds that out."""
    made = bundle(tmp_path)
    of_equals_the_last(tmp_path)
    engine = TrtEngine(made, "tensorrt")
    with pytest.raises(AssertionError):
        suite.test_any_pass_gives_what_the_table_gives(engine, 0)
    promised(monkeypatch)
    for part in range(10):
        suite.test_any_pass_gives_what_the_table_gives(engine, part)
    for name in suite.SCHEDULES:
        suite.test_answers_are_those_of_the_sequential_procedure(engine, name)
    engine.close()


# ── TensorRT for RTX ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_kernels_are_compiled_for_shapes_that_come_back_and_kept(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = bundle(tmp_path / "bundle", target="tensorrt-rtx")

    def passes() -> int:
        """Kernels compiled in a run of the program."""
        before = machine.trt.compiled
        engine = TrtEngine(made, "tensorrt-rtx")
        for turn in range(4):
            for width in (1, 2, 3)[: 3 if turn else 2]:
                engine.run(Pass([1] * width, [0] * width, 0, [0]))
        engine.run(Pass([1] * 4, [0] * 4, 0, [0]))  # once: not worth a kernel
        engine.close()
        return machine.trt.compiled - before

    assert passes() == 3
    (path,) = (tmp_path / "cache" / "mara-deploy").iterdir()
    assert passes() == 0
    machine.trt.__version__ = "10.16.2"
    later = tuple(replace(facts, version="10.16.2") for facts in made.manifest.engines)
    made = replace(made, manifest=replace(made.manifest, engines=later))
    assert passes() == 3
    path.write_bytes(b"damaged")
    assert passes() == 3
    assert passes() == 0


# ── when captures fail ───────────────────────────────────────────────────────────────────────────────────────────────


def test_where_capture_fails_passes_run_without_and_that_is_recorded(tmp_path: Path, machine: Machine) -> None:
    machine.cuda.refuse_capture = True
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    for position in range(6):
        assert right(engine.run(row(position)), position)
    assert "cudaErrorStreamCaptureInvalidated" in engine.describe()["cuda_graphs"]
    assert machine.held()["graphs"] == machine.cuda.launched == 0
    engine.close()


def test_the_switch_off_is_recorded(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt", graphs=False)
    for position in range(5):
        engine.run(row(position))
    assert machine.cuda.launched == 0
    assert engine.describe()["cuda_graphs"] == "switched off"
    engine.close()


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_place", [True, False])
def test_the_cache_grows_and_keeps_what_it_holds(tmp_path: Path, machine: Machine, in_place: bool) -> None:
    engine = TrtEngine(bundle(tmp_path, in_place, SIZES), "tensorrt")
    assert (engine.slots, engine.allocated_slots) == (SLOTS, SIZES[0])
    sizes = []
    for position in range(CONTEXT):
        assert right(engine.run(row(position)), position)
        sizes.append(engine.allocated_slots)
        assert machine.held()["engines"] == 1
    assert sorted(set(sizes)) == list(SIZES)
    assert sizes.index(SIZES[1]) == SIZES[0]  # not before it must
    engine.close()


def test_a_growth_that_fails_leaves_an_engine_that_goes_on(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path, slots=SIZES)
    engine = TrtEngine(made, "tensorrt")
    for position in range(SIZES[0]):
        assert right(engine.run(row(position)), position)
    larger = made.path(made.manifest.engines[1].file)
    content = larger.read_bytes()
    larger.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(EngineError, match="cannot open"):
            engine.run(row(SIZES[0]))
        assert engine.allocated_slots == SIZES[0]
        assert right(engine.run(row(SIZES[0] - 1)), SIZES[0] - 1)  # what fits the smaller one goes on
    larger.write_bytes(content)
    assert right(engine.run(row(SIZES[0])), SIZES[0])
    engine.close()


@pytest.mark.parametrize("in_place", [True, False])
def test_an_interrupt_while_the_smaller_cache_is_freed_leaves_the_larger_one(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    engine = TrtEngine(bundle(tmp_path, in_place, slots=SIZES), "tensorrt")
    for position in range(SIZES[0]):
        engine.run(row(position))
    real = trt_engine._Cache.close

    def close(cache: Any) -> None:
        real(cache)
        raise KeyboardInterrupt  # a signal is heard when the call returns

    with monkeypatch.context() as patch:
        patch.setattr(trt_engine._Cache, "close", close)
        with pytest.raises(KeyboardInterrupt):
            engine.run(row(SIZES[0]))
    assert engine.allocated_slots == SIZES[1]
    assert right(engine.run(row(SIZES[0])), SIZES[0])
    engine.close()


def test_where_no_second_context_can_be_made_passes_share_the_first(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    assert right(engine.run(row(0)), 0)
    monkeypatch.setattr(ICudaEngine, "create_execution_context", lambda *_: None)
    assert all(right(engine.run(row(position)), position) for position in range(1, 8))
    assert machine.cuda.launched == 0
    assert "no execution context" in engine.describe()["cuda_graphs"]
    engine.close()


def test_an_interrupted_pass_leaves_its_row_owed(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next pass would see the entry of the candidate that was not chosen."""
    engine = TrtEngine(bundle(tmp_path, in_place=False), "tensorrt")
    engine.run(Pass([0], [0], 0))
    engine.run(Pass([7, 8], [1, 1], 1))
    engine.move(2, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "wait", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.run(Pass([5], [2], 2, [0]))  # it goes on behind the interrupt, and reads its inputs
    found = engine.run(Pass([3], [2], 2, [0]))
    assert found.top_logits[0, 0] == table((0, 8, 3))[0].max() != table((0, 7, 3))[0].max()
    engine.close()


def test_a_row_is_owed_across_growth(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path, True, SIZES), "tensorrt")
    for position in range(SIZES[0] - 2):
        engine.run(row(position))
    engine.run(Pass([7, 8], [SIZES[0] - 2] * 2, SIZES[0] - 2))
    engine.move(SIZES[0] - 1, SIZES[0] - 2)
    out = engine.run(Pass([1, 2], [SIZES[0] - 1] * 2, SIZES[0] - 1, [1], [0, 1], [0.0, 0.0], threshold=99.0))
    prefix = (*(i % FINE for i in range(SIZES[0] - 2)), 8, 2)
    assert out.rows.tolist() == [1]
    assert out.top_logits[0, 0] == table(prefix)[0].max()
    engine.close()


def test_clearing_goes_back_to_the_smallest(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path, True, SIZES), "tensorrt")
    for _ in range(2):
        for position in range(CONTEXT):
            assert right(engine.run(row(position)), position)
        assert engine.allocated_slots == SLOTS
        engine.move(1, 0)
        engine.clear()
        assert engine.allocated_slots == SIZES[0]
        assert machine.held()["engines"] == 1
    engine.close()


def test_every_capacity_is_measured_once(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "CONTEXTS", (2, 20, 60))
    monkeypatch.setattr(calibrate, "WIDTHS", (1, 2, 3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = bundle(tmp_path / "bundle", True, SIZES)
    engine = TrtEngine(made, "tensorrt")
    seen: list[tuple[int, int]] = []
    real = TrtEngine.run

    def run(self: TrtEngine, work: Pass) -> Any:
        out = real(self, work)
        seen.append((work.slot, self.allocated_slots))
        return out

    monkeypatch.setattr(TrtEngine, "run", run)
    cost = calibrate.measured_cost(made, engine)
    assert cost.contexts == (2, 20, 60)
    assert set(seen) == set(zip(cost.contexts, SIZES, strict=True))
    assert engine.allocated_slots == SIZES[0]
    seen.clear()
    engine.run(row(SIZES[0]))  # larger now
    assert calibrate.measured_cost(made, engine) == cost
    assert len(seen) == 1
    engine.close()


@pytest.mark.parametrize("in_place", [True, False])
def test_nothing_grows_over_2000_steps(tmp_path: Path, machine: Machine, in_place: bool) -> None:
    engine = TrtEngine(bundle(tmp_path, in_place), "tensorrt")
    session, config = Session(engine, Fixed(2)), DecodeConfig(top_k=3, top_p=1.0, max_new_tokens=CONTEXT - 2)
    steps, held = 0, []
    while steps < 2000:
        options: dict[str, Any] = {"fallback": "first", "eos_token_ids": set(), "limit": CONTEXT - 2}
        steps += len(list(decode(session, [1, steps % FINE], config, **options, stats=Stats())))
        held.append(machine.held())
    assert held[-1] == held[len(held) // 4]  # every shape has come back by then
    assert machine.cuda.launched > 1000
    engine.close()


def test_what_is_dropped_is_given_back(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    engine.run(row(0))
    del engine
    machine.check_given_back()


def test_closing_twice_is_closing_once(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    engine.close()
    engine.close()


# ── passes beyond the engine's bounds ────────────────────────────────────────────────────────────────────────────────


def test_the_rows_of_a_pass_may_be_arrays(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    none, both = np.arange(0), np.arange(2)
    assert engine.run(Pass(both, both, 0, none, none, none)).rows.tolist() == []
    assert engine.run(Pass(both, both, 0, both, both, np.full(2, -np.inf))).rows.tolist() == [0, 1]
    engine.close()


def test_a_pass_that_is_too_wide_is_refused_and_evaluated_in_pieces(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    tokens = [i % FINE for i in range(45)]
    with pytest.raises(EngineError, match="a pass of 45 rows, 0 of them for the LM head, is wider than the 32 and 17"):
        engine.run(Pass(tokens, range(45), 0))
    with pytest.raises(EngineError, match=f"{HEAD_ROWS + 1} of them"):
        engine.run(Pass(tokens[:20], range(20), 0, range(HEAD_ROWS + 1)))
    found = engine.evaluate(tokens, range(45), 0)
    for position in range(45):
        logits, hidden = table(tuple(tokens[: position + 1]))
        np.testing.assert_array_equal(found.hidden[position], hidden)
        np.testing.assert_array_equal(found.logits[position], logits)
    engine.close()


def test_an_owed_row_makes_no_pass_too_wide(tmp_path: Path, machine: Machine) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    engine.run(Pass([3, 4], [0, 0], 0))
    engine.move(1, 0)
    out = engine.run(Pass([5] * 32, range(1, 33), 1, [31]))
    assert out.rows.tolist() == [31]
    assert out.top_logits[0, 0] == table((4, *[5] * 32))[0].max()
    engine.close()


# ── weights that are streamed ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fits", [True, False])
def test_weights_are_streamed_if_they_must(tmp_path: Path, machine: Machine, fits: bool) -> None:
    machine.trt.automatic_budget = 3000
    size = 5000 if fits else machine.cuda.total_bytes
    engine = TrtEngine(bundle(tmp_path, file={"streamable_weights_bytes": size}), "tensorrt")
    for position in range(6):
        assert right(engine.run(row(position)), position)
    facts = engine.describe()
    assert facts["memory"]["streamed_weight_bytes"] == (0 if fits else size - 3000)
    assert facts["cuda_graphs"] is True if fits else "weights are streamed" in facts["cuda_graphs"]
    engine.close()


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_activations_count_beside_the_weights(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    machine.trt.automatic_budget = 3000
    file = {"streamable_weights_bytes": 5000, "activation_bytes": 4096}
    monkeypatch.setattr(Cuda, "free_bytes", lambda self: 5000 + 4096 + room)
    engine = TrtEngine(bundle(tmp_path, file=file), "tensorrt")
    assert engine.describe()["memory"]["streamed_weight_bytes"] == (0 if room > 0 else 2000)
    engine.close()


def test_a_budget_that_is_refused_streams_all_weights(tmp_path: Path, machine: Machine) -> None:
    machine.trt.automatic_budget, machine.trt.refused_budgets = 3000, {3000}
    size = machine.cuda.total_bytes
    engine = TrtEngine(bundle(tmp_path, file={"streamable_weights_bytes": size}), "tensorrt")
    assert right(engine.run(row(0)), 0)
    assert engine.describe()["memory"]["streamed_weight_bytes"] == size
    engine.close()


def test_where_no_budget_is_taken_the_engine_is_refused(tmp_path: Path, machine: Machine) -> None:
    machine.trt.automatic_budget, machine.trt.refused_budgets = 3000, {0, 3000}
    made = bundle(tmp_path, file={"streamable_weights_bytes": machine.cuda.total_bytes})
    with pytest.raises(EngineError) as caught:
        TrtEngine(made, "tensorrt")
    assert re.search(r"neither with 3,000 bytes on the GPU nor with none \(a budget of 0\): ", str(caught.value))
    assert str(caught.value).endswith(f"mara-build {tmp_path} --target tensorrt")
    del caught


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_ran_is_described(tmp_path: Path, machine: Machine) -> None:
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
    assert memory["slots"] == SLOTS
    assert memory["kv_cache_bytes"] >= 2 * SLOTS * 4 * 4
    assert memory["activation_bytes"] == 4096
    engine.close()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"version": "10.3.0"}, f"is of TensorRT 10.3.0, and this machine has TensorRT {INSTALLED}"),
        ({"version": "11.1.0", "options": {"version_compatible": True}}, "is of TensorRT 11.1.0, and"),
        ({"version": "10.17.0", "options": {"version_compatible": True}}, "is of TensorRT 10.17.0, and"),
        ({"compute_capability": "9.0"}, "is for compute capability 9.0, and this machine has a GPU of 8.7"),
        ({"compute_capability": "8.9+"}, "is for compute capability 8.9+, and this machine has a GPU of 8.7"),
        ({"compute_capability": "8.6, 8.9"}, "is for compute capability 8.6, 8.9, and"),
        ({"platform": "linux-riscv"}, "is for linux-riscv, and this machine has "),
    ],
    ids=str,
)
def test_an_engine_of_elsewhere_is_refused_with_the_command_that_builds_it(
    tmp_path: Path, machine: Machine, facts: dict[str, Any], said: str
) -> None:
    made = bundle(tmp_path, **facts)
    with pytest.raises(EngineError) as caught:
        TrtEngine(made, "tensorrt")
    assert said in str(caught.value)
    assert str(caught.value).endswith(f"build it again with mara-build {tmp_path} --target tensorrt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "facts",
    [
        {"version": "10.14.0", "options": {"version_compatible": True}},
        {"compute_capability": "8.0+"},
        {"compute_capability": "8.6, 8.7"},
    ],
    ids=str,
)
def test_an_engine_that_this_machine_may_run_is_not_refused(
    tmp_path: Path, machine: Machine, facts: dict[str, Any]
) -> None:
    engine = TrtEngine(bundle(tmp_path, file={"lean_runtime": "options" in facts}, **facts), "tensorrt")
    assert right(engine.run(row(0)), 0)
    engine.close()


def test_a_gpu_that_fails_at_the_first_question_is_a_reason(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = machine.cuda.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(machine.cuda, "cudaDeviceGetAttribute", lambda *_: (lost, 0))
    assert "cudaDeviceGetAttribute says" in str(trt_engine.why_not(bundle(tmp_path), "tensorrt"))


def test_what_fails_on_the_way_out_leaves_nothing_else_open(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TrtEngine(bundle(tmp_path), "tensorrt")
    for position in range(4):
        engine.run(row(position))
    real = machine.cuda.cudaGraphExecDestroy

    def fails(graph: Any) -> Any:
        real(graph)
        return (machine.cuda.cudaError_t.cudaErrorInvalidValue,)

    monkeypatch.setattr(machine.cuda, "cudaGraphExecDestroy", fails)
    with pytest.raises(EngineError, match="cudaGraphExecDestroy") as caught:
        engine.close()
    del caught  # it holds what the failing frames hold
    gc.collect()
    machine.check_given_back()


def test_what_is_missing_is_named(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle(tmp_path)
    other = replace(made.manifest, engines=(), targets=("cpu",))
    assert trt_engine.why_not(replace(made, manifest=other), "tensorrt") == (
        "the bundle was not exported for it (targets: cpu)"
    )
    unbuilt = replace(made.manifest, engines=())
    assert f"no engine for it yet: build one on this machine with mara-build {tmp_path}" in str(
        trt_engine.why_not(replace(made, manifest=unbuilt), "tensorrt")
    )
    machine.cuda.devices = 0
    assert "there is no NVIDIA GPU that can be used (cudaErrorNoDevice (100))" in str(
        trt_engine.why_not(made, "tensorrt")
    )

    def missing(target: str) -> Any:
        raise ImportError(f"No module named {target!r}")

    monkeypatch.setattr(trt_plan, "load", missing)
    assert "its Python package cannot be imported (No module named 'tensorrt'): pip install" in str(
        trt_engine.why_not(made, "tensorrt")
    )


def test_auto_goes_on_to_the_next_when_an_engine_cannot_be_opened(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path)
    path = made.path(made.manifest.engines[0].file)
    path.write_bytes(b"not an engine")
    made = replace(made, manifest=replace(made.manifest, targets=("tensorrt", "cpu")))
    engine, declined = open_engine(made)
    assert engine.describe()["name"] == "cpu"
    assert f"cannot open {path}" in declined["tensorrt"]
    with pytest.raises(EngineError, match=f"^TensorRT {INSTALLED} cannot open {path}"):
        open_engine(made, "tensorrt")


def test_a_runtime_that_does_not_start_is_one_line(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(logger: Any) -> Any:
        logger.log(machine.trt.ILogger.Severity.ERROR, "CUDA initialization failure\nwith error 3")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(machine.trt, "Runtime", none)
    with pytest.raises(EngineError, match=r"does not start on this GPU: CUDA initialization failure with error 3$"):
        TrtEngine(bundle(tmp_path), "tensorrt")


@pytest.mark.parametrize("content", [b"", b"not an engine"])
def test_a_damaged_file_is_one_line(tmp_path: Path, machine: Machine, content: bytes) -> None:
    made = bundle(tmp_path)
    path = made.path(made.manifest.engines[0].file)
    path.write_bytes(content)
    with pytest.raises(EngineError) as caught:
        TrtEngine(made, "tensorrt")
    assert re.fullmatch(
        rf"TensorRT {INSTALLED} cannot open {path} \(Serialization assertion failed \(magicTag\)\): build it again .*",
        str(caught.value),
    )
    del caught
    machine.check_given_back()


@pytest.mark.parametrize("total", [1000, 60_000])
def test_too_little_memory_is_told_in_numbers(tmp_path: Path, machine: Machine, total: int) -> None:
    made = bundle(tmp_path, file={"activation_bytes": 1 << 30})
    machine.cuda.total_bytes = total
    with pytest.raises(EngineError, match=r"the GPU has no [\d,]+ MiB for .* \(0 MiB are free; .*\)"):
        TrtEngine(made, "tensorrt")
    machine.check_given_back()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"in_place": False}, "present.0.key is written over no input"),
        ({"slots": SLOTS + 1}, rf"past_key_values.0.key should be float32 \(1, 1, {SLOTS}, 4\) and is float"),
    ],
    ids=str,
)
def test_an_engine_of_another_bundle_is_refused(
    tmp_path: Path, machine: Machine, file: dict[str, Any], said: str
) -> None:
    with pytest.raises(EngineError, match=f"does not fit its manifest: {said}"):
        TrtEngine(bundle(tmp_path, file=file), "tensorrt")
