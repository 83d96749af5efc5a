"""Resumed runs equal uninterrupted ones; what ends a run leaves one that can be resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.event_file_writer import EventsWriter
from transformers import LlamaConfig, LlamaForSequenceClassification

from mara_deploy import agent as agents
from mara_deploy.files import run_lock
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.folder import RunFolder
from mara_runtime.errors import MaraError
from tests.export.training.conftest import EPISODES, SMALL, error_of, everything, recorded, rows, same, same_runs


def test_interrupted_and_resumed_equals_uninterrupted(run, resume, scores, whole, tmp_path) -> None:
    state = everything(whole)["state"]
    progress = state["progress"]
    assert progress["episodes"] == EPISODES
    assert progress["updates"] > 10
    assert 0 < progress["pending_updates"] < 1, "no update is pending at the checkpoint"
    assert state["added"] > SMALL["replay-transitions"], "the ring buffer has not wrapped"

    scores.CALLS = 0
    scores.TRIP = {3: "interrupt", 5: "terminate", 7: "fail"}
    assert f"interrupted after 6 of {EPISODES} episodes" in error_of(run("broken"))
    assert agents.load(tmp_path / "broken" / "agent.safetensors").widths == (16, 8)
    assert f"interrupted after 10 of {EPISODES}" in error_of(resume("broken"))
    assert "train_test_scores:length failed with RuntimeError: out of order" in error_of(resume("broken"))
    last = resume("broken", "--quiet")
    assert (last.code, last.err) == (0, "")
    assert same_runs(tmp_path / "broken", whole)


def test_the_times_of_checkpoints_do_not_matter(run, resume, scores, whole, monkeypatch, tmp_path) -> None:
    """A rare one is made in the middle of a round, when the reserve of the replay buffer is used up."""
    saves = recorded(monkeypatch, RunFolder, "save")
    scores.CALLS, scores.TRIP = 0, {EPISODES // 2 - 1: "fail"}
    assert run("cut", checkpoint_minutes=600).code == 2
    done = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["progress"]["episodes"]
    assert 0 < done < EPISODES - 4
    assert saves, "the reserve was not used up"
    assert resume("cut").code == 0
    assert same_runs(tmp_path / "cut", whole)


def test_a_finished_run_can_be_extended(run, resume, whole, tmp_path, monkeypatch) -> None:
    """By reading its checkpoint once, dropping an incomplete line of the log and a partial file of a killed process."""
    assert run("short", episodes=12).code == 0
    with (tmp_path / "short" / "log.jsonl").open("a") as file:
        file.write('{"episodes": 14, "sc')
    (tmp_path / "short" / ".checkpoint.pt.1.partial").write_text("cut o")
    assert "--episodes is 4, but the run already has 12" in error_of(resume("short", "--episodes", 4))
    loads = recorded(monkeypatch, RunFolder, "load")
    assert resume("short", "--episodes", EPISODES).code == 0
    assert len(loads) == 1
    assert same_runs(tmp_path / "short", whole)
    assert not list((tmp_path / "short").glob(".*"))
    assert run("few", episodes=2, prompts_at_once=8).code == 0  # with few episodes, a round is smaller
    assert "--replay-transitions is 160" in error_of(resume("few", "--episodes", 8))


def test_a_resumed_run_keeps_model_device_and_precision(run, resume, cached, checkpoint, tmp_path) -> None:
    """Also when the model has a new revision on the Hub."""
    cached("somebody/model", checkpoint("qwen2"), revision="a" * 40)
    assert run("out", model="somebody/model", episodes=4, dtype="bfloat16").code == 0
    before = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (before["device"], before["dtype"], before["model"]["revision"]) == ("cpu", "bfloat16", "a" * 40)
    cached("somebody/model", checkpoint("llama"), revision="b" * 40)
    assert resume("out", "--episodes", 8).code == 0
    after = {**before, "config": {**before["config"], "episodes": 8}}
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == after


def test_changed_inputs_are_refused(run, resume, checkpoint, tmp_path) -> None:
    """Files of the model, code of a score, weights of a reward model, whose device and batch size are the run's."""
    shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    config = LlamaConfig.from_pretrained(checkpoint("llama"), num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained("judge")
    for file in checkpoint("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "judge")
    scores = ("train_test_scores:length", "--score", "judge", "--score-device", "cpu", "--score-batch", 3)
    assert run("out", model="model", score=scores, episodes=4).code == 0
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (recorded["score_device"], recorded["score_batch"]) == ("cpu", 3)
    assert resume("out", "--episodes", 6).code == 0
    for file, name in (
        (tmp_path / "train_test_scores.py", "the score train_test_scores:length"),
        (tmp_path / "judge" / "model.safetensors", "the score judge"),
        (tmp_path / "model" / "generation_config.json", "the files of model"),
    ):
        before = file.read_bytes()
        file.write_bytes(before[:-1] + b"\x3f" if file.suffix == ".safetensors" else before + b"\n")
        line = error_of(resume("out", "--episodes", 8))
        assert name in line
        assert "have changed since" in line
        file.write_bytes(before)
    assert resume("out", "--episodes", 8).code == 0


def test_a_score_that_is_not_finite_ends_the_run_at_the_last_checkpoint(run, scores, tmp_path) -> None:
    scores.TRIP = {scores.CALLS + 2: "nan"}
    assert re.search(r"train_test_scores:length is nan for .* 'prompt number \d'", error_of(run("out")))
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["progress"]["episodes"] == 2


def test_what_cannot_start_names_the_remedy(run, tmp_path, monkeypatch) -> None:
    """Prompts that leave no room for an answer; a first round larger than the reserve of the replay buffer."""
    line = error_of(run("out", max_new_tokens=100_000, replay_transitions=1_600_000))
    assert "lower --max-new-tokens" in line
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(TrainConfig, "check_replay", lambda config: None)  # which estimates by the length alone
    line = error_of(run("out", replay_transitions=40))
    match = re.search(r"a round has (\d+) transitions, more than the 5 .* --replay-transitions (\d+) ", line)
    assert match is not None, line
    assert int(match[2]) == 8 * int(match[1]) - 7
    assert not (tmp_path / "out" / "log.jsonl").read_text()


def test_a_later_round_larger_than_the_reserve_keeps_what_came_before(run, resume, tmp_path, monkeypatch) -> None:
    """Bit for bit what a run of so many episodes leaves, and again after resuming."""
    monkeypatch.setattr(TrainConfig, "check_replay", lambda config: None)
    whole = {"episodes": 10, "seed": 5}
    assert run("longer", **whole, replay_transitions=400).code == 0
    sizes = np.diff([row["transitions"] for row in rows(tmp_path / "longer")], prepend=0).tolist()
    at = next(i for i in range(len(sizes) - 1, 1, -1) if sizes[i] > max(sizes[:i]))
    capacity = 8 * (sizes[at] - 1)
    settings = {**whole, "replay_transitions": capacity, "checkpoint_minutes": 600}
    line = error_of(run("out", **settings))
    assert rows(tmp_path / "out")[-1]["episodes"] == 2 * at
    assert f"a round has {sizes[at]} transitions, more than the {sizes[at] - 1} that" in line
    assert f"{2 * at} episodes" in line
    assert run("short", **{**settings, "episodes": 2 * at}).code == 0
    left = everything(tmp_path / "out", capacity)
    assert left["state"]["progress"]["updates"] > 0
    assert same(left, everything(tmp_path / "short", capacity))
    assert error_of(resume("out")) == line
    assert same(everything(tmp_path / "out", capacity), left)


def test_a_folder_in_use_is_left_alone(run, resume, tmp_path) -> None:
    assert run("out", episodes=4).code == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    line = error_of(run("out"))
    assert "choose another --out" in line
    assert "--resume" in line
    with run_lock(tmp_path / "out"):
        assert "another run is using out" in error_of(resume("out", "--episodes", 8))
    with run_lock(tmp_path / "new"):
        assert "another run is using new" in error_of(run("new"))
    assert list((tmp_path / "new").iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files
    assert "run.json" in error_of(resume(tmp_path / "nowhere"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").touch()
    assert "--out" in error_of(run("other", episodes=4))
    (tmp_path / "killed").mkdir()  # before it had a run.json
    for name in ("prompts.json", ".prompts.json.1.partial", ".run.json.1.partial"):
        (tmp_path / "killed" / name).write_text("cut o")
    assert run("killed", episodes=2).code == 0
    (tmp_path / "file").write_text("")  # root may write anywhere, but not into a file
    assert "cannot write" in error_of(run("file/out"))


def test_a_damaged_run_is_not_resumed(run, resume, tmp_path) -> None:
    assert run("out", episodes=2).code == 0
    for name in ("checkpoint.pt", "run.json", "prompts.json"):
        file = tmp_path / "out" / name
        whole = file.read_bytes()
        file.write_bytes(b"\x00")
        assert f"{name} cannot be read" in error_of(resume("out", "--episodes", 8))
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "file", ["log.jsonl", "replay/scores.npy", "tensorboard", "checkpoint.pt", "agent.safetensors"]
)
def test_after_a_full_disk_the_run_can_be_resumed(run, resume, uninterrupted, tmp_path, monkeypatch, file) -> None:
    """Whichever file meets it first; the file in progress stays as it was."""
    with monkeypatch.context() as patch:
        full_at(patch, file)
        line = error_of(run("out", episodes=10))
    assert re.fullmatch(rf"cannot write out/{file}: .*No space left on device.*", line), line
    assert resume("out", "--quiet").code == 0
    assert same_runs(tmp_path / "out", uninterrupted(10))


def full_at(monkeypatch, file: str) -> None:
    """Let the fourth write of a file fail as on a full disk."""
    owner, name, counts = {
        "log.jsonl": (Path, "open", lambda path, mode="r", *_: path.name == file and mode == "a"),
        "replay/scores.npy": (os, "posix_fallocate", lambda *_: True),  # the fourth of five files
        "tensorboard": (EventsWriter, "write_event", lambda *_: True),
        "checkpoint.pt": (torch, "save", lambda state, _: "learner" in state),
        "agent.safetensors": (agents, "save", lambda *_: True),
    }[file]
    real, left = getattr(owner, name), 4

    def write(*args: Any, **kw: Any) -> Any:
        nonlocal left
        left -= counts(*args)
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kw)

    monkeypatch.setattr(owner, name, write)


def test_the_error_for_a_full_disk_names_file_and_reason(tmp_path) -> None:
    """torch's own error is about its position in the file, safetensors' has no errno."""
    folder = RunFolder.new(tmp_path / "out", {}, [])
    big, small = {"a": torch.zeros(100_000)}, {"a": torch.zeros(1)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for state, file in ((big, "checkpoint.pt"), (small, "agent.safetensors")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        try:
            with pytest.raises(MaraError, match=rf"cannot write .*{file}: .*File too large"):
                folder.save(state, agents.untrained(400, 0, (64, 8)), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "out").glob(".*"))
