"""The builder against NVIDIA's own parser and builder: TensorRT for RTX, which needs no GPU to build.

What only a device can tell - that an engine runs, and how fast - is not here.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mara_export.progress import Progress
from mara_export.tensorrt import network as parts
from mara_export.tensorrt.build import BuildOptions, build, why_cannot_build
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda
from mara_runtime.errors import EngineError, MaraError
from tests import checkpoints
from tests.tensorrt.conftest import MAX_CANDIDATES, MAX_CONTEXT

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")

ROOT = Path(__file__).resolve().parents[2]
RTX = "tensorrt-rtx"
SLOTS = 176  # MAX_CONTEXT + MAX_CANDIDATES + 17, and up to a multiple of 16
CACHE = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "HALF", "int4": "HALF"}
COVERING = [
    ("qwen2", "fp16", "portable"),
    ("qwen3", "int4", "portable"),
    ("llama", "int8", "portable"),
    ("mistral", "bf16", "portable"),
    ("llama", "fp32", "portable"),
    ("qwen3", "fp16", "decomposed"),
    ("qwen2", "int4", "decomposed"),
    ("mistral", "int8", "decomposed"),
]
"""Every pair of architecture, precision and lowering that differs in the builder; the rest is left to `test-long`."""
CASES = [
    pytest.param(*case, marks=() if case in COVERING else pytest.mark.long)
    for case in product(checkpoints.ARCHITECTURES, CACHE, ("portable", "decomposed"))
]


@pytest.fixture
def copied(bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Bundle]:
    """(architecture="qwen2", precision="fp16") → a bundle that a test may change."""

    def copy(architecture: str = "qwen2", precision: str = "fp16", lowering: str = "portable") -> Bundle:
        source = bundle(architecture, precision, lowering)
        return Bundle.open(shutil.copytree(source, tmp_path / source.name))

    return copy


@pytest.fixture
def network(bundle: Callable[..., Path]) -> Callable[..., parts.Network]:
    def parse(architecture: str = "qwen2", precision: str = "fp16", lowering: str = "portable") -> parts.Network:
        return parts.Network(trt, bundle(architecture, precision, lowering) / "step.onnx", SLOTS)

    return parse


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(bundle.path("step.onnx")), load_external_data=False)


def weight_bytes(bundle: Bundle) -> int:
    """Of the graph's matrices, each counted once where two names share its bytes."""
    places: dict[str, int] = {}
    for tensor in graph_of(bundle).graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if facts:
            places[facts["offset"]] = int(facts["length"])
    return sum(places.values())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Noted(Progress):
    """Remembers what the user is told, and calls `at` at the first sign of life of the builder."""

    def __init__(self, at: Callable[[], None] = lambda: None) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []
        self.told: list[tuple[str, int, int]] = []
        self._at = at

    def note(self, what: str) -> None:
        self.notes.append(what)

    @contextmanager
    def phases(self) -> Iterator[Callable[[str, int, int], None]]:
        def tell(phase: str, done: int, steps: int) -> None:
            self.told.append((phase, done, steps))
            if len(self.told) == 1:
                self._at()

        yield tell


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("architecture", "precision", "lowering"), CASES)
def test_an_engine_of_every_architecture_and_precision(
    copied: Callable[..., Bundle], architecture: str, precision: str, lowering: str
) -> None:
    before = copied(architecture, precision, lowering)
    progress = Noted()
    after = build(before, RTX, None, progress)
    assert Bundle.open(before.folder) == after  # every file with the size and checksum that the new manifest gives
    assert {name: e for name, e in after.manifest.files.items() if name in before.manifest.files} == (
        before.manifest.files
    )
    (engine,) = after.manifest.engines
    assert RTX in after.manifest.targets
    assert engine.target == RTX
    assert engine.file.startswith(f"engines/{RTX}/step-{SLOTS}-")
    assert (engine.slots, engine.decode_rows, engine.prefill_rows, engine.head_rows) == (SLOTS, 34, SLOTS, 17)
    assert engine.slots >= MAX_CONTEXT + tensors.spare_slots(MAX_CANDIDATES)
    assert engine.in_place == (lowering == "portable")
    assert (engine.version, engine.compute_capability) == (trt.__version__, "8.0+")

    layers, counts = engine.options["layers"], Counter(node.op_type for node in graph_of(before).graph.node)
    depth = before.manifest.model.shape.num_layers
    if lowering == "portable":
        assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == depth
        assert layers["KV_CACHE_UPDATE"] == layers["ROTARY_EMBEDDING"] == 2 * depth
    else:
        assert not {"ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING"} & set(layers)
    assert layers["MATRIX_MULTIPLY"] == counts["MatMul"] + counts["Gemm"]
    assert layers.get("DEQUANTIZE", 0) == counts["DequantizeLinear"]
    assert (counts["DequantizeLinear"] > 0) == (precision in ("int8", "int4"))
    assert layers["TOPK"] == counts["TopK"] + counts["ArgMax"] == 2
    assert after.manifest.files[engine.file].size_bytes > weight_bytes(before)

    fused = precision != "fp32" or lowering != "portable"  # NVIDIA has no fused attention in float32
    assert engine.options["decomposable"] == ([] if fused else "all")
    assert any("no fused attention kernel for any layer" in note for note in progress.notes) == (not fused)


