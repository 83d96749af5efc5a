"""What is read from a Hugging Face checkpoint does not depend on how, or by which transformers, it was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mara_deploy.commands.inspect import summary
from mara_export.errors import ModelError
from mara_export.export import export
from mara_export.hf.checkpoint import eos_token_ids, load_config, load_model
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import load_tokenizer
from mara_export.options import ExportOptions
from mara_runtime.errors import MaraError, OptionError
from tests import checkpoints
from tests.export.conftest import copy_model, edit_json


def source(folder: Path) -> ModelSource:
    return ModelSource(folder, folder.name, None)


def test_bfloat16_shards_load_as_float32_in_one_file(checkpoint, tmp_path) -> None:
    folder = checkpoint("qwen3")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    full = copy_model(folder, tmp_path / "full", dtype="float32")
    save_file({name: t.float() for name, t in rounded.items()}, full / "model.safetensors", metadata={"format": "pt"})
    half = copy_model(folder, tmp_path / "half", dtype="bfloat16")
    checkpoints.shard(half, rounded, 3)
    expected, found = (load_model(source(path)).state_dict() for path in (full, half))
    assert expected.keys() == found.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_configuration_of_transformers_5_keeps_its_rotary_base(checkpoint, tmp_path, architecture) -> None:
    """It writes base and scaling together, which transformers 4 passes over: the reference would be wrong alike."""
    four = copy_model(checkpoint(architecture), tmp_path / "four", rope_theta=500.0)
    scaling = json.loads((four / "config.json").read_text())["rope_scaling"] or {"rope_type": "default"}
    parameters = {**scaling, "rope_theta": 500.0}
    new = {"rope_parameters": parameters, "rope_scaling": ..., "rope_theta": ...}
    five = copy_model(checkpoint(architecture), tmp_path / "five", **new)
    ids = torch.tensor(checkpoints.random_prompts(1, seed=1, length=40))
    with torch.no_grad():
        expected, found = (load_model(source(path))(ids).logits for path in (four, five))
    assert torch.equal(expected, found)


def test_end_tokens_come_from_the_first_file_that_names_them(checkpoint, tmp_path) -> None:
    """The generation config, else config.json, else the tokenizer; never a default of a class (LlamaConfig's is 2)."""
    both = checkpoint("qwen2")
    config = copy_model(both, tmp_path / "config")
    (config / "generation_config.json").unlink()
    tokenizer = copy_model(checkpoint("llama"), tmp_path / "tokenizer", eos_token_id=...)
    edit_json(tokenizer / "generation_config.json", eos_token_id=...)
    for folder, expected in (
        (both, checkpoints.EOS_IDS),
        (config, (checkpoints.EOS_ID,)),
        (tokenizer, (checkpoints.EOS_ID,)),
    ):
        assert eos_token_ids(load_model(source(folder)), load_tokenizer(source(folder))) == expected


def test_code_in_a_models_folder_is_not_run(checkpoint, tmp_path, monkeypatch) -> None:
    """Neither where transformers knows the class nor where it would have to ask for permission."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked, with 15 s to answer"))
    proof = tmp_path / "proof"
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = copy_model(checkpoint("qwen2"), tmp_path / "model", auto_map=auto_map)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    load_config(source(folder)), load_model(source(folder))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    edit_json(folder / "tokenizer_config.json", **tokenizer)
    edit_json(folder / "config.json", model_type="llama", auto_map=...)
    with pytest.raises(ModelError):
        load_tokenizer(source(folder))
    assert not proof.exists()


def test_surplus_weights_may_be_left_out_by_name(checkpoint, agent, tmp_path) -> None:
    folder = copy_model(checkpoint("qwen2"), tmp_path / "qwen2")
    state = load_file(folder / "model.safetensors")
    heads = {"v_head.weight": torch.ones(1, 64), "v_head.bias": torch.ones(1)}
    save_file({**state, **heads}, folder / "model.safetensors", metadata={"format": "pt"})
    for patterns, named in (
        (["v_head.b*"], r"no place for: v_head\.weight;"),
        (["v_head.*", "mtp.*"], r"--ignore-weights is 'mtp\.\*', which matches no surplus weight; .* v_head\.bias"),
        (["model.layers.0.*"], "matches no surplus weight"),
    ):
        with pytest.raises(MaraError, match=named):
            load_model(source(folder), ignore_weights=patterns)
    with pytest.raises(OptionError, match="qwen2 has none"):
        load_model(source(checkpoint("qwen2")), ignore_weights=["v_head*"])
    options = ExportOptions(max_context=64, max_candidates=8, gate=False, ignore_weights=("v_head*",))
    bundle = export(source(folder), checkpoints.named(agent("qwen2")), tmp_path / "out", options)
    assert bundle.manifest.model.ignored_weights == ("v_head*",)
    assert "without weights v_head*" in " ".join(summary(bundle))
