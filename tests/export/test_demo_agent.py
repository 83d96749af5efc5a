"""The demo's agent: made by the recipe it names, deployed as it was trained, and it aligns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks.alignment import Contest
from mara_deploy import agent as agents
from mara_deploy.demo import AGENT_FILE
from mara_deploy.demo import __main__ as demo_command
from mara_deploy.demo.prompts import SETS, DemoPrompt, demo_prompts
from mara_deploy.train.config import RECIPES
from mara_deploy.train.policy import agent_policy
from mara_runtime import AlignedDecoder, DecodeConfig
from tests.unit.helpers import write_manifest


@pytest.fixture(scope="module")
def demo_agent() -> agents.Agent:
    return agents.load(AGENT_FILE)


@pytest.fixture(scope="module")
def contest() -> Contest:
    torch.set_num_threads(1)
    return Contest("demo-final", 86)  # two prompts a group


@pytest.fixture(scope="module")
def trained(contest, demo_agent) -> dict[str, Any]:
    return contest.measure("the demo's agent", demo_agent)


def test_it_is_what_the_recipe_makes(demo_agent) -> None:
    run = json.loads((AGENT_FILE.parent / "run.json").read_text())
    assert run["config"] == json.loads(json.dumps(RECIPES["demo"].to_json())), "train the demo's agent again"
    assert run["prompts"]["count"] == len(demo_prompts("demo"))
    assert demo_agent.widths == RECIPES["demo"].widths
    assert demo_agent.fallback == RECIPES["demo"].fallback
    with safe_open(AGENT_FILE, framework="pt") as file:
        facts = file.metadata()
    assert facts["episodes"] == str(RECIPES["demo"].episodes)
    assert facts["model"] == run["model"]["name"] == "demo"
    assert sum(path.stat().st_size for path in AGENT_FILE.parent.iterdir()) < 400_000


def test_it_aligns_and_stays_within_the_grammar(trained, contest) -> None:
    """The bounds of docs/guide/train.md, on a part of the set; benchmarks/alignment.py measures all of it."""
    rate, low, high = trained["vs_greedy"]
    assert rate >= 60
    assert 40 < low <= rate <= high
    assert trained["vs_sampling"][0] >= 70
    assert trained["grammar"] >= 0.95
    assert trained["forced"] <= 0.08
    assert trained["score"] > np.mean(contest.greedy["scores"]) + 0.3


def test_an_untrained_agent_does_not(contest) -> None:
    """A control, on the same prompts with the same plain answers."""
    rates = [
        contest.measure(f"untrained {seed}", agents.untrained(128, seed, RECIPES["demo"].widths))["vs_greedy"][0]
        for seed in range(3)
    ]
    assert np.mean(rates) < 40


def prompts(count: int | None) -> list[DemoPrompt]:
    held_out = [prompt for name in SETS[1:] for prompt in demo_prompts(name)]
    return held_out if count is None else held_out[:: len(held_out) // count][:count]


@pytest.mark.parametrize("count", [60, pytest.param(None, marks=pytest.mark.long)])
def test_pytorch_and_bundle_decide_alike_on_held_out_prompts(count, bundle, demo_agent) -> None:
    from mara_deploy.demo import MODEL_FOLDER
    from mara_deploy.scores.base import Combined, WeightedScore
    from mara_deploy.scores.load import load_score
    from mara_deploy.train.task import open_task
    from mara_export.hf.sources import ModelSource

    asked = prompts(count)
    score = Combined([WeightedScore(load_score("demo"))])
    source = ModelSource(MODEL_FOLDER, "demo", None)
    task = open_task(source, [p.text for p in asked], score, RECIPES["demo"], device="cpu")
    decoder = AlignedDecoder(bundle("demo"), threads=1)
    config = DecodeConfig(max_new_tokens=RECIPES["demo"].max_new_tokens, schedule="together")
    eos = set(decoder.bundle.manifest.model.eos_token_ids)
    for start in range(0, len(asked), 128):
        part = np.arange(start, min(start + 128, len(asked)))
        episodes = task.answer(part, agent_policy(demo_agent), None, demo_agent.fallback, record=False).episodes
        for i, episode in zip(part, episodes, strict=True):
            answer = decoder.generate(asked[i].text, config)
            assert [t for t in answer.token_ids if t not in eos] == episode.token_ids, asked[i].text
            counters = answer.stats
            assert (counters.decisions, counters.examined, counters.forced) == (
                *(episode.decisions, episode.examined, episode.forced),
            )


# ── the command's --out ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def earlier(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle("demo"), tmp_path / "demo"))


def kept(out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The command's one line on an `out` that it must leave alone."""
    before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
    assert demo_command.main(["--out", str(out)]) == 2
    assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("python -m mara_deploy.demo: error: ")


def test_the_bundle_of_an_earlier_demo_makes_way(earlier) -> None:
    demo_command._remove_previous(earlier)
    assert not earlier.exists()


@pytest.mark.parametrize(("part", "name"), [("agent", "demography-v2.pth"), ("agent", "demo.pth"), ("model", "demos")])
def test_a_bundle_of_similar_names_is_the_users_own(earlier, capsys, part, name) -> None:
    manifest = json.loads((earlier / "manifest.json").read_text())
    manifest[part]["source"] = name
    write_manifest(earlier, manifest)
    assert all(text in kept(earlier, capsys) for text in (str(earlier), "not a demo bundle", "--out"))


@pytest.mark.parametrize("name", ["notes.txt", "engines/mine/notes.txt", "engines/link"])
def test_files_beside_the_demos_are_the_users_own(earlier, tmp_path, capsys, name) -> None:
    (earlier / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("link"):
        (tmp_path / "elsewhere").mkdir()
        (earlier / name).symlink_to(tmp_path / "elsewhere")
    else:
        (earlier / name).touch()
    assert f"{earlier} contains {name}," in kept(earlier, capsys)


def test_a_link_to_the_demo_is_left_alone(earlier, tmp_path, capsys) -> None:
    (tmp_path / "link").symlink_to(earlier)
    assert kept(tmp_path / "link", capsys) == f"{tmp_path}/link is a link: remove it, or choose another --out"
