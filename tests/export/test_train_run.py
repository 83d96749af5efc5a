"""`mara-train` end to end: resumed runs equal uninterrupted ones, and a failed run can be resumed."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging

from mara_deploy import agent as agents
from mara_deploy.files import run_lock
from mara_deploy.train import loop, report
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.replay import ReplayBuffer
from mara_deploy.train.report import write_report
from mara_runtime.errors import MaraError

SCORES = """
import os, signal
CALLS = 0
TRIP = {}                                      # {call: what happens during it}

def length(prompts, answers):
    global CALLS
    CALLS += 1
    trip = TRIP.pop(CALLS, None)
    if trip == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif trip == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif trip == "fail":
        raise RuntimeError("out of order")
    elif trip == "nan":
        return [float("nan")] * len(answers)
    return [len(answer) / 40 for answer in answers]
"""
EPISODES = 32
SMALL = {
    "episodes": EPISODES,
    "prompts-at-once": 2,
    "max-new-tokens": 4,
    "top-k": 4,
    "top-p": 1,
    "fallback": "first",
    "batch": 16,
    "updates-per-episode": 0.75,
    "start-transitions": 20,
    "replay-transitions": 160,
    "n-step": 5,
    "checkpoint-minutes": 0,
    "threads": 1,
}


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """The user's module of scores, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_test_scores.py").write_text(SCORES)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("train_test_scores", None)
    import train_test_scores

    yield train_test_scores
    del sys.modules["train_test_scores"]


@pytest.fixture
def run(command, checkpoint, scores, tmp_path, monkeypatch):
    """(folder, setting=value, …) → CommandResult of a new run in it, without a report, as plots are slow."""
    monkeypatch.setattr(report, "write_report", lambda folder: None)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(7)))

    def train(out: str, model: Any = None, score: tuple[Any, ...] = ("train_test_scores:length",), **settings: Any):
        settings = {**SMALL, **{name.replace("_", "-"): value for name, value in settings.items()}}
        options = [part for name, value in settings.items() for part in (f"--{name}", value) if part is not None]
        inputs = ["--model", model or checkpoint("qwen2"), "--prompts", "prompts.txt", "--score", *score]
        return command("train", *inputs, "--out", out, *options, "--widths", 16, 8)

    return train


@pytest.fixture
def resume(command):
    """(folder, more options) → CommandResult."""
    return lambda out, *options: command("train", "--resume", "--out", out, *options)


_UNINTERRUPTED: dict[int, Path] = {}


@pytest.fixture
def uninterrupted(run, tmp_path):
    """episodes → folder of an uninterrupted run, made once."""

    def folder(episodes: int) -> Path:
        if episodes not in _UNINTERRUPTED:
            assert run(f"whole{episodes}", episodes=episodes).code == 0
            _UNINTERRUPTED[episodes] = tmp_path / f"whole{episodes}"
        return _UNINTERRUPTED[episodes]

    return folder


@pytest.fixture
def whole(uninterrupted) -> Path:
    return uninterrupted(EPISODES)


def everything(out: Path, capacity: int = SMALL["replay-transitions"]) -> dict[str, Any]:
    """All that a run leaves, except times."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    agent = agents.load(out / "agent.safetensors")
    replay = ReplayBuffer(out / "replay", capacity, agent.hidden_size, state["added"])
    return {
        "agent": dict(agent.state_dict()),
        "state": state,
        "replay": vars(replay.sample(np.random.default_rng(0), 200, 1)),
        "log": [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows(out)],
    }


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def same_runs(one: Path, other: Path, capacity: int = SMALL["replay-transitions"]) -> bool:
    return same(everything(one, capacity), everything(other, capacity))


def error_of(result) -> str:
    """The last line of a command that failed with exit code 2."""
    assert result.code == 2
    assert "Traceback" not in result.err
    return result.err.splitlines()[-1].removeprefix("mara-train: error: ")


def recorded(monkeypatch, cls: type, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of a method from now on."""
    calls, real = [], getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda *args: (calls.append(args), real(*args))[1])
    return calls


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── what a run does ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seed_decides_prompts_actions_and_batches(run, whole, tmp_path) -> None:
    """For the weights see test_train_learner.py."""
    assert run("other", seed=1, episodes=8).code == 0
    runs = [everything(folder) for folder in (whole, tmp_path / "other")]
    prompts = [[row["example"]["prompt"] for row in result["log"][:4]] for result in runs]
    assert prompts[0] != prompts[1]
    streams = {result["state"][use]["state"]["inc"] for result in runs for use in ("actions", "batches")}
    assert len(streams) == 4, "generators that draw the same numbers"


