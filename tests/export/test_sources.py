"""Folders, Hub ids and aliases. The Hub's local cache is laid out by hand; nothing here needs a network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from mara_export.errors import ModelError
from mara_export.hf.catalogue import ALIASES
from mara_export.hf.sources import ModelSource, resolve_file, resolve_model
from mara_export.hf.tokenizer import load_tokenizer
from mara_runtime.bundle import Bundle
from tests.export.conftest import NOWHERE, PROGRESS, REVISION, CommandResult

OLDER = "fedcba9876543210fedcba9876543210fedcba98"
QWEN2 = "Qwen/Qwen2-0.5B-Instruct"
AGENTS = "IAAR-Shanghai/MARA_AGENTS"


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_named_by_its_last_part_and_wins_over_an_alias(checkpoint, monkeypatch, hf_home) -> None:
    folder = checkpoint("qwen2")
    source = resolve_model(str(folder))
    assert (source.folder, source.name, source.revision) == (folder, "qwen2", None)
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "qwen2"
    monkeypatch.chdir(folder.parent)
    for name in ("./qwen2/", "qwen2"):
        assert (resolve_model(name).name, resolve_model(name).revision) == ("qwen2", None)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/qwen2").folder == folder


def test_a_folder_without_config_or_weights_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match=rf"{tmp_path} is not a Hugging Face model folder: it has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=rf"{tmp_path} has no \.safetensors weights; other formats are not loaded"):
        resolve_model(str(tmp_path))


ADAPTER = r"holds an adapter \(adapter_config\.json\): name its base with --model, and the adapter with --lora"


def test_an_adapter_is_refused_with_the_remedy(cached, tmp_path) -> None:
    """A folder with the whole model or the adapter alone; in the Hub's cache, before weights are fetched."""
    for files in (("model.safetensors", "config.json"), ("adapter_model.safetensors",)):
        folder = tmp_path / files[0] / "tuned"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", *files):
            (folder / name).write_text("{}")
        with pytest.raises(ModelError, match=f"^tuned {ADAPTER}"):
            resolve_model(str(folder))
    cached("somebody/tuned", {"config.json": b"{}", "adapter_config.json": b"{}"})  # and nothing else
    for vet in (None, lambda _: None):
        with pytest.raises(ModelError, match=f"^somebody/tuned {ADAPTER}"):
            resolve_model("somebody/tuned", vet)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        *((name, True) for name in ("qwen9", "a/b/c", "/nonexistent/folder", "./x/y", "with space/name", "org/")),
        *((name, True) for name in ("/name", "~nosuchuser/model", "-org/name", "x" * 5000)),
        *((name, False) for name in ("org/..", "org/na--me", "org/name.git", "org/" + "x" * 200)),
    ],
)
def test_what_cannot_be_a_model_is_refused(hf_home, name, remedy) -> None:
    """With what to give instead; ids that only the Hub's own rules exclude, with its reason."""
    with pytest.raises(ModelError, match=re.escape(name[:50])) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    if remedy:
        assert "give a folder, a Hub id" in str(caught.value)
        assert "llama3.2-1b" in str(caught.value)


# --- the Hub's cache -------------------------------------------------------------------------------------------------


def test_a_cached_model_is_found_with_its_revision(cached, checkpoint) -> None:
    hub_ids = {known.hub_id for known in ALIASES.values()}
    assert len(hub_ids) == len(ALIASES)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in hub_ids)
    older = cached(QWEN2, checkpoint("qwen2"), OLDER, main=False)
    newest = cached(QWEN2, checkpoint("qwen2"))
    for name in ("qwen2", QWEN2):
        source = resolve_model(name)
        assert (source.folder, source.name, source.revision) == (newest, QWEN2, REVISION)
    pinned = resolve_model(QWEN2, revision=OLDER)
    assert (pinned.folder, pinned.revision) == (older, OLDER)


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_that_is_not_cached_is_one_line_within_seconds(hf_home, monkeypatch, offline) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    for name, named in (("qwen3", "qwen3 (Qwen/Qwen3-0.6B): "), ("nobody/nothing", "nobody/nothing: ")):
        start = time.monotonic()
        with pytest.raises(ModelError, match="not in the Hub cache, and the Hub cannot be reached") as caught:
            resolve_model(name)
        assert time.monotonic() - start < 10
        assert str(caught.value).startswith(named)
        assert "\n" not in str(caught.value)
    assert not list(hf_home.rglob("config.json"))


@pytest.mark.parametrize("left_out", ["config.json", "model.safetensors"])
def test_an_incomplete_download_is_refused(cached, checkpoint, left_out) -> None:
    snapshot = cached(QWEN2, checkpoint("qwen2"))
    (snapshot / left_out).unlink()
    with pytest.raises(ModelError, match=rf"{QWEN2} is not complete here"):
        resolve_model("qwen2")


