"""The training loop: answer a round of prompts, remember the transitions, learn from them, and so on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mara_deploy.agent import Agent
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Policy
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.learner import Learner
from mara_deploy.train.policy import divergence, entropy
from mara_deploy.train.replay import Replay
from mara_deploy.train.task import Answers, Task
from mara_runtime.errors import MaraError

Row = dict[str, Any]
"""Figures of a round; `_row` says what each key means."""


@dataclass
class _Progress:
    """How far a run has come."""

    episodes: int = 0
    updates: int = 0
    owed: float = 0.0
    """updates that are due but not yet made: less than one, between rounds"""


def train(
    task: Task,
    config: TrainConfig,
    folder: RunFolder,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    tell: Callable[[Row], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    facts: Mapping[str, str] | None = None,
) -> Learner:
    """Train until `config.episodes`, or until `stop` says so.

    checkpoint: the folder's last one, to go on from it; tell: called after each round; facts: recorded in the agent's
    file. Ends with a checkpoint, from which a later call goes on to the same result as an uninterrupted run: bit for
    bit on a CPU with the same number of threads.
    Raises MaraError (ScoreError, NumericsError); the last checkpoint then stays. Where the replay memory cannot take a
    round, there is one of everything before it.
    """
    learner = Learner(task.hidden_size, config, task.environment.lm.device)
    progress = _Progress()
    actions, batches = (np.random.default_rng([config.seed, use]) for use in (1, 2))
    if checkpoint is not None:
        learner.restore(checkpoint["learner"])
        progress = _Progress(**checkpoint["progress"])
        actions.bit_generator.state, batches.bit_generator.state = checkpoint["actions"], checkpoint["batches"]
    added = 0 if checkpoint is None else checkpoint["added"]
    replay = Replay(folder.replay, config.replay_transitions, task.hidden_size, added)
    folder.rewind(progress.episodes)

    def save(next_actions: Mapping[str, Any]) -> None:
        replay.flush()
        folder.save(
            {
                "learner": learner.state(),
                "progress": vars(progress),
                "actions": next_actions,
                "batches": batches.bit_generator.state,
                "added": replay.added,
            },
            learner.actor,
            {**(facts or {}), "episodes": str(progress.episodes), "updates": str(progress.updates)},
        )
        replay.saved()

    saved = time.monotonic()
    while progress.episodes < config.episodes and not stop():
        began, before = time.monotonic(), actions.bit_generator.state
        chosen = _chosen(progress.episodes, config, len(task.prompts))
        answers = task.answer(chosen, agent_policy(learner.actor), actions)
        collected = time.monotonic()
        transitions = sum(len(e.chain.accepted) for e in answers.episodes)
        try:
            replay.check(transitions)
        except MaraError as error:
            if not progress.episodes:
                raise
            save(before)
            raise MaraError(
                f"{error}; agent and checkpoint are as of the {progress.episodes} episodes before"
            ) from None
        if replay.room < transitions:
            save(before)
        for episode, score in zip(answers.episodes, answers.scored.combined, strict=True):
            if len(episode.chain.accepted):
                replay.add(episode.chain, score - config.score_baseline)
        progress.episodes += len(chosen)

        watched: list[dict[str, float]] = []
        if len(replay) >= config.start_transitions:
            progress.owed += config.updates_per_episode * len(chosen)
            while progress.owed >= 1.0:
                watched.append(learner.update(replay.sample(batches, config.batch, config.n_step)))
                progress.owed -= 1.0
                progress.updates += 1
        row = _row(answers, config, learner, progress, replay, watched)
        row["rollout_seconds"], row["update_seconds"] = collected - began, time.monotonic() - collected
        folder.log(row)
        tell(row)
        if time.monotonic() - saved > 60 * config.checkpoint_minutes:
            save(actions.bit_generator.state)
            saved = time.monotonic()
    save(actions.bit_generator.state)
    return learner


def agent_policy(agent: Agent) -> Policy:
    """An agent as a policy of rollouts."""

    @torch.no_grad()
    def margins(states: Tensor, _: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = agent.margin(states.float()).cpu().numpy()
        return found

    return margins


def _chosen(episodes: int, config: TrainConfig, prompts: int) -> NDArray[np.int64]:
    """Indices of the next round's prompts: all in an order drawn from the seed, then all in another one, and so on."""
    count = min(config.prompts_at_once, config.episodes - episodes)
    found = []
    for number in range(episodes, episodes + count):
        lap, at = divmod(number, prompts)
        found.append(_order(config.seed, lap, prompts)[at])
    return np.array(found)


@lru_cache(maxsize=2)  # a round may see the end of one lap and the beginning of the next
def _order(seed: int, lap: int, prompts: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 0, lap]).permutation(prompts)


def _row(
    answers: Answers,
    config: TrainConfig,
    learner: Learner,
    progress: _Progress,
    replay: Replay,
    watched: list[dict[str, float]],
) -> Row:
    episodes, scored = answers.episodes, answers.scored
    margins, reference, forced = (
        torch.from_numpy(np.concatenate([getattr(e.chain, name) for e in episodes]))
        for name in ("margins", "reference", "forced")
    )
    free = int((~forced).sum())
    kl = float(divergence(margins, reference, forced).sum()) / len(episodes)
    decisions = sum(e.decisions for e in episodes)
    examined = sum(e.examined for e in episodes)
    rejected_all = sum(e.forced for e in episodes)
    score = float(np.mean(scored.combined))
    return {
        "episodes": progress.episodes,
        "updates": progress.updates,
        "transitions": replay.added,
        "score": score,  # mean over the round
        "scores": {name: float(np.mean(values)) for name, values in scored.each.items()},
        "reward": score - config.kl_weight * kl,
        "kl": kl,  # nats per answer, from the LLM's own choice
        "entropy": float(entropy(margins[~forced]).mean()) if free else 0.0,  # nats per state, of the policy that acted
        "alpha": learner.alpha,
        "accept_rate": (decisions - rejected_all) / max(1, examined),  # of examined candidates
        "forced_rate": rejected_all / max(1, decisions),  # of decisions: all were rejected
        "intervention_rate": sum(e.interventions for e in episodes) / max(1, decisions),  # not the LLM's best
        "decision_share": decisions / max(1, sum(len(e.token_ids) + e.finished for e in episodes)),  # of tokens
        "answer_tokens": float(np.mean([len(e.token_ids) for e in episodes])),
        "finished_share": float(np.mean([e.finished for e in episodes])),
        **{name: float(np.mean([w[name] for w in watched])) for name in (watched[0] if watched else ())},
        "example": {"prompt": answers.prompts[0], "answer": answers.texts[0], "score": scored.combined[0]},
    }
