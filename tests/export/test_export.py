"""A bundle is whole or absent, and its content depends on the model and the agent alone."""

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

from mara_deploy.agent import untrained
from mara_deploy.demo.__main__ import main as demo_main
from mara_export.export import export, export_all, finish
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_export.tracing import trace
from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, MaraError, OptionError
from tests import checkpoints
from tests.checkpoints import named
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, edit_json
from tests.unit.helpers import write_manifest

ROOT = Path(__file__).parents[2]
UNCHECKED = ExportOptions(gate=False)


def contents(folder: Path) -> dict[str, str]:
    """Relative path and SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- whole or absent -------------------------------------------------------------------------------------------------


class Stages(Progress):
    """Records the stages, and calls `act` after those whose name begins with `at`."""

    def __init__(self, at: str = "no stage", act: Callable[[], object] = lambda: None) -> None:
        super().__init__(quiet=True)
        self.at, self.act, self.seen = at, act, []

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        self.seen.append(what)
        yield
        if what.startswith(self.at):
            self.act()


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def test_an_interrupted_export_leaves_nothing(checkpoint, agent, tmp_path) -> None:
    source, out = resolve_model(str(checkpoint("qwen2"))), tmp_path / "new" / "deeper" / "out"
    with pytest.raises(KeyboardInterrupt):
        export(source, named(agent("qwen2")), out, UNCHECKED, Stages("trace the LLM", raising(KeyboardInterrupt())))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_at_any_stage_leaves_nothing(traced, tmp_path) -> None:
    options, every = ExportOptions(precision="int8", gate=False), Stages()
    finish(traced("qwen2"), options, tmp_path / "whole", every)
    for stage in every.seen:
        with pytest.raises(OSError, match="injected"):
            finish(traced("qwen2"), options, tmp_path / "new" / "out", Stages(stage, raising(OSError("injected"))))
        assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_files_of_others_that_appear_during_an_export_stay(traced, tmp_path) -> None:
    out = tmp_path / "old" / "new" / "out"
    out.parent.parent.mkdir()

    def interfere() -> None:
        out.mkdir(exist_ok=True)
        (out / "precious").touch()

    with pytest.raises(MaraError, match=r"cannot write .*out"):  # the last rename fails
        finish(traced("qwen2"), UNCHECKED, out, Stages("", interfere))
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new", "out", "precious"]


def test_an_empty_folder_is_used_and_survives_a_failure(traced, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ZeroDivisionError):
        finish(traced("qwen2"), UNCHECKED, out, Stages("join", raising(ZeroDivisionError())))
    assert [*tmp_path.rglob("*")] == [out]
    finish(traced("qwen2"), UNCHECKED, out)
    Bundle.open(out)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("full", "exists already and is not an empty folder: remove it, or choose another --out"),
        ("file", "exists already and is not an empty folder"),
        ("link", "full exists already and is not an empty folder"),
        ("file/a/b/out", "cannot write"),
        ("new/" + "x" * 300, "cannot write"),
        ("new/" + "x" * 250, "cannot write"),  # a valid name, but not with the temporary folder's suffix
        ("/proc/new/out", "cannot write"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_before_the_model_is_read(agent, tmp_path, out, message) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = sorted(tmp_path.rglob("*"))
    unread = ModelSource(tmp_path / "unread", "unread", None)
    with pytest.raises(MaraError, match=message):
        export(unread, named(agent("qwen2")), tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_demo_keeps_its_bundle_when_it_cannot_export(bundle_copy, monkeypatch, capsys) -> None:
    out = bundle_copy()
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    manifest["model"]["source"] = manifest["agents"][0]["source"] = "demo"
    write_manifest(out, manifest)
    before = contents(out)
    monkeypatch.setitem(sys.modules, "mara_export.export", None)
    assert demo_main(["--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'mara-deploy[cpu,export]'" in line
    assert contents(out) == before


# --- several bundles from one trace ----------------------------------------------------------------------------------


def test_bundles_of_one_trace_equal_those_of_separate_traces(checkpoint, agent, tmp_path) -> None:
    """Byte for byte, whatever the state of the random generators and the output folder."""
    source = resolve_model(str(checkpoint("qwen2")))
    options = [ExportOptions(precision="int8", max_context=64), ExportOptions(target="tensorrt-rtx", max_context=64)]
    outs, progress = [tmp_path / "0", tmp_path / "1"], Stages()
    torch.manual_seed(99)
    np.random.seed(99)
    made = export_all(source, named(agent("qwen2")), list(zip(options, outs, strict=True)), progress)
    assert [bundle.folder for bundle in made] == outs
    for stage, count in (("open qwen2", 1), ("run the reference", 1), ("trace the LLM", 1), ("parity gate", 2)):
        assert sum(seen.startswith(stage) for seen in progress.seen) == count
    torch.manual_seed(100)
    options = replace(options[0], gate=False)  # the gate changes no file but the manifest
    alone = export(source, named(agent("qwen2")), tmp_path / "alone" / "out", options)
    assert alone.manifest.files == made[0].manifest.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "alone"]


def test_bundles_written_before_a_failure_stay(checkpoint, agent, tmp_path) -> None:
    source = resolve_model(str(checkpoint("qwen2")))
    good = ExportOptions(max_context=64, gate=False)
    bad = ExportOptions(precision="int4", max_context=64, gate=False, keep=("nothing/*",))
    with pytest.raises(OptionError, match="--keep"):
        export_all(source, named(agent("qwen2")), [(good, tmp_path / "good"), (bad, tmp_path / "bad")])
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    Bundle.open(tmp_path / "good")
    with pytest.raises(OptionError, match="--out"):
        export_all(source, named(agent("qwen2")), [(good, tmp_path / "same"), (good, tmp_path / "same")])
    with pytest.raises(ValueError, match="max_context"):
        export_all(source, named(agent("qwen2")), [(good, tmp_path / "a"), (UNCHECKED, tmp_path / "b")])


def test_what_a_trace_does_not_cover_is_refused(traced, tmp_path) -> None:
    for options, flag in (
        ({"max_context": MAX_CONTEXT + 1}, "--max-context"),
        ({"max_candidates": MAX_CANDIDATES + 1}, "--max-candidates"),
        ({"max_context": 48}, "--max-context"),  # shorter than the reference's prompts and their siblings
    ):
        with pytest.raises(OptionError, match=flag):
            finish(traced("qwen2"), ExportOptions(**options), tmp_path / "out")
    with pytest.raises(OptionError, match="reference"):
        finish(replace(traced("qwen2"), reference=None), ExportOptions(), tmp_path / "out")
    facts = replace(traced("qwen2").model, eos_token_ids=(-1,))
    with pytest.raises(BundleError, match="eos_token_ids"):  # a manifest that no one could read
        finish(replace(traced("qwen2"), model=facts), UNCHECKED, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


# --- what is in a bundle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_a_bundle_has_no_pickle_and_no_path_of_this_machine(bundle, checkpoint, tmp_path_factory, lowering) -> None:
    forbidden = [
        str(ROOT),
        str(checkpoint("qwen2").parent),
        str(tmp_path_factory.getbasetemp()),
        str(Path.home()) + "/",
        "site-packages",
        ".partial",
        str(Path(sys.prefix)),
    ]
    for path in filter(Path.is_file, bundle("qwen2", lowering).rglob("*")):
        data = path.read_bytes()
        assert [text for text in forbidden if text.encode() in data] == [], path.name
        assert path.suffix in (".json", ".onnx", ".data", ".jinja", ".safetensors")
        assert not data.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04"))
        with pytest.raises((ValueError, IndexError, KeyError, EOFError)):
            list(pickletools.genops(io.BytesIO(data)))


@pytest.mark.parametrize(("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(traced, tmp_path, mask, file, directory) -> None:
    before = os.umask(mask)
    try:
        finish(traced("qwen2"), UNCHECKED, tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    folders = {modes.pop("agents"), stat.S_IMODE((tmp_path / "out").stat().st_mode)}
    assert set(modes.values()) == {file}, modes
    assert folders == {directory}


def test_the_manifest_states_the_facts(traced, checkpoint, bundle, tmp_path) -> None:
    folder = bundle("qwen2")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json"}
    config = json.loads((checkpoint("qwen2") / "config.json").read_text())
    model, agent = manifest["model"], manifest["agents"][0]
    assert (model["source"], model["architecture"], model["revision"]) == ("qwen2", "qwen2", None)
    assert (model["intermediate_size"], model["tied"]) == (config["intermediate_size"], config["tie_word_embeddings"])
    assert model["eos_token_ids"] == list(checkpoints.EOS_IDS)  # config.json names only the first
    assert (agent["hidden_size"], agent["widths"], agent["fallback"]) == (64, [32, 16], "first")
    assert agent["source"] == "qwen2-agent.safetensors"
    assert (manifest["max_context"], manifest["max_candidates"]) == (MAX_CONTEXT, MAX_CANDIDATES)
    assert manifest["made_with"]["torch"] == torch.__version__
    step = {"file": "step.onnx", "lowering": "ort", "precision": "fp32", "quantisation": None, "cache": "float32"}
    assert (manifest["step"], manifest["targets"], manifest["engines"]) == (step, ["cpu"], [])
    assert manifest["noise"] > 0
    assert agent["noise"] > 0

    other = replace(traced("qwen2"), agents=named(silent_agent(), "silent") + traced("qwen2").agents)
    made = finish(other, ExportOptions(gate=False, max_context=64, max_candidates=8), tmp_path / "out").manifest
    assert Bundle.open(tmp_path / "out").manifest.to_json() == made.to_json()
    assert (made.max_context, made.max_candidates) == (64, 8)
    assert [(a.name, a.parity, a.noise) for a in made.agents] == [("silent", None, None), ("agent", None, None)]
    assert (made.parity, made.noise) == (None, None)


def silent_agent() -> Any:
    """An agent of zeros, as before its first update."""
    agent = untrained(64, 0, (4, 4))
    torch.nn.init.zeros_(agent.output_linear.weight)
    torch.nn.init.zeros_(agent.output_linear.bias)
    return agent


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("architecture", "tie", "config"),
    [
        ("llama", True, {"rope_scaling": YARN}),
        ("qwen2", False, {"rope_scaling": LINEAR}),
        pytest.param("llama", False, {"rope_scaling": None}, marks=pytest.mark.long),
        ("mistral", False, {"sliding_window": 64}),  # as large as the context
    ],
    ids=str,
)
def test_other_configurations_pass_the_gate(tmp_path, architecture, tie, config) -> None:
    """Without a tokenizer, and with an agent that has not learned anything."""
    folder = checkpoints.make(architecture, tmp_path / "model", seed=3, tie=tie)
    edit_json(folder / "config.json", **config)
    options = ExportOptions(max_context=64)
    bundle = export(resolve_model(str(folder)), named(silent_agent()), tmp_path / "out", options)
    manifest = bundle.manifest
    assert (manifest.parity["passed"], manifest.model.tied, manifest.tokenizer) == (True, tie, None)
    graph = onnx.load(bundle.path("step.onnx"), load_external_data=False).graph
    assert sum(manifest.model.shape.vocab_size in t.dims for t in graph.initializer) == (1 if tie else 2)


def test_answers_end_at_the_tokens_of_the_model_and_of_eos(checkpoint, agent, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("mara_export.tracing.end_of_turn", lambda _: (7, "<seven>"))
    source, pad = resolve_model(str(checkpoint("qwen2"))), checkpoints.SPECIAL_TOKENS["<pad>"]
    (tmp_path / "trace").mkdir()
    options = {"gate": False, "eos": ("<pad>", "</s>"), "progress": Progress()}
    traced = trace(source, named(agent("qwen2")), tmp_path / "trace", **options)
    assert traced.model.eos_token_ids[-1] == pad
    assert traced.model.eos_token_ids.count(checkpoints.EOS_ID) == 1
    assert "ends an answer with <seven>, which is not an end token of the model: add --eos '<seven>'" in (
        capsys.readouterr().err
    )