def test_updates_begin_with_enough_transitions_and_none_is_lost(whole) -> None:
    log = rows(whole)
    waiting = [row for row in log if row["transitions"] < SMALL["start-transitions"]]
    assert waiting, "learning starts in the first round"
    episodes = waiting[-1]["episodes"]
    expected = [int(0.75 * max(0, row["episodes"] - episodes)) for row in log]
    assert [row["updates"] for row in log] == expected


def test_the_reward_is_the_score_minus_its_baseline(run, monkeypatch, tmp_path) -> None:
    added = recorded(monkeypatch, ReplayBuffer, "add")
    assert run("out", episodes=4, score_baseline=0.25).code == 0
    log = rows(tmp_path / "out")
    scores = np.reshape([reward + 0.25 for _, _, reward in added], (2, 2))
    assert scores.mean(axis=1).tolist() == pytest.approx([row["score"] for row in log])
    assert log[0]["example"]["score"] == pytest.approx(scores[0, 0])


def test_checkpoints_are_minutes_apart(run, scores, monkeypatch) -> None:
    episodes, save = [], RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda *args: (episodes.append(args[2].origin.episodes), save(*args)))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * scores.CALLS))  # 25 s per round
    assert run("out", episodes=16, checkpoint_minutes=1, replay_transitions=2000).code == 0
    assert episodes == [6, 12, 16]


def test_both_agent_files_load_with_metadata_and_common_permissions(whole) -> None:
    one, other = (agents.load(whole / name) for name in ("agent.safetensors", "agent.pth"))
    assert same(dict(one.state_dict()), dict(other.state_dict()))
    assert one.fallback == SMALL["fallback"]
    assert (one.origin.episodes, one.origin.score) == (EPISODES, "train_test_scores:length")
    modes = {path.name: path.stat().st_mode & 0o777 for path in whole.iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_terminal_report_and_tensorboard_show_the_log(run, scores, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write_report", write_report)
    done = run("out", episodes=10)
    log = rows(tmp_path / "out")
    assert [row["episodes"] for row in log] == [2, 4, 6, 8, 10]
    last = log[-1]
    assert f"score {last['score']:+.3f}" in done.err
    for name in ("KL", "H ", "α", "accepts", "forced", "intervenes", "episode/s"):
        assert name in done.err, name

    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert last["example"]["prompt"] in page
    assert set(re.findall(r"(?:src|href)=\"(?!#)", page)) == set()  # self-contained

    events = read_events(tmp_path / "out" / "tensorboard")
    assert events["rollout/score"] == pytest.approx({row["episodes"]: row["score"] for row in log})
    assert {"rollout/kl", "rollout/forced_rate", "learner/critic_loss", "time/rollout_seconds"} <= set(events)

    # markup in answers stays text
    folder = RunFolder.existing(tmp_path / "out")
    folder.log({**last, "example": {"prompt": "<b>", "answer": "<script>alert(1)</script>", "score": 0.5}})
    monkeypatch.setattr(report, "plots", lambda *_: "<svg></svg>")
    write_report(folder)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg></svg>" in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard event files."""
    values: dict[str, dict[int, float]] = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), the record, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def test_quiet_prints_nothing_also_for_sharded_models(run, checkpoint, reference, tmp_path) -> None:
    """transformers draws a progress bar for several shards."""
    logging.enable_progress_bar()  # another test may have turned it off
    reference("qwen2").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    for file in checkpoint("qwen2").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    done = run("out", model=tmp_path / "model", quiet=None, episodes=4)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_an_agent_without_updates_comes_with_a_warning(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "plots", lambda *_: "<svg></svg>")
    monkeypatch.setattr(report, "write_report", write_report)
    done = run("out", episodes=4, start_transitions=140)
    warning = "the agent was never updated"
    assert done.code == 0
    assert f"mara-train: warning: {warning}" in done.err
    assert str(rows(tmp_path / "out")[-1]["transitions"]) in done.err
    assert "mara-export --model" not in done.err
    assert warning in (tmp_path / "out" / "report.html").read_text()
    assert agents.load(tmp_path / "out" / "agent.safetensors").origin.updates == 0
    done = run("sure", episodes=4, top_p=1e-6, quiet=None)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert "--top-p" in done.err


# ── what is refused, and what remains ────────────────────────────────────────────────────────────────────────────────


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
                folder.save(state, agents.untrained(400, 0, (64, 8)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "out").glob(".*"))
