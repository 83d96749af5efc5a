"""What `mara-export --target` writes for engines other than ONNX Runtime on a CPU, run there all the same."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from mara_export import parity
from mara_export.errors import ModelError, ParityError
from mara_export.export import finish
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_export.targets import TARGETS
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.graph_file import OPERATORS
from tests import checkpoints


@pytest.fixture
def make(traced, tmp_path):
    """(options) → a bundle of the tiny Qwen2."""
    return lambda **options: finish(
        traced("qwen2"), ExportOptions(max_context=128, max_candidates=8, **options), tmp_path / "out"
    )


def elements(folder: Path, *names: str) -> set[int]:
    """Data types of inputs and outputs of the graph."""
    graph = onnx.load(folder / "step.onnx", load_external_data=False).graph
    infos = {info.name: info for info in (*graph.input, *graph.output)}
    return {infos[name].type.tensor_type.elem_type for name in names}


@pytest.mark.parametrize(
    ("target", "options", "lowering", "precision"),
    [
        ("cuda", {}, "ort", "fp16"),
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
    assert elements(bundle.folder, "past_key_values.0.key", "present.1.value") == {TensorProto.FLOAT16}
    wide = ("margins", "logits", "last_hidden_state", "top_logits")
    assert elements(bundle.folder, *wide) == {TensorProto.FLOAT}
    decoder = AlignedDecoder(bundle, engine="cpu", threads=1)
    for schedule in ("one-by-one", "together", "adaptive"):
        answer = decoder.generate([5, 6, 7], DecodeConfig(top_k=8, max_new_tokens=12, schedule=schedule))
        assert 1 <= len(answer.token_ids) <= 12


QUICK = {
    *(("cpu", lowering, precision) for lowering in ("ort", "portable", "decomposed") for precision in ("fp16", "int4")),
    ("cuda", "ort", "int8"),
}
ALL = {(name, lowering, p) for name, t in TARGETS.items() for lowering in t.lowerings for p in t.precisions}


ELSEWHERE = {("", name) for name in ("Clip", "Erf", "Floor", "Neg", "Pow", "Reciprocal")} | {
    ("com.microsoft", name) for name in ("MoE", "QMoE")
}
"""What other families and the other tracer bring: OLMo clips, Ministral 3 scales by position, an exact GELU has Erf,
transformers 5 has experts."""


@pytest.mark.parametrize(
    ("models", "combinations"),
    [
        (("qwen2", "starcoder2"), QUICK),
        pytest.param((*checkpoints.ARCHITECTURES, "starcoder2"), ALL, marks=pytest.mark.long),
    ],
    ids=["some", "all"],
)
def test_the_runtime_accepts_the_operators_that_exports_write_and_no_others(
    traced, tmp_path, models, combinations
) -> None:
    written: set[tuple[str, str]] = set()

    def add(graph: onnx.GraphProto) -> None:
        written.update((node.domain, node.op_type) for node in graph.node)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    add(attribute.g)

    for model, (target, lowering, precision) in itertools.product(models, sorted(combinations)):
        blocks = {"block_size": 32} if precision == "int4" else {}
        if blocks and target == "tensorrt":  # whose blocks do not divide these models; its graphs are those of RTX
            continue
        options = ExportOptions(
            target=target, lowering=lowering, precision=precision, gate=False, max_context=128, **blocks
        )
        out = tmp_path / f"{model}-{target}-{lowering}-{precision}"
        finish(traced(model), options, out)
        add(onnx.load(out / "step.onnx", load_external_data=False).graph)
    assert written | ELSEWHERE == {(domain, name) for domain, names in OPERATORS.items() for name in names}
    assert not written & ELSEWHERE


def test_an_operator_that_the_runtime_would_refuse_is_named_before_anything_is_written(
    traced, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(OPERATORS, "", OPERATORS[""] - {"Sigmoid"})
    with pytest.raises(ModelError, match=r"/model/layers\.0/mlp/\S+ is 'Sigmoid'"):
        finish(traced("qwen2"), ExportOptions(gate=False), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activations_that_float16_does_not_hold_are_found_on_a_cpu(traced, reference, agent, tmp_path) -> None:
    """The same function in float32: what is multiplied by 2**17 is divided by it again."""
    model = copy.deepcopy(reference("qwen2"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0**17)
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0**-17)
    prompts = [(tokens, True) for tokens in checkpoints.random_prompts(1)]
    large = parity.run_reference(model, "large", [agent("qwen2")], prompts, 8, Progress(quiet=True))
    options = {"max_context": 128, "max_candidates": 8}
    with pytest.raises(ParityError, match=r"activations reach [\d,]+, and float16 ends at 65,504: use bf16"):
        finish(replace(traced("qwen2"), reference=large), ExportOptions(target="cuda", **options), tmp_path / "out")
    finish(replace(traced("qwen2"), reference=large), ExportOptions(**options), tmp_path / "out")


def test_bfloat16_is_not_for_a_cpu(make) -> None:
    with pytest.raises(OptionError, match=r"ONNX Runtime on a CPU cannot run.*--no-gate"):
        make(target="tensorrt", precision="bf16")
    bundle = make(target="tensorrt", precision="bf16", gate=False)
    assert (bundle.manifest.targets, bundle.manifest.step.cache) == (("tensorrt",), "bfloat16")
    assert bundle.manifest.parity is None
    assert elements(bundle.folder, "past_key_values.0.key") == {TensorProto.BFLOAT16}


@pytest.mark.parametrize(
    ("target", "block_size", "remedy"),
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
def test_blocks_that_do_not_divide_a_model_are_refused_with_those_that_do(make, target, block_size, remedy) -> None:
    with pytest.raises(OptionError, match=re.escape(remedy)) as caught:
        make(target=target, lowering="portable", precision="int4", block_size=block_size, gate=False)  # of 64 and 96
    assert f"--block-size is {block_size or 64}, " in str(caught.value)
    assert "the 96 inputs of " in str(caught.value)


@pytest.mark.parametrize(
    ("target", "more", "missing"),
    [
        ("tensorrt-rtx", [], None),  # whose builder needs no GPU
        ("tensorrt", [], "engine not built: "),
        ("tensorrt-rtx", ["--no-build"], "engine not built: --no-build was given"),
    ],
)
def test_an_export_builds_the_engine_or_says_what_will(
    command, checkpoint, agent_file, tmp_path, target, more, missing
) -> None:
    out = tmp_path / "out"
    model = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--max-context", 128, "--no-gate"]
    done = command("export", *model, "--target", target, *more, "--out", out)
    assert done.code == 0, done.err
    engines = Bundle.open(out).manifest.engines
    if missing is None:
        (engine,) = engines
        assert (engine.target, engine.in_place) == (target, True)
        assert f"engine    {target} {engine.version} for compute capability 8.0+" in done.out
        assert "mara-build" not in done.out
    else:
        assert engines == ()
        assert missing in done.out
        assert f"mara-build {out} --target {target}" in done.out


def test_a_soft_cap_is_written_out_where_tensorrt_has_none(traced, tmp_path) -> None:
    """NVIDIA's parser rejects the attribute (docs/reference/families.md has what builds)."""
    for target, fused in (("tensorrt-rtx", False), ("cpu", True)):
        made = finish(traced("gemma2"), ExportOptions(target=target, lowering="portable"), tmp_path / target)
        operators = {node.op_type for node in onnx.load(made.path("step.onnx"), load_external_data=False).graph.node}
        assert ("Attention" in operators, "Tanh" in operators) == (fused, True)  # the gate has passed
