"""The builder against NVIDIA's own parser and builder: TensorRT for RTX, which needs no GPU to build.

Only a device can tell whether an engine runs, and how fast. What surrounds the builder: tests/unit/test_build.py.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from mara_export.progress import Progress
from mara_export.targets import MOST_AGENTS
from mara_export.tensorrt import network as parts
from mara_export.tensorrt.build import BuildOptions, build
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines import trt_file
from mara_runtime.engines.io_block import Sizes
from mara_runtime.tensors import AGENT_WIDTHS
from tests import checkpoints
from tests.gpu.test_conformance import CAPACITIES, written_bundle
from tests.tensorrt.conftest import MAX_CANDIDATES, MAX_CONTEXT, RTX, files, refused
from tests.unit import written_model

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")

ROOT = Path(__file__).resolve().parents[2]
SLOTS = 176  # MAX_CONTEXT + MAX_CANDIDATES + 17, and up to a multiple of 16
CACHE = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "HALF", "int4": "HALF"}
COVERING = [
    ("qwen2", "fp16", "portable"),
    ("qwen3", "int4", "portable"),
    ("mistral", "bf16", "portable"),
    ("llama", "fp32", "portable"),
    ("qwen3", "fp16", "decomposed"),
    ("llama", "int8", "decomposed"),
]
"""Every architecture, precision and lowering; the other combinations are left to `test-long`."""
CASES = [
    pytest.param(*case, marks=() if case in COVERING else pytest.mark.long)
    for case in product(checkpoints.ARCHITECTURES, CACHE, ("portable", "decomposed"))
]


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


@dataclass(frozen=True)
class Built:
    before: Bundle
    after: Bundle
    progress: Noted


@pytest.fixture(scope="module")
def built(bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """(architecture, precision, lowering) → a bundle, and the same with its engine; not to be changed."""
    root = tmp_path_factory.mktemp("built")

    @cache
    def make(architecture: str, precision: str, lowering: str) -> Built:
        source = bundle(architecture, precision, lowering)
        progress, copy = Noted(), Bundle.open(shutil.copytree(source, root / source.name))
        return Built(Bundle.open(source), build(copy, RTX, None, progress), progress)

    return make


@pytest.fixture
def network(bundle: Callable[..., Path]) -> Callable[..., parts.Network]:
    def parse(architecture: str, precision: str) -> parts.Network:
        fixed = {"C": SLOTS, "W1": AGENT_WIDTHS[0], "W2": AGENT_WIDTHS[1]}
        return parts.Network(trt, bundle(architecture, precision) / "step.onnx", fixed)

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


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("architecture", "precision", "lowering"), CASES)
def test_an_engine_of_every_architecture_and_precision(
    built: Callable[..., Built], architecture: str, precision: str, lowering: str
) -> None:
    made = built(architecture, precision, lowering)
    before, after = made.before.manifest, made.after.manifest
    assert Bundle.open(made.after.folder) == made.after  # every file with the size and checksum of the new manifest
    assert before.files.items() <= after.files.items()
    (engine,) = after.engines
    assert RTX in after.targets
    assert engine.file.startswith(f"engines/{RTX}/step-{SLOTS}-")
    assert engine.slots == SLOTS >= MAX_CONTEXT + tensors.spare_slots(MAX_CANDIDATES)
    assert engine.in_place == (lowering == "portable")
    assert (engine.version, engine.compute_capability) == (trt.__version__, "8.0+")
    assert (engine.agents, engine.agent_widths) == (MOST_AGENTS, AGENT_WIDTHS)  # those of its agent are less

    graph = graph_of(made.before).graph
    layers, counts = engine.options["layers"], Counter(node.op_type for node in graph.node)
    depth = before.model.shape.num_layers
    if lowering == "portable":
        assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == depth
        assert layers["KV_CACHE_UPDATE"] == layers["ROTARY_EMBEDDING"] == 2 * depth
    else:
        assert not {"ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING"} & set(layers)
    assert layers["MATRIX_MULTIPLY"] == counts["MatMul"] + counts["Gemm"]
    assert layers.get("DEQUANTIZE", 0) == counts["DequantizeLinear"]
    assert (counts["DequantizeLinear"] > 0) == (precision in ("int8", "int4"))
    assert after.files[engine.file].size_bytes > weight_bytes(made.before)

    fused = precision != "fp32" or lowering != "portable"  # NVIDIA has no fused attention in float32
    assert engine.options["decomposable"] == ([] if fused else "all")
    assert any("no fused attention kernel for any layer" in note for note in made.progress.notes) == (not fused)

    # Int4 weights stay packed: two to a byte, transposed, each matrix once.
    packed = [t for t in graph.initializer if t.data_type == TensorProto.INT4]
    assert bool(packed) == (precision == "int4")
    plan = made.after.path(engine.file).read_bytes() if packed else b""
    for tensor in packed:
        values = numpy_helper.to_array(tensor, str(made.before.folder)).astype(np.int8).T.reshape(-1)
        pairs = ((values[0::2] & 15) | ((values[1::2] & 15) << 4)).astype(np.uint8).tobytes()
        assert plan.count(pairs) == 1, tensor.name


@pytest.mark.parametrize("precision", list(CACHE))
def test_the_cache_is_updated_in_place_and_the_llm_computes_in_its_type(
    bundle: Callable[..., Path], network: Callable[..., parts.Network], precision: str
) -> None:
    parsed = network("qwen3", precision)
    inside = parsed.network
    layers = [inside.get_layer(i) for i in range(inside.num_layers)]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    shape = Bundle.open(bundle("qwen3", precision)).manifest.model.shape
    assert {(u.get_input(0).name, u.get_output(0).name) for u in updates} == set(tensors.kv_names(shape.num_caches))
    for update in updates:
        assert update.get_input(0).is_network_input
        assert update.get_output(0).is_network_output
        assert update.get_output(0).dtype.name == CACHE[precision]
        assert tuple(update.get_output(0).shape) == (-1, shape.caches[0].kv_heads, SLOTS, shape.caches[0].head_dim)
    outputs = {inside.get_output(i).name: inside.get_output(i).dtype.name for i in range(inside.num_outputs)}
    assert {outputs[name] for name in (tensors.MARGINS, tensors.LOGITS, tensors.TOP_LOGITS)} == {"FLOAT"}
    inputs = {inside.get_input(i).name: tuple(inside.get_input(i).shape) for i in range(inside.num_inputs)}
    for weights in tensors.agent_weights(shape.hidden_size):  # their number is open, their widths are not
        assert inputs[weights.name] == Sizes(1, 1, 1, 1, 1, 1, -1, AGENT_WIDTHS).of(weights.shape)
    types: dict[bool, set[str]] = {True: set(), False: set()}
    for layer in layers:
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            types[layer.name.startswith("agents/")].add(layer.get_input(0).dtype.name)
    assert types == {True: {"FLOAT"}, False: {CACHE[precision]}}

    # Float32 is not rounded, which the builder does by default.
    builder = trt.Builder(trt_file.logger(trt))
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    ones = dict.fromkeys(("B", "M", "S", "H0", "N", "Q", "A"), (1, 1, 1))
    assert not parsed.config([ones]).get_flag(trt.BuilderFlag.TF32)

    # Weights are counted as they are stored, and as wide ones.
    here = Bundle.open(bundle("qwen3", precision))
    integers = [t for t in graph_of(here).graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.INT4)]
    saved = sum(math.prod(t.dims) for t in integers) * {"int8": 2 - 1, "int4": 2 - 0.5}.get(precision, 0)
    assert parsed.weight_bytes == weight_bytes(here)
    assert parsed.wide_weight_bytes == parsed.weight_bytes + saved
    assert bool(integers) == (precision in ("int8", "int4"))


def test_the_conformance_model_builds_with_the_slots_that_its_suite_counts_on(tmp_path: Path) -> None:
    """tests/gpu runs it on a device."""
    options = BuildOptions(capacities=CAPACITIES, optimisation_level=0)
    engines = build(written_bundle(RTX, tmp_path), RTX, options).manifest.engines
    assert [engine.slots for engine in engines] == [32, 48, written_model.SLOTS]
    assert not any(engine.in_place for engine in engines)
    assert [engine.options["layers"]["SCATTER"] for engine in engines] == [4] * 3


class Unfused(trt.Builder):  # type: ignore[misc]
    """A builder that has no fused kernel for the attentions it names, until those may be several kernels."""

    named: str
    works_apart: bool
    asked: list[list[str]]

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        inputs = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        for layer in inputs:
            layer.__class__ = trt.IAttentionInputLayer  # the binding returns the base class
        attentions = [layer.attention for layer in inputs]
        self.asked.append([attention.name for attention in attentions if attention.decomposable])
        if self.asked[-1] and self.works_apart:
            return b"plan"
        self.error_recorder.report_error(trt.ErrorCodeTRT.INTERNAL_ERROR, f"Error Code 10: no kernel for {self.named}")
        return None


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("named", ["/model/layers.1/self_attn/CachedAttention/attention", "this attention"])
def test_attentions_without_a_fused_kernel_may_be_several(
    copied: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, named: str, works: bool
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(
        trt, "Builder", type("Builder", (Unfused,), {"named": named, "works_apart": works, "asked": asked})
    )
    progress = Noted()
    which = [named] if named.startswith("/") else "all"
    if works:
        after = build(copied(), RTX, None, progress)
        assert after.manifest.engines[0].options["decomposable"] == which
    else:
        message = refused(copied())
        assert f"cannot build the engine: no kernel for {named}" in message
        assert message.endswith("--lowering decomposed")
        assert "--lowering" not in refused(copied(lowering="decomposed"))  # no way out
    assert asked[0] == []
    assert asked[1] == [named] if which != "all" else len(asked[1]) > 1
    assert all(named in note for note in progress.notes) or which == "all"


def test_an_interrupt_stops_the_builder_and_leaves_nothing(
    copied: Callable[..., Bundle], built: Callable[..., Built]
) -> None:
    bundle = copied()
    before = files(bundle.folder)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)  # the builder's thread: Python handles the signal in the main one meanwhile

    progress = Noted(at=interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, RTX, None, progress)
    assert files(bundle.folder) == before
    whole = built("qwen2", "fp16", "portable").progress.told
    assert len(progress.told) < len(whole)
    assert len({phase for phase, _, _ in whole}) > 3
    assert any(done == steps > 1 for _, done, steps in whole)
    assert all(0 <= done <= steps for _, done, steps in whole)


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


def test_the_command_builds_several_engines_with_onnx_and_tensorrt_alone(copied: Callable[..., Bundle]) -> None:
    bundle = copied("qwen3", "int4")
    options = "--capacity 64 --compute-capability 8.6,12.0,8.6 --weight-streaming --optimisation-level 0"
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, str(bundle.folder), "--target", RTX, *options.split()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = Bundle.open(bundle.folder)
    assert [(e.slots, e.prefill_rows) for e in after.manifest.engines] == [(112, 112), (SLOTS, SLOTS)]
    for engine in after.manifest.engines:
        assert (engine.compute_capability, engine.options["weight_streaming"]) == ("8.6, 12.0", True)
        assert f"build engines/{RTX}/step-{engine.slots}" in done.stderr
        size = after.manifest.files[engine.file].size_bytes
        assert f"{engine.file}  ({size / 1e6:.1f} MB" in done.stdout
    assert "2 attention_input" in done.stdout
    line = f'mara-run {bundle.folder} --engine {RTX} --prompt "…"'
    assert done.stdout.splitlines()[-1] == line
