"""`mara-train` from end to end: resumed runs equal uninterrupted ones, and what is left behind is whole."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tensorboardX.event_file_writer import EventsWriter
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging

from mara_deploy import agent as agents
from mara_deploy.files import held
from mara_deploy.scores import reward_model
from mara_deploy.train import folder, loop, report, task
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.replay import Replay
from mara_deploy.train.report import write_report

SCORES = """
import os, signal
CALLS = 0
TRIP = {}                                      # call: what happens at it

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
SMALL = {
    "episodes": 60,
    "prompts-at-once": 2,
    "max-new-tokens": 20,
    "top-k": 6,
    "batch": 16,
    "updates-per-episode": 0.75,
    "start-transitions": 40,
    "replay-transitions": 320,
    "n-step": 5,
    "checkpoint-minutes": 0,
    "threads": 1,
}


@pytest.fixture
def scores(tmp_path, monkeypatch):
    """The user's module of scores, in the working directory; `scores.TRIP[n]` is what happens at the n-th call."""
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

    def train(out: str, model: Any = None, **settings: Any):
        named = {name.replace("_", "-"): value for name, value in settings.items()}
        given = {**SMALL, **named}
        options = [part for name, value in given.items() for part in (f"--{name}", value) if part is not None]
        where = ["--model", model or checkpoint("qwen2"), "--prompts", "prompts.txt"]
        widths = ["--widths", 16, 8]
        return command("train", *where, "--score", "train_test_scores:length", "--out", out, *options, *widths)

    return train


_WHOLE: dict[str, Any] = {}


@pytest.fixture
def whole(run, tmp_path) -> dict[str, Any]:
    """`everything` of an uninterrupted run, made once."""
    if not _WHOLE:
        assert run("whole").code == 0
        _WHOLE.update(everything(tmp_path / "whole"))
    return _WHOLE


def everything(out: Path, capacity: int = SMALL["replay-transitions"]) -> dict[str, Any]:
    """All that a run leaves, but for times."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    replay = Replay(out / "replay", capacity, hidden_size(out), state["added"])
    return {
        "agent": dict(agents.load(out / "agent.safetensors").state_dict()),
        "state": state,
        "replay": vars(replay.sample(np.random.default_rng(0), 200, 1)),
        "log": [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows],
    }


def hidden_size(out: Path) -> int:
    return agents.load(out / "agent.safetensors").hidden_size


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def test_interrupted_and_resumed_is_as_if_nothing_had_happened(run, command, scores, whole, tmp_path) -> None:
    progress = whole["state"]["progress"]
    assert progress["episodes"] == 60
    assert progress["updates"] > 10
    assert progress["owed"] == 0.5, "no update is half due when a checkpoint is made"
    assert whole["state"]["added"] > SMALL["replay-transitions"], "the ring has not gone round"

    scores.CALLS = 0
    scores.TRIP = {3: "interrupt", 5: "terminate", 7: "fail"}
    first = run("broken")
    assert first.code == 2
    message = "error: interrupted after 6 of 60 episodes, and saved: mara-train --resume --out broken\n"
    assert first.err.endswith(message)
    assert agents.load(tmp_path / "broken" / "agent.safetensors").widths == (16, 8)
    second = command("train", "--resume", "--out", "broken")
    assert "interrupted after 10 of 60" in second.err
    third = command("train", "--resume", "--out", "broken")
    assert third.code == 2
    assert "the score train_test_scores:length failed with RuntimeError: out of order" in third.err
    last = command("train", "--resume", "--out", "broken", "--quiet")
    assert (last.code, last.err) == (0, "")
    assert same(everything(tmp_path / "broken"), whole)


def test_when_checkpoints_are_made_does_not_matter(run, whole, monkeypatch, tmp_path) -> None:
    """Rare ones too: one is made when the replay memory's reserve runs out, in the middle of a round."""
    saves, real = [], RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda *args: (saves.append(args), real(*args)))
    assert run("rare", checkpoint_minutes=600).code == 0
    assert len(saves) > 1, "the reserve has not run out"
    assert same(everything(tmp_path / "rare"), whole)