@pytest.mark.parametrize("precision", list(CACHE))
def test_the_cache_is_updated_in_place_and_the_llm_computes_in_its_type(
    network: Callable[..., parts.Network], precision: str
) -> None:
    parsed = network("llama", precision)
    inside = parsed.network
    layers = [inside.get_layer(i) for i in range(inside.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    assert {(u.get_input(0).name, u.get_output(0).name) for u in updates} == set(tensors.kv_names(3))
    for update in updates:
        assert update.get_input(0).is_network_input
        assert update.get_output(0).is_network_output
        assert update.get_output(0).dtype.name == CACHE[precision]
        assert tuple(update.get_output(0).shape) == (1, 2, SLOTS, 16)
    outputs = {inside.get_output(i).name: inside.get_output(i).dtype.name for i in range(inside.num_outputs)}
    assert {outputs[name] for name in (tensors.MARGINS, tensors.LOGITS, tensors.TOP_LOGITS)} == {"FLOAT"}
    types = {
        layer.name: layer.get_input(0).dtype.name for layer in layers if layer.type == trt.LayerType.MATRIX_MULTIPLY
    }
    of_agent = {kind for name, kind in types.items() if name.startswith("agent/")}
    of_llm = {kind for name, kind in types.items() if not name.startswith("agent/")}
    assert (of_agent, of_llm) == ({"FLOAT"}, {CACHE[precision]})


def test_both_profiles_cover_what_decoding_asks_for(
    copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    real = parts.Network.config

    def config(self: parts.Network, profiles: Any) -> Any:
        asked.extend(profiles)
        assert real(self, profiles).num_optimization_profiles == 2
        raise EngineError("that is enough")

    monkeypatch.setattr(parts.Network, "config", config)
    assert refused(copied()) == "that is enough"
    rows, head_rows = tensors.spare_slots(MAX_CANDIDATES) + 1, tensors.DRAFT_ROWS + 1
    (decode, prefill) = asked
    assert (decode[0], decode[2]) == ((1, 1, 1), (rows, head_rows, rows))
    assert (prefill[0], prefill[2]) == ((1, 1, 1), (SLOTS, head_rows, SLOTS))
    for least, best, most in asked:
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))


def test_int4_weights_stay_packed(copied: Callable[..., Bundle]) -> None:
    # Two to a byte, transposed, each matrix once: an engine that widened them would be four times as large.
    bundle = build(copied("qwen2", "int4"), RTX)
    plan = bundle.path(bundle.manifest.engines[0].file).read_bytes()
    weights = [t for t in graph_of(bundle).graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert weights
    for tensor in weights:
        values = numpy_helper.to_array(tensor, str(bundle.folder)).astype(np.int8).T.reshape(-1)
        packed = ((values[0::2] & 15) | ((values[1::2] & 15) << 4)).astype(np.uint8).tobytes()
        assert plan.count(packed) == 1, tensor.name


def test_float32_is_not_rounded(network: Callable[..., parts.Network]) -> None:
    parsed = network()
    assert parsed._builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)  # on by default
    assert not parsed.config([((1, 1, 1),) * 3]).get_flag(trt.BuilderFlag.TF32)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_the_weights_are_counted_as_they_are_and_as_wide_ones(
    bundle: Callable[..., Path], network: Callable[..., parts.Network], precision: str
) -> None:
    parsed = network("qwen3", precision)
    here = Bundle.open(bundle("qwen3", precision))
    integers = [t for t in graph_of(here).graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.INT4)]
    assert parsed.weight_bytes == weight_bytes(here)
    saved = sum(math.prod(t.dims) for t in integers) * {"fp16": 0, "int8": 2 - 1, "int4": 2 - 0.5}[precision]
    assert parsed.wide_weight_bytes == parsed.weight_bytes + saved
    assert bool(integers) == (precision != "fp16")


