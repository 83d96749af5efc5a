"""A bundle is whole or absent; what is in it depends on the model and the agent alone; bad models are rejected."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickletools
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from mara_deploy.agent import untrained
from mara_deploy.demo import export_demo
from mara_deploy.demo.__main__ import main as demo_main
from mara_export.errors import ModelError
from mara_export.export import export, export_all, finish
from mara_export.hf.checkpoint import from_pretrained
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort import CpuEngine
from mara_runtime.errors import BundleError, MaraError, OptionError
from tests import checkpoints
from tests.export.conftest import MAX_CONTEXT

ROOT = Path(__file__).parents[2]
Make = Callable[..., Bundle]


@pytest.fixture
def make(checkpoint, agent) -> Make:
    """Export a tiny model to a folder."""

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


class Stopped(Progress):
    """Raises when a stage begins or ends; remembers the stages."""

    def __init__(self, error: BaseException, stage: str, before: bool = True) -> None:
        super().__init__(quiet=True)
        self.error, self.wanted, self.before, self.seen = error, stage, before, []

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.seen.append(what)
        stop = what.startswith(self.wanted)
        if stop and self.before:
            raise self.error
        yield
        if stop:
            raise self.error


@pytest.mark.parametrize(("stage", "before"), [("trace the LLM", False), ("parity gate", True)])
def test_nothing_is_left_of_an_interrupted_export(make, tmp_path, stage, before) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "new" / "deeper" / "out", progress=Stopped(KeyboardInterrupt(), stage, before))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_nothing_is_left_of_a_bundle_that_fails_at_any_stage(traced, tmp_path, precision) -> None:
    options = ExportOptions(precision=precision, gate=False)
    every = Stopped(KeyboardInterrupt(), "no such stage")
    finish(traced("qwen2"), options, tmp_path / "whole", every)
    for stage in every.seen:
        with pytest.raises(OSError, match="injected"):
            finish(traced("qwen2"), options, tmp_path / "new" / "out", Stopped(OSError("injected"), stage, False))
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_others_put_there_meanwhile_stays(traced, tmp_path) -> None:
    out = tmp_path / "old" / "new" / "out"
    out.parent.parent.mkdir()

    class Neighbour(Progress):
        @contextlib.contextmanager
        def stage(self, what: str) -> Iterator[None]:
            out.mkdir(exist_ok=True)
            (out / "precious").touch()
            yield

    with pytest.raises(MaraError, match=r"cannot write .*out"):  # the last rename fails
        finish(traced("qwen2"), ExportOptions(gate=False), out, Neighbour(quiet=True))
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new", "out", "precious"]


def test_an_empty_folder_is_taken_and_survives_a_failure(traced, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ZeroDivisionError):
        finish(traced("qwen2"), ExportOptions(gate=False), out, Stopped(ZeroDivisionError(), "join"))
    assert [*tmp_path.rglob("*")] == [out]
    finish(traced("qwen2"), ExportOptions(gate=False), out)
    Bundle.open(out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("full", "exists already and is not an empty folder: remove it, or choose another --out"),
        ("file", "exists already and is not an empty folder"),
        ("link", "exists already and is not an empty folder"),
        ("file/a/b/out", "cannot write"),
        ("new/" + "x" * 300, "cannot write"),
        ("new/" + "x" * 250, "cannot write"),  # a fine name, but not with what the temporary folder adds to it
        ("/proc/new/out", "cannot write"),
    ],
)
def test_an_out_that_cannot_be_written_is_rejected_before_the_model_is_read(
    checkpoint, agent, tmp_path, monkeypatch, out, message
) -> None:
    source = resolve_model(str(checkpoint("qwen2")))
    agent_ = agent("qwen2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    unread = replace(source, folder=tmp_path / "unread")
    with pytest.raises(MaraError, match=message):
        export(unread, agent_, "agent", tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_agent_of_another_size_is_rejected_with_both_names_and_numbers(checkpoint, tmp_path) -> None:
    source = resolve_model(str(checkpoint("qwen2")))
    with pytest.raises(ModelError, match=r"big\.pth .* hidden size of 80; qwen2 has 64"):
        export(source, untrained(80, 0, (4, 4)), "big.pth", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- several bundles from one trace ----------------------------------------------------------------------------------


def test_bundles_of_one_trace_are_those_of_traces_of_their_own(checkpoint, agent, tmp_path) -> None:
    source = resolve_model(str(checkpoint("qwen3")))
    options = [ExportOptions(precision=precision, max_context=64) for precision in ("int8", "fp32")]
    options.append(ExportOptions(target="tensorrt-rtx", max_context=64))
    outs = [tmp_path / str(i) for i in range(3)]
    progress = Stopped(KeyboardInterrupt(), "no such stage")
    made = export_all(source, agent("qwen3"), "agent", list(zip(options, outs, strict=True)), progress)
    assert [bundle.folder for bundle in made] == outs
    for stage in ("load qwen3", "run the reference", "trace the LLM"):
        assert sum(seen.startswith(stage) for seen in progress.seen) == 1
    assert sum(seen == "parity gate" for seen in progress.seen) == 3
    alone = export(source, agent("qwen3"), "agent", tmp_path / "alone", options[0])
    assert alone.manifest.files == made[0].manifest.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "alone"]


def test_of_several_bundles_those_before_a_failure_stay(checkpoint, agent, tmp_path) -> None:
    source = resolve_model(str(checkpoint("qwen2")))
    wrong = ExportOptions(precision="int4", max_context=64, keep=("nothing/*",))
    bundles = [(ExportOptions(max_context=64), tmp_path / "good"), (wrong, tmp_path / "bad")]
    with pytest.raises(OptionError, match="--keep"):
        export_all(source, agent("qwen2"), "agent", bundles)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    Bundle.open(tmp_path / "good")
    with pytest.raises(OptionError, match="--out"):
        export_all(source, agent("qwen2"), "agent", [(wrong, tmp_path / "same"), (wrong, tmp_path / "same")])
    with pytest.raises(ValueError, match="max_context"):
        export_all(source, agent("qwen2"), "agent", [(wrong, tmp_path / "a"), (ExportOptions(), tmp_path / "b")])


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"max_context": MAX_CONTEXT + 1}, "--max-context"),
        ({"max_candidates": 65}, "--max-candidates"),
        ({"max_context": 48}, "--max-context"),  # shorter than the reference's prompts and their siblings
    ],
)
def test_what_a_trace_does_not_cover_is_rejected(traced, tmp_path, options, flag) -> None:
    with pytest.raises(OptionError, match=flag):
        finish(traced("qwen2"), ExportOptions(**options), tmp_path / "out")
    with pytest.raises(OptionError, match="reference"):
        finish(replace(traced("qwen2"), reference=None), ExportOptions(), tmp_path / "out")
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
        assert [text for text in forbidden if text.encode() in data] == [], path.name
        assert path.suffix in (".json", ".onnx", ".data", ".jinja")
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04"))
        with pytest.raises((ValueError, IndexError, KeyError, EOFError)):
            list(pickletools.genops(io.BytesIO(data)))


@pytest.mark.parametrize(("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(traced, tmp_path, mask, file, directory) -> None:
    before = os.umask(mask)
    try:
        finish(traced("qwen2"), ExportOptions(gate=False), tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {file}, modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directory


def test_the_same_input_gives_the_same_bytes(make, bundle, tmp_path) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    one = make(tmp_path / "one", "llama")
    torch.manual_seed(100)
    assert contents(make(tmp_path / "elsewhere" / "two", "llama").folder) == contents(one.folder)


def test_the_manifest_states_the_facts(traced, checkpoint, tmp_path) -> None:
    bundle = finish(traced("llama"), ExportOptions(max_context=64), tmp_path / "out")
    assert Bundle.open(tmp_path / "out").manifest.to_json() == bundle.manifest.to_json()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["files"]) == {path.name for path in bundle.folder.iterdir()} - {"manifest.json"}
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    model, agent = manifest["model"], manifest["agent"]
    assert (model["source"], model["architecture"], model["revision"]) == ("llama", "llama", None)
    assert (model["intermediate_size"], model["tied"]) == (config["intermediate_size"], config["tie_word_embeddings"])
    assert model["eos_token_ids"] == list(checkpoints.EOS_IDS)  # config.json names only the first
    assert (agent["hidden_size"], agent["widths"], agent["fallback"]) == (64, [32, 16], "first")
    assert agent["source"] == "llama-agent.safetensors"
    assert (manifest["max_context"], manifest["max_candidates"], manifest["targets"]) == (64, 64, ["cpu"])
    assert manifest["made_with"]["torch"] == torch.__version__
    step = {"file": "step.onnx", "lowering": "ort", "precision": "fp32", "quantisation": None, "cache": "float32"}
    assert manifest["step"] == step
    assert manifest["engines"] == []
    graph = onnx.load(tmp_path / "out" / "step.onnx", load_external_data=False).graph
    for side, infos in (("inputs", graph.input), ("outputs", graph.output)):
        assert [t["name"] for t in manifest["io"][side]] == [info.name for info in infos]
    assert manifest["io"]["outputs"][2] == {"name": "top_ids", "dtype": "int64", "shape": ["P", 72]}
    assert set(manifest["noise"]) == {"margins", "logits"}
    own = finish(
        replace(traced("llama"), agent=replace(traced("llama").agent, fallback="last")),
        ExportOptions(gate=False),
        tmp_path / "own",
    )
    assert own.manifest.agent.fallback == "last"
    assert (own.manifest.parity, own.manifest.noise) == (None, None)


def test_how_the_checkpoint_is_stored_makes_no_difference(make, checkpoint, tmp_path) -> None:
    """bfloat16 in shards against float32 of the same values in one file."""
    source = checkpoint("qwen3")
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    full = copy_of(source, tmp_path / "full" / "qwen3", dtype="float32")  # the name is in the manifest
    save_file({name: t.float() for name, t in rounded.items()}, full / "model.safetensors", metadata={"format": "pt"})
    half = copy_of(source, tmp_path / "half" / "qwen3", dtype="bfloat16")
    shard(half, rounded, 3)
    bundles = [make(tmp_path / f"out-{i}", "qwen3", folder, gate=False) for i, folder in enumerate((full, half))]
    assert contents(bundles[0].folder) == contents(bundles[1].folder)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
        ("llama", {"rope_scaling": None}),
        ("mistral", {"sliding_window": 64}),  # as large as the context
    ],
    ids=str,
)
def test_configurations_that_pass_the_gate(make, checkpoint, tmp_path, architecture, config) -> None:
    folder = copy_of(checkpoint(architecture), tmp_path / architecture, **config)
    assert make(tmp_path / "out", architecture, folder).manifest.parity["passed"]


@pytest.mark.parametrize(("architecture", "tie"), [("qwen2", False), ("llama", True)])
def test_tied_and_separate_heads_pass_the_gate(make, tmp_path, architecture, tie) -> None:
    bundle = make(tmp_path / "out", architecture, checkpoints.make(architecture, tmp_path / "model", seed=3, tie=tie))
    assert (bundle.manifest.parity["passed"], bundle.manifest.model.tied) == (True, tie)
    assert bundle.manifest.tokenizer is None
    graph = onnx.load(bundle.path("step.onnx"), load_external_data=False).graph
    vocab_size = bundle.manifest.model.shape.vocab_size
    assert sum(vocab_size in t.dims for t in graph.initializer) == (1 if tie else 2)


def test_an_agent_of_zeros_exports(checkpoint, tmp_path) -> None:
    """As one is that has not begun to learn."""
    silent = untrained(64, 0, (4, 4))
    torch.nn.init.zeros_(silent.output_linear.weight)
    torch.nn.init.zeros_(silent.output_linear.bias)
    source, options = resolve_model(str(checkpoint("qwen2"))), ExportOptions(max_context=64)
    assert export(source, silent, "silent", tmp_path / "out", options).manifest.parity["passed"]


def test_a_manifest_that_nobody_could_read_is_not_written(traced, tmp_path) -> None:
    facts = replace(traced("qwen2").model, source="x", eos_token_ids=(-1,))
    with pytest.raises(BundleError, match="eos_token_ids"):
        finish(replace(traced("qwen2"), model=facts), ExportOptions(gate=False), tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_progress_is_a_line_per_stage(traced, tmp_path, capfd) -> None:
    finish(traced("qwen2"), ExportOptions(precision="int8"), tmp_path / "int8", Progress())
    lines = capfd.readouterr().err.splitlines()
    stages = ("lower to 'ort'", "quantise to int8", "join with the agent", "write", "parity gate")
    assert [line.strip()[: len(stage)] for line, stage in zip(lines, stages, strict=True)] == list(stages)
    assert all(line.endswith(" s") for line in lines)
    finish(traced("qwen2"), ExportOptions(), tmp_path / "quiet", Progress(quiet=True))
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_demo_without_the_packages_of_an_export_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    out = export_demo(tmp_path / "demo", quiet=True, max_context=64).folder
    before = contents(out)
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    assert demo_main(["--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'mara-deploy[cpu,export]'" in line
    assert contents(out) == before


# --- models that are not what they seem ------------------------------------------------------------------------------


def copy_of(source: Path, folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config:
        write_config(folder, **config)
    return folder


def write_config(folder: Path, file: str = "config.json", **config: Any) -> None:
    """Change entries of a JSON file; None for `...` removes one."""
    values = {**json.loads((folder / file).read_text()), **config}
    (folder / file).write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def shard(folder: Path, state: dict[str, torch.Tensor], count: int) -> list[Path]:
    """Write weights as files of which each has a part."""
    (folder / "model.safetensors").unlink()
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = {}
    for i, path in enumerate(paths):
        part = dict(sorted(state.items())[i::count])
        save_file(part, path, metadata={"format": "pt"})
        index |= dict.fromkeys(part, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


Damage = Callable[[Path], Any]


def configured(**config: Any) -> Damage:
    return lambda folder: write_config(folder, **config)


def file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_a_shard(folder: Path) -> None:
    path = shard(folder, load_file(folder / "model.safetensors"), 2)[1]
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(folder: Path) -> None:
    shard(folder, load_file(folder / "model.safetensors"), 2)[1].unlink()


def without(name: str) -> Damage:
    return weights(lambda state: state.pop(name))


def as_reward_model(state: dict[str, torch.Tensor]) -> None:
    state["score.weight"] = state.pop("lm_head.weight")[:1].clone()


def tied_under_the_other_name(state: dict[str, torch.Tensor]) -> None:
    """safetensors' save_model keeps one name of a shared tensor, and transformers reads the other alone."""
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


