"""Transitions a second: the batched training environment against one candidate a pass, on the same machine and model.

    python benchmarks/transitions.py [--model M] [--prompts-at-once N] [--threads N]

The other side is what MARA's released code does: Hugging Face eager, one prompt at a time, each candidate in a forward
pass of its own until one is accepted; the KV cache is cropped after a rejected one. Both sides sample the same policy
on the same prompts, and take turns. Prints a line a side, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers

from mara_deploy import agent as agents
from mara_deploy.demo import MODEL_FOLDER
from mara_deploy.demo.prompts import demo_prompts
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.policy import agent_policy
from mara_deploy.train.replay import ReplayBuffer
from mara_deploy.train.task import open_task
from mara_export.hf.checkpoint import load_model
from mara_export.hf.sources import ModelSource, resolve_model
from mara_runtime.candidates import select


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--model", default="demo")
    options.add_argument("--prompts-at-once", type=int, default=64)
    options.add_argument("--max-new-tokens", type=int, default=RECIPES["demo"].max_new_tokens)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    source = ModelSource(MODEL_FOLDER, "demo", None) if args.model == "demo" else resolve_model(args.model)
    prompts = [Prompt(p.text) for p in demo_prompts()][:: len(demo_prompts()) // args.prompts_at_once][
        : args.prompts_at_once
    ]
    config = replace(RECIPES["demo"], max_new_tokens=args.max_new_tokens)
    score = Combined([WeightedScore(load_score("demo"))])
    task = open_task(source, prompts, score, config, device="cpu", dtype="float32")
    agent = agents.untrained(task.hidden_size, 0, config.widths)
    environment, everyone = task.environment, np.arange(len(prompts))

    def batched(seed: int) -> int:
        rng = np.random.default_rng(seed)
        episodes = environment.rollout([task.tokens[i] for i in everyone], agent_policy(agent), rng)
        return sum(len(e.trajectory) for e in episodes)

    one = OneCandidateAPass(load_model(source), agent, environment.eos_token_ids, config.top_k, config.top_p)

    def single(seed: int) -> int:
        """An eighth of the prompts: it is slow, and its speed does not depend on their number."""
        rng = np.random.default_rng(seed)
        return sum(one.episode(task.tokens[i], args.max_new_tokens, rng) for i in everyone[seed % 8 :: 8])

    rates: dict[str, list[float]] = {"batched": [], "one candidate a pass": []}
    for number in range(args.rounds + 1):
        for name, side in (("batched", batched), ("one candidate a pass", single)):
            rate = transitions_a_second(side, number)
            if number:  # the first warms up
                rates[name].append(rate)
    for name, found in rates.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:<22} {middle:8.0f} [{low:.0f}, {high:.0f}] transitions/s")
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    print(f"{'ratio':<22} {statistics.median(ratios):8.1f} [{min(ratios):.1f}, {max(ratios):.1f}]")
    size = ReplayBuffer.bytes_per_transition(task.hidden_size)
    print(f"{'bytes a transition':<22} {size:8}; its state alone {2 * task.hidden_size}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": args.threads, **versions}
    print(
        json.dumps({"model": source.name, "prompts_at_once": len(prompts), "rates": rates, "ratio": ratios, **machine})
    )


def transitions_a_second(side: Callable[[int], int], seed: int) -> float:
    began = time.perf_counter()
    return side(seed) / (time.perf_counter() - began)


class OneCandidateAPass:
    """The sequential environment."""

    def __init__(self, model: Any, agent: agents.Agent, eos: frozenset[int], top_k: int, top_p: float) -> None:
        self.model, self.agent, self.eos, self.top_k, self.top_p = model, agent, eos, top_k, top_p

    @torch.no_grad()
    def episode(self, prompt: list[int], limit: int, rng: np.random.Generator) -> int:
        """Answer a prompt; returns the number of transitions."""
        cache = transformers.DynamicCache()
        state, states = self.forward(prompt, cache), []
        for _ in range(limit):
            best = self.model.lm_head(state).topk(self.top_k + 8)
            ids = select(best.indices.numpy(), best.values.numpy(), 0.0, self.top_k, self.top_p).ids.tolist()
            length = cache.get_seq_length()
            for token in ids:
                if (more := cache.get_seq_length() - length) > 0:
                    cache.crop(-more)  # transformers 5 takes no length
                state = self.forward([token], cache)
                if len(ids) == 1:
                    break
                states.append(state)
                if rng.random() < torch.sigmoid(self.agent.margin(state[None]))[0]:
                    break
            if token in self.eos:
                break
        return len(states)

    def forward(self, tokens: list[int], cache: Any) -> torch.Tensor:
        state: torch.Tensor = self.model.model(
            input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True
        ).last_hidden_state[0, -1]
        return state


if __name__ == "__main__":
    sys.exit(main())