@pytest.mark.parametrize(
    ("precision", "widened", "told"), [("int8", True, True), ("int8", False, False), ("fp16", True, False)]
)
def test_weights_that_were_widened_are_told_of(
    copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, precision: str, widened: bool, told: bool
) -> None:
    def built(self: parts.Network, *_: Any) -> tuple[bytes, list[str]]:
        return bytes(self.wide_weight_bytes if widened else self.wide_weight_bytes - 1), []

    monkeypatch.setattr(parts.Network, "build", built)
    progress = Noted()
    build(copied("qwen2", precision), RTX, None, progress)
    assert progress.notes == []  # too small a model to tell
    monkeypatch.setattr("mara_export.tensorrt.build.KERNEL_BYTES", 0)
    build(copied("llama", precision), RTX, None, progress)
    assert len(progress.notes) == told
    assert all("seems to have widened the int8 weights" in note for note in progress.notes)


def test_several_capacities_and_gpus(copied: Callable[..., Bundle]) -> None:
    bundle = build(copied(), RTX, BuildOptions(capacities=(32,), compute_capabilities=("8.6", "12.0")))
    found = [(e.slots, e.prefill_rows, e.compute_capability) for e in bundle.manifest.engines]
    assert found == [(80, 80, "8.6, 12.0"), (SLOTS, SLOTS, "8.6, 12.0")]
    same = BuildOptions(weight_streaming=True, compute_capabilities=("8.6", "12.0", "8.6"), optimisation_level=1)
    bundle = build(bundle, RTX, same)
    assert [(e.slots, e.options["weight_streaming"]) for e in bundle.manifest.engines] == [(80, False), (SLOTS, True)]
    bundle = build(bundle, RTX, BuildOptions(workspace_mib=1024))  # for other GPUs: the rest could not run with it
    assert [(e.slots, e.compute_capability) for e in bundle.manifest.engines] == [(SLOTS, "8.0+")]
    assert [f"engines/{name}" for name in files(bundle.folder / "engines")] == [bundle.manifest.engines[0].file]
    assert Bundle.open(bundle.folder) == bundle


