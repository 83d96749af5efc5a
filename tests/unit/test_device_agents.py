"""Agents on a device, TensorRT's on the double: what changes there, and what stays.

What every engine does with agents: tests/conformance_agents.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from mara_export.tensorrt.build import agent_widths
from mara_runtime.bundle import Bundle
from mara_runtime.engines import ort
from mara_runtime.engines.base import Engine, Pass
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.ort_cuda import CudaEngine, CudaMemory
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import BundleError, EngineError
from mara_runtime.tensors import AGENT_WIDTHS
from tests.double.machine import Machine
from tests.unit.written_model import DECODE_ROWS, JUDGES, MOST_AGENTS, SIZES, SLOTS, add_engines, table, write_bundle

Open = Callable[..., TrtEngine]


@pytest.fixture
def start(machine: Machine, tmp_path: Path) -> Iterator[Open]:
    """Opens the engine of a bundle of so many slots; facts: of the engines, as in `add_engines`."""
    engines = []

    def start(slots: tuple[int, ...] = (SLOTS,), **facts: Any) -> TrtEngine:
        made = add_engines(write_bundle(tmp_path, always_head=True), slots, True, **facts)
        engines.append(TrtEngine(made, "tensorrt"))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
    machine.check_given_back()


def judge(engine: Engine, *mix: float, rows: int = 2) -> list[float]:
    """Margins of the tokens 1, 2, …, at the beginning of a text."""
    tokens, priorities = range(1, 1 + rows), [0.0] * rows
    return engine.run(
        Pass(tokens, [0] * rows, 0, agent_rows=range(rows), mix=mix, priorities=priorities)
    ).margins.tolist()


def margins(name: str, rows: int = 2) -> list[float]:
    """Those of an agent as a table."""
    return [float(JUDGES[name](table((token,))[1][None])[0]) for token in range(1, 1 + rows)]


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    """The arguments of each call of a method of Cuda's from now on."""
    calls, real = [], getattr(Cuda, name)

    def counted(self: Cuda, *given: Any) -> Any:
        calls.append(given)
        return real(self, *given)

    monkeypatch.setattr(Cuda, name, counted)
    return calls


def test_engines_are_built_for_the_widest_agent_and_at_least_for_a_usual_one(tmp_path: Path) -> None:
    manifest = Bundle.open(write_bundle(tmp_path, always_head=True)).manifest
    narrow = manifest.agents[0]
    assert agent_widths(replace(manifest, agents=())) == agent_widths(manifest) == AGENT_WIDTHS
    wide = [replace(narrow, name=name, widths=widths) for name, widths in (("a", (2048, 8)), ("b", (16, 512)))]
    assert agent_widths(replace(manifest, agents=(narrow, *wide))) == (2048, 512)


