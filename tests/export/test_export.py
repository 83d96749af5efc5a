"""A bundle is whole or absent; what is in it depends on the model and the agent alone."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickletools
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mara_export import export as export_module
from mara_export import folder as folder_module
from mara_export import parity
from mara_export.errors import ModelError
from mara_export.export import export
from mara_export.graph.weights import Weights
from mara_export.hf.checkpoint import from_pretrained
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_runtime.bundle import Bundle
from mara_runtime.engines.ort import OrtEngine
from mara_runtime.errors import BundleError, MaraError, OptionError
from tests import checkpoints

ROOT = Path(__file__).parents[2]
Make = Callable[..., Bundle]


@pytest.fixture
def make(checkpoint, agent) -> Make:
    """Export a tiny model to a folder."""
    checkpoint("qwen2"), agent("qwen2")  # made now: some tests break what makes them

    def run(
        out: Path, architecture: str = "qwen2", model: Path | None = None, progress: Progress | None = None, **more: Any
    ) -> Bundle:
        source = resolve_model(str(model or checkpoint(architecture)))
        options = ExportOptions(**{"max_context": 64, **more})
        return export(source, agent(architecture), "agent.pth", out, options, progress)

    return run


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- whole or absent -------------------------------------------------------------------------------------------------

STAGES = [
    "load_tokenizer",
    "load_config",
    "load_model",
    "eos_token_ids",
    "_gate_prompts",
    "parity.reference_case",
    "trace_llm",
    "load",
    "lower",
    "tie_head",
    "halve",
    "quantise",
    "trace_agent",
    "join",
    "weights.save",
    "write_tokenizer",
    "_versions",
    "OrtEngine",
    "parity.engine_side",
    "parity.compare",
    "file_entries",
    "folder._open_to_others",
]


@pytest.mark.parametrize(
    ("error", "before"),
    [(KeyboardInterrupt, True), (OSError, False)],
    ids=["interrupt before", "error after"],
)
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_is_left_of_an_export_that_ended_early(make, tmp_path, monkeypatch, stage, error, before) -> None:
    where, _, name = stage.rpartition(".")
    holder: Any = {"": export_module, "parity": parity, "folder": folder_module, "weights": Weights}[where]
    real, calls = getattr(holder, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if not before:
            real(*args, **kwargs)
        raise error("injected")

    monkeypatch.setattr(holder, name, failing)
    out = tmp_path / "new" / "deeper" / "out"
    with pytest.raises((error, MaraError) if error is OSError else error, match="injected"):
        make(out, precision={"halve": "fp16", "quantise": "int8"}.get(stage, "fp32"))
    assert calls
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_last_rename_fails(make, tmp_path, monkeypatch) -> None:
    out = tmp_path / "new" / "out"

    def in_the_way(folder: Path) -> None:
        out.mkdir()
        (out / "of somebody else").touch()

    monkeypatch.setattr(folder_module, "_open_to_others", in_the_way)
    with pytest.raises(MaraError, match=r"cannot write .*out"):
        make(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "out", "of somebody else"]


def test_parents_that_others_use_stay(make, tmp_path, monkeypatch) -> None:
    (tmp_path / "old").mkdir()
    out = tmp_path / "old" / "new" / "out"

    def neighbour(*_: Any) -> None:
        (out.parent / "neighbour").touch()
        raise RuntimeError("injected")

    monkeypatch.setattr(export_module, "trace_llm", neighbour)
    with pytest.raises(RuntimeError, match="injected"):
        make(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new", "neighbour"]


def test_an_existing_empty_folder_is_taken(make, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    Bundle.open(out)


def test_an_existing_empty_folder_is_still_there_after_a_failure(make, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(export_module, "trace_llm", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(out.iterdir()) == []


def test_an_out_in_the_way_is_refused_before_any_heavy_work(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # would be a TypeError
    monkeypatch.setattr(export_module, "load_tokenizer", None)
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "precious").write_text("data")
    file.write_text("data")
    for out in (full, file):
        with pytest.raises(
            MaraError, match="exists already and is not an empty folder: remove it, or choose another --out"
        ):
            make(out)
    assert (full / "precious").read_text() == file.read_text() == "data"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "precious"]


@pytest.mark.parametrize("below", ["file/out", "file/a/b/out"])
def test_an_out_below_a_file_is_refused_before_any_heavy_work(make, tmp_path, monkeypatch, below) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    (tmp_path / "file").write_text("data")
    with pytest.raises(MaraError, match="cannot write"):
        make(tmp_path / below)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_an_out_where_nobody_can_write_is_refused(make, monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for out in ("/proc/out", "/proc/new/out"):
        with pytest.raises(MaraError, match="cannot write"):
            make(Path(out))


def test_a_name_that_is_too_long_is_refused_and_leaves_no_parents(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    # 245 letters are a fine name, but not with what the temporary folder's name adds to it.
    for out in (tmp_path / "new" / ("x" * 300), tmp_path / "new" / ("x" * 300) / "out", tmp_path / "new" / ("x" * 250)):
        with pytest.raises(MaraError, match="cannot write"):
            make(out)
        assert list(tmp_path.iterdir()) == []


def test_a_dangling_link_is_not_followed_nor_lost(make, tmp_path) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MaraError, match="out"):
        make(out)
    assert out.is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": 1}, "--max-context is 1; it must be at least 2"),
        ({"max_context": -5}, "--max-context is -5"),
        ({"max_candidates": 0}, "--max-candidates is 0; it must lie between 1 and 1024"),
        ({"max_candidates": 1025}, "--max-candidates is 1025"),
        ({"lowering": "tensorrt"}, "--lowering is 'tensorrt'; it must be one of ort, portable"),
        ({"precision": "fp8"}, "--precision is 'fp8'; it must be one of fp32, fp16, bf16, int8, int4"),
    ],
)
def test_options_are_checked_first(make, tmp_path, monkeypatch, options, message) -> None:
    monkeypatch.setattr(export_module, "load_config", None)
    with pytest.raises(OptionError, match=message):
        make(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_agent_of_another_size_is_refused_with_both_names_and_numbers(checkpoint, tmp_path, monkeypatch) -> None:
    from mara_deploy.agent import untrained

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    source = resolve_model(str(checkpoint("qwen2")))
    with pytest.raises(ModelError, match=r"the agent big\.pth was made for a hidden size of 80; qwen2 has 64"):
        export(source, untrained(80, 0, (4, 4)), "big.pth", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what is in a bundle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_no_pickle_and_no_path_of_this_machine(bundle, checkpoint, tmp_path_factory, lowering) -> None:
    folder: Path = bundle("llama", lowering)
    forbidden = [
        str(ROOT),
        str(checkpoint("llama").parent),
        str(tmp_path_factory.getbasetemp()),
        str(Path.home()) + "/",
        "site-packages",
        ".partial",
        str(Path(sys.prefix)),
    ]
    for path in folder.rglob("*"):
        data = path.read_bytes()
        found = [text for text in forbidden if text.encode() in data]
        assert not found, f"{path.name} holds {found}"
        assert path.suffix in (".json", ".onnx", ".data", ".jinja")
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04"))
        with pytest.raises((ValueError, IndexError, KeyError, EOFError)):
            list(pickletools.genops(io.BytesIO(data)))
    model = onnx.load(folder / "step.onnx", load_external_data=False)
    assert not model.doc_string
    assert not model.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


@pytest.mark.parametrize(
    ("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)]
)
def test_modes_follow_the_umask(make, tmp_path, mask, file, directory) -> None:
    before = os.umask(mask)
    try:
        make(tmp_path / "out", gate=False)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {file}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directory


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_the_same_input_gives_the_same_bytes(make, tmp_path, lowering) -> None:
    one = make(tmp_path / "one", "llama", lowering=lowering)
    torch.manual_seed(99)
    np.random.seed(99)
    two = make(tmp_path / "elsewhere" / "two", "llama", lowering=lowering)
    assert contents(one.folder) == contents(two.folder)


def test_the_returned_bundle_is_the_one_on_disk(make, tmp_path) -> None:
    bundle = make(tmp_path / "out")
    assert Bundle.open(tmp_path / "out").manifest.to_json() == bundle.manifest.to_json()
    assert set(bundle.manifest.files) == {p.name for p in bundle.folder.iterdir()} - {"manifest.json"}
    for name, entry in bundle.manifest.files.items():
        data = (bundle.folder / name).read_bytes()
        assert (entry.size_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_manifest_states_the_facts(make, tmp_path, reference) -> None:
    manifest = json.loads((make(tmp_path / "out", "llama").folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["schema_version"] == 3
    assert manifest["model"]["source"] == "llama"
    assert manifest["model"]["architecture"] == "llama"
    assert manifest["model"]["eos_token_ids"] == list(checkpoints.EOS_IDS)  # config.json names only the first
    assert manifest["agent"]["source"] == "agent.pth"
    assert manifest["agent"]["hidden_size"] == 64
    assert manifest["agent"]["widths"] == [32, 16]
    assert manifest["agent"]["fallback"] == "first"
    assert (manifest["max_context"], manifest["max_candidates"]) == (64, 64)
    assert manifest["targets"] == ["cpu"]
    assert manifest["made_with"]["torch"] == torch.__version__
    assert manifest["step"] == {
        "file": "step.onnx",
        "lowering": "ort",
        "precision": "fp32",
        "quantisation": None,
        "cache": "float32",
    }
    assert manifest["engines"] == []
    graph = onnx.load(tmp_path / "out" / "step.onnx", load_external_data=False).graph
    for side, infos in (("inputs", graph.input), ("outputs", graph.output)):
        assert [t["name"] for t in manifest["io"][side]] == [info.name for info in infos]
    assert [t["name"] for t in manifest["io"]["inputs"]][:3] == ["input_ids", "position_ids", "write_indices"]
    assert manifest["io"]["outputs"][2] == {"name": "top_ids", "dtype": "int64", "shape": ["P", 72]}
    assert set(manifest["noise"]) == {"margins", "logits"}


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_how_the_checkpoint_is_stored_makes_no_difference(make, checkpoint, tmp_path, lowering) -> None:
    """bfloat16, sharded, or both, against float32 of the same values."""
    source = checkpoint("qwen3")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}

    def variant(name: str, state: dict[str, torch.Tensor], shards: int, dtype: str) -> Path:
        folder = tmp_path / name / "qwen3"  # the name is in the manifest
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix in (".json", ".jinja"):
                (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        if shards == 1:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for index in range(shards):
            file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(state.items())[index::shards])
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    full = {name: tensor.float() for name, tensor in rounded.items()}
    folders = [
        variant("full", full, 1, "float32"),
        variant("half", rounded, 1, "bfloat16"),
        variant("sharded", full, 3, "float32"),
        variant("both", rounded, 3, "bfloat16"),
    ]
    with safe_open(folders[1] / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    bundles = [make(tmp_path / f"out-{i}", "qwen3", folder, lowering=lowering) for i, folder in enumerate(folders)]
    # The parity report measures the reference too, whose last bits depend on where its weights lie in memory.
    reports = [json.loads((bundle.folder / "manifest.json").read_text(encoding="utf-8")) for bundle in bundles]
    for bundle, report in zip(bundles, reports, strict=True):
        assert report.pop("parity")["passed"]
        assert report.pop("noise")["logits"] > 0
        (bundle.folder / "manifest.json").write_text(json.dumps(report))
        assert contents(bundle.folder) == contents(bundles[0].folder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        None,
    ],
    ids=lambda s: s["rope_type"] if s else "none",
)
def test_each_fixed_rope_passes_the_gate(make, checkpoint, tmp_path, scaling) -> None:
    folder = copy_of(checkpoint("llama"), tmp_path / "llama", rope_scaling=scaling)
    assert make(tmp_path / "out", "llama", folder).manifest.parity["passed"]


@pytest.mark.parametrize(("architecture", "tie"), [("qwen2", False), ("llama", True)])
def test_tied_and_separate_heads_pass_the_gate(make, tmp_path, architecture, tie) -> None:
    folder = checkpoints.make(architecture, tmp_path / architecture, seed=3, tie=tie)
    bundle = make(tmp_path / "out", architecture, folder)
    assert bundle.manifest.parity["passed"]
    assert bundle.manifest.tokenizer is None
    shape = bundle.manifest.model.shape
    graph = onnx.load(bundle.path("step.onnx"), load_external_data=False).graph
    assert sum(shape.vocab_size in t.dims for t in graph.initializer) == (1 if tie else 2)


def test_a_window_as_large_as_the_capacity_passes_the_gate(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("mistral"), tmp_path / "mistral", sliding_window=64)
    assert make(tmp_path / "out", "mistral", folder).manifest.parity["passed"]


def test_an_agents_own_fallback_is_in_the_manifest(checkpoint, agent_file, tmp_path) -> None:
    from mara_deploy import agent as agents

    loaded = agents.load(agent_file("qwen2"))
    loaded.fallback = "last"
    bundle = export(
        resolve_model(str(checkpoint("qwen2"))), loaded, "agent", tmp_path / "out", ExportOptions(max_context=64)
    )
    assert bundle.manifest.agent.fallback == "last"


# --- models that are not what they seem ------------------------------------------------------------------------------


def copy_of(source: Path, folder: Path, **config: Any) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config:
        values = {**json.loads((folder / "config.json").read_text()), **config}
        (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(make: Make, tmp_path: Path, folder: Path, match: str) -> str:
    with pytest.raises(ModelError, match=match) as caught:
        make(tmp_path / "new" / "out", model=folder)
    assert not (tmp_path / "new").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_checkpoint_that_lacks_a_weight_is_refused(make, checkpoint, tmp_path, name) -> None:
    """transformers fills the gap with random values; the gate cannot see it, as both sides have the same."""
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(make, tmp_path, folder, match=f"qwen2 .*{name}")


def test_a_checkpoint_without_a_language_model_head_is_refused(make, checkpoint, agent, tmp_path) -> None:
    """As a reward model of a supported family is."""
    folder = copy_of(checkpoint("llama"), tmp_path / "llama", architectures=["LlamaForSequenceClassification"])
    state = load_file(folder / "model.safetensors")
    state["score.weight"] = state.pop("lm_head.weight")[:1].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(make, tmp_path, folder, match=r"llama .*lm_head\.weight")


def test_a_weight_of_another_shape_is_refused(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2", intermediate_size=80)
    refused(make, tmp_path, folder, match="qwen2 cannot be loaded")


@pytest.mark.parametrize("what", ["truncated", "header", "empty"])
def test_damaged_weights_are_refused(make, checkpoint, tmp_path, what) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes({"truncated": data[:-100], "header": b"\xff" * 8 + data[8:], "empty": b""}[what])
    message = refused(make, tmp_path, folder, match="qwen2 cannot be loaded")
    assert "model.safetensors is damaged (" in message


def test_of_several_shards_the_damaged_one_is_named(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(state))}
    for shard in set(names.values()):
        save_file({n: state[n] for n in state if names[n] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    make(tmp_path / "whole", model=folder)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    message = refused(make, tmp_path, folder, match=r"model-00002-of-00002\.safetensors is damaged")
    assert "fetch or copy it again" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"eos_token_id": [1', "\xff"])
def test_a_generation_config_that_cannot_be_read_is_refused(make, checkpoint, tmp_path, text) -> None:
    """Transformers would go without it, and its list of ids that end an answer be lost."""
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    refused(make, tmp_path, folder, match=r"^qwen2: its generation_config\.json, .* is no JSON object: correct it")


def test_a_model_without_a_generation_config_ends_as_its_config_says(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    (folder / "generation_config.json").unlink()
    assert make(tmp_path / "out", model=folder).manifest.model.eos_token_ids == (checkpoints.EOS_ID,)


def test_a_config_without_an_architecture_is_refused_in_a_line_that_can_be_read(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")  # transformers would read the name
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values))
    message = refused(make, tmp_path, folder, match=r"^qwen2: its config\.json has no model_type")
    assert len(message) < 300


def test_a_long_reason_of_others_is_cut(checkpoint, tmp_path) -> None:
    class Kind:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise ValueError("first, " + "second, " * 1000)

    source = resolve_model(str(checkpoint("qwen2")))
    with pytest.raises(ModelError, match=r"^qwen2 cannot be loaded: first, .* …$") as caught:
        from_pretrained(Kind, source)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_configuration_of_transformers_5_has_its_rotary_base(make, checkpoint, tmp_path, architecture) -> None:
    """It writes base and scaling together, which transformers 4 passes over: the reference would be wrong alike."""
    expected = copy_of(checkpoint(architecture), tmp_path / "four", rope_theta=500.0)
    found = copy_of(checkpoint(architecture), tmp_path / "five")
    values = json.loads((found / "config.json").read_text())
    values["rope_parameters"] = {**(values.pop("rope_scaling") or {"rope_type": "default"}), "rope_theta": 500.0}
    del values["rope_theta"]
    (found / "config.json").write_text(json.dumps(values))
    ids = checkpoints.random_prompts(1, seed=1, length=40)[0]
    four, five = (
        OrtEngine(make(tmp_path / f"{folder.name}-out", architecture, folder), threads=1)
        .evaluate(ids, range(40), 0)
        .logits
        for folder in (expected, found)
    )
    assert np.array_equal(four, five)


@pytest.mark.parametrize(
    ("rope", "match"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "has rope scaling 'dynamic'"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial rotary embeddings are not supported"),
        ({"full_attention": {"rope_theta": 1e4}}, "not those of one rotary embedding for all layers"),
    ],
)
def test_what_transformers_5_writes_of_rotary_embeddings_is_looked_at(make, checkpoint, tmp_path, rope, match) -> None:
    refused(make, tmp_path, copy_of(checkpoint("qwen2"), tmp_path / "qwen2", rope_parameters=rope), match=match)


@pytest.mark.parametrize(
    ("architecture", "config", "match"),
    [
        ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads = 3, which do not divide 4"),
        ("mistral", {"num_key_value_heads": -1}, "num_key_value_heads = -1, which do not divide"),
        ("mistral", {"rope_scaling": 2.0}, "rope_scaling = 2.0, which is no JSON object"),
        ("mistral", {"sliding_window": "all"}, "sliding_window = 'all', which is no number of tokens"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0, which is no number of tokens"),
        ("qwen2", {"max_position_embeddings": 1}, "holds 1 token, which leaves no room for an answer"),
        ("qwen2", {"quantization": {"bits": 4}}, "is quantised already"),
        ("qwen2", {"vocab_size": 330}, r"cannot be loaded: Error\(s\) in loading .*: size mismatch for .*320.*330"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_named(make, checkpoint, tmp_path, architecture, config, match) -> None:
    by_default = partial(make, max_context=None)
    refused(by_default, tmp_path, copy_of(checkpoint(architecture), tmp_path / architecture, **config), match=match)


def test_of_two_tied_weights_the_embedding_must_be_there(make, checkpoint, tmp_path) -> None:
    """safetensors' save_model keeps one name of a shared tensor, and transformers reads the other alone."""
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(make, tmp_path, folder, match=r"is not a whole causal LM: it lacks model\.embed_tokens\.weight$")


