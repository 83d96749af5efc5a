"""How a TensorRT engine is opened or refused, on the double; what is refused by NVIDIA's own runtime."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.engines import open_engine, trt_file
from mara_runtime.engines import tensorrt as trt_engine
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError
from tests.conformance import chain, siblings
from tests.double.machine import Machine
from tests.unit.test_trt_engine import advance, bundle
from tests.unit.written_model import SLOTS

INSTALLED = "10.16.1.11"
COMPATIBLE = {"version_compatible": True}


def refused(made: Any) -> str:
    """The one line with which an engine is refused, here or in its first prompt; all memory is given back."""
    with pytest.raises(EngineError) as caught:
        TrtEngine(made, "tensorrt").run(chain([1] * 30, head_rows=[29]))
    message = str(caught.value)
    assert "\n" not in message
    del caught
    gc.collect()
    return message


def test_auto_opens_the_engine_and_describes_it(tmp_path: Path, machine: Machine) -> None:
    engine, declined = open_engine(bundle(tmp_path), "auto")
    assert isinstance(engine, TrtEngine)
    assert declined == {}
    facts = engine.describe()
    expected = {
        "name": "tensorrt", "version": f"tensorrt {INSTALLED}", "gpu": "Double", "compute_capability": "8.7",
        "driver": "13.2",
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    memory = facts["memory"]
    assert (memory["slots"], memory["activation_bytes"]) == (SLOTS, 4096)
    assert memory["kv_cache_bytes"] >= 2 * SLOTS * 4 * 4
    engine.close()


def test_auto_goes_on_to_the_next_engine_when_one_cannot_be_opened(tmp_path: Path, machine: Machine) -> None:
    made = bundle(tmp_path)
    path = made.path(made.manifest.engines[0].file)
    path.write_bytes(b"not an engine")
    made = replace(made, manifest=replace(made.manifest, targets=("tensorrt", "cpu")))
    engine, declined = open_engine(made)
    assert engine.describe()["name"] == "cpu"
    assert f"cannot open {path}" in declined["tensorrt"]


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"version": "10.3.0"}, ("TensorRT 10.3.0", INSTALLED)),
        ({"version": "11.1.0", "options": COMPATIBLE}, ("TensorRT 11.1.0", INSTALLED)),
        ({"version": "10.17.0", "options": COMPATIBLE}, ("TensorRT 10.17.0", INSTALLED)),
        ({"version": "10.14.0", "options": COMPATIBLE}, ()),
        ({"compute_capability": "9.0"}, ("9.0", "8.7")),
        ({"compute_capability": "8.9+"}, ("8.9+", "8.7")),
        ({"compute_capability": "8.6, 8.9"}, ("8.6, 8.9", "8.7")),
        ({"compute_capability": "8.0+"}, ()),
        ({"compute_capability": "8.6, 8.7"}, ()),
        ({"platform": "linux-riscv"}, ("linux-riscv",)),
    ],
    ids=str,
)
def test_an_engine_for_another_machine_is_refused_with_the_command_that_builds_it(
    tmp_path: Path, machine: Machine, facts: dict[str, Any], named: tuple[str, ...]
) -> None:
    made = bundle(tmp_path, file={"lean_runtime": "options" in facts}, **facts)
    if named:
        message = refused(made)
        assert all(each in message for each in named)
        assert message.endswith(f"mara-build {tmp_path} --target tensorrt")
    else:
        engine = TrtEngine(made, "tensorrt")
        advance(engine, 0)
        engine.close()


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


def test_a_runtime_that_does_not_start_is_one_line(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(logger: Any) -> Any:
        logger.log(machine.trt.ILogger.Severity.ERROR, "CUDA initialization failure\nwith error 3")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(machine.trt, "Runtime", none)
    assert refused(bundle(tmp_path)).endswith(": CUDA initialization failure with error 3")


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (b"", "Serialization assertion failed (magicTag)"),
        (b"not an engine", "Serialization assertion failed (magicTag)"),
        ({"in_place": False}, "present.0.key"),
        ({"slots": SLOTS + 1}, f"('B', 1, {SLOTS}, 4)"),
        ({"profiles": 1}, "profile 1"),
        ({"activation_bytes": 1 << 40}, "MiB"),
    ],
    ids=str,
)
def test_a_file_that_is_damaged_unfit_or_too_large_is_refused(
    tmp_path: Path, machine: Machine, file: Any, named: str
) -> None:
    made = bundle(tmp_path, file=None if isinstance(file, bytes) else file)
    if isinstance(file, bytes):
        made.path(made.manifest.engines[0].file).write_bytes(file)
    assert named in refused(made)


@pytest.mark.parametrize("content", [b"", b"not an engine" * 1000], ids=["empty", "other"])
def test_nvidia_s_runtime_refuses_what_is_no_engine_in_its_words(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is for Linux on x86-64")
    monkeypatch.setattr(trt_file, "load", lambda target: trt)  # the interface is TensorRT's; the memory is the double's
    made = bundle(tmp_path, version=trt.__version__)
    path = made.path(made.manifest.engines[0].file)
    path.write_bytes(content)
    message = refused(made)
    assert message.startswith(f"TensorRT {trt.__version__} cannot open {path} (")
    assert "Error Code" in message
    assert message.endswith(f"build it again on this machine with mara-build {tmp_path} --target tensorrt")


@pytest.mark.parametrize("total", [1000, 60_000])
def test_too_little_memory_at_any_stage_is_refused(tmp_path: Path, machine: Machine, total: int) -> None:
    made = bundle(tmp_path, file={"activation_bytes": 1 << 30})
    machine.cuda.total_bytes = total
    message = refused(made)
    assert "the GPU has no " in message
    assert "0 MiB are free" in message


# ── streamed weights ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("room", [0, 1])
def test_weights_are_streamed_only_where_they_do_not_fit_with_the_activations(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(Cuda, "free_bytes", lambda self: 5000 + 4096 + room)
    machine.trt.automatic_budget = 3000
    engine = TrtEngine(bundle(tmp_path, file={"streamable_weights_bytes": 5000}), "tensorrt")
    advance(engine, *range(6))
    facts = engine.describe()
    assert facts["memory"]["streamed_weight_bytes"] == (0 if room else 2000)
    assert facts["cuda_graphs"] is True if room else "streamed" in facts["cuda_graphs"]
    engine.close()


def test_a_refused_budget_streams_all_weights_or_refuses_the_engine(tmp_path: Path, machine: Machine) -> None:
    machine.trt.automatic_budget, machine.trt.refused_budgets = 3000, {3000}
    size = machine.cuda.total_bytes
    made = bundle(tmp_path, file={"streamable_weights_bytes": size})
    engine = TrtEngine(made, "tensorrt")
    advance(engine, 0)
    assert engine.describe()["memory"]["streamed_weight_bytes"] == size
    engine.close()
    machine.trt.refused_budgets = {0, 3000}
    message = refused(made)
    assert "3,000 bytes" in message
    assert message.endswith(f"mara-build {tmp_path} --target tensorrt")


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

    assert (compiled(), compiled()) == (3, 0)
    (path,) = (tmp_path / "cache" / "mara-deploy").iterdir()
    machine.trt.__version__ = "10.16.2"
    later = tuple(replace(facts, version="10.16.2") for facts in made.manifest.engines)
    made = replace(made, manifest=replace(made.manifest, engines=later))
    assert compiled() == 3
    path.write_bytes(b"damaged")
    assert (compiled(), compiled()) == (3, 0)
