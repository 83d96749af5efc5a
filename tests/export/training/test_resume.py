"""Resumed runs equal uninterrupted ones; what ends a run leaves one that can be resumed."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboardX.event_file_writer import EventsWriter

from mara_deploy import agent as agents
from mara_deploy.files import run_lock
from mara_deploy.train import task
from mara_deploy.train.folder import RunFolder
from mara_runtime.errors import MaraError
from tests.export.training.conftest import (
    EPISODES,
    SMALL,
    error_of,
    everything,
    read_run,
    recorded,
    rows,
    same,
    same_runs,
)


def test_interrupted_and_resumed_equals_uninterrupted(run, resume, scores, whole, tmp_path) -> None:
    state = everything(whole)["state"]
    progress = state["progress"]
    assert progress["episodes"] == EPISODES
    assert progress["updates"] > 10
    assert 0 < progress["pending_updates"] < 1, "no update is pending at the checkpoint"
    assert state["replay"]["added"] > SMALL["replay-transitions"], "the ring buffer has not wrapped"

    scores.CALLS = 0  # each start asks for one score before its first round
    scores.TRIP = {4: "interrupt", 7: "terminate", 10: "fail"}
    assert f"interrupted after 6 of {EPISODES} episodes" in error_of(run("broken"))
    assert agents.load(tmp_path / "broken" / "agent.safetensors").widths == (16, 8)
    assert f"interrupted after 10 of {EPISODES}" in error_of(resume("broken"))
    assert "train_test_scores:length failed with RuntimeError: out of order" in error_of(resume("broken"))
    last = resume("broken", "--quiet")
    assert (last.code, last.err) == (0, "")
    assert same_runs(tmp_path / "broken", whole)


@pytest.mark.parametrize("trip", ["fail", "nan", "stop now", "batch system"])
def test_whatever_ends_a_run_no_finished_round_is_lost(run, resume, scores, uninterrupted, tmp_path, trip) -> None:
    """Although the last checkpoint is long ago."""
    scores.CALLS, scores.TRIP = 0, {5: trip}
    done = run("out", episodes=10, checkpoint_minutes=600)
    assert done.code == 2
    finished = 8 if trip == "batch system" else 6
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["episodes"] == finished == rows(tmp_path / "out")[-1]["episodes"]
    assert resume("out", "--quiet").code == 0
    assert same_runs(tmp_path / "out", uninterrupted(10))


def test_a_score_that_fails_in_passing_is_asked_again(run, scores, uninterrupted, tmp_path, monkeypatch) -> None:
    pauses = []
    monkeypatch.setattr(task.time, "sleep", pauses.append)
    scores.CALLS, scores.TRIP = 0, {1: "offline", 4: "offline", 5: "busy", 8: "offline"}
    done = run("out", episodes=10)
    assert done.code == 0
    assert pauses == [1, 1, 5, 1]
    assert done.err.count("train_test_scores:length failed with ConnectionResetError") == 3
    assert "RateLimitError: slow down (train_test_scores.py:" in done.err
    assert "trying again in 5 s" in done.err
    assert same_runs(tmp_path / "out", uninterrupted(10))
    scores.CALLS, scores.TRIP = 0, dict.fromkeys(range(3, 9), "offline")
    assert "ConnectionResetError" in error_of(run("gone", episodes=4))
    assert scores.CALLS == 6


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


def test_a_resumed_run_keeps_model_device_and_precision(run, resume, cached, checkpoint, tmp_path) -> None:
    """Also when the model has a new revision on the Hub."""
    cached("somebody/model", checkpoint("qwen2"), revision="a" * 40)
    assert run("out", model="somebody/model", episodes=4, dtype="bfloat16").code == 0
    before = read_run(tmp_path / "out")
    assert (before["device"], before["dtype"], before["model"]["revision"]) == ("cpu", "bfloat16", "a" * 40)
    cached("somebody/model", checkpoint("llama"), revision="b" * 40)
    assert resume("out", "--episodes", 8).code == 0
    after = read_run(tmp_path / "out")
    changed = [{"episodes": 4, "what": "--episodes", "from": 4, "to": 8}]
    config = {**before["config"], "episodes": 8}
    assert after == {**before, "config": config, "changes": changed, "sha256": after["sha256"]}


def test_another_model_is_refused_and_another_place_is_not(run, resume, talker, tmp_path) -> None:
    shutil.copytree(talker, tmp_path / "model")
    assert run("out", model="model", episodes=4).code == 0
    (tmp_path / "model").rename(tmp_path / "moved")
    assert "--model" in error_of(resume("out", "--episodes", 6))
    assert resume("out", "--episodes", 6, "--model", "moved").code == 0
    moved = {"episodes": 4, "what": "--model", "from": "model", "to": "moved"}
    assert moved in read_run(tmp_path / "out")["changes"]
    with (tmp_path / "moved" / "generation_config.json").open("a") as file:
        file.write("\n")
    line = error_of(resume("out", "--episodes", 8))
    assert "the files of moved have changed" in line
    (tmp_path / "moved" / "generation_config.json").write_bytes((talker / "generation_config.json").read_bytes())
    assert resume("out", "--episodes", 8).code == 0


def test_scores_devices_and_sizes_may_change_and_are_recorded(run, resume, judge, tmp_path) -> None:
    both = ("train_test_scores:length", "--score", "judge", "--score-batch", 3)
    assert run("out", score=both, episodes=4, device="cpu").code == 0
    first = read_run(tmp_path / "out")
    assert (first["score_device"], first["score_batch"], first["changes"]) == ("cpu", 3, [])
    assert resume("out", "--episodes", 6).code == 0
    assert [change["what"] for change in read_run(tmp_path / "out")["changes"]] == ["--episodes"]

    with (tmp_path / "train_test_scores.py").open("a") as file:
        file.write("\n")
    sizes = {"--prompts-at-once": 3, "--max-new-tokens": 3, "--replay-transitions": 40, "--checkpoint-minutes": 1.0}
    done = resume("out", "--episodes", 12, "--score-batch", 2, *(x for s in sizes.items() for x in s))
    assert done.code == 0
    changes = {change["what"]: change["to"] for change in read_run(tmp_path / "out")["changes"][1:]}
    assert changes.pop("score train_test_scores:length") != first["scores"][0]
    assert changes == {**sizes, "--score-batch": 2, "--episodes": 12}
    assert "changed since the run began: --score-batch, from 3 to 2" in done.err
    log = rows(tmp_path / "out")
    assert [row["episodes"] for row in log[-2:]] == [9, 12]
    assert max(row["answer_tokens"] for row in log[-2:]) <= 3
    assert sum(file.stat().st_size for file in (tmp_path / "out" / "replay").iterdir()) < 100 * 2 * 64

    done = resume(
        "out", "--episodes", 15, "--score", "train_test_scores:length", "--weight", 2, "--replay-transitions", 500
    )
    assert done.code == 0
    assert read_run(tmp_path / "out")["score"] == "+2·train_test_scores:length"
    assert resume("out", "--score", "nowhere:nothing").code == 2
    assert "no --score is a model" in error_of(resume("out", "--score-batch", 8))
    assert resume("out", "--episodes", 16).code == 0


def test_a_run_can_begin_with_an_agent(run, resume, scores, whole, checkpoint, tmp_path) -> None:
    """It keeps its widths, and the first round is its own; killed before its first round, it still begins so."""
    scores.CALLS, scores.TRIP = 0, {2: "fail"}
    assert run("warm", init_agent=whole / "agent.safetensors", episodes=4).code == 2
    begun, taken = (agents.load(folder / "agent.safetensors") for folder in (tmp_path / "warm", whole))
    assert same(dict(begun.state_dict()), dict(taken.state_dict()))
    assert resume("warm").code == 0
    cold = run("cold", episodes=4)
    assert cold.code == 0
    assert rows(tmp_path / "warm")[0]["entropy"] != rows(tmp_path / "cold")[0]["entropy"]
    assert read_run(tmp_path / "warm")["init_agent"] == str(whole / "agent.safetensors")
    agents.untrained(32, 0, (16, 8)).save(tmp_path / "narrow.safetensors")
    agents.untrained(64, 0, (4, 4)).save(tmp_path / "other.safetensors")
    for agent, named in (
        ("narrow", "reads 32 values, but talker has 64"),
        ("other", "--widths is (16, 8)"),
        ("no", "no agent file"),
    ):
        assert named in error_of(run("refused", init_agent=f"{agent}.safetensors"))
    assert not (tmp_path / "refused").exists()


def test_what_cannot_start_names_the_remedy(run, scores, tmp_path) -> None:
    """Before the first round, and with nothing written."""
    scores.CALLS, scores.TRIP = 0, {1: "nan"}
    assert re.search(r"train_test_scores:length is nan for .* 'prompt number \d'", error_of(run("out")))
    assert "lower --max-new-tokens" in error_of(run("out", max_new_tokens=100_000))
    assert "free some" in error_of(run("out", replay_transitions=10**15))
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("file", ["log.jsonl", "replay", "tensorboard", "checkpoint.pt", "agent.safetensors"])
def test_after_a_full_disk_the_run_can_be_resumed(run, resume, uninterrupted, tmp_path, monkeypatch, file) -> None:
    """Whichever file meets it first; the file in progress stays as it was."""
    with monkeypatch.context() as patch:
        full_at(patch, file)
        line = error_of(run("out", episodes=10))
    assert re.fullmatch(rf"cannot write out/{file}\S*: .*No space left on device.*", line), line
    assert resume("out", "--quiet").code == 0
    assert same_runs(tmp_path / "out", uninterrupted(10))


def full_at(monkeypatch, file: str) -> None:
    """Let the fourth write of a file fail as on a full disk."""
    owner, name, counts = {
        "log.jsonl": (Path, "open", lambda path, mode="r", *_: path.name == file and mode == "ab"),
        "replay": (Path, "open", lambda path, mode="r", *_: path.parent.name == file and mode == "ab"),
        "tensorboard": (EventsWriter, "write_event", lambda *_: True),
        "checkpoint.pt": (torch, "save", lambda state, _: "learner" in state),
        "agent.safetensors": (agents.Agent, "save", lambda *_: True),
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
    """torch's own error is about its position in the file."""
    folder = RunFolder.new(tmp_path / "out", {}, [], {})
    big, small = {"a": torch.zeros(100_000)}, {"a": torch.zeros(1)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for state, file in ((big, "checkpoint.pt"), (small, "agent.safetensors")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        try:
            with pytest.raises(MaraError, match=rf"cannot write .*{file}: .*File too large"):
                folder.save(state, agents.untrained(400, 0, (64, 8)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "out").glob(".*"))