def test_weights_that_are_not_finite_are_the_model_s_own(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(make, tmp_path, folder, match="^qwen2 gives numbers that are not finite, in transformers, too")


def test_a_model_that_transformers_loads_and_cannot_run_is_one_line(make, checkpoint, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied\nsecond line")

    monkeypatch.setattr(parity, "reference_case", fail)
    match = "^qwen2 cannot be run by transformers: shapes cannot be multiplied$"
    refused(make, tmp_path, checkpoint("qwen2"), match=match)


def test_the_end_of_an_answer_is_no_default_of_a_class(make, checkpoint, tmp_path) -> None:
    """LlamaConfig's is 2. The model names none, and its tokenizer does."""
    folder = copy_of(checkpoint("llama"), tmp_path / "llama")
    values = json.loads((folder / "config.json").read_text())
    del values["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256}))
    assert make(tmp_path / "out", "llama", folder).manifest.model.eos_token_ids == (checkpoints.EOS_ID,)


def test_a_manifest_that_nobody_could_read_is_not_written(make, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parity.Report, "to_json", lambda report: {"perplexity": np.inf})
    with pytest.raises(BundleError, match=r"is not valid manifest JSON \(Infinity is not a JSON number\)"):
        make(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_chat_template_that_the_runtime_does_not_render_is_refused(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"additional_special_tokens": ["<pad>", "<|end|>"]}
    config |= {"chat_template": "{{ additional_special_tokens[1] }}{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(make, tmp_path, folder, match="chat template of qwen2 fails where the bundle runs")


def test_the_demo_without_the_packages_of_an_export_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    from mara_deploy.demo import __main__ as demo

    out = demo.export_demo(tmp_path / "demo", quiet=True, max_context=64).folder
    before = contents(out)
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    assert demo.main(["--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: the demo needs packages that are not installed" in line
    assert "pip install 'mara-deploy[cpu,export]'" in line
    assert contents(out) == before


def test_a_missing_shard_is_refused(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    names["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    refused(make, tmp_path, folder, match="qwen2 cannot be loaded.*00002-of-00002")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"model_type": "nonsense"}', '{"model_type": 3}', "\xff"],
)
def test_a_config_json_that_is_none_is_refused(make, checkpoint, tmp_path, text) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(make, tmp_path, folder, match="qwen2")


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"max_position_embeddings": None},
        {"rope_scaling": "linear"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 0},
    ],
    ids=str,
)
def test_a_config_with_a_wrong_value_is_refused(make, checkpoint, tmp_path, config) -> None:
    refused(make, tmp_path, copy_of(checkpoint("qwen2"), tmp_path / "qwen2", **config), match="qwen2")


def test_code_of_a_model_folder_is_not_run_nor_asked_about(make, checkpoint, tmp_path, monkeypatch) -> None:
    proof = tmp_path / "proof"
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked, with 15 s to answer"))
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2", model_type="evil", auto_map=auto_map)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    refused(make, tmp_path, folder, match="qwen2")
    known = copy_of(checkpoint("qwen2"), tmp_path / "known", auto_map=auto_map)
    (known / "evil.py").write_text((folder / "evil.py").read_text())
    make(tmp_path / "out", model=known)
    assert not proof.exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("mistral"), tmp_path / "mistral")
    checkpoints.add_tokenizer(folder, 400)
    with pytest.raises(ModelError, match=r"mistral.*vocabulary"):
        make(tmp_path / "out", "mistral", folder)
    assert not (tmp_path / "out").exists()


def test_not_finite_weights_are_stopped_by_the_gate(make, checkpoint, tmp_path) -> None:
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MaraError, match=r"nan|finite"):
        make(tmp_path / "out", model=folder)
    assert not (tmp_path / "out").exists()


# --- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_a_stage(make, tmp_path, capfd) -> None:
    make(tmp_path / "one", progress=Progress())
    lines = capfd.readouterr().err.splitlines()
    stages = ["load qwen2", "run the reference", "trace the LLM", "lower to 'ort'", "join with the agent, and write"]
    stages.append("parity gate")
    assert [line.strip()[: len(stage)] for line, stage in zip(lines, stages, strict=True)] == stages
    assert all(line.endswith(" s") for line in lines)
    make(tmp_path / "int8", progress=Progress(), precision="int8")
    lines = capfd.readouterr().err.splitlines()
    stages.insert(4, "quantise to int8")
    assert [line.strip()[: len(stage)] for line, stage in zip(lines, stages, strict=True)] == stages
    make(tmp_path / "two", progress=Progress(quiet=True))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_checkpoint_with_weights_of_another_kind_is_refused(make, checkpoint, tmp_path) -> None:
    """The reference leaves them out as well, so the gate cannot see it."""
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old checkpoints hold it; it is computed
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(make, tmp_path, folder, match=r"qwen2 has weights .* no place for: model\.layers\.0\.self_attn\.q_norm")


def test_an_agent_of_zeros_exports(checkpoint, tmp_path, agent) -> None:
    """As one is that has not begun to learn."""
    silent = copy.deepcopy(agent("qwen2"))
    torch.nn.init.zeros_(silent.output_linear.weight)
    torch.nn.init.zeros_(silent.output_linear.bias)
    bundle = export(
        resolve_model(str(checkpoint("qwen2"))), silent, "silent", tmp_path / "out", ExportOptions(max_context=64)
    )
    assert bundle.manifest.parity["passed"] is True
