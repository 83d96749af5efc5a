"""The demo's agent: made by the recipe it names, deployed as it was trained, and it aligns."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks.alignment import Contest
from mara_deploy import agent as agents
from mara_deploy import demo
from mara_deploy.demo import AGENT_FILE, MODEL_FOLDER
from mara_deploy.demo import __main__ as demo_command
from mara_deploy.demo.prompts import SETS, demo_prompts
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.policy import agent_policy
from mara_deploy.train.task import open_task
from mara_export.hf.sources import ModelSource
from mara_runtime import AlignedDecoder, DecodeConfig
from tests.unit.helpers import write_manifest


@pytest.fixture(scope="module")
def demo_agent() -> agents.Agent:
    return agents.load(AGENT_FILE)


@pytest.fixture(scope="module")
def contest() -> Contest:
    return Contest("demo-final", 43)  # a prompt of each group


def test_it_is_what_the_recipe_makes(demo_agent) -> None:
    run = json.loads((AGENT_FILE.parent / "run.json").read_text())
    assert run["config"] == json.loads(json.dumps(RECIPES["demo"].to_json())), "train the demo's agent again"
    assert run["prompts"]["count"] == len(demo_prompts("demo"))
    assert demo_agent.widths == RECIPES["demo"].widths
    assert demo_agent.fallback == RECIPES["demo"].fallback
    origin = demo_agent.origin
    assert (origin.episodes, origin.top_k, origin.top_p) == tuple(
        getattr(RECIPES["demo"], name) for name in ("episodes", "top_k", "top_p")
    )
    assert origin.model == run["model"]["name"] == "demo"
    assert sum(path.stat().st_size for path in AGENT_FILE.parent.iterdir()) < 400_000


def test_it_aligns_and_stays_within_the_grammar_and_untrained_agents_do_not(contest, demo_agent) -> None:
    """The bounds of docs/guide/train.md, on a part of the set; benchmarks/alignment.py measures all of it."""
    trained = contest.measure("the demo's agent", demo_agent)
    rate, low, high = trained["vs_greedy"]
    assert rate >= 60
    assert 40 < low <= rate <= high
    assert trained["vs_sampling"][0] >= 70
    assert trained["grammar"] >= 0.95
    assert trained["forced"] <= 0.08
    assert trained["score"] > np.mean(contest.greedy["scores"]) + 0.3
    controls = [agents.untrained(128, seed, RECIPES["demo"].widths) for seed in range(2)]
    assert np.mean([contest.measure("untrained", control)["vs_greedy"][0] for control in controls]) < 40


@pytest.mark.parametrize("count", [20, pytest.param(None, marks=pytest.mark.long)])
def test_pytorch_and_bundle_decide_alike_on_held_out_prompts(count, bundle, demo_agent) -> None:
    asked = [prompt.text for name in SETS[1:] for prompt in demo_prompts(name)]
    asked = asked if count is None else asked[:: len(asked) // count][:count]
    score = Combined([WeightedScore(load_score("demo"))])
    source, prompts = ModelSource(MODEL_FOLDER, "demo", None), [Prompt(text) for text in asked]
    task = open_task(source, prompts, score, RECIPES["demo"], device="cpu")
    decoder = AlignedDecoder(bundle("demo"), threads=1)
    config = DecodeConfig(max_new_tokens=RECIPES["demo"].max_new_tokens, schedule="together")
    eos = set(decoder.bundle.manifest.model.eos_token_ids)
    for start in range(0, len(asked), 128):
        part = np.arange(start, min(start + 128, len(asked)))
        episodes = task.answer(part, agent_policy(demo_agent), None, demo_agent.fallback, record=False).episodes
        for i, episode in zip(part, episodes, strict=True):
            answer = decoder.generate(asked[i], config)
            assert [t for t in answer.token_ids if t not in eos] == episode.token_ids, asked[i]
            theirs = (episode.decisions, episode.examined, episode.forced)
            assert (answer.stats.decisions, answer.stats.examined, answer.stats.forced) == theirs


# ── the command's --out ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_replaces_an_earlier_demo_and_nothing_else(bundle, tmp_path, monkeypatch, capsys) -> None:
    """A refusal leaves everything there."""
    out, link, manifest = tmp_path / "demo", tmp_path / "link", tmp_path / "demo" / "manifest.json"
    shutil.copytree(bundle("demo"), out)
    link.symlink_to(out)

    def refused(out: Path) -> str:
        before = {path: path.is_file() and path.read_bytes() for path in out.rglob("*")}
        assert demo_command.main(["--out", str(out)]) == 2
        assert {path: path.is_file() and path.read_bytes() for path in out.rglob("*")} == before
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("python -m mara_deploy.demo: error: ")

    assert refused(link) == f"{link} is a link: remove it, or choose another --out"
    ours = manifest.read_text()
    for part, name in (("agents", "demography-v2.pth"), ("agents", "demo.pth"), ("model", "demos")):
        changed = json.loads(ours)
        (changed[part][0] if part == "agents" else changed[part])["source"] = name
        write_manifest(out, changed)
        assert all(text in refused(out) for text in (str(out), "not a demo bundle", "--out"))
    manifest.write_text(ours)
    for name in ("notes.txt", "engines/mine/notes.txt", "engines/link"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("link"):
            (out / name).symlink_to(tmp_path)
        else:
            (out / name).touch()
        assert f"{out} contains {name}," in refused(out)
        (out / name).unlink()

    monkeypatch.setattr(demo, "export_demo", lambda _: bundle("demo"))
    assert demo_command.main(["--out", str(out), "--prompts", "1"]) == 0
    assert not out.exists()
    shown = " ".join(capsys.readouterr().out.split())
    counters = r"(\d+) tokens, (\d+) decisions over .*: accepted (\d+) at rank 1.*; all rejected (\d+)"
    tokens, decisions, first, rejected = map(int, re.search(counters, shown).groups())
    assert f"Aligned: {tokens} tokens, {decisions / tokens:.0%} of them decisions" in shown
    assert f"accepted {first / decisions:.0%} at rank 1, all rejected {rejected / decisions:.0%}." in shown
