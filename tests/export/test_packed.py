"""Checkpoints that are quantised already: what is read, and what the bundle has of it, are the numbers they hold.

The other side is the packer's (tests/packings.py): the numbers before they were packed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file

from mara_deploy.commands.inspect import summary
from mara_deploy.demo import MODEL_FOLDER, NAME, demo_agent
from mara_export.errors import ModelError
from mara_export.export import export, finish
from mara_export.hf.checkpoint import load_model, open_stored
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.hf.weights import Weights
from mara_export.options import ExportOptions
from mara_export.tracing import Traced, trace
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from tests import checkpoints
from tests.export.conftest import copy_model, edit_json
from tests.packings import Kind, Numbers, pack, tensors

AWQ, GPTQ, COMPRESSED = Kind("awq"), Kind("gptq", symmetric=True, group=-1), Kind("compressed-tensors", group=16)
BFLOAT16 = Kind("compressed-tensors", symmetric=True, scales=torch.bfloat16)
KINDS = [
    *(Kind("awq", symmetric, group) for symmetric in (False, True) for group in (32, 64, 128, -1)),
    *(
        Kind("gptq", symmetric, group, bits, layout)
        for symmetric in (False, True)
        for group in (32, 128, -1)
        for bits in (4, 8)
        for layout in ("", "gptq", "gptq_v2")
    ),
    *(
        Kind("compressed-tensors", symmetric, group, bits, scales=torch.bfloat16)
        for symmetric in (False, True)
        for group in (32, 128, -1)
        for bits in (4, 8)
    ),
]


def source(folder: Path) -> ModelSource:
    return resolve_model(str(folder))


def config_of(folder: Path, kind: Kind) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    edit_json(folder / "config.json", model_type="llama", quantization_config=kind.config())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_packed_matrix_is_the_one_that_was_packed(tmp_path, kind) -> None:
    """All integers and zero points there are, 0 among them, from which GPTQ borrows."""
    random, (rows, columns) = np.random.default_rng(0), (40, 256)
    groups = 1 if kind.group == -1 else columns // kind.group
    middle = 2 ** (kind.bits - 1)
    zeros = np.full((rows, groups), middle) if kind.symmetric else random.integers(0, 2 * middle, (rows, groups))
    scales = torch.from_numpy(random.uniform(1e-3, 1, (rows, groups))).to(kind.scales)
    numbers = Numbers(random.integers(0, 2 * middle, (rows, columns)), scales, zeros)
    config_of(tmp_path, kind)
    parts = tensors("model.layers.0.mlp.up_proj", numbers, kind)
    for i, (name, tensor) in enumerate(parts.items()):  # in files of their own
        save_file({name: tensor}, tmp_path / f"{i}.safetensors")
    stored = open_stored(source(tmp_path))
    (name,) = stored
    assert name == "model.layers.0.mlp.up_proj.weight"
    assert stored.shape(name) == (rows, columns)
    expected = numbers.floats()
    assert torch.equal(stored[name], expected)
    for count in (1, 256, 700, rows * columns + 1):
        assert torch.equal(stored.first(name, count), expected.flatten()[:count])


@pytest.fixture(scope="module")
def packed(tmp_path_factory, checkpoint) -> Callable[[str, Kind], Path]:
    """(architecture or "demo", kind) → a packed checkpoint; beside it lies one of what its weights stand for."""
    root = tmp_path_factory.mktemp("packed")

    def make(name: str, kind: Kind) -> Path:
        folder = root / f"{name}-{kind.method}-{kind.bits}{'-symmetric' * kind.symmetric}"
        if not folder.exists():
            pack(MODEL_FOLDER if name == "demo" else checkpoint(name), folder, kind)
        return folder

    return make


def floats_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-floats")


@pytest.fixture(scope="module")
def traced(tmp_path_factory, packed) -> Callable[..., Traced]:
    """(folder, gate, agents) → a trace of it."""
    return lambda folder, gate=True, agents=(): trace(
        source(folder), agents, tmp_path_factory.mktemp("trace"), max_context=128, gate=gate
    )


def made(traced: Traced, out: Path, **options: Any) -> Bundle:
    return finish(traced, ExportOptions(max_context=128, **options), out)


def matrices(bundle: Bundle) -> dict[str, np.ndarray]:
    """Of each product with weights, (K, N) as float32, by its node's name."""
    graph = onnx.load(bundle.path("step.onnx")).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}

    def array(name: str) -> np.ndarray:
        return numpy_helper.to_array(stored[name]).astype(np.float32)

    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            found[node.name] = array(node.input[1])
        elif node.op_type == "MatMulNBits":
            said = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            rows, columns, size, bits = (said[key] for key in ("N", "K", "block_size", "bits"))
            numbers, scales, *zeros = (array(name) for name in node.input[1:])
            if bits == 4:
                numbers, zeros = (two_by_two(numbers), [two_by_two(each)[:, : columns // size] for each in zeros])
            centred = numbers.reshape(rows, -1, size) - (zeros[0][:, :, None] if zeros else 2.0 ** (bits - 1))
            found[node.name] = (centred * scales.reshape(rows, -1, 1)).astype(np.float32).reshape(rows, columns).T
        elif node.op_type == "MatMul" and made_by.get(node.input[1], node).op_type == "DequantizeLinear":
            numbers, scales, *zeros = (array(name) for name in made_by[node.input[1]].input)
            size = len(numbers) // len(scales)
            centred = numbers - (np.repeat(zeros[0], size, axis=0) if zeros else np.float32(0))
            found[node.name] = centred * np.repeat(scales, size, axis=0)
    return found


def two_by_two(octets: np.ndarray) -> np.ndarray:
    whole = octets.astype(np.uint8)
    return np.stack([whole & 15, whole >> 4], -1).reshape(len(whole), -1).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "kind", "lowering"),
    [
        ("qwen2", AWQ, "ort"),
        ("llama", GPTQ, "ort"),
        ("qwen3", COMPRESSED, "ort"),  # heads of 24 numbers: blocks of 16 do not lie within them
        ("qwen2", BFLOAT16, "decomposed"),
        ("llama", AWQ, "portable"),
        pytest.param("phi3", AWQ, "ort", marks=pytest.mark.long),
        pytest.param("phi3", GPTQ, "decomposed", marks=pytest.mark.long),
        pytest.param("llama", Kind("gptq", bits=8), "ort", marks=pytest.mark.long),
        pytest.param("llama", Kind("gptq", bits=8), "decomposed", marks=pytest.mark.long),
    ],
)
def test_the_graph_has_the_numbers_of_the_checkpoint(tmp_path, packed, traced, name, kind, lowering) -> None:
    """As has one of the floats they stand for, whatever the lowering joins and rearranges."""
    folder = packed(name, kind)
    kept = () if lowering != "ort" else ("*/embed_tokens/*",)  # random embeddings do not survive four bits
    integers = made(
        traced(folder),
        tmp_path / "integers",
        precision=f"int{kind.bits}",
        lowering=lowering,
        keep=("*/lm_head/*", *kept),
    )
    floats = made(traced(floats_of(folder)), tmp_path / "floats", lowering=lowering)
    assert integers.manifest.parity["passed"]
    assert integers.manifest.structure["passed"]
    assert integers.manifest.model.weights == floats.manifest.model.weights
    assert integers.manifest.step.quantisation["quantiser"] == kind.method
    found, expected = (
        {name: matrix for name, matrix in matrices(bundle).items() if "layers." in name}
        for bundle in (integers, floats)
    )
    assert found.keys() == expected.keys()
    if name == "qwen3":  # so the order of its heads stays, which that of floats loses
        found, expected = ({name: np.sort(m, axis=None) for name, m in each.items()} for each in (found, expected))
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []
    graph = onnx.load(integers.path("step.onnx"), load_external_data=False).graph
    stored = [node for node in graph.node if node.op_type in ("MatMulNBits", "DequantizeLinear")]
    assert len(stored) == len(found) > 0


def test_the_demo_is_exported_with_its_head_and_table_rounded_here(tmp_path, packed, traced, subject) -> None:
    agents = checkpoints.named(demo_agent(), NAME)
    bundle = made(traced(packed("demo", AWQ), agents=agents), tmp_path / "bundle", precision="int4")
    assert bundle.manifest.parity["passed"]
    assert bundle.manifest.step.quantisation == {"bits": 4, "block_size": 32, "quantiser": "awq", "keep": []}
    assert any("int4 (awq, blocks of 32)" in line for line in summary(bundle))
    graph = onnx.load(bundle.path("step.onnx"), load_external_data=False).graph
    (table,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    (head,) = [node for node in graph.node if "lm_head" in node.name and node.op_type == "MatMulNBits"]
    assert len(head.input) == 3  # no zero points: rounded to nearest
    assert len(table.input) == 3
    _, _, prompts = subject("demo")
    decoder = AlignedDecoder(tmp_path / "bundle", threads=1)
    assert decoder.generate(prompts[0], DecodeConfig(max_new_tokens=8)).token_ids


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_other_precisions_are_made_of_the_floats(tmp_path, packed, traced, precision) -> None:
    folder = packed("qwen2", AWQ)
    made(traced(folder, False), tmp_path / "packed", precision=precision, gate=False)
    made(traced(floats_of(folder), False), tmp_path / "floats", precision=precision, gate=False)
    found, expected = ((tmp_path / each / "step.onnx.data").read_bytes() for each in ("packed", "floats"))
    assert found == expected


def test_a_packed_model_is_loaded_as_its_floats(tmp_path, packed) -> None:
    """At once, as training has it, and streamed; in shards; with the idle biases of AutoGPTQ."""
    folder = packed("llama", GPTQ)
    expected = load_model(source(floats_of(folder)))
    idle = Path(shutil.copytree(folder, tmp_path / "idle"))
    state = load_file(idle / "model.safetensors")
    idle_bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(96, dtype=torch.float16)}
    checkpoints.shard(idle, state | idle_bias, 3)
    ids = torch.tensor(checkpoints.random_prompts(1))
    for streamed in (None, tmp_path):
        model = load_model(source(idle), streamed=streamed)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
        assert Weights(model).fingerprint() == Weights(expected).fingerprint()
        assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id
    assert {p.dtype for p in load_model(source(idle), dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def replaced(**parts: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    """Tensors of the first layer's up_proj, others if the name has a module; None: left out."""

    def damage(state: dict[str, torch.Tensor]) -> None:
        for part, tensor in parts.items():
            name = part.replace("__", ".") if "__" in part else f"model.layers.0.mlp.up_proj.{part}"
            state.pop(name, None)
            if tensor is not None:
                state[name] = tensor

    return damage


@pytest.mark.parametrize(
    ("name", "kind", "damage", "message"),
    [
        ("llama", AWQ, replaced(qweight=None), r"is not a whole causal LM: it lacks model\.layers\.0\.mlp\.up_proj\.w"),
        ("llama", AWQ, replaced(scales=None), r"is not a whole causal LM: it lacks .*up_proj\.scales$"),
        ("llama", AWQ, replaced(model__norm__weight=None), r"is not a whole causal LM: it lacks model\.norm\.weight$"),
        ("llama", AWQ, replaced(v_head__weight=torch.ones(2)), r"no place for: v_head\.weight; .*--ignore-weights"),
        ("llama", GPTQ, replaced(bias=torch.ones(96)), r"no place for: .*up_proj\.bias; "),
        (
            "llama",
            AWQ,
            replaced(scales=torch.ones(3, 96)),
            r"up_proj\.scales is not stored as awq in 4 bits and blocks",
        ),
        ("llama", AWQ, replaced(qzeros=torch.ones(2, 12)), r"up_proj\.qzeros is not stored as awq"),
        (
            "llama",
            AWQ,
            replaced(qweight=torch.ones(48, 12).int()),
            "rows of 48 weights, which are not whole blocks of 32",
        ),
        ("llama", GPTQ, replaced(qzeros=torch.zeros(1, 12).int()), r"qzeros has zero points, but .* says symmetric"),
        ("llama", GPTQ, replaced(g_idx=torch.arange(64).int()), r"weights out of order \(.*up_proj\.g_idx\)"),
        (
            "llama",
            AWQ,
            replaced(model__norm__weight=torch.ones(64).to(torch.int8)),
            r"quantised: its model\.norm\.weight is stored as I8",
        ),
        (
            "qwen2",
            AWQ,
            replaced(lm_head__weight=torch.ones(320, 64)),
            r"lm_head\.weight is not its embedding",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_packed_checkpoint_is_complete_or_refused(tmp_path, packed, name, kind, damage, message) -> None:
    folder = Path(shutil.copytree(packed(name, kind), tmp_path / name))
    state = load_file(folder / "model.safetensors")
    damage(state)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(source(folder), streamed=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_packed_checkpoint_of_another_shape_is_refused(tmp_path, packed) -> None:
    folder = copy_model(packed("llama", AWQ), tmp_path / "llama", intermediate_size=64)
    with pytest.raises(ModelError, match=r"size mismatch for .*down_proj.*: \[64, 64\] by config\.json"):
        load_model(source(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "precision": "int4"}, "zero points .*take --precision fp16, or int8"),
        ({"precision": "int4", "block_size": 64}, "--block-size is 64, but the weights of llama-awq-4 .* blocks of 32"),
    ],
)
def test_options_against_the_checkpoint_are_refused_before_it_is_loaded(
    tmp_path, packed, monkeypatch, options, message
) -> None:
    monkeypatch.setattr("mara_export.tracing.load_model", None)
    with pytest.raises(OptionError, match=message):
        export(source(packed("llama", AWQ)), [], tmp_path / "out", ExportOptions(**options))
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_the_integers_unless_told_otherwise(tmp_path, packed, command) -> None:
    folder = packed("llama", BFLOAT16)
    result = command("export", "--model", folder, "--out", tmp_path / "out", "--no-gate", "--quiet")
    assert result.code == 0, result
    assert Bundle.open(tmp_path / "out").manifest.step.precision == "int4"
    refused = command("export", "--model", packed("llama", AWQ), "--target", "tensorrt", "--precision", "int4")
    assert "zero points" in refused.refusal("mara-export")
