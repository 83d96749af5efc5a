"""Does training align the demo? Preference rates of trained and of untrained agents against the plain LM.

    python -m benchmarks.alignment --set demo-final --seeds 0 1 2 --controls 8

Trains an agent a seed as `mara-train --model demo --prompts demo --score demo --seed N` does, and lets it answer the
prompts of a set (mara_deploy.demo.prompts); so do untrained agents, whose mean must lie near 0: a single one tells
nothing. Intervals are bootstrapped by group of related prompts. Prints a line an agent, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.demo_lm import corpus
from mara_deploy import agent as agents
from mara_deploy.demo import MODEL_FOLDER
from mara_deploy.demo.prompts import SETS, DemoPrompt, demo_prompts
from mara_deploy.demo.score import sentences
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.environment import Environment, Episode
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.loop import first_checkpoint, train
from mara_deploy.train.policy import Policy, agent_policy, reference_policy
from mara_deploy.train.task import TrainingTask, open_task
from mara_export.hf.sources import ModelSource

BOOTSTRAPS = 2000


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--set", default="demo-final", choices=SETS)
    options.add_argument("--prompts", type=int, default=400, help="of the set, drawn evenly over its groups")
    options.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="agents to train")
    options.add_argument("--controls", type=int, default=8, help="untrained agents")
    options.add_argument("--agents", type=Path, nargs="*", default=[], help="agent files to measure too")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    contest = Contest(args.set, args.prompts)
    print(f"{args.set}: {len(contest.prompts)} prompts of {len(set(contest.groups))} groups")
    print(f"plain greedy: {contest.describe(contest.greedy)}\nplain sampling: {contest.describe(contest.sampled)}")
    results = {}
    for path in args.agents:
        results[path.name] = contest.measure(path.name, agents.load(path))
    for seed in args.seeds:
        results[f"trained {seed}"] = contest.measure(f"trained, seed {seed}", trained(seed))
    config = RECIPES["demo"]
    controls = [agents.untrained(contest.task.hidden_size, 1000 + i, config.widths) for i in range(args.controls)]
    for number, control in enumerate(controls):
        results[f"untrained {number}"] = contest.measure(f"untrained {number}", control)
    if controls:
        rates = [results[f"untrained {i}"]["vs_greedy"][0] for i in range(len(controls))]
        print(f"untrained agents against greedy: mean {np.mean(rates):+.1f} %, s.d. {np.std(rates):.1f}")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps({"set": args.set, "prompts": len(contest.prompts), "results": results, **machine}))


class Contest:
    """Plain answers to the prompts of a set, and what others are worth beside them."""

    def __init__(self, name: str, count: int) -> None:
        self.prompts = evenly(demo_prompts(name), count)
        self.groups = [prompt.group for prompt in self.prompts]
        self.task = demo_task(self.prompts)
        greedy = replace(self.task.environment, top_k=1)
        self.greedy = self.answer(reference_policy, None, environment=greedy)
        self.sampled = self.answer(reference_policy, np.random.default_rng(0))

    def answer(
        self,
        policy: Policy,
        rng: np.random.Generator | None,
        fallback: str = "first",
        environment: Environment | None = None,
    ) -> dict[str, Any]:
        """Answers, their scores, their share of sentences that the grammar could have made."""
        task = self.task if environment is None else replace(self.task, environment=environment)
        found = task.answer(np.arange(len(self.prompts)), policy, rng, fallback, record=False)
        said = [
            corpus.known(sentence, prompt.task)
            for prompt, text in zip(self.prompts, found.texts, strict=True)
            for sentence in sentences(text)
        ]
        return {"scores": found.scores.combined, "grammar": float(np.mean(said)), "episodes": found.episodes}

    def measure(self, name: str, agent: agents.Agent) -> dict[str, Any]:
        """Preference rates in per cent with their 95 % intervals, and counters."""
        answers = self.answer(agent_policy(agent), None, agent.fallback)
        result = {
            "vs_greedy": self.preference(answers, self.greedy),
            "vs_sampling": self.preference(answers, self.sampled),
            "score": float(np.mean(answers["scores"])),
            "grammar": answers["grammar"],
            "forced": share(answers["episodes"], "forced"),
        }
        against = ", ".join(
            f"{kind} {rate:+.1f} % [{low:+.1f}, {high:+.1f}]"
            for kind, (rate, low, high) in (("greedy", result["vs_greedy"]), ("sampling", result["vs_sampling"]))
        )
        print(f"{name}: against {against}; {self.describe(answers)}", flush=True)
        return result

    def describe(self, answers: dict[str, Any]) -> str:
        episodes = answers["episodes"]
        return (
            f"score {np.mean(answers['scores']):+.3f}, grammatical {answers['grammar']:.1%}, "
            f"forced {share(episodes, 'forced'):.1%}, {np.mean([len(e.token_ids) for e in episodes]):.0f} tokens"
        )

    def preference(self, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float, float]:
        """(wins - losses) / (wins + ties + losses) in per cent, and the 2.5 and 97.5 percentiles by group."""
        by_group = defaultdict(list)
        for group, a, b in zip(self.groups, ours["scores"], theirs["scores"], strict=True):
            by_group[group].append((a > b) - (a < b))
        groups = [np.array(values) for values in by_group.values()]
        rng = random.Random(0)
        draws = [100 * np.concatenate(rng.choices(groups, k=len(groups))).mean() for _ in range(BOOTSTRAPS)]
        low, high = np.percentile(draws, [2.5, 97.5])
        return float(100 * np.concatenate(groups).mean()), float(low), float(high)


def trained(seed: int) -> agents.Agent:
    config = replace(RECIPES["demo"], seed=seed)
    prompts = demo_prompts()
    with tempfile.TemporaryDirectory() as scratch:
        task = demo_task(prompts)
        checkpoint = first_checkpoint(task.hidden_size, config)
        folder = RunFolder.new(Path(scratch) / "run", {}, [p.text for p in prompts], checkpoint)
        return train(task, config, folder, checkpoint).actor


def demo_task(prompts: Sequence[DemoPrompt]) -> TrainingTask:
    score = Combined([WeightedScore(load_score("demo"))])
    asked = [Prompt(p.text) for p in prompts]
    return open_task(ModelSource(MODEL_FOLDER, "demo", None), asked, score, RECIPES["demo"], device="cpu")


def evenly(prompts: tuple[DemoPrompt, ...], count: int) -> list[DemoPrompt]:
    """As many of each group as possible, drawn with a fixed seed."""
    by_group = defaultdict(list)
    for prompt in random.Random(0).sample(prompts, len(prompts)):
        by_group[prompt.group].append(prompt)
    rounds = max(map(len, by_group.values()))
    turns = [group[i] for i in range(rounds) for group in by_group.values() if i < len(group)]
    return turns[:count]


def share(episodes: list[Episode], name: str) -> float:
    return sum(getattr(e, name) for e in episodes) / max(1, sum(e.decisions for e in episodes))


if __name__ == "__main__":
    sys.exit(main())
