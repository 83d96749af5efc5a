"""What `mara-train` does, writes and shows, end to end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from transformers.utils import logging

from mara_deploy import agent as agents
from mara_deploy.train import loop, report
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.replay import ReplayBuffer
from mara_deploy.train.report import write_report
from tests.export.training.conftest import EPISODES, SMALL, everything, recorded, rows, same


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
    saves = recorded(monkeypatch, RunFolder, "save")
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * scores.CALLS))  # 25 s per round
    assert run("out", episodes=16, checkpoint_minutes=1, replay_transitions=2000).code == 0
    assert [agent.origin.episodes for *_, agent in saves] == [6, 12, 16]


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
    folder = RunFolder(tmp_path / "out")
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write(
            json.dumps({**last, "example": {"prompt": "<b>", "answer": "<script>alert(1)</script>", "score": 0.5}})
            + "\n"
        )
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


def test_quiet_prints_nothing_also_for_sharded_models(run, talker, reference, tmp_path) -> None:
    """transformers draws a progress bar for several shards."""
    logging.enable_progress_bar()  # another test may have turned it off
    reference("qwen2").save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    for file in (*talker.glob("tokenizer*"), talker / "generation_config.json"):
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