def test_a_checkpoint_in_the_middle_of_a_round_is_gone_on_from(run, command, scores, whole, tmp_path) -> None:
    scores.CALLS, scores.TRIP = 0, {29: "fail"}
    assert run("rare", checkpoint_minutes=600).code == 2
    made = torch.load(tmp_path / "rare" / "checkpoint.pt", weights_only=True)["progress"]["episodes"]
    assert 0 < made < 56, "the reserve has not run out"
    assert command("train", "--resume", "--out", "rare").code == 0
    assert same(everything(tmp_path / "rare"), whole)


def test_more_episodes_may_be_asked_for_later(run, command, whole, tmp_path) -> None:
    assert run("short", episodes=12).code == 0
    assert command("train", "--resume", "--out", "short", "--episodes", 60).code == 0
    assert same(everything(tmp_path / "short"), whole)


def test_a_checkpoint_is_read_once(run, command, monkeypatch) -> None:
    assert run("out", episodes=4).code == 0
    loads, real = [], RunFolder.load
    monkeypatch.setattr(RunFolder, "load", lambda folder: loads.append(folder) or real(folder))
    assert command("train", "--resume", "--out", "out", "--episodes", 8).code == 0
    assert len(loads) == 1


def test_fewer_episodes_than_were_made_are_refused(run, command, tmp_path) -> None:
    assert run("out", episodes=8).code == 0
    before = (tmp_path / "out" / "run.json").read_text()
    done = command("train", "--resume", "--out", "out", "--episodes", 4)
    assert done.code == 2
    assert "--episodes is 4, but the run has made 8" in done.err.splitlines()[-1]
    assert (tmp_path / "out" / "run.json").read_text() == before


def test_a_run_goes_on_as_and_where_it_began(run, command, tmp_path, monkeypatch) -> None:
    assert run("out", episodes=4, dtype="bfloat16").code == 0
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (kept["device"], kept["dtype"]) == ("cpu", "bfloat16")
    opened, real = [], task.open_task
    monkeypatch.setattr(task, "open_task", lambda *args, **kw: opened.append(kw) or real(*args, **kw))
    assert command("train", "--resume", "--out", "out", "--episodes", 8).code == 0
    assert (opened[0]["device"], opened[0]["dtype"]) == ("cpu", "bfloat16")
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == {
        **kept,
        "config": {**kept["config"], "episodes": 8},
    }


def test_a_model_that_has_moved_on_the_hub_is_the_one_that_it_was(run, command, cached, checkpoint, tmp_path) -> None:
    cached("somebody/model", checkpoint("qwen2"), revision="a" * 40)
    assert run("out", model="somebody/model", episodes=6).code == 0
    cached("somebody/model", checkpoint("llama"), revision="b" * 40)
    assert command("train", "--resume", "--out", "out", "--episodes", 8).code == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["revision"] == "a" * 40


def test_a_model_that_has_changed_is_refused(run, command, checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint("qwen2"), tmp_path / "model")
    assert run("out", model="model", episodes=4).code == 0
    shutil.copy(checkpoint("llama") / "generation_config.json", tmp_path / "model" / "new.json")
    done = command("train", "--resume", "--out", "out", "--episodes", 8)
    assert done.code == 2
    assert "the files of model have changed since the run began: begin a new one" in done.err.splitlines()[-1]


def test_more_episodes_must_fit_the_replay_memory_like_those_of_a_new_run(run, command) -> None:
    """With few episodes, fewer answers are sampled at once."""
    assert run("out", episodes=2, prompts_at_once=8).code == 0
    done = command("train", "--resume", "--out", "out", "--episodes", 8)
    assert done.code == 2
    assert "8 --prompts-at-once of 20 --max-new-tokens may have 160 at one candidate" in done.err.splitlines()[-1]