def test_cuda_graphs_of_onnx_runtime_keep_the_agents_that_they_refer_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime frees no graph before its session; tests/cuda count them."""
    monkeypatch.setitem(ort.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(CudaMemory, "device", "cpu")
    engine: Any = CudaEngine(Bundle.open(write_bundle(tmp_path, always_head=True)), 1, graphs=True)
    bindings = []
    for name in ("agent", "other") * 2:
        for names, mix in (([name], [1.0]), ([name, name], [0.5, 0.5]), ([], [1.0])):
            engine.use(names)
            assert judge(engine, *mix) == (margins(name) if names else [0.0, 0.0])
            bindings += engine.memory.bank.slab.bindings.values()
    assert len({*map(id, bindings)}) == 4  # of each size one, and that of the row that is tried


def test_a_device_without_memory_for_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ort.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(CudaMemory, "device", "cpu")
    engine: Any = CudaEngine(Bundle.open(write_bundle(tmp_path, always_head=True)), 1)
    engine.use(["other"])

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nat line 1")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", fail)
        with pytest.raises(EngineError, match=r"no memory for the agents \(out of memory\): use fewer$"):
            engine.use(["other", "agent"])
    assert judge(engine, 1.0) == margins("other")
    engine.use(["other", "agent"])
    assert judge(engine, 0.0, 1.0) == margins("agent")


def test_agents_that_change_leave_graphs_contexts_and_addresses(
    start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    for names in (["agent", "other"], ["agent"]):  # both numbers have their graphs then
        engine.use(names)
        for _ in range(4):
            judge(engine, *[1.0] * len(names))
    before, launched = machine.in_use(), machine.cuda.launched
    uploads = count(monkeypatch, "upload")
    for turn in range(6):
        name = ("agent", "other")[turn % 2]
        engine.use([name])
        assert len(uploads) == turn * len(engine.memory.agents.addresses())
        engine.use([name])  # which are in memory
        assert judge(engine, 1.0) == margins(name)
    assert machine.cuda.launched == launched + 6
    engine.use(["other", "agent"])
    assert judge(engine, 0.0, 1.0) == margins("agent")
    assert machine.cuda.launched == launched + 7
    assert machine.in_use() == before  # no page-locked copy of the weights either


def test_a_pass_uploads_its_inputs_at_once_and_no_agents(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    engine.use(["agent", "other"])
    uploads = count(monkeypatch, "upload")
    judge(engine, 1.0, 2.0)
    ((_, source),) = uploads
    assert source is engine.memory.inputs.host


def test_agents_stay_while_engine_files_take_turns(start: Open) -> None:
    engine = start(SIZES)
    engine.use(["other", "agent"])
    for slots in SIZES:
        engine.memory.grow(slots)
        assert engine.memory.slots == slots
        assert judge(engine, 1.0, 0.0) == margins("other")
    engine.cache.clear()
    assert engine.memory.slots == SIZES[0]
    assert judge(engine, 0.0, 1.0) == margins("agent")


def test_what_an_engine_was_not_built_for_is_refused_and_what_was_in_use_stays(start: Open, tmp_path: Path) -> None:
    engine = start()
    engine.use(["agent", "other"])
    with pytest.raises(EngineError, match=rf"^3 agents are more than the {MOST_AGENTS} .* use fewer at once$"):
        engine.use(["agent", "other", "endless"])
    assert judge(engine, 0.0, 1.0) == margins("other")
    engine = start(agent_widths=[3, 1], file={"agent_widths": [3, 1]})
    with pytest.raises(EngineError) as caught:
        engine.use(["agent"])
    assert str(caught.value) == (
        f"the agent agent has hidden widths (3, 2), and the engine was built for (3, 1): build it again with "
        f"mara-build {tmp_path} --target tensorrt"
    )
    assert judge(engine, 1.0) == [0.0, 0.0]


def test_an_engine_file_for_other_widths_than_the_manifest_says_is_refused(start: Open) -> None:
    with pytest.raises(
        EngineError, match=r"agents\.0\.weight should be float32 .*5, 4\) and is .*3, 4\); build it again"
    ):
        start(file={"agent_widths": [3, 4]})


def test_of_engines_that_take_different_numbers_the_least_counts(machine: Machine, tmp_path: Path) -> None:
    write_bundle(tmp_path, always_head=True)
    add_engines(tmp_path, SIZES[:1], True, agents=3, file={"agents": 3})
    engine = TrtEngine(add_engines(tmp_path, SIZES[1:], True), "tensorrt")
    with pytest.raises(EngineError, match=f"3 agents are more than the {MOST_AGENTS} "):
        engine.use(["agent", "other", "endless"])
    engine.close()


def test_an_interrupted_change_is_made_again(start: Open, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, before, real = start(), machine.in_use(), Cuda.upload
    calls: list[int] = []

    def upload(self: Cuda, *given: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, *given)

    engine.use(["other"])
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "upload", upload)
        with pytest.raises(KeyboardInterrupt):
            engine.use(["agent"])
    assert machine.in_use() == before
    engine.use(["other"])
    assert judge(engine, 1.0) == margins("other")


def test_a_damaged_file_leaves_the_agents_in_use(start: Open, tmp_path: Path) -> None:
    engine = start()
    engine.use(["other"])
    (tmp_path / "agents" / "agent.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="cannot be read as an agent"):
        engine.use(["other", "agent"])
    assert judge(engine, 1.0) == margins("other")


def test_more_judged_rows_than_rows(start: Open) -> None:
    """As when every agent judges every row: beyond the decoding profile, and beyond the engine."""
    engine, rows = start(), DECODE_ROWS - 1
    engine.use(["agent", "other"])
    for count in (DECODE_ROWS, DECODE_ROWS + 1, 32):
        judged = [*range(rows), *range(rows)][:count]
        work = Pass([1] * rows, [0] * rows, 0, agent_rows=judged, mix=[0.0, 1.0], priorities=[0.0] * count)
        assert engine.run(work).margins.tolist() == margins("other")[:1] * count
    with pytest.raises(EngineError, match="33 judged, is wider than the 32 "):
        engine.run(replace(work, agent_rows=[0] * 33, priorities=[0.0] * 33))
