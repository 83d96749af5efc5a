"""Models, agents and output folders that `mara-export` refuses: one line that names the fault, nothing written."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from mara_deploy import agent as agents
from mara_export.errors import ModelError
from mara_export.export import export
from mara_export.folder import claimed
from mara_export.hf.sources import resolve_model
from tests import checkpoints
from tests.export.conftest import copy_model, edit_json

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture
def refused(command, tmp_path, checkpoint, agent_file, monkeypatch) -> Callable[..., str]:
    """Run mara-export with a good model and agent except for what is given; → its line."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked, with 15 s to answer"))
    checkpoint("qwen2"), agent_file("qwen2")

    def run(*more: object, model: Any = None, agent: Any = None, out: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        options = ["--model", model or checkpoint("qwen2"), "--agent", agent or agent_file("qwen2")]
        line = command("export", *options, "--out", out or tmp_path / "new" / "out", *more).refusal("mara-export")
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


def names(line: str, *texts: str) -> None:
    assert [text for text in texts if text not in line] == [], line


# --- damaged models --------------------------------------------------------------------------------------------------

Damage = Callable[[Path], Any]


def configured(**config: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", **config)


def file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def without(name: str) -> Damage:
    return weights(lambda state: state.pop(name))


def end_token(ids: Any, file: str = "generation_config.json") -> Damage:
    """`file` names what ends an answer; config.json counts only where there is no generation config."""

    def damage(folder: Path) -> None:
        if file == "config.json":
            (folder / "generation_config.json").unlink()
        edit_json(folder / file, eos_token_id=ids)

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_a_shard(folder: Path) -> None:
    path = checkpoints.shard(folder, load_file(folder / "model.safetensors"), 2)[1]
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    checkpoints.shard(folder, load_file(folder / "model.safetensors"), 2)[1].unlink()


def as_reward_model(state: dict[str, torch.Tensor]) -> None:
    state["score.weight"] = state.pop("lm_head.weight")[:1].clone()


def tied_under_the_other_name(state: dict[str, torch.Tensor]) -> None:
    """safetensors' save_model keeps one name of a shared tensor, and transformers reads only the other."""
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


def of_another_kind(state: dict[str, torch.Tensor]) -> None:
    """The gate cannot see it: the reference leaves it out as well."""
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old checkpoints hold it; it is computed


def with_value_head(state: dict[str, torch.Tensor]) -> None:
    state["v_head.weight"], state["v_head.bias"] = torch.ones(1, 64), torch.ones(1)


def in_float8(state: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    state[name], state[f"{name}_scale_inv"] = state[name].to(torch.float8_e4m3fn), torch.ones(1, 1)


def not_a_number(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan


def pickled(folder: Path) -> None:
    """The only .safetensors file holds something else."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def template(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="{{ '%0999999d' % 1 }}{{ messages[0].content }}")


def rope(**values: Any) -> Damage:
    return configured(rope_parameters=values)


def links(name: str) -> Damage:
    """A file of the folder is a link to one outside."""

    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / name).write_text("a secret")
        (folder / name).symlink_to(outside / name)

    return damage


def custom_code(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('it runs')")


REFUSED: dict[str, tuple[str, Damage, str]] = {
    "no weight of a layer": ("qwen2", without("model.layers.1.mlp.up_proj.weight"), r"qwen2 .*up_proj\.weight"),
    "no norm": ("qwen2", without("model.norm.weight"), r"qwen2 .*model\.norm\.weight"),
    "no embedding": ("qwen2", without("model.embed_tokens.weight"), r"qwen2 .*embed_tokens\.weight"),
    "no head": ("llama", weights(as_reward_model), r"llama .*lm_head\.weight"),
    "tied under the other name": ("qwen2", weights(tied_under_the_other_name), r"lacks model\.embed_tokens\.weight$"),
    "another kind of weight": ("qwen2", weights(of_another_kind), r"q_norm.* with --ignore-weights 'model\*'"),
    "a value head": ("llama", weights(with_value_head), r"v_head\.bias, v_head\.weight; .*--ignore-weights 'v_head\*'"),
    "fp8": ("llama", weights(in_float8), r"llama is quantised: .*q_proj\.weight is stored as F8_E4M3"),
    "fp8, said": (
        "llama",
        configured(quantization_config={"quant_method": "fp8"}),
        r"quantised already \(fp8\); read as they are: awq, .*: export",
    ),
    "quantised by MLX": ("llama", configured(quantization={"bits": 4}), r"quantised already \(quantization\)"),
    "not a number": ("qwen2", weights(not_a_number), "not finite in transformers, too"),
    "another shape": ("qwen2", configured(intermediate_size=80), "qwen2 cannot be loaded"),
    "another vocabulary": ("qwen2", configured(vocab_size=330), r"size mismatch for .*embed.*: \[330, 64\] by config"),
    "cut": ("qwen2", cut_weights, r"qwen2 .*model\.safetensors is damaged"),
    "empty": ("qwen2", file("model.safetensors", b""), r"model\.safetensors is damaged"),
    "a cut shard": ("qwen2", cut_a_shard, r"model-00002-of-00002\.safetensors is damaged .*fetch or copy it again"),
    "a lost shard": ("qwen2", lose_a_shard, "00002-of-00002"),
    "a pickle": ("qwen2", pickled, r"qwen2.*model\.safetensors"),
    "code to generate with": ("qwen2", custom_code, "custom_generate"),
    "a link as template": ("qwen2", links("chat_template.jinja"), r"chat_template\.jinja is a link"),
    "a pipe": ("qwen2", lambda folder: os.mkfifo(folder / "notes.json"), r"notes\.json is not a regular file"),
    **{
        f"a shard {name}": (
            "qwen2",
            file("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}).encode()),
            r"index\.json names ",
        )
        for name in ("../outside.safetensors", "/dev/zero", "pytorch_model.bin")
    },
    **{
        f"{name} that begins with {mark!r}": (
            "qwen2",
            file(name, mark + b"{}"),
            f"{name} begins with a byte order mark",
        )
        for name in ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
        for mark in (codecs.BOM_UTF8, codecs.BOM_UTF16_LE)
    },
    "no family": ("qwen2", configured(model_type=...), r"config\.json has no model_type"),
    "another family": ("qwen2", configured(model_type="rwkv"), "qwen2 is not a whole causal LM"),
    "a family of its own code": (
        "qwen2",
        configured(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        "qwen2 cannot be loaded",
    ),
    "a small context": ("qwen2", configured(max_position_embeddings=1), "context of 1 token"),
    "a window that is not a number": ("mistral", configured(sliding_window="all"), "sliding_window.* 'all'"),
    "a window of nothing": ("mistral", configured(sliding_window=0), "sliding_window = 0"),
    "odd heads": ("qwen2", configured(num_key_value_heads=3), "num_key_value_heads = 3, which does not divide 4"),
    "negative heads": ("mistral", configured(num_key_value_heads=-1), "num_key_value_heads = -1"),
    "rope as a number": ("mistral", configured(rope_scaling=2.0), "rope_scaling = 2.0"),
    "partial rope": ("qwen2", rope(rope_theta=1e4, partial_rotary_factor=0.5), "cannot be (run|traced)"),
    **{
        f"rope {name} said twice": ("llama", configured(**{f"rope_{key}": value for key, value in said}), message)
        for name, said, message in (
            ("base", [("theta", 1e4), ("parameters", {"rope_theta": 1e6})], "rope_theta twice"),
            ("scaling", [("parameters", {"rope_type": "default"}), ("scaling", LINEAR)], "twice.*linear.*None"),
            ("type", [("scaling", {**LINEAR, "type": "yarn"})], "says twice.*yarn.*linear"),
            ("setting", [("scaling", {**LINEAR, "rope_theta": 1e6})], "rope_theta in rope_scaling"),
        )
    },
    "another head said to be tied": ("llama", configured(tie_word_embeddings=True), "lm_head.weight is not its embed"),
    "rope per layer": ("qwen2", rope(full_attention={"rope_theta": 1e4}), "rope_parameters"),
    "another template": ("qwen2", template, "chat template of qwen2 fails where the bundle runs"),
    "a large tokenizer": ("mistral", lambda folder: checkpoints.add_tokenizer(folder, 400), "mistral.*vocabulary"),
    **{
        f"generation config {text!r}": (
            "qwen2",
            file("generation_config.json", text.encode("latin-1")),
            r"qwen2: its generation_config\.json",
        )
        for text in ("", "[]", "null", '{"eos_token_id": [1', "\xff")
    },
    **{
        f"config {text!r}": ("qwen2", file("config.json", text.encode("latin-1")), "qwen2")
        for text in ("", "[]", "null", "{}", '{"model_type": 3}', "\xff")
    },
    **{
        f"{key} {value!r}": ("qwen2", configured(**{key: value}), "qwen2")
        for key, value in (
            ("hidden_size", "64"),
            ("hidden_size", None),
            ("num_attention_heads", 0),
            ("max_position_embeddings", None),
            ("rope_scaling", "linear"),
            ("num_hidden_layers", 0),
        )
    },
    **{
        f"end token {ids!r}": ("qwen2", end_token(ids), f"eos_token_id is {named}, .*0 to 319")
        for ids, named in ((-1, "-1"), ([257, 320], "320"), ("257", "'257'"), (257.0, r"257\.0"))
    },
    "end token of config.json": ("qwen2", end_token(320, "config.json"), "eos_token_id is 320"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_model_is_one_short_line(refused, checkpoint, tmp_path, case) -> None:
    """transformers fills gaps at random and leaves out what it does not know: the gate could not see it."""
    architecture, damage, message = REFUSED[case]
    folder = copy_model(checkpoint(architecture), tmp_path / architecture)
    damage(folder)
    line = refused(model=folder)
    assert re.search(message, line), line
    assert len(line) < 500


def test_a_model_that_transformers_cannot_run_is_one_line(checkpoint, agent, tmp_path) -> None:
    class Broken(type(agent("qwen2"))):  # type: ignore[misc]
        def margin(self, states: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes cannot be multiplied\nsecond line")

    broken = Broken.__new__(Broken)
    broken.__dict__ = agent("qwen2").__dict__
    with pytest.raises(ModelError, match=r"^qwen2 cannot be run by transformers: shapes cannot be multiplied$"):
        export(resolve_model(str(checkpoint("qwen2"))), checkpoints.named(broken), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what is not there, or does not fit ------------------------------------------------------------------------------


def test_what_is_not_there_is_named(refused, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # the Hub is not even asked
    for model in ("/nowhere/model", "./nowhere", "qwen9", "~nosuchuser/model"):
        names(refused(model=model), model)
    for agent in (f"{tmp_path}/none.pth", str(tmp_path), "~nosuchuser/a.pth"):
        names(refused(agent=agent), agent, ".pth or .safetensors")
    assert refused(agent="x" * 5000)
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    names(refused(), "pip install 'mara-deploy[cpu,export]'")


def test_an_agent_that_does_not_fit_is_named(refused, tmp_path) -> None:
    names(refused(agent="demo"), "the agent demo works only with the model demo, not with qwen2")
    agents.untrained(128, 0, (4, 4)).save(tmp_path / "big.safetensors")
    names(refused(agent=tmp_path / "big.safetensors"), "big.safetensors", "128", "qwen2", "64")
    for name in ("agent.pth", "agent.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02M")
        names(refused(agent=tmp_path / name), str(tmp_path / name))


def test_a_context_beyond_the_models_own_is_refused(refused) -> None:
    names(refused("--max-context", "513"), "--max-context is 513", "qwen2", "512")
    names(refused("--max-context", "1000000000000"), "--max-context is 1000000000000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--target cuda --lowering portable", "--lowering is 'portable'; --target cuda supports ort"),
        ("--precision int8 --block-size 48", "--block-size is 48"),
        ("--out full", "full exists already and is not an empty folder"),
        ("--out . --precision fp16 --precision int4", "cpu-int4 exists already and is not an empty folder"),
        ("--out full/file/out", "full/file/out: "),
        ("--out a/../held", "another export is writing"),
    ],
)
def test_options_are_refused_before_anything_is_fetched(hf_home, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "cpu-int4"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    with claimed(tmp_path / "held"):
        outcome = command("export", "--model", "qwen2", "--agent", "IAAR-Shanghai/MARA_AGENTS:a.pth", *options.split())
    names(outcome.refusal("mara-export"), message)


def test_weights_are_not_fetched_for_a_model_that_is_refused(
    cached, checkpoint, agent_file, tmp_path, monkeypatch, command
) -> None:
    """By its configuration, the agent's hidden size, or an occupied folder: only config.json is in the cache here."""
    config = json.loads((checkpoint("qwen2") / "config.json").read_text())

    def refusal(**change: Any) -> str:
        cached("Qwen/Qwen2-0.5B-Instruct", {"config.json": json.dumps({**config, **change}).encode()})
        options = ["--model", "qwen2", "--agent", agent_file("qwen2")]
        return command("export", *options).refusal("mara-export")

    monkeypatch.chdir(tmp_path)
    names(refusal(), "weights are missing")
    assert not (tmp_path / "bundles").exists()
    names(refusal(layer_types=["chunked_attention"] * 2), "chunked_attention")
    assert re.search("64.*3072|3072.*64", refusal(hidden_size=3072))
    (tmp_path / "bundles" / "Qwen2-0.5B-Instruct-qwen2-agent-cpu-fp32" / "mine").mkdir(parents=True)
    names(refusal(), "fp32 exists already and is not an empty folder")