def test_one_layer_without_a_fused_kernel(copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    # A builder that names the layer: the others stay fused.
    real, calls = parts.Network._run, []
    layer = "/model/layers.1/self_attn/CachedAttention/attention"

    def run(self: parts.Network, config: Any, tell: Any) -> tuple[Any, str]:
        calls.append({name: attention.decomposable for name, attention in self.attentions().items()})
        return (None, f"Error Code 10: no implementation for {layer}") if len(calls) == 1 else real(self, config, tell)

    monkeypatch.setattr(parts.Network, "_run", run)
    progress = Noted()
    bundle = build(copied(), RTX, None, progress)
    assert bundle.manifest.engines[0].options["decomposable"] == [layer]
    assert [set(call.values()) for call in calls] == [{False}, {False, True}]
    assert [name for name, apart in calls[1].items() if apart] == [layer]
    assert layer in progress.notes[0]


@pytest.mark.parametrize(("lowering", "way_out"), [("portable", True), ("decomposed", False)])
def test_attentions_that_cannot_be_built_either_way(
    copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, lowering: str, way_out: bool
) -> None:
    monkeypatch.setattr(parts.Network, "_run", lambda *_: (None, "Error Code 10: no kernel for this attention"))
    message = refused(copied("qwen2", "fp16", lowering))
    assert "cannot build the engine: no kernel for this attention" in message
    assert message.endswith(": export the bundle again with --lowering decomposed") == way_out


# ── nothing half-built ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_interrupt_stops_the_builder_and_leaves_nothing(copied: Callable[..., Bundle]) -> None:
    bundle = copied()
    before = files(bundle.folder)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)  # the builder's thread: Python handles the signal in the main one meanwhile

    progress = Noted(at=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, RTX, None, progress)
    assert files(bundle.folder) == before
    whole = Noted()
    build(bundle, RTX, None, whole)
    assert len(progress.told) < len(whole.told)
    assert len({phase for phase, _, _ in whole.told}) > 3
    assert any(done == steps > 1 for _, done, steps in whole.told)
    assert all(0 <= done <= steps for _, done, steps in whole.told)


def test_when_the_second_of_two_fails_nothing_is_kept(
    copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copied()
    before = files(bundle.folder)
    real, built = parts.Network.build, []

    def second_fails(self: parts.Network, *args: Any) -> Any:
        if built:
            raise EngineError("no memory left")
        built.append(self)
        return real(self, *args)

    monkeypatch.setattr(parts.Network, "build", second_fails)
    with pytest.raises(EngineError, match="no memory left"):
        build(bundle, RTX, BuildOptions(capacities=(32,)))
    assert files(bundle.folder) == before


# ── refusals: one line each ──────────────────────────────────────────────────────────────────────────────────────────


def refused(bundle: Bundle, target: str = RTX, **options: Any) -> str:
    """The message with which a build is refused; the bundle is as it was."""
    before = files(bundle.folder)
    with pytest.raises(MaraError) as caught:
        build(bundle, target, BuildOptions(**options))
    assert files(bundle.folder) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def damage(bundle: Bundle, change: Callable[[onnx.GraphProto], None]) -> Bundle:
    model = graph_of(bundle)
    change(model.graph)
    onnx.save(model, str(bundle.path("step.onnx")))
    return bundle


def first(graph: onnx.GraphProto, op: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == op)


def unknown_operator(graph: onnx.GraphProto) -> None:
    first(graph, "RMSNormalization").op_type = "RootMeanSquare"


def missing_node(graph: onnx.GraphProto) -> None:
    graph.node.remove(first(graph, "RMSNormalization"))


def wrong_axis(graph: onnx.GraphProto) -> None:
    next(a for a in first(graph, "TensorScatter").attribute if a.name == "axis").i = -1


def lost_layer(graph: onnx.GraphProto) -> None:
    node = first(graph, "RotaryEmbedding")
    node.op_type = "Identity"
    del node.input[1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_operator, r"^TensorRT for RTX \S+ cannot read step\.onnx: node \S+ \(RootMeanSquare\): "),
        (missing_node, r"cannot read step\.onnx: node "),
        (wrong_axis, r"node \S+ \(TensorScatter\): "),
        (lost_layer, r"read 3 ROTARY_EMBEDDING layers from the graph, which should have 4"),
    ],
)
def test_a_damaged_graph(
    copied: Callable[..., Bundle], change: Callable[[onnx.GraphProto], None], message: str
) -> None:
    assert re.search(message, refused(damage(copied(), change)))


