"""What ONNX Runtime's CUDA build does with our graphs and our engine, counted by the pass (tests/cuda/fake.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.gpu_work import WIDTHS
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from tests.cuda.child import RUNS
from tests.cuda.count import KINDS
from tests.cuda.fake import Calls, FakeCuda, Result

pytestmark = pytest.mark.long

CAPABILITIES = (80, 87, 89, 90)
"""Of an A100, an Orin, an L4 or GeForce 40, and an H100, times ten."""
CASES = [
    *(("demo", precision, capability) for precision in ("fp16", "int8", "int4") for capability in CAPABILITIES),
    *((architecture, "fp16", 87) for architecture in ("qwen3", "llama", "mistral")),
]
LAUNCHES_OF_A_LAYER, OTHER_LAUNCHES = 26, 65
"""At most, kernels and calls of cuBLAS."""
WAITS = 3
"""At most, of a pass: after its upload, its run and its download."""
SHAPE_OPS = {"Concat", "Gather", "Slice", "Squeeze", "Unsqueeze"}
"""May run on the CPU, of the nodes that compute shapes; ONNX Runtime puts them there by itself, beside their inputs."""
WIDE = "prompt of 256"
"""More rows than a binding is kept for: it is made, with its two blocks, for each pass."""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def folder_and_result(
    request: pytest.FixtureRequest, fake: FakeCuda, bundle: Callable[[str, str], Path]
) -> tuple[Path, Result]:
    architecture, precision, capability = request.param
    folder = bundle(architecture, precision)
    return folder, fake.run(capability, "tests.cuda.child", "passes", str(folder))


@pytest.fixture(scope="module")
def result(folder_and_result: tuple[Path, Result]) -> Result:
    return folder_and_result[1]


@pytest.fixture(scope="module")
def layers(folder_and_result: tuple[Path, Result]) -> int:
    return Bundle.open(folder_and_result[0]).manifest.model.shape.num_layers


def settled(result: Result, label: str) -> Iterator[tuple[str, Calls]]:
    """The passes that have run before in the same shape, but those of full outputs; label: eager or graphs."""
    for name, calls in result.passes.items():
        again = name.endswith(("later", *(f"run {run}" for run in range(1, RUNS))))
        if name.startswith(label) and again and "full" not in name.split(": ")[1]:
            yield name, calls


def test_every_node_runs_on_cuda_but_a_few_of_shapes(result: Result) -> None:
    nodes = result.said["nodes"]
    assert {provider for provider, *_ in nodes} == {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert not [name for _, operator, name in nodes if operator.startswith("Memcpy")]
    on_cpu = [(operator, name) for provider, operator, name in nodes if provider == "CPUExecutionProvider"]
    assert [name for operator, name in on_cpu if operator not in SHAPE_OPS] == []
    assert len(on_cpu) <= 14


def test_inputs_and_outputs_take_one_copy_each(result: Result) -> None:
    counted = {
        name: (len(calls.copied("host-to-device")), len(calls.copied("device-to-host")))
        for label in ("eager", "graphs")
        for name, calls in settled(result, label)
    }
    assert counted
    assert {name: count for name, count in counted.items() if WIDE not in name and count != (1, 1)} == {}
    assert {count for name, count in counted.items() if WIDE in name} == {(3, 1)}


def test_launches_and_waits_are_bounded(result: Result, layers: int) -> None:
    most = OTHER_LAUNCHES + LAUNCHES_OF_A_LAYER * layers
    counted = {name: len(calls.kernels) + calls.products for name, calls in settled(result, "eager")}
    assert {name: count for name, count in counted.items() if not layers < count <= most} == {}
    waits = {name: calls.waits for name, calls in settled(result, "eager") if WIDE not in name}
    assert {name: count for name, count in waits.items() if count > WAITS} == {}


def test_attention_of_wide_passes_is_fused(result: Result, layers: int) -> None:
    wide = ("prompt of 20,", "prompt of 256,", "40 candidates,")
    fused = {
        name: sum(KINDS["fused"] in kernel for kernel in calls.kernels)
        for name, calls in settled(result, "eager")
        if any(part in name for part in wide)
    }
    assert len(fused) > 2 * len(wide)
    assert {name: count for name, count in fused.items() if count != layers} == {}


def test_nothing_is_allocated_and_the_cache_is_not_copied(result: Result) -> None:
    for name, calls in settled(result, "eager"):
        assert calls.allocations == [], name
        if any(f"{rows} candidates" in name for rows in WIDTHS[:3]):
            assert max(calls.copied("device-to-device")) < result.said["entries"] / 4, name


@pytest.mark.parametrize("rows", WIDTHS[:3])
def test_quantised_weights_are_multiplied_as_they_are(result: Result, rows: int) -> None:
    """Few rows need not widen all weights first."""
    kernels = result.passes[f"eager: {rows} candidates, later"].kernels
    assert not [name for name in kernels if "Dequantize" in name]


def test_a_repeated_pass_is_one_replay(result: Result) -> None:
    assert result.said["graphs"] is True
    for name, calls in settled(result, "graphs"):
        expected = (0, 1) if WIDE not in name else (1, 0)
        assert (min(len(calls.kernels), 1), calls.replays) == expected, name
    assert any(calls.captured for calls in result.passes.values())


def test_a_cleared_cache_keeps_its_graphs(result: Result) -> None:
    """ONNX Runtime frees none before its session: graphs of memory that is gone would pile up."""
    calls = result.passes["graphs: cleared"]
    assert (calls.captured, calls.replays, calls.allocations) == (0, 6, [])


def test_agents_that_change_keep_graphs_and_memory_and_take_no_copy_of_a_pass(result: Result) -> None:
    for agents in range(3):
        turn = f"{agents} agents, turn 2"
        change, replay = result.passes[f"graphs: {turn}"], result.passes[f"graphs: {turn}, pass 0"]
        assert len(change.copied("host-to-device")) == len(tensors.agent_weights(1))
        assert (replay.captured, replay.kernels, replay.replays) == (0, [], 1)
        assert change.allocations == replay.allocations == []
        bound = result.passes[f"eager: {turn}, pass 1"]
        assert [len(calls.copied("host-to-device")) for calls in (replay, bound)] == [1, 1]


def test_captures_and_replays_do_nothing_that_is_forbidden(result: Result) -> None:
    assert {name: calls.wrong for name, calls in result.passes.items() if calls.wrong} == {}
