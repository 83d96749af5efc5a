"""Runs of `mara-train` on a tiny model, and what they leave."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from mara_deploy import agent as agents
from mara_deploy.train import report
from mara_deploy.train.replay import ReplayBuffer
from tests.export.conftest import copy_model

SCORES = """
import os, signal
CALLS = 0
TRIP = {}                                      # {call: what happens during it}

class RateLimitError(Exception): pass

def length(prompts, answers):
    global CALLS
    CALLS += 1
    trip = TRIP.pop(CALLS, None)
    if trip == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
    elif trip == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif trip == "batch system":
        os.kill(os.getpid(), signal.SIGUSR1)
    elif trip == "stop now":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    elif trip == "offline":
        raise ConnectionResetError("no route")
    elif trip == "busy":
        raise RateLimitError("slow down")
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
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])  # of `python -c`: another module
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("train_test_scores", None)
    import train_test_scores

    yield train_test_scores
    del sys.modules["train_test_scores"]


@pytest.fixture(scope="session")
def talker(checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with so many end tokens that some answers of few tokens end by themselves."""
    folder = copy_model(checkpoint("qwen2"), tmp_path_factory.mktemp("talker") / "talker")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 300, 6))}))
    return folder


@pytest.fixture
def run(command, talker, scores, tmp_path, monkeypatch):
    """(folder, setting=value, …) → CommandResult of a new run in it, without a report, as plots are slow."""
    monkeypatch.setattr(report, "write_report", lambda folder: None)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {i}\n" for i in range(7)))

    def train(out: str, model: Any = None, score: tuple[Any, ...] = ("train_test_scores:length",), **settings: Any):
        return command("train", *new_run(out, model or talker, score, **settings))

    return train


def new_run(out: str, model: Any, score: tuple[Any, ...], **settings: Any) -> list[Any]:
    """The arguments of mara-train. A setting of ... is left out, one of None is a flag without a value."""
    settings = {**SMALL, **{name.replace("_", "-"): value for name, value in settings.items()}}
    given = {name: value for name, value in settings.items() if value is not ...}
    options = [part for name, value in given.items() for part in (f"--{name}", value) if part is not None]
    inputs = ["--model", model, "--prompts", "prompts.txt", "--score", *score]
    return [*inputs, "--out", out, *options, "--widths", 16, 8]


@pytest.fixture
def judge(checkpoint, scores, tmp_path) -> Path:
    """A reward model that reads 40 tokens, in the working directory."""
    config = LlamaConfig.from_pretrained(checkpoint("llama"), num_labels=1, pad_token_id=0, max_position_embeddings=40)
    LlamaForSequenceClassification(config).save_pretrained("judge")
    for file in checkpoint("llama").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "judge")
    return tmp_path / "judge"


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
    replay = ReplayBuffer(out / "replay", capacity, agent.hidden_size, state["replay"])
    return {
        "agent": dict(agent.state_dict()),
        "state": {name: value for name, value in state.items() if name != "log"},
        "replay": vars(replay.sample(np.random.default_rng(0), 200, 1)),
        "log": [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows(out)],
    }


def read_run(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


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