def test_a_build_that_fails(copied: Callable[..., Bundle]) -> None:
    message = refused(copied(), workspace_mib=1)
    assert message.startswith(f"TensorRT for RTX {trt.__version__} cannot build the engine: ")
    assert "workspace" in message
    assert "/_src/" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # TensorRT for RTX names Turing among its GPUs, and then has no kernel for a Gemm in float32
        ({"compute_capabilities": ("7.5",)}, "--compute-capability is '7.5'; .* builds for 8.0"),
        ({"compute_capabilities": ("8.6", "9.9")}, "--compute-capability is '9.9'; .* 8.6, 8.9, 12.0"),
        ({"hardware": "ampere-plus"}, "--hardware is for tensorrt; "),
        ({"version_compatible": True}, "--version-compatible is for tensorrt; "),
        ({"timing_cache": Path("a.timings")}, "--timing-cache is for tensorrt; "),
        ({"capacities": (129,)}, "--capacity is 129; .* 128 tokens"),
    ],
)
def test_options_that_tensorrt_for_rtx_does_not_take(
    copied: Callable[..., Bundle], options: dict[str, Any], message: str
) -> None:
    assert "SM75" in trt.ComputeCapability.__members__
    assert re.search(message, refused(copied(), **options))


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_graph_that_cannot_be_read(copied: Callable[..., Bundle], damage: str) -> None:
    # with --no-verify nobody has looked at it yet
    bundle = copied()
    graph = bundle.path("step.onnx")
    whole = graph.read_bytes()
    graph.unlink()
    if damage == "cut":
        graph.write_bytes(whole[:-3])
    assert "step.onnx cannot be read: " in refused(bundle)


def test_where_no_engine_can_go(copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "Network", None)  # would be a TypeError: it comes to no build
    bundle = copied()
    (bundle.folder / "engines").touch()
    assert refused(bundle).startswith(f"cannot write {bundle.folder}: ")


# ── TensorRT itself, where it is not, or not as it should be ─────────────────────────────────────────────────────────


def test_without_tensorrt_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    reason = why_cannot_build("tensorrt")
    assert reason is not None
    assert "pip install 'mara-deploy[tensorrt]'" in reason
    assert "JetPack" in reason
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings" in str(why_cannot_build(RTX))
    assert "not one of tensorrt, tensorrt-rtx" in str(why_cannot_build("cuda"))


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str, gpus: int, status: int = 100) -> None:
    """A TensorRT and a CUDA that are asked for nothing but their version and the GPUs; status: where there is none."""
    module = types.ModuleType("tensorrt")
    module.__dict__.update(__version__=version, HardwareCompatibilityLevel=types.SimpleNamespace(NONE=0))
    runtime = types.ModuleType("cuda.bindings.runtime")
    major, minor = object(), object()
    runtime.__dict__.update(
        cudaGetDeviceCount=lambda: (0, gpus) if gpus else (status, 0),
        cudaGetErrorString=lambda status: (0, b"no CUDA-capable device is detected"),
        cudaDeviceAttr=types.SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=major, cudaDevAttrComputeCapabilityMinor=minor
        ),
        cudaDeviceGetAttribute=lambda what, device: (0, {major: 8, minor: 7}[what]),
    )
    bindings = types.ModuleType("cuda.bindings")
    bindings.__dict__.update(runtime=runtime)
    modules = {"tensorrt": module, "cuda": types.ModuleType("cuda"), "cuda.bindings": bindings}
    for name, value in {**modules, "cuda.bindings.runtime": runtime}.items():
        monkeypatch.setitem(sys.modules, name, value)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "10.16.1.11", gpus=0)
    reason = str(why_cannot_build("tensorrt"))
    assert "no NVIDIA GPU can be used (no CUDA-capable device is detected (100))" in reason
    assert cuda.FOR_CUDA_12 not in reason
    stand_in(monkeypatch, "10.16.1.11", gpus=0, status=35)
    for driver, told in ((True, cuda.FOR_CUDA_12), (False, "no driver is installed")):
        monkeypatch.setattr(cuda, "_has_driver", lambda found=driver: found)
        assert told in str(why_cannot_build("tensorrt"))
    stand_in(monkeypatch, "10.16.1.11", gpus=1)
    assert why_cannot_build("tensorrt") is None


