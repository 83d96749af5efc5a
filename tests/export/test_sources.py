"""Folders, Hub ids and aliases. The Hub's local cache is laid out by hand; nothing here needs a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest

from mara_deploy.commands import export as command
from mara_export.errors import ModelError
from mara_export.hf.families import ALIASES
from mara_export.hf.sources import ModelSource, resolve_file, resolve_model
from mara_runtime.bundle import Bundle
from tests.hub import NOWHERE, REVISION

OLDER = "fedcba9876543210fedcba9876543210fedcba98"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_named_by_its_last_part(checkpoint, monkeypatch) -> None:
    folder = checkpoint("qwen2")
    source = resolve_model(str(folder))
    assert (source.folder, source.name, source.revision) == (folder, "qwen2", None)
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "qwen2"
    monkeypatch.chdir(folder.parent)
    assert resolve_model("./qwen2/").name == "qwen2"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/qwen2").folder == folder


def test_a_folder_wins_over_an_alias(checkpoint, monkeypatch, hf_home) -> None:
    monkeypatch.chdir(checkpoint("qwen2").parent)
    assert resolve_model("qwen2").revision is None


def test_a_folder_without_config_or_weights_is_refused(checkpoint, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"model is not a Hugging Face model folder: it has no config\.json"):
        resolve_model(str(folder))
    shutil.copy(checkpoint("qwen2") / "config.json", folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"model has no \.safetensors weights; other formats are not loaded"):
        resolve_model(str(folder))


ADAPTER = r"holds an adapter \(adapter_config\.json\): merge it into its model first \(merge_and_unload of PEFT\)"


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_refused_with_what_to_do(checkpoint, tmp_path, whole) -> None:
    folder = tmp_path / "tuned"
    shutil.copytree(checkpoint("qwen2"), folder)
    (folder / "adapter_config.json").write_text("{}")
    if not whole:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"^tuned {ADAPTER}"):
        resolve_model(str(folder))


def test_a_cached_adapter_is_refused_before_weights_are_fetched(cached) -> None:
    cached("somebody/tuned", {"config.json": b"{}", "adapter_config.json": b"{}"})  # and nothing else
    for vet in (None, lambda _: None):
        with pytest.raises(ModelError, match=f"^somebody/tuned {ADAPTER}"):
            resolve_model("somebody/tuned", vet)


def test_what_is_asked_of_the_hub_first_are_the_files_that_refuse(monkeypatch, tmp_path) -> None:
    asked = []

    def snapshot_download(_: str, allow_patterns: list[str], **__: object) -> str:
        asked.append(allow_patterns)
        (tmp_path / "adapter_config.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=ADAPTER):
        resolve_model("somebody/tuned", lambda _: None)
    assert asked == [["config.json", "adapter_config.json"]]


@pytest.mark.parametrize(
    "name", ["qwen9", "a/b/c", "/nonexistent/folder", "./x/y", "with space/name", "org/", "/name", "~nosuchuser/model"]
)
def test_what_cannot_be_a_model_is_refused_with_the_choices(hf_home, name) -> None:
    with pytest.raises(ModelError, match="give a folder, a Hub id") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)
    assert "llama3.2-1b" in str(caught.value)


@pytest.mark.parametrize("name", ["org/..", "org/na--me", "-org/name", "org/name.git", "org/" + "x" * 200, "x" * 5000])
def test_ids_that_the_hub_does_not_allow_are_refused(hf_home, name) -> None:
    with pytest.raises(ModelError, match=re.escape(name[:50])) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


# --- the Hub's cache -------------------------------------------------------------------------------------------------


def test_aliases_are_hub_ids() -> None:
    hub_ids = [known.hub_id for known in ALIASES.values()]
    assert ALIASES["qwen2"].hub_id == "Qwen/Qwen2-0.5B-Instruct"
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in hub_ids)
    assert len(set(hub_ids)) == len(hub_ids)


@pytest.mark.parametrize("name", ["qwen2", "Qwen/Qwen2-0.5B-Instruct"])
def test_a_cached_model_is_found_with_its_revision(cached, checkpoint, name) -> None:
    cached("Qwen/Qwen2-0.5B-Instruct", {"config.json": b"{}"}, OLDER, main=False)
    snapshot = cached("Qwen/Qwen2-0.5B-Instruct", checkpoint("qwen2"))
    source = resolve_model(name)
    assert source.folder == snapshot
    assert (source.name, source.revision) == ("Qwen/Qwen2-0.5B-Instruct", REVISION)


@pytest.mark.parametrize("name", ["qwen3", "nobody/nothing"])
def test_what_is_not_cached_is_one_line_within_seconds(hf_home, name) -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match="not in the Hub cache, and the Hub cannot be reached") as caught:
        resolve_model(name)
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith("qwen3 (Qwen/Qwen3-0.6B): " if name == "qwen3" else "nobody/nothing: ")
    assert "\n" not in str(caught.value)
    assert not list(hf_home.rglob("config.json"))


def test_offline_mode_is_the_same_line(hf_home, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="not in the Hub cache"):
        resolve_model("nobody/nothing")


@pytest.mark.parametrize("left_out", ["config.json", "model.safetensors"])
def test_an_incomplete_download_is_refused(cached, checkpoint, left_out) -> None:
    snapshot = cached("Qwen/Qwen2-0.5B-Instruct", checkpoint("qwen2"))
    (snapshot / left_out).unlink()
    with pytest.raises(ModelError, match=r"Qwen/Qwen2-0\.5B-Instruct is not complete here"):
        resolve_model("qwen2")


def test_a_cached_agent_file(cached) -> None:
    snapshot = cached("IAAR-Shanghai/MARA_AGENTS", {"a.pth": b"data", "deep/b.pth": b"more"})
    assert resolve_file("IAAR-Shanghai/MARA_AGENTS", "a.pth") == snapshot / "a.pth"
    assert resolve_file("IAAR-Shanghai/MARA_AGENTS", "deep/b.pth").read_bytes() == b"more"
    with pytest.raises(ModelError, match=r"IAAR-Shanghai/MARA_AGENTS:c\.pth: .*no such file"):
        resolve_file("IAAR-Shanghai/MARA_AGENTS", "c.pth")
    with pytest.raises(ModelError, match=r"^nobody/agents:a\.pth: .*cannot be reached"):
        resolve_file("nobody/agents", "a.pth")


def test_a_file_outside_the_repository_is_refused(cached, tmp_path) -> None:
    cached("org/agents", {"a.pth": b"data"})
    (tmp_path / "hf-home" / "secret.pth").write_bytes(b"data")
    up = "../" * 4
    assert (tmp_path / "hf-home/hub/models--org--agents/snapshots" / REVISION / f"{up}secret.pth").is_file()
    with pytest.raises(ModelError, match="secret"):
        resolve_file("org/agents", f"{up}secret.pth")


# --- the command on both ---------------------------------------------------------------------------------------------


def test_a_model_that_is_not_cached_is_one_line_of_the_command(hf_home, agent_file, tmp_path, command) -> None:
    options = ["--model", "qwen2", "--agent", agent_file("qwen2"), "--out", tmp_path / "new" / "out"]
    outcome = command("export", *options)
    assert (outcome.code, outcome.out) == (2, "")
    first, line = outcome.err.splitlines()
    assert first == "mara-export: loading PyTorch and Optimum …"
    assert line.startswith("mara-export: error: qwen2 (Qwen/Qwen2-0.5B-Instruct): there is no such folder here")
    assert not (tmp_path / "new").exists()


def test_exporting_a_cached_model_and_agent_by_their_hub_names(
    cached, checkpoint, agent_file, tmp_path, monkeypatch, capsys
) -> None:
    import torch
    from safetensors.torch import load_file

    cached("Qwen/Qwen2-0.5B-Instruct", checkpoint("qwen2"))
    torch.save(load_file(agent_file("qwen2")), tmp_path / "agent.pth")
    cached("IAAR-Shanghai/MARA_AGENTS", {"llama/agent-1.pth": (tmp_path / "agent.pth").read_bytes()})
    monkeypatch.chdir(tmp_path)
    agent = "IAAR-Shanghai/MARA_AGENTS:llama/agent-1.pth"
    assert command.main(["--model", "qwen2", "--agent", agent, "--max-context", "64"]) == 0
    bundle = Bundle.open(tmp_path / "bundles" / "Qwen2-0.5B-Instruct-agent-1-cpu-fp32")
    assert bundle.manifest.model.source == "Qwen/Qwen2-0.5B-Instruct"
    assert bundle.manifest.model.revision == REVISION
    assert bundle.manifest.agent.source == agent
    assert f"Qwen/Qwen2-0.5B-Instruct @ {REVISION}" in capsys.readouterr().out
    text = (bundle.folder / "manifest.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in text


def test_hf_home_decides_in_a_process_of_its_own(cached, hf_home, checkpoint, agent_file, tmp_path) -> None:
    cached("Qwen/Qwen2-0.5B-Instruct", checkpoint("qwen2"))
    environment = {**os.environ, "HF_HOME": str(hf_home), "HF_ENDPOINT": NOWHERE, "OMP_NUM_THREADS": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        environment.pop(name, None)

    options = ["--model", "qwen2", "--agent", str(agent_file("qwen2")), "--out", "out", "--max-context", "64"]
    outcome = subprocess.run(
        [sys.executable, "-m", "mara_deploy.commands.export", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    # Nothing but its own lines: no warning of a library.
    first, *stages = outcome.stderr.splitlines()
    assert first == "mara-export: loading PyTorch and Optimum …"
    assert [line for line in stages if not re.fullmatch(r"  \S.* +\d+\.\d s", line)] == []
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["model"]["revision"] == REVISION


def test_a_model_is_refused_by_its_configuration_before_its_weights_are_fetched(cached) -> None:
    cached("somebody/gemma", {"config.json": b'{"model_type": "gemma2"}'})  # and nothing else

    def vet(source: ModelSource) -> None:
        assert json.loads((source.folder / "config.json").read_text())["model_type"] == "gemma2"
        raise ModelError("not this one")

    with pytest.raises(ModelError, match="not this one"):
        resolve_model("somebody/gemma", vet)
    with pytest.raises(ModelError, match="weights are missing"):
        resolve_model("somebody/gemma", lambda _: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cuda", "--lowering", "portable"], "--lowering is 'portable'; --target cuda supports ort"),
        (["--target", "cuda", "--precision", "fp32"], "--precision is 'fp32'; --target cuda supports fp16"),
        (["--target", "tensorrt", "--precision", "bf16"], "or give --no-gate"),
        (["--max-candidates", "0"], "--max-candidates is 0; it must be a whole number from 1 to 1024"),
        (["--precision", "int8", "--block-size", "48"], "--block-size is 48"),
        (["--out", "full"], "full exists already and is not an empty folder"),
        (["--out", "full/file/out"], "full/file/out: "),
    ],
)
def test_options_are_refused_before_anything_is_fetched(hf_home, tmp_path, monkeypatch, command, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    outcome = command("export", "--model", "qwen2", "--agent", "IAAR-Shanghai/MARA_AGENTS:a.pth", *options)
    assert outcome.code == 2
    assert message in outcome.err.splitlines()[-1]


def test_a_bundle_in_the_way_is_seen_before_the_weights_are_fetched(
    cached, checkpoint, agent_file, tmp_path, monkeypatch, command
) -> None:
    cached("Qwen/Qwen2-0.5B-Instruct", {"config.json": (checkpoint("qwen2") / "config.json").read_bytes()})
    monkeypatch.chdir(tmp_path)
    options = ["--model", "qwen2", "--agent", agent_file("qwen2")]
    assert "weights are missing" in command("export", *options).err
    assert not (tmp_path / "bundles").exists()
    (tmp_path / "bundles" / "Qwen2-0.5B-Instruct-qwen2-agent-cpu-fp32" / "mine").mkdir(parents=True)
    assert "fp32 exists already and is not an empty folder" in command("export", *options).err


def test_a_second_copy_of_the_weights_is_not_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from mara_export.hf import sources

    files = ["config.json", "tokenizer.json", "consolidated.safetensors", "model-00001-of-00002.safetensors"]
    files += ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "original/consolidated.00.pth"]
    wanted = filter_repo_objects(files, allow_patterns=sources._WANTED, ignore_patterns=sources._UNWANTED)
    assert set(files) - set(wanted) == {"consolidated.safetensors", "original/consolidated.00.pth"}


def test_the_files_of_a_tokenizer_without_its_json_are_fetched(checkpoint, tmp_path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    from mara_export.hf import sources
    from mara_export.hf.tokenizer import load_tokenizer

    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    whole.mkdir(), fetched.mkdir()
    model = json.loads((checkpoint("qwen2") / "tokenizer.json").read_text())["model"]
    (whole / "vocab.json").write_text(json.dumps(model["vocab"]))
    (whole / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (whole / "config.json").write_text('{"model_type": "qwen2"}')
    (whole / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    names = [path.name for path in whole.iterdir()]
    for name in filter_repo_objects(names, allow_patterns=sources._WANTED, ignore_patterns=sources._UNWANTED):
        shutil.copy(whole / name, fetched)
    expected = load_tokenizer(ModelSource(whole, whole.name, None))("another theme")["input_ids"]
    assert len(expected) < len("another theme")
    assert load_tokenizer(ModelSource(fetched, fetched.name, None))("another theme")["input_ids"] == expected


def test_a_commit_that_is_named_is_taken_though_the_model_has_moved(cached, checkpoint) -> None:
    old = cached("somebody/model", checkpoint("qwen2"), revision="a" * 40)
    new = cached("somebody/model", checkpoint("qwen2"), revision="b" * 40)
    assert resolve_model("somebody/model").folder == new
    found = resolve_model("somebody/model", revision="a" * 40)
    assert (found.folder, found.revision) == (old, "a" * 40)
