"""Each rule of the double broken once, by the smallest program that breaks it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.engines.io_block import Sizes
from mara_runtime.tensors import kv_names, step_inputs
from tests.double import RULES, Broken
from tests.double.machine import Machine, write_engine
from tests.unit.written_model import SHAPE, SLOTS, write_bundle

MOST = {"decode_rows": 8, "prefill_rows": 16, "head_rows": 4, "places": 3, "shared_rows": 4}
AGENTS = {"agents": 2, "agent_widths": (3, 2)}
SMALL = Sizes(conversations=1, width=2, rows=2, heads=1, asked=1, shown=1, agents=1, widths=(3, 2))
SHARED = SMALL._replace(conversations=2)
SHARED_MOST = MOST["shared_rows"] + MOST["decode_rows"]
BEYOND: list[dict[str, int]] = [
    *({"conversations": count} for count in (1, MOST["places"] + 1)),
    *({"width": MOST["shared_rows"] + 1}, {"rows": SHARED_MOST + 1}, {"asked": SHARED_MOST + 1}),
    *({"heads": MOST["places"] * MOST["head_rows"] + 1}, {"shown": 2}),
]
PAST, PRESENT = "past_key_values.0.key", "present.0.key"


class Program:
    """A context that is ready to run, and what a program that keeps the rules does with it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        write_bundle(folder, always_head=True)
        options = {"in_place": True, **options}
        write_engine(folder / "x.engine", folder / "step.onnx", slots=SLOTS, **MOST, **AGENTS, **options)
        self.machine = Machine()
        self.cuda, self.trt = self.machine.cuda, self.machine.trt
        self.stream = int(self.cuda.cudaStreamCreateWithFlags(1)[1])
        self.runtime = self.trt.Runtime(self.trt.ILogger())
        self.engine = self.runtime.deserialize_cuda_engine((folder / "x.engine").read_bytes())
        self.host = self.cuda.cudaMallocHost(64)[1]

    def context(self, profile: int = 0, sizes: Sizes = SMALL) -> Any:
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        context.set_device_memory(self.allocate(4096), 4096)
        context.set_optimization_profile_async(profile, self.stream)
        for tensor in step_inputs(SHAPE):
            shape = sizes.of([SLOTS if size == "C" else size for size in tensor.shape])
            context.set_input_shape(tensor.name, shape)
        for i in range(self.engine.num_io_tensors):
            context.set_tensor_address(self.engine.get_tensor_name(i), self.allocate(1 << 14))
        for past, present in kv_names(SHAPE.num_caches):
            address = self.allocate(1 << 14)
            context.set_tensor_address(past, address)
            context.set_tensor_address(present, address)
        return context

    def allocate(self, size: int, value: int | None = 0) -> int:
        address: int = self.cuda.cudaMalloc(size)[1]
        if value is not None:
            self.cuda.cudaMemsetAsync(address, value, size, self.stream)
        return address

    def run(self, context: Any) -> None:
        assert context.execute_async_v3(self.stream)
        self.wait()

    def wait(self) -> None:
        self.cuda.cudaStreamSynchronize(self.stream)

    def begin(self) -> None:
        self.cuda.cudaStreamBeginCapture(self.stream, 1)

    def capture(self, context: Any) -> Any:
        self.run(context)
        self.begin()
        context.execute_async_v3(self.stream)
        graph = self.cuda.cudaStreamEndCapture(self.stream)[1]
        return self.cuda.cudaGraphInstantiate(graph, 0)[1]

    def up(self, host: int, device: int) -> None:
        self.cuda.cudaMemcpyAsync(device, host, 64, self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, self.stream)

    def down(self, host: int, device: int) -> None:
        self.cuda.cudaMemcpyAsync(host, device, 64, self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, self.stream)

    def write(self, host: int) -> None:
        self.cuda._pinned(host, 64)[3] = 1


def launch_after(change: Callable[[Any], object]) -> Callable[[Program], None]:
    def program(p: Program) -> None:
        context = p.context()
        graph = p.capture(context)
        p.cuda.cudaGraphLaunch(graph, p.stream)  # as it was captured
        p.wait()
        change(context)
        p.cuda.cudaGraphLaunch(graph, p.stream)

    return program


def run_after(change: Callable[[Program, Any], object]) -> Callable[[Program], None]:
    def program(p: Program) -> None:
        context = p.context()
        p.run(context)
        change(p, context)
        p.run(context)

    return program


def shared(**sizes: int) -> Callable[[Program], None]:
    """A pass of several conversations with other sizes than those that the third profile takes."""
    return lambda p: p.context(2, SHARED._replace(**sizes)) and None


def captured(call: Callable[[Program], object]) -> Callable[[Program], None]:
    def program(p: Program) -> None:
        p.begin()
        call(p)

    return program


def copy_and(touch: str) -> Callable[[Program], None]:
    def program(p: Program) -> None:
        (p.up if touch == "source" else p.down)(p.host, p.allocate(64))
        p.write(p.host)
        p.wait()

    return program