def test_a_tensorrt_that_is_too_old(monkeypatch: pytest.MonkeyPatch, copied: Callable[..., Bundle]) -> None:
    stand_in(monkeypatch, "8.6.1", gpus=1)
    assert "TensorRT 8.6.1 is too old" in refused(copied(), "tensorrt")


def test_jetpack_6_and_a_graph_with_an_in_place_cache(
    monkeypatch: pytest.MonkeyPatch, copied: Callable[..., Bundle]
) -> None:
    stand_in(monkeypatch, "10.3.0", gpus=1)
    message = refused(copied(), "tensorrt")
    assert "TensorRT 10.3.0 cannot read the graph" in message
    assert "10.15 or later" in message
    assert "--lowering decomposed" in message


def test_options_that_this_tensorrt_does_not_know(
    monkeypatch: pytest.MonkeyPatch, copied: Callable[..., Bundle]
) -> None:
    stand_in(monkeypatch, "10.15.0", gpus=1)
    bundle = copied()
    assert "which TensorRT 10.15.0 does not know" in refused(bundle, "tensorrt", hardware="same-compute-capability")
    assert "--compute-capability is for tensorrt-rtx" in refused(bundle, "tensorrt", compute_capabilities=("8.9",))


def test_a_timing_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, copied: Callable[..., Bundle], tmp_path: Path
) -> None:
    stand_in(monkeypatch, "10.16.1.11", gpus=1)
    message = refused(copied(), "tensorrt", timing_cache=tmp_path / "nowhere" / "a.timings")
    assert message.startswith(f"--timing-cache is {tmp_path}/nowhere/a.timings, which cannot be written: ")


# ── the command, as on a Jetson ──────────────────────────────────────────────────────────────────────────────────────

WITHOUT = ("torch", "transformers", "optimum", "tqdm", "onnxruntime", "safetensors", "huggingface_hub")
BLOCK = f"""
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {WITHOUT!r}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocker())
from mara_deploy.commands.build import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_needs_onnx_and_tensorrt_alone(copied: Callable[..., Bundle]) -> None:
    bundle = copied("qwen3", "int4")
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, str(bundle.folder), "--target", RTX, "--capacity", "64"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = Bundle.open(bundle.folder)
    assert [engine.slots for engine in after.manifest.engines] == [112, SLOTS]
    for engine in after.manifest.engines:
        assert f"build engines/{RTX}/step-{engine.slots}" in done.stderr
        size = after.manifest.files[engine.file].size_bytes
        assert f"{engine.file}  ({size / 1e6:.1f} MB" in done.stdout
    assert "2 attention_input" in done.stdout
    line = f'mara-run {bundle.folder} --engine {RTX} --prompt "…" --top-k {MAX_CANDIDATES}'
    assert done.stdout.splitlines()[-1] == line


def test_the_command_refuses_a_graph_of_another_lowering(
    bundle: Callable[..., Path], copied: Callable[..., Bundle], command: Callable[..., Any]
) -> None:
    made = copied()
    manifest = made.path("manifest.json")
    manifest.write_text(manifest.read_text().replace('"lowering": "portable"', '"lowering": "ort"'))
    outcome = command("build", made.folder, "--target", RTX)
    assert (outcome.code, outcome.out) == (2, "")
    (line,) = outcome.err.splitlines()
    assert "lowering ort, which TensorRT cannot read: export it with --target tensorrt-rtx" in line
