"""The training loop: roll out a round of prompts, store the transitions, update the agent, repeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mara_deploy.train.config import TrainConfig
from mara_deploy.train.folder import RunFolder
from mara_deploy.train.learner import Learner
from mara_deploy.train.policy import agent_policy, entropy, kl_divergence
from mara_deploy.train.replay import ReplayBuffer
from mara_deploy.train.task import Rollouts, TrainingTask
from mara_runtime.errors import MaraError

Row = dict[str, Any]
"""Metrics of a round, see `round_metrics`."""


@dataclass
class RunProgress:
    """How far a run has come."""

    episodes: int = 0
    updates: int = 0
    pending_updates: float = 0.0
    """due but not made: less than one, between rounds"""


def train(
    task: TrainingTask,
    config: TrainConfig,
    folder: RunFolder,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    on_round: Callable[[Row], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Learner:
    """Train until `config.episodes`, or until `stop` returns true.

    checkpoint: the folder's last one, to resume from; on_round: called after each round.
    Ends with a checkpoint. Resuming from it gives the same result as an uninterrupted run: on a CPU bit for bit, with
    the same number of threads.
    Raises MaraError (ScoreError, NumericsError), and leaves the last checkpoint. If the replay buffer cannot take a
    round, it first makes a checkpoint of everything before that round.
    """
    learner = Learner(task.hidden_size, config, task.environment.lm.device)
    progress = RunProgress()
    actions, batches = (np.random.default_rng([config.seed, stream]) for stream in (1, 2))
    if checkpoint is not None:
        learner.restore(checkpoint["learner"])
        progress = RunProgress(**checkpoint["progress"])
        actions.bit_generator.state, batches.bit_generator.state = checkpoint["actions"], checkpoint["batches"]
    added = 0 if checkpoint is None else checkpoint["added"]
    replay = ReplayBuffer(folder.replay, config.replay_transitions, task.hidden_size, added)
    folder.rewind(progress.episodes)

    def save(actions_state: Mapping[str, Any]) -> None:
        replay.flush()
        if task.training is not None:
            learner.actor.origin = replace(
                task.training, episodes=progress.episodes, updates=progress.updates, transitions=replay.added
            )
        folder.save(
            {
                "learner": learner.state(),
                "progress": vars(progress),
                "actions": actions_state,
                "batches": batches.bit_generator.state,
                "added": replay.added,
            },
            learner.actor,
        )
        replay.saved()

    last_save = time.monotonic()
    while progress.episodes < config.episodes and not stop():
        start, actions_before = time.monotonic(), actions.bit_generator.state
        indices = round_indices(progress.episodes, config, len(task.prompts))
        rollouts = task.answer(indices, agent_policy(learner.actor), actions)
        rolled_out = time.monotonic()

        transitions = sum(len(episode.trajectory) for episode in rollouts.episodes)
        try:
            replay.check(transitions)
        except MaraError as error:
            if not progress.episodes:
                raise
            save(actions_before)
            raise MaraError(
                f"{error}; agent and checkpoint are saved as of the {progress.episodes} episodes before"
            ) from None
        if replay.room < transitions:
            save(actions_before)
        for episode, score in zip(rollouts.episodes, rollouts.scores.combined, strict=True):
            if len(episode.trajectory):
                replay.add(episode.trajectory, score - config.score_baseline)
        progress.episodes += len(indices)

        metrics: list[dict[str, float]] = []
        if len(replay) >= config.start_transitions:
            progress.pending_updates += config.updates_per_episode * len(indices)
            while progress.pending_updates >= 1.0:
                metrics.append(learner.update(replay.sample(batches, config.batch, config.n_step)))
                progress.pending_updates -= 1.0
                progress.updates += 1
        row = {
            "episodes": progress.episodes,
            "updates": progress.updates,
            "transitions": replay.added,
            "alpha": learner.alpha,
            **round_metrics(rollouts, config.kl_weight),
            **{name: float(np.mean([m[name] for m in metrics])) for name in (metrics[0] if metrics else ())},
            "rollout_seconds": rolled_out - start,
            "update_seconds": time.monotonic() - rolled_out,
        }
        folder.log(row)
        on_round(row)
        if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
            save(actions.bit_generator.state)
            last_save = time.monotonic()
    save(actions.bit_generator.state)
    return learner


def round_indices(episodes: int, config: TrainConfig, prompts: int) -> NDArray[np.int64]:
    """Prompts of the round after so many episodes: a permutation of all prompts, then another one, and so on."""
    count = min(config.prompts_at_once, config.episodes - episodes)
    laps = (divmod(number, prompts) for number in range(episodes, episodes + count))
    return np.array([_permutation(config.seed, lap, prompts)[at] for lap, at in laps])


@lru_cache(maxsize=2)  # a round may span two permutations
def _permutation(seed: int, lap: int, prompts: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 0, lap]).permutation(prompts)


def round_metrics(rollouts: Rollouts, kl_weight: float) -> Row:
    """Figures of a round for the log, means over its episodes."""
    episodes, scores = rollouts.episodes, rollouts.scores
    margins, reference, forced = (
        torch.from_numpy(np.concatenate([getattr(episode.trajectory, name) for episode in episodes]))
        for name in ("margins", "reference", "forced")
    )
    kl = float(kl_divergence(margins, reference, forced).sum()) / len(episodes)
    decisions = sum(e.decisions for e in episodes)
    all_rejected = sum(e.forced for e in episodes)
    score = float(np.mean(scores.combined))
    return {
        "score": score,
        "scores": {name: float(np.mean(values)) for name, values in scores.each.items()},
        "reward": score - kl_weight * kl,
        "kl": kl,  # nats per answer, between the policy that acted and the LLM
        "entropy": 0.0
        if forced.all()
        else float(entropy(margins[~forced]).mean()),  # nats per state that is not forced
        "accept_rate": (decisions - all_rejected) / max(1, sum(e.examined for e in episodes)),  # of examined candidates
        "forced_rate": all_rejected / max(1, decisions),
        "intervention_rate": sum(e.interventions for e in episodes) / max(1, decisions),
        "decision_share": decisions / max(1, sum(len(e.token_ids) + e.finished for e in episodes)),  # of tokens
        "answer_tokens": float(np.mean([len(e.token_ids) for e in episodes])),
        "finished_share": float(np.mean([e.finished for e in episodes])),
        "example": {"prompt": rollouts.prompts[0].text, "answer": rollouts.texts[0], "score": scores.combined[0]},
    }
