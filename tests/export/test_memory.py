"""The memory model against real bundles, NVIDIA's real builder, and a process that decodes.

TensorRT for RTX builds without a GPU and reports what its engine's weights and activations take. That is the only check
of a workspace that there is without a device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mara_deploy import agent as agents
from mara_deploy import memory
from mara_deploy.commands.memory import find, of_bundle, parser
from mara_deploy.memory import Setting, estimate
from mara_export.export import finish
from mara_export.hf.sources import ModelSource
from mara_export.options import ExportOptions
from mara_export.tracing import Traced, trace
from mara_runtime.bundle import Bundle
from mara_runtime.engines import open_engine
from mara_runtime.engines.ort_banks import CpuMemory
from mara_runtime.tensors import spare_slots
from tests.checkpoints import named

CANDIDATES = 16
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
WIDE = {"intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 8192, "tie_word_embeddings": True}
UNTIED = {"intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 32768, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Bundle, Setting]]:
    """(model, target, precision, lowering, context=256) → a bundle with random weights, and its setting."""
    root = tmp_path_factory.mktemp("memory")

    @cache
    def checkpoint(name: str) -> Path:
        torch.manual_seed(0)
        decoder = (
            Qwen2ForCausalLM(Qwen2Config(**SIZES, **WIDE))
            if name == "wide"
            else LlamaForCausalLM(LlamaConfig(**SIZES, **UNTIED))
        )
        for parameter_name, parameter in decoder.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)  # zeros would be left out of the graph
        decoder.save_pretrained(root / name)
        return root / name

    @cache
    def traced(name: str, context: int) -> Traced:
        folder = root / f"{name}-{context}-trace"
        folder.mkdir()
        source, given = ModelSource(checkpoint(name), name, None), named(agents.untrained(256, seed=0))
        return trace(source, given, folder, max_context=context, max_candidates=CANDIDATES, gate=False)

    @cache
    def make(name: str, target: str, precision: str, lowering: str, context: int) -> tuple[Bundle, Setting]:
        sizes = {"max_context": context, "max_candidates": CANDIDATES}
        options = ExportOptions(target=target, precision=precision, lowering=lowering, **sizes, gate=False)
        out = root / f"{name}-{target}-{precision}-{lowering}-{context}"
        bundle = finish(traced(name, context), options, out)
        return bundle, Setting(target, precision, context, CANDIDATES, lowering=lowering)

    return lambda name, target, precision, lowering, context=256: make(name, target, precision, lowering, context)


def decoder_of(bundle: Bundle) -> Any:
    return find(str(bundle.folder.parent / bundle.manifest.model.source))[1]


@pytest.mark.parametrize(
    ("target", "precision", "lowering"),
    [
        ("cpu", "fp32", "ort"),
        ("cpu", "fp16", "ort"),
        ("cpu", "int8", "ort"),
        ("cuda", "int4", "ort"),
        ("tensorrt", "int4", "portable"),
    ],
)
def test_the_weights_of_a_bundle_are_as_large_as_computed(made, target, precision, lowering):
    bundle, setting = made("wide", target, precision, lowering)
    stored = bundle.path("step.onnx.data").stat().st_size
    assert memory.weight_bytes(decoder_of(bundle), setting) == pytest.approx(stored, rel=0.005)


def test_the_cache_is_what_an_engine_allocates(made):
    bundle, setting = made("wide", "cpu", "fp32", "ort")
    capacity = open_engine(bundle, "cpu", 1)[0].cache.capacity
    assert capacity == setting.slots == 256 + spare_slots(CANDIDATES)
    cache = CpuMemory(bundle.manifest.model.shape, "float32", capacity)
    cache.place(0).grow(capacity)
    assert sum(group.nbytes for group in cache.places[0].entries) == estimate(decoder_of(bundle), setting).kv_bytes


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT for RTX reports while it builds."""
    from mara_runtime.engines import trt_file

    try:
        module = trt_file.load("tensorrt-rtx")
    except ImportError as error:
        pytest.skip(f"TensorRT for RTX is not installed: {error}")
    said: list[str] = []
    monkeypatch.setattr(type(trt_file.logger(module)), "log", lambda _, severity, message: said.append(message))
    return said


def largest(log: list[str], what: str) -> int:
    return max(int(size) for line in log for size in re.findall(rf"{what}: (\d+)", line))


@pytest.mark.parametrize(
    ("name", "precision", "lowering", "context"),
    [
        pytest.param("wide", "fp16", "portable", 256, marks=pytest.mark.long),
        pytest.param("wide", "int8", "portable", 256, marks=pytest.mark.long),
        ("wide", "int4", "portable", 256),
        ("wide", "fp16", "decomposed", 256),
        pytest.param("untied", "fp16", "portable", 8192, marks=pytest.mark.long),
        pytest.param("untied", "fp32", "portable", 4096, marks=pytest.mark.long),
    ],
)
def test_an_engine_takes_what_was_computed(made, log, name, precision, lowering, context):
    """To a few hundredths; activations without fused attention are less than computed."""
    from mara_export.tensorrt.build import build

    bundle, setting = made(name, "tensorrt-rtx", precision, lowering, context)
    model = decoder_of(bundle)
    built = build(bundle, "tensorrt-rtx")
    (engine,) = built.manifest.engines
    assert engine.slots == setting.slots
    assert memory.weight_bytes(model, setting) == pytest.approx(largest(log, "Total Weights Memory"), rel=0.01)
    size = built.manifest.files[engine.file].size_bytes
    assert memory.engine_memory_bytes(model, setting) == pytest.approx(size, rel=0.05)
    activations = largest(log, "Total Activation Memory")
    computed = memory.activation_bytes(model, setting)
    assert 0.98 * activations <= computed <= (1.05 if setting.fused else 1.5) * activations

    # of a bundle that has an engine, the engine's size replaces the estimate
    _, rows = of_bundle(built, parser().parse_args([str(built.folder)]))
    found = rows[-1][1]
    assert found.engine_bytes == size
    assert found.kv_bytes == memory.kv_bytes(model, setting)
    assert found.workspace_bytes == memory.workspace_bytes(model, setting)


DECODE = """
import re, sys
from pathlib import Path
from mara_runtime.bundle import Bundle
from mara_runtime.passes import PREFILL_ROWS
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Pass
engine, _ = open_engine(Bundle.open(sys.argv[1], verify=False), "cpu", 1)
engine.cache.reuse([0] * 4096)
for start in range(0, 4096, PREFILL_ROWS):
    rows = list(range(start, start + PREFILL_ROWS))
    engine.run(Pass([8 * row for row in rows], rows, start, head_rows=[PREFILL_ROWS - 1]))
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def test_decoding_on_a_cpu_takes_what_was_computed(made):
    """Peak of a process that takes a prompt. Rows of the embedding that no token asks for stay in the file."""
    bundle, setting = made("untied", "cpu", "fp32", "ort", 4096)
    peak = int(subprocess.check_output([sys.executable, "-c", DECODE, str(bundle.folder)], timeout=600))
    computed = estimate(decoder_of(bundle), setting).total_bytes
    assert 0.65 * computed <= peak <= 1.05 * computed