def of_another_kind(state: dict[str, torch.Tensor]) -> None:
    """The reference leaves it out as well, so the gate cannot see it."""
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old checkpoints hold it; it is computed


def not_a_number(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan


def template(folder: Path) -> None:
    tokens = {"additional_special_tokens": ["<pad>", "<|end|>"]}
    text = "{{ additional_special_tokens[1] }}{{ messages[0].content }}"
    write_config(folder, "tokenizer_config.json", **tokens, chat_template=text)


ROPE = "rope_parameters"
REJECTED: dict[str, tuple[str, Damage, str]] = {
    "no weight of a layer": ("qwen2", without("model.layers.1.mlp.up_proj.weight"), r"qwen2 .*up_proj\.weight"),
    "no norm": ("qwen2", without("model.norm.weight"), r"qwen2 .*model\.norm\.weight"),
    "no embedding": ("qwen2", without("model.embed_tokens.weight"), r"qwen2 .*embed_tokens\.weight"),
    "no head": ("llama", weights(as_reward_model), r"llama .*lm_head\.weight"),
    "tied under the other name": ("qwen2", weights(tied_under_the_other_name), r"lacks model\.embed_tokens\.weight$"),
    "another kind of weight": ("qwen2", weights(of_another_kind), r"q_norm"),
    "not a number": ("qwen2", weights(not_a_number), "not finite in transformers, too"),
    "another shape": ("qwen2", configured(intermediate_size=80), "qwen2 cannot be loaded"),
    "another vocabulary": ("qwen2", configured(vocab_size=330), "size mismatch for .*320.*330"),
    "cut": ("qwen2", cut_weights, r"qwen2 .*model\.safetensors is damaged"),
    "a wrong header": ("qwen2", file("model.safetensors", b"\xff" * 80), r"model\.safetensors is damaged"),
    "empty": ("qwen2", file("model.safetensors", b""), r"model\.safetensors is damaged"),
    "a cut shard": ("qwen2", cut_a_shard, r"model-00002-of-00002\.safetensors is damaged .*fetch or copy it again"),
    "a lost shard": ("qwen2", lose_a_shard, "00002-of-00002"),
    "quantised": ("qwen2", configured(quantization={"bits": 4}), "already quantised"),
    "no family": ("qwen2", configured(model_type=...), r"config\.json has no model_type"),
    "a family of its own code": (
        "qwen2",
        configured(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        "qwen2 cannot be loaded",
    ),
    "a small context": ("qwen2", configured(max_position_embeddings=1), "context of 1 token"),
    "a window that is no number": ("mistral", configured(sliding_window="all"), "sliding_window = 'all'"),
    "a window of nothing": ("mistral", configured(sliding_window=0), "sliding_window = 0"),
    "odd heads": ("qwen2", configured(num_key_value_heads=3), "num_key_value_heads = 3, which does not divide 4"),
    "negative heads": ("mistral", configured(num_key_value_heads=-1), "num_key_value_heads = -1"),
    "rope as a number": ("mistral", configured(rope_scaling=2.0), "rope_scaling = 2.0"),
    "dynamic rope": (
        "qwen2",
        configured(**{ROPE: {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        "rope scaling 'dynamic'",
    ),
    "partial rope": (
        "qwen2",
        configured(**{ROPE: {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        "partial rotary embeddings",
    ),
    "rope per layer": ("qwen2", configured(**{ROPE: {"full_attention": {"rope_theta": 1e4}}}), "rope_parameters"),
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
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_bad_model_is_rejected_in_one_short_line(make, checkpoint, tmp_path, monkeypatch, case) -> None:
    """transformers fills gaps at random and leaves out what it does not know: the gate could not see it."""
    architecture, damage, message = REJECTED[case]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked, with 15 s to answer"))
    folder = copy_of(checkpoint(architecture), tmp_path / architecture)
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        make(tmp_path / "new" / "out", architecture, folder, max_context=None)
    assert not (tmp_path / "new").exists()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_model_that_transformers_loads_and_cannot_run_is_one_line(make, checkpoint, agent, tmp_path) -> None:
    class Broken(type(agent("qwen2"))):  # type: ignore[misc]
        def margin(self, states: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes cannot be multiplied\nsecond line")

    broken = Broken.__new__(Broken)
    broken.__dict__ = agent("qwen2").__dict__
    with pytest.raises(ModelError, match=r"^qwen2 cannot be run by transformers: shapes cannot be multiplied$"):
        export(resolve_model(str(checkpoint("qwen2"))), broken, "agent", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_long_reason_of_others_is_cut(checkpoint) -> None:
    class Kind:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise ValueError("first, " + "second, " * 1000)

    with pytest.raises(ModelError, match=r"^qwen2 cannot be loaded: first, .* …$") as caught:
        from_pretrained(Kind, resolve_model(str(checkpoint("qwen2"))))
    assert len(str(caught.value)) < 400


def test_code_of_a_model_folder_is_not_run(make, checkpoint, tmp_path) -> None:
    proof = tmp_path / "proof"
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = copy_of(checkpoint("qwen2"), tmp_path / "known", auto_map=auto_map)
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    make(tmp_path / "out", model=folder, gate=False)
    assert not proof.exists()


def test_what_ends_an_answer_comes_from_the_first_that_names_it(make, checkpoint, tmp_path) -> None:
    """The generation config, else config.json, else the tokenizer; never a default of a class (LlamaConfig's is 2)."""
    folder = copy_of(checkpoint("qwen2"), tmp_path / "qwen2")
    (folder / "generation_config.json").unlink()
    first = make(tmp_path / "config", model=folder, gate=False)
    folder = copy_of(checkpoint("llama"), tmp_path / "llama", eos_token_id=...)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256}))
    second = make(tmp_path / "tokenizer", "llama", folder, gate=False)
    assert [bundle.manifest.model.eos_token_ids for bundle in (first, second)] == [(checkpoints.EOS_ID,)] * 2


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_configuration_of_transformers_5_has_its_rotary_base(make, checkpoint, tmp_path, architecture) -> None:
    """It writes base and scaling together, which transformers 4 passes over: the reference would be wrong alike."""
    four = copy_of(checkpoint(architecture), tmp_path / "four", rope_theta=500.0)
    five = copy_of(checkpoint(architecture), tmp_path / "five")
    scaling = json.loads((five / "config.json").read_text())["rope_scaling"] or {"rope_type": "default"}
    write_config(five, rope_parameters={**scaling, "rope_theta": 500.0}, rope_scaling=..., rope_theta=...)
    ids = checkpoints.random_prompts(1, seed=1, length=40)[0]
    logits = [
        CpuEngine(make(tmp_path / f"{folder.name}-out", architecture, folder, gate=False), threads=1)
        .run(Pass.full_outputs(ids, range(40), 0))
        .logits
        for folder in (four, five)
    ]
    assert np.array_equal(*logits)