def test_a_cached_agent_file(cached, tmp_path) -> None:
    snapshot = cached(AGENTS, {"a.pth": b"data", "deep/b.pth": b"more"})
    assert resolve_file(AGENTS, "a.pth") == snapshot / "a.pth"
    assert resolve_file(AGENTS, "deep/b.pth").read_bytes() == b"more"
    (tmp_path / "hf-home" / "secret.pth").write_bytes(b"data")
    outside = "../" * 4 + "secret.pth"
    assert (snapshot / outside).is_file()
    for repository, file, message in (
        (AGENTS, "c.pth", rf"{AGENTS}:c\.pth: .*no such file"),
        ("nobody/agents", "a.pth", r"^nobody/agents:a\.pth: .*cannot be reached"),
        (AGENTS, outside, "secret"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve_file(repository, file)


# --- what is fetched -------------------------------------------------------------------------------------------------


def test_a_model_is_vetted_before_its_weights_are_fetched(cached) -> None:
    cached("somebody/gemma", {"config.json": b'{"model_type": "gemma2"}'})  # and nothing else

    def vet(source: ModelSource) -> None:
        assert json.loads((source.folder / "config.json").read_text())["model_type"] == "gemma2"
        raise ModelError("not this one")

    with pytest.raises(ModelError, match="not this one"):
        resolve_model("somebody/gemma", vet)
    with pytest.raises(ModelError, match="weights are missing"):
        resolve_model("somebody/gemma", lambda _: None)


class Fake:
    """A Hub whose repositories are folders. It records which files each request gets."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.fetched = repository, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def snapshot_download(self, _: str, *, revision: None, allow_patterns: list, ignore_patterns: list) -> str:
        names = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*")]
        wanted = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        snapshot = self.repository.parent / str(len(self.fetched))
        self.fetched.append(sorted(wanted))
        for name in self.fetched[-1]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, snapshot / name)
        return str(snapshot)


def test_configurations_are_fetched_first_and_weights_once(tmp_path, monkeypatch) -> None:
    repository = tmp_path / "repository"
    (repository / "original").mkdir(parents=True)
    weights = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    wanted = ["config.json", *weights, "model.safetensors.index.json", "tokenizer.json"]
    for name in (*wanted, "consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin"):
        (repository / name).touch()
    hub = Fake(repository, monkeypatch)
    resolve_model("somebody/model", lambda _: None)
    assert hub.fetched == [["config.json"], wanted]
    (repository / "adapter_config.json").touch()
    with pytest.raises(ModelError, match=ADAPTER):
        resolve_model("somebody/model", lambda _: None)
    assert hub.fetched[2:] == [["adapter_config.json", "config.json"]]


def test_a_tokenizer_without_its_json_is_fetched_whole(checkpoint, tmp_path, monkeypatch) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    model = json.loads((checkpoint("qwen2") / "tokenizer.json").read_text())["model"]
    (repository / "vocab.json").write_text(json.dumps(model["vocab"]))
    (repository / "merges.txt").write_text("".join(" ".join(pair) + "\n" for pair in model["merges"]))
    (repository / "config.json").write_text('{"model_type": "qwen2"}')
    (repository / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (repository / "model.safetensors").touch()
    Fake(repository, monkeypatch)
    expected = load_tokenizer(ModelSource(repository, "whole", None))("another theme")["input_ids"]
    assert len(expected) < len("another theme")
    assert load_tokenizer(resolve_model("somebody/model"))("another theme")["input_ids"] == expected


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_cached_is_one_line_of_the_command(hf_home, agent_file, tmp_path, command) -> None:
    options = ["--model", "qwen2", "--agent", agent_file("qwen2"), "--out", tmp_path / "new" / "out"]
    line = command("export", *options).refusal("mara-export")
    assert line.startswith(f"qwen2 ({QWEN2}): there is no such folder here")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_model_and_an_agent_of_the_hub(
    cached, hf_home, checkpoint, agent_file, tmp_path, monkeypatch, command, own_process
) -> None:
    """No path of this machine is in the bundle. In a process: HF_HOME decides, and no library adds a line to stderr."""
    cached(QWEN2, checkpoint("qwen2"))
    torch.save(load_file(agent_file("qwen2")), tmp_path / "agent.pth")
    cached(AGENTS, {"llama/agent-1.pth": (tmp_path / "agent.pth").read_bytes()})
    monkeypatch.chdir(tmp_path)
    agent = f"{AGENTS}:llama/agent-1.pth"
    options = ["--model", "qwen2", "--agent", agent, "--max-context", "64"]
    if own_process:
        environment = {**os.environ, "HF_HOME": str(hf_home), "HF_ENDPOINT": NOWHERE, "OMP_NUM_THREADS": "1"}
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
            environment.pop(name, None)
        argv = [sys.executable, "-m", "mara_deploy.commands.export", *options]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600, check=False)
        outcome = CommandResult(done.returncode, done.stdout, done.stderr)
    else:
        outcome = command("export", *options, "--no-gate")
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if not PROGRESS.fullmatch(line)] == []
    assert f"{QWEN2} @ {REVISION}" in outcome.out
    bundle = Bundle.open(tmp_path / "bundles" / "Qwen2-0.5B-Instruct-agent-1-cpu-fp32")
    assert (bundle.manifest.model.source, bundle.manifest.model.revision) == (QWEN2, REVISION)
    assert bundle.manifest.agents[0].source == agent
    assert str(tmp_path) not in (bundle.folder / "manifest.json").read_text(encoding="utf-8")
