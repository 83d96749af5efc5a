"""What `mara-export --target` writes for engines other than ONNX Runtime on a CPU, run there all the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from mara_deploy.demo import export_demo
from mara_export.errors import ParityError
from mara_export.export import export, finish
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from tests import checkpoints

CONTEXT = 128


@pytest.fixture
def make(traced, tmp_path):
    def made(architecture: str = "qwen2", **options) -> Bundle:
        options = {"max_context": CONTEXT, "max_candidates": 8, **options}
        if architecture == "demo":
            export_demo(tmp_path / "out", quiet=True, **options)
            return Bundle.open(tmp_path / "out")
        return finish(traced(architecture), ExportOptions(**options), tmp_path / "out")

    return made


def elements(folder: Path, name: str) -> int:
    graph = onnx.load(folder / "step.onnx", load_external_data=False).graph
    (found,) = [info for info in (*graph.input, *graph.output) if info.name == name]
    return found.type.tensor_type.elem_type


@pytest.mark.parametrize(
    ("target", "options", "lowering", "precision"),
    [
        ("cuda", {}, "ort", "fp16"),
        ("cuda", {"architecture": "demo", "precision": "int4"}, "ort", "int4"),
        ("tensorrt", {}, "portable", "fp16"),
        ("tensorrt-rtx", {"precision": "int8"}, "portable", "int8"),
    ],
)
def test_a_graph_for_a_gpu_computes_in_float16_and_passes_the_gate_on_a_cpu(
    make, target, options, lowering, precision
) -> None:
    bundle = make(target=target, **options)
    manifest = bundle.manifest
    assert manifest.targets == (target, "cpu")
    assert (manifest.step.lowering, manifest.step.precision, manifest.step.cache) == (lowering, precision, "float16")
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    for name in ("past_key_values.0.key", "present.1.value"):
        assert elements(bundle.folder, name) == TensorProto.FLOAT16
    for name in ("margins", "logits", "last_hidden_state", "top_logits"):
        assert elements(bundle.folder, name) == TensorProto.FLOAT
    decoder = AlignedDecoder(bundle, engine="cpu", threads=1)
    results = [
        decoder.generate([5, 6, 7], DecodeConfig(top_k=8, max_new_tokens=24, schedule=schedule)).token_ids
        for schedule in ("one-by-one", "together", "adaptive")
    ]
    assert all(1 <= len(ids) <= 24 for ids in results)


def test_activations_that_float16_does_not_hold_are_found_on_a_cpu(checkpoint, agent, tmp_path) -> None:
    """The same function in float32: what is multiplied by 2**17 is divided by it again."""
    model = checkpoints.load(checkpoint("qwen2"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0**17)
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0**-17)
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "large")
    model.save_pretrained(folder)
    sizes = {"max_context": CONTEXT, "max_candidates": 8}
    options = ExportOptions(target="cuda", **sizes)
    source, out = resolve_model(str(folder)), tmp_path / "out"
    with pytest.raises(ParityError, match=r"activations reach [\d,]+, and float16 ends at 65,504: use bf16"):
        export(source, agent("qwen2"), "agent", out, options)
    assert not out.exists()
    bundle = export(source, agent("qwen2"), "agent", out, ExportOptions(precision="fp32", **sizes))
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity["largest_activation"] is None


def test_float32_for_tensorrt_is_exact_under_every_schedule(make) -> None:
    bundle = make(target="tensorrt", precision="fp32")
    assert bundle.manifest.step.cache == "float32"
    decoder = AlignedDecoder(bundle, engine="cpu", threads=1)
    answers = {
        tuple(decoder.generate([5, 6, 7], DecodeConfig(top_k=8, max_new_tokens=48, schedule=schedule)).token_ids)
        for schedule in ("one-by-one", "together", "adaptive")
    }
    assert len(answers) == 1


def test_bfloat16_is_not_for_a_cpu(make) -> None:
    with pytest.raises(OptionError, match=r"ONNX Runtime on a CPU cannot run.*--no-gate"):
        make(target="tensorrt", precision="bf16")
    bundle = make(target="tensorrt", precision="bf16", gate=False)
    assert bundle.manifest.targets == ("tensorrt",)
    assert bundle.manifest.step.cache == "bfloat16"
    assert bundle.manifest.parity is None
    assert elements(bundle.folder, "past_key_values.0.key") == TensorProto.BFLOAT16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "metal"}, "--target is 'metal'; it must be one of cpu, cuda, tensorrt, tensorrt-rtx"),
        ({"target": "cuda", "precision": "fp32"}, "--precision is 'fp32'; for --target cuda take fp16, int8, int4"),
        ({"target": "cuda", "precision": "bf16"}, "--precision is 'bf16'; for --target cuda take fp16, int8, int4"),
        ({"precision": "bf16"}, "--precision is 'bf16'; for --target cpu take fp32, fp16, int8, int4"),
        ({"target": "cuda", "lowering": "portable"}, "--lowering is 'portable'; for --target cuda take ort"),
        ({"target": "tensorrt", "lowering": "ort"}, "--lowering is 'ort'; for --target tensorrt take portable"),
    ],
)
def test_what_a_target_cannot_do_is_said_first(make, tmp_path, options, said) -> None:
    with pytest.raises(OptionError) as caught:
        make(**options)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_mara_export_builds_the_engine_where_it_can(command, checkpoint, agent_file, tmp_path) -> None:
    out = tmp_path / "rtx"
    model = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 128]
    done = command("export", *model, "--target", "tensorrt-rtx", "--out", out)
    assert done.code == 0, done.err
    (engine,) = Bundle.open(out).manifest.engines
    assert (engine.target, engine.in_place) == ("tensorrt-rtx", True)
    assert f"engine    tensorrt-rtx {engine.version} for compute capability 8.0+" in done.out
    assert "mara-build" not in done.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "tensorrt"], "engine not built: "),
        (["--target", "tensorrt-rtx", "--no-build"], "engine not built: --no-build was given"),
    ],
)
def test_mara_export_says_what_builds_the_engine_where_it_cannot(
    command, checkpoint, agent_file, tmp_path, options, said
) -> None:
    out = tmp_path / "later"
    model = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 128]
    done = command("export", *model, *options, "--out", out)
    assert done.code == 0, done.err
    assert Bundle.open(out).manifest.engines == ()
    assert said in done.out
    assert f"mara-build {out} --target {options[1]}" in done.out


# --- blocks that do not divide a model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "block_size", "way_out"),
    [
        ("tensorrt-rtx", 64, ": use 32"),
        (
            "tensorrt",
            None,
            "no block size of --target tensorrt (64, 128) divides the sizes of this model: use --precision int8 or "
            "fp16",
        ),
        ("cpu", 64, "use 16 or 32"),
    ],
)
def test_blocks_that_do_not_divide_a_model_are_refused_with_those_that_do(make, target, block_size, way_out) -> None:
    with pytest.raises(OptionError, match=re.escape(way_out)) as caught:
        make(target=target, lowering="portable", precision="int4", block_size=block_size, gate=False)  # of 64 and 96
    assert f"--block-size is {block_size or 64}, " in str(caught.value)
    assert "the 96 inputs of " in str(caught.value)