def freed_host(p: Program) -> None:
    p.up(p.host, p.allocate(64))
    p.cuda.cudaFreeHost(p.host)
    p.wait()


def budget(p: Program) -> None:
    context = p.context()
    p.engine.weight_streaming_budget_v2 = 1
    assert context is not None


def end(p: Program) -> None:
    p.machine.check_given_back()


def cold_capture(p: Program) -> None:
    context = p.context()
    p.run(context)
    context.set_input_shape("agent_rows", (2,))
    p.begin()
    context.execute_async_v3(p.stream)


def unwritten(p: Program, context: Any) -> None:
    cache = p.allocate(1 << 14, None)
    for name in (PAST, PRESENT):
        context.set_tensor_address(name, cache)


PROGRAMS: list[tuple[str, Callable[[Program], None]]] = [
    ("static capacity", run_after(lambda p, c: c.set_input_shape(PAST, (1, 1, SLOTS + 1, 4)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("input_ids", (1, 9)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("head_rows", (5,)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("agent_rows", (0,)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("agent_mix", (3, 1)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("grid", (2, 2)))),
    ("profile", run_after(lambda p, c: c.set_input_shape("hidden_rows", (9,)))),
    ("profile", run_after(lambda p, c: c.set_input_shape(PAST, (2, 1, SLOTS, 4)))),
    *[("profile", shared(**beyond)) for beyond in BEYOND],
    ("static capacity", run_after(lambda p, c: c.set_input_shape("agents.0.weight", (1, 2, 4)))),
    ("profile first", run_after(lambda p, c: c.set_optimization_profile_async(1, p.stream))),
    ("addresses", run_after(lambda p, c: c._addresses.pop("margins"))),
    ("in place", run_after(lambda p, c: c.set_tensor_address(PRESENT, p.allocate(1 << 14)))),
    ("device memory", run_after(lambda p, c: c.set_tensor_address("logits", p.allocate(64)))),
    ("device memory", run_after(lambda p, c: p.cuda.cudaFree(c._addresses["margins"]))),
    ("device memory", lambda p: [p.cuda.cudaFree(a) for a in [p.allocate(64)] * 2] and None),
    ("aligned", run_after(lambda p, c: c.set_tensor_address("margins", p.allocate(512) + 128))),
    ("pinned", lambda p: p.up(0x1000, p.allocate(64))),
    ("pinned", freed_host),
    ("untouched", copy_and("source")),
    ("untouched", copy_and("target")),
    ("written", run_after(unwritten)),
    ("activations", run_after(lambda p, c: c.set_device_memory(p.allocate(64), 64))),
    ("activations", run_after(lambda p, c: c.set_device_memory(0, 0))),
    ("one before capture", cold_capture),
    ("unchanged graph", launch_after(lambda c: c.set_input_shape("agent_rows", (2,)))),
    ("unchanged graph", launch_after(lambda c: c.set_tensor_address("margins", c._addresses["logits"]))),
    ("nothing else in capture", captured(lambda p: p.cuda.cudaMalloc(1))),
    ("nothing else in capture", captured(lambda p: p.cuda.cudaFreeHost(p.host))),
    ("nothing else in capture", captured(lambda p: p.wait())),
    ("nothing else in capture", captured(lambda p: p.engine.create_execution_context())),
    ("stream", lambda p: p.context().execute_async_v3(0) and None),
    ("stream", lambda p: p.cuda.cudaMemsetAsync(p.allocate(8), 0, 8, 99) and None),
    ("budget first", budget),
    ("all given back", end),
]


@pytest.mark.parametrize(("rule", "program"), PROGRAMS, ids=[f"{i}-{rule}" for i, (rule, _) in enumerate(PROGRAMS)])
def test_a_rule_that_is_broken_is_named(tmp_path: Path, rule: str, program: Callable[[Program], None]) -> None:
    with pytest.raises(Broken) as caught:
        program(Program(tmp_path))
    assert caught.value.rule == rule


def test_every_rule_has_a_program_that_breaks_it() -> None:
    assert {rule for rule, _ in PROGRAMS} == set(RULES)


def test_a_pass_of_several_conversations_within_the_bounds_runs(tmp_path: Path) -> None:
    p = Program(tmp_path)
    most = SHARED._replace(conversations=3, width=4, rows=12, heads=12, asked=12)
    for sizes in (SHARED, most):
        context = p.context(2, sizes)
        context.set_tensor_address("logits", p.allocate(1 << 16))
        p.run(context)


def test_two_sides_must_not_share_memory(tmp_path: Path) -> None:
    p = Program(tmp_path, in_place=False)
    with pytest.raises(Broken, match="in place"):
        p.run(p.context())


def test_what_is_read_too_early_is_not_there_yet(tmp_path: Path) -> None:
    p = Program(tmp_path)
    p.down(p.host, p.allocate(64))
    assert set(p.cuda._pinned(p.host, 64)) == {255}
    p.wait()
    assert set(p.cuda._pinned(p.host, 64)) == {0}