def test_a_score_that_has_changed_is_refused(run, command, tmp_path) -> None:
    assert run("out", episodes=4).code == 0
    with (tmp_path / "train_test_scores.py").open("a") as file:
        file.write("\n# better now")
    done = command("train", "--resume", "--out", "out", "--episodes", 8)
    assert done.code == 2
    assert "the code or weights of the score train_test_scores:length have changed" in done.err.splitlines()[-1]


def test_a_reward_model_is_read_as_before_and_known_again(command, checkpoint, tmp_path, monkeypatch) -> None:
    """--score-device and --score-batch are the run's; other weights are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write_report", lambda folder: None)
    config = LlamaConfig.from_pretrained(checkpoint("llama"), num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained("judge")
    for file in checkpoint("llama").glob("tokenizer*"):
        (tmp_path / "judge" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prompts.txt").write_text("a prompt\nanother\n")
    options = [
        part
        for name, value in {**SMALL, "episodes": 4, "replay-transitions": 1000}.items()
        for part in (f"--{name}", value)
    ]
    score = ["--score", "judge", "--score-device", "cpu", "--score-batch", 3]
    where = ["--model", checkpoint("qwen2"), "--prompts", "prompts.txt", "--out", "out"]
    done = command("train", *where, *score, *options, "--widths", 16, 8)
    assert done.code == 0, done.err
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (kept["score_device"], kept["score_batch"]) == ("cpu", 3)
    loaded, real = [], reward_model.load
    monkeypatch.setattr(reward_model, "load", lambda *args: loaded.append(args) or real(*args))
    more = ["train", "--resume", "--out", "out", "--episodes"]
    assert command(*more, 8).code == 0
    assert loaded[0] == ("judge", None, "cpu", 3, None)
    with (tmp_path / "judge" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x3f")
    done = command(*more, 12)
    assert done.code == 2
    assert "the code or weights of the score judge have changed" in done.err.splitlines()[-1]


def test_the_seed_decides_weights_prompts_actions_and_batches(run, tmp_path) -> None:
    """Each of them: one alone makes another agent. For the weights see test_train_learner.py."""
    for seed in (0, 1):
        assert run(f"seed{seed}", seed=seed, episodes=8).code == 0
    one, other = (everything(tmp_path / f"seed{seed}") for seed in (0, 1))
    assert not same(one["agent"], other["agent"])
    prompts = [[row["example"]["prompt"] for row in made["log"]] for made in (one, other)]
    assert prompts[0] != prompts[1]
    streams = {made["state"][use]["state"]["inc"] for made in (one, other) for use in ("actions", "batches")}
    assert len(streams) == 4, "generators that draw the same numbers"


def test_updates_begin_when_there_is_enough_and_none_is_lost(whole) -> None:
    first, *rest = whole["log"]
    assert first["transitions"] < SMALL["start-transitions"] <= rest[0]["transitions"]
    assert [row["updates"] for row in whole["log"]] == [int(0.75 * (row["episodes"] - 2)) for row in whole["log"]]


def test_a_score_is_paid_less_its_baseline(run, monkeypatch, tmp_path) -> None:
    paid, real = [], Replay.add
    monkeypatch.setattr(Replay, "add", lambda self, chain, score: (paid.append(score), real(self, chain, score)))
    assert run("out", episodes=8, score_baseline=0.25).code == 0
    rows = everything(tmp_path / "out")["log"]
    means = np.reshape(paid, (4, 2)).mean(axis=1) + 0.25
    assert means.tolist() == pytest.approx([row["score"] for row in rows])
    assert rows[0]["example"]["score"] == pytest.approx(paid[0] + 0.25)


def test_checkpoints_are_minutes_apart(run, scores, monkeypatch) -> None:
    made, real = [], RunFolder.save
    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda self, state, *rest: (made.append(state["progress"]["episodes"]), real(self, state, *rest)),
    )
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * scores.CALLS))  # 25 s a round
    assert run("out", episodes=16, checkpoint_minutes=1, replay_transitions=2000).code == 0
    assert made == [6, 12, 16]


def test_both_files_of_the_agent_load_and_say_where_it_comes_from(run, tmp_path) -> None:
    assert run("out", episodes=8, fallback="first").code == 0
    one, other = (agents.load(tmp_path / "out" / name) for name in ("agent.safetensors", "agent.pth"))
    assert same(dict(one.state_dict()), dict(other.state_dict()))
    assert one.fallback == "first"
    with safe_open(tmp_path / "out" / "agent.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert facts["episodes"] == "8"
    assert facts["score"] == "train_test_scores:length"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_what_there_is_to_see(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write_report", write_report)
    done = run("out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == list(range(2, 61, 2))
    last = rows[-1]
    assert f"score {last['score']:+.3f}" in done.err
    for word in ("KL", "H ", "α", "accepts", "forced", "intervenes", "episode/s"):
        assert word in done.err, word

    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "episode" in page
    assert last["example"]["prompt"] in page
    assert "http://www.w3.org" in page  # names of XML, and no other address: the page needs nothing else
    assert set(re.findall(r"(?:src|href)=\"(?!#)", page)) == set()

    events = read_events(tmp_path / "out" / "tensorboard")
    assert events["rollout/score"] == pytest.approx({row["episodes"]: row["score"] for row in rows})
    assert {"rollout/kl", "rollout/forced_rate", "learner/critic_loss", "time/rollout_seconds"} <= set(events)


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """{tag: {step: value}} of TensorBoard event files."""
    from tensorboardX.proto.event_pb2 import Event

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


def test_markup_in_answers_stays_text(tmp_path) -> None:
    row = {
        "episodes": 4,
        "updates": 0,
        "transitions": 9,
        "score": 0.5,
        "scores": {"s": 0.5},
        "reward": 0.5,
        "kl": 0.0,
        "entropy": 0.6,
        "alpha": 0.1,
        "accept_rate": 0.5,
        "forced_rate": 0.0,
        "intervention_rate": 0.5,
        "decision_share": 0.5,
        "answer_tokens": 3.0,
        "finished_share": 1.0,
        "rollout_seconds": 1.0,
        "update_seconds": 0.0,
        "example": {"prompt": "<b>", "answer": "<script>alert(1)</script>", "score": 0.5},
    }
    run = {"model": {"name": "m"}, "prompts": {"count": 1}, "score": "s", "versions": {}}
    config = {"episodes": 4, "target_entropy": 0.6, "start_transitions": 40}
    folder = RunFolder.new(tmp_path / "run", {**run, "config": config}, [])
    folder.log(row)
    write_report(folder)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


# ── what is refused, and what is left then ───────────────────────────────────────────────────────────────────────────


def test_a_score_that_is_not_a_number_ends_the_run_and_names_the_prompt(run, scores, tmp_path) -> None:
    scores.TRIP = {scores.CALLS + 2: "nan"}
    done = run("out")
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert re.search(r"the score train_test_scores:length is nan for the answer to the prompt 'prompt number \d'", line)
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["progress"]["episodes"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "no-such-model"}, "there is no model 'no-such-model'"),
        ({"max_new_tokens": 100_000, "replay_transitions": 1_600_000}, "lower --max-new-tokens, or remove the prompt"),
        ({"replay_transitions": 41}, "raise --replay-transitions, or lower --prompts-at-once"),
        ({"template": "tokenize=false"}, "the chat template's variable 'tokenize' is set by the code itself"),
    ],
)
def test_what_cannot_be_is_one_line(run, settings, said) -> None:
    done = run("out", **settings)
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


def test_a_round_that_the_replay_memory_cannot_take_ends_the_first_one(run, tmp_path, monkeypatch) -> None:
    """Not the one at which the files are full, hours later; the memory may be large for everything else."""
    monkeypatch.setattr(TrainConfig, "check_replay", lambda config: None)  # which knows answers' lengths alone
    done = run("out", replay_transitions=80)
    assert done.code == 2
    said = done.err.splitlines()[-1]
    found = re.search(r"a round has (\d+) transitions, more than the 10 .*: begin a new run with (\S+) (\d+) or", said)
    assert found is not None, said
    assert (found[2], int(found[3])) == ("--replay-transitions", 8 * int(found[1]) - 7)
    assert not (tmp_path / "out" / "log.jsonl").read_text()


def test_a_later_round_that_the_replay_memory_cannot_take_leaves_what_came_before(
    run, command, tmp_path, monkeypatch
) -> None:
    """To the last bit as a run of so many episodes would; and that it is resumed changes nothing."""
    monkeypatch.setattr(TrainConfig, "check_replay", lambda config: None)
    assert run("longer", seed=5, episodes=24).code == 0
    rounds = np.diff([row["transitions"] for row in everything(tmp_path / "longer")["log"]], prepend=0).tolist()
    at = next(i for i in range(len(rounds) - 1, 3, -1) if rounds[i] > max(rounds[:i]))
    memory = {"replay_transitions": 8 * (rounds[at] - 1), "checkpoint_minutes": 600, "seed": 5}
    reported: list[int] = []
    monkeypatch.setattr(report, "write_report", lambda folder: reported.append(folder.rows()[-1]["episodes"]))
    done = run("out", episodes=24, **memory)
    assert reported == [2 * at]
    assert done.code == 2
    said = done.err.splitlines()[-1]
    assert f"a round has {rounds[at]} transitions, more than the {rounds[at] - 1} that" in said
    assert said.endswith(f"; agent and checkpoint are as of the {2 * at} episodes before")
    assert run("short", episodes=2 * at, **memory).code == 0
    left = {name: everything(tmp_path / name, memory["replay_transitions"]) for name in ("out", "short")}
    assert left["out"]["state"]["progress"]["updates"] > 0
    assert same(left["out"], left["short"])
    assert command("train", "--resume", "--out", "out").err.splitlines()[-1] == said
    assert same(everything(tmp_path / "out", memory["replay_transitions"]), left["out"])


def test_quiet_is_quiet_with_a_model_in_several_files_too(run, checkpoint, reference, tmp_path) -> None:
    """For which transformers draws a progress bar."""
    logging.enable_progress_bar()  # another test may have turned it off
    reference("qwen2").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    for file in checkpoint("qwen2").glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    done = run("out", model=tmp_path / "model", quiet=None, episodes=8)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_an_agent_that_learned_nothing_is_no_success(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "write_report", write_report)
    done = run("out", episodes=4, start_transitions=200)
    said = "the agent was never updated: "
    assert done.code == 0
    collected = everything(tmp_path / "out")["state"]["added"]
    assert (
        f"mara-train: warning: {said}{collected} of the 200 transitions of --start-transitions were collected"
        in done.err
    )
    assert "mara-export --model" not in done.err
    assert said in (tmp_path / "out" / "report.html").read_text()
    with safe_open(tmp_path / "out" / "agent.safetensors", framework="pt") as file:
        assert file.metadata()["updates"] == "0"
    done = run("sure", episodes=4, top_p=1e-6, quiet=None)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert "no decision was ever met" in done.err


def test_a_folder_that_another_run_is_using_is_left_alone(run, command, tmp_path) -> None:
    assert run("out", episodes=4).code == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    with held(tmp_path / "out"):
        done = command("train", "--resume", "--out", "out", "--episodes", 8)
        assert done.code == 2
        assert "another run is using out: wait until it ends" in done.err.splitlines()[-1]
    with held(tmp_path / "new"):
        assert "another run is using new" in run("new").err.splitlines()[-1]
    assert list((tmp_path / "new").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert command("train", "--resume", "--out", "out", "--episodes", 8).code == 0


def test_nothing_is_written_for_a_run_that_cannot_begin(run, tmp_path) -> None:
    assert run("out", max_new_tokens=100_000, replay_transitions=1_600_000).code == 2
    assert not (tmp_path / "out").exists()


def test_what_a_run_left_that_was_killed_in_its_first_moment_is_in_nobody_s_way(run, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("prompts.json", ".prompts.partial.json", ".run.partial.json"):
        (tmp_path / "out" / name).write_text("cut o")
    assert run("out", episodes=4).code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").touch()
    assert run("other", episodes=4).code == 2


def test_a_folder_in_use_is_left_alone(run, command, tmp_path) -> None:
    assert run("out", episodes=4).code == 0
    again = run("out")
    assert again.code == 2
    assert "exists already and is not an empty folder: choose another --out or go on with it by --resume" in again.err
    nothing = command("train", "--resume", "--out", tmp_path / "nowhere")
    assert nothing.err.splitlines()[-1].endswith("holds no training run to resume: it has no run.json")


@pytest.mark.parametrize("damaged", ["checkpoint.pt", "run.json", "prompts.json"])
def test_a_damaged_run_is_not_resumed(run, command, tmp_path, damaged) -> None:
    assert run("out", episodes=4).code == 0
    (tmp_path / "out" / damaged).write_bytes(b"\x00")
    done = command("train", "--resume", "--out", "out", "--episodes", 8)
    assert done.code == 2
    assert f"{damaged} cannot be read" in done.err.splitlines()[-1]


def test_a_line_of_the_log_that_was_cut_off_does_not_matter(run, command, tmp_path) -> None:
    assert run("out", episodes=4).code == 0
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"episodes": 8, "sc')
    assert command("train", "--resume", "--out", "out", "--episodes", 8).code == 0
    assert [row["episodes"] for row in everything(tmp_path / "out")["log"]] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "file", ["log.jsonl", "replay/scores.npy", "tensorboard", "checkpoint.pt", "agent.safetensors"]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(run, command, whole, tmp_path, monkeypatch, file) -> None:
    """Whichever file meets it first; the one in progress stays as it was."""
    full_at(monkeypatch, file)
    done = run("out")
    assert done.code == 2
    said = done.err.splitlines()[-1]
    assert re.fullmatch(rf"mara-train: error: cannot write out/{file}: .*No space left on device.*", said), said
    assert "Traceback" not in done.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write_report", lambda folder: None)
    assert command("train", "--resume", "--out", "out", "--quiet").code == 0
    assert same(everything(tmp_path / "out"), whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_torch_says_that_the_disk_is_full() -> None:
    """Of itself it says that its own position in the file is wrong."""
    with pytest.raises(OSError, match="No space left on device"):
        folder._torch_save({"a": torch.zeros(100_000)}, Path("/dev/full"))


def full_at(monkeypatch, file: str) -> None:
    """Let the tenth writing of a file fail as on a full disk."""
    left = 10

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def tenth(real: Any, about: Any) -> Any:
        def writes(*args: Any, **kw: Any) -> Any:
            nonlocal left
            left -= about(*args)
            return real(*args, **kw) if left else fails()

        return writes

    if file == "log.jsonl":
        open_ = Path.open
        monkeypatch.setattr(Path, "open", tenth(open_, lambda path, mode="r", *_: path.name == file and mode == "a"))
    elif file == "replay/scores.npy":
        monkeypatch.setattr(os, "posix_fallocate", tenth(os.posix_fallocate, lambda *_: True))
        left = 4  # five files an episode: the fourth is the scores
    elif file == "tensorboard":
        monkeypatch.setattr(EventsWriter, "write_event", tenth(EventsWriter.write_event, lambda *_: True))
    elif file == "checkpoint.pt":
        monkeypatch.setattr(torch, "save", tenth(torch.save, lambda state, _: "learner" in state))
    else:
        monkeypatch.setattr(agents, "save", tenth(agents.save, lambda *_: True))


def test_a_folder_that_cannot_be_written_is_said(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")  # root may write anywhere, but not into a file
    done = run("file/out")
    assert (done.code, done.err.count("error:")) == (2, 1)
    assert "cannot write" in done.err
