"""The training loop: roll out a round of prompts, store the transitions, update the agent, repeat."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mara_deploy.agent import Agent
from mara_deploy.scores.base import ScoreError
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.folder import Log, RunFolder
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


def first_checkpoint(hidden_size: int, config: TrainConfig, agent: Agent | None = None) -> dict[str, Any]:
    """The checkpoint that a run begins with. agent: to begin with instead of random weights, of the same sizes."""
    learner = Learner(hidden_size, config)
    if agent is not None:
        learner.actor.load_state_dict(agent.state_dict())
    actions, batches = (np.random.default_rng([config.seed, stream]).bit_generator.state for stream in (1, 2))
    progress = vars(RunProgress())
    state = {"learner": learner.state(), "progress": progress, "actions": actions, "batches": batches}
    return {**state, "replay": None, "log": None}


def open_files(folder: RunFolder, config: TrainConfig, checkpoint: Mapping[str, Any]) -> tuple[ReplayBuffer, Log]:
    """The files that grow, as they were at a checkpoint. Raises MaraError for damaged ones."""
    (hidden_size,) = checkpoint["learner"]["actor"]["ln.weight"].shape
    log = folder.log(checkpoint["log"])
    return ReplayBuffer(folder.replay, config.replay_transitions, hidden_size, checkpoint["replay"]), log


def train(
    task: TrainingTask,
    config: TrainConfig,
    folder: RunFolder,
    checkpoint: Mapping[str, Any],
    files: tuple[ReplayBuffer, Log] | None = None,
    *,
    on_round: Callable[[Row], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Learner:
    """Train until `config.episodes`, or until `stop` returns true.

    checkpoint: the folder's last one; files: of `open_files`, if they are open already; on_round: called after each
    round.
    Whatever ends it, it leaves a checkpoint with all finished rounds. Resuming from it gives the same result as an
    uninterrupted run: on a CPU bit for bit, with the same number of threads.
    Raises MaraError (ScoreError, NumericsError).
    """
    learner = Learner(task.hidden_size, config, task.environment.lm.device)
    learner.restore(checkpoint["learner"])
    progress = RunProgress(**checkpoint["progress"])
    actions, batches = np.random.default_rng(), np.random.default_rng()
    actions.bit_generator.state, batches.bit_generator.state = checkpoint["actions"], checkpoint["batches"]
    replay, log = files or open_files(folder, config, checkpoint)

    def state() -> dict[str, Any]:
        return {
            "learner": copy.deepcopy(learner.state()),
            "progress": dict(vars(progress)),
            "actions": actions.bit_generator.state,
            "batches": batches.bit_generator.state,
            "replay": replay.state(),
            "log": log.state(),
        }

    def save(state: Mapping[str, Any]) -> None:
        replay.flush()
        agent = Agent(task.hidden_size, config.widths)
        agent.load_state_dict(state["learner"]["actor"])
        agent.fallback = config.fallback
        if task.training is not None:
            agent.origin = replace(
                task.training,
                max_new_tokens=config.max_new_tokens,
                episodes=state["progress"]["episodes"],
                updates=state["progress"]["updates"],
                transitions=state["replay"]["added"],
            )
        folder.save(state, agent)
        replay.saved(state["replay"])

    last, last_save = state(), time.monotonic()
    try:
        while progress.episodes < config.episodes and not stop():
            row = _round(task, config, learner, replay, progress, actions, batches)
            log.append(row)
            last = state()
            on_round(row)
            if time.monotonic() - last_save > 60 * config.checkpoint_minutes:
                save(last)
                last_save = time.monotonic()
    except BaseException:
        with suppress(MaraError):  # the first error is the cause
            save(last)
        raise
    save(last)
    return learner


def _round(
    task: TrainingTask,
    config: TrainConfig,
    learner: Learner,
    replay: ReplayBuffer,
    progress: RunProgress,
    actions: np.random.Generator,
    batches: np.random.Generator,
) -> Row:
    """Answer some prompts, store the transitions, make the updates that are due. Returns the row of the log."""
    start = time.monotonic()
    indices = round_indices(progress.episodes, config, len(task.prompts))
    rollouts = task.answer(indices, agent_policy(learner.actor), actions)
    rolled_out = time.monotonic()
    for episode, score in zip(rollouts.episodes, rollouts.scores.combined, strict=True):
        if abs(reward := score - config.score_baseline) > np.finfo(np.float32).max:
            raise ScoreError(f"the score {task.score.name} is {score}, which float32 cannot hold: lower its --weight")
        if len(episode.trajectory):
            replay.add(episode.trajectory, reward)
    progress.episodes += len(indices)

    metrics: list[dict[str, float]] = []
    if len(replay) >= config.start_transitions:
        progress.pending_updates += config.updates_per_episode * len(indices)
        while progress.pending_updates >= 1.0:
            metrics.append(learner.update(replay.sample(batches, config.batch, config.n_step)))
            progress.pending_updates -= 1.0
            progress.updates += 1
    return {
        "episodes": progress.episodes,
        "updates": progress.updates,
        "transitions": replay.added,
        "alpha": learner.alpha,
        **round_metrics(rollouts, config.kl_weight),
        **{name: float(np.mean([m[name] for m in metrics])) for name in (metrics[0] if metrics else ())},
        "rollout_seconds": rolled_out - start,
        "update_seconds": time.monotonic() - rolled_out,
    }


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
        "score_spread": float(np.ptp(scores.combined)),
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
