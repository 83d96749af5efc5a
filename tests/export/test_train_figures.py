"""The metrics of a round, worked by hand, and the prompts of a round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import ScoreValues
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Episode, Trajectory
from mara_deploy.train.loop import round_indices, round_metrics
from mara_deploy.train.task import Rollouts


def trajectory(margins: list[float], reference: list[float], forced: list[bool]) -> Trajectory:
    n = len(margins)
    numbers = (np.array(column, np.float32) for column in (margins, reference))
    return Trajectory(np.zeros((n, 2), np.float16), np.ones(n, np.bool_), *numbers, np.array(forced, np.bool_))


def metrics(episodes: list[Episode], scores: list[float]) -> dict[str, Any]:
    prompts = [Prompt(f"prompt {i}") for i in range(len(episodes))]
    texts = [f"text {i}" for i in range(len(episodes))]
    values = ScoreValues(scores, {"one": scores, "other": [3 * s for s in scores]})
    return round_metrics(Rollouts(prompts, episodes, texts, values), kl_weight=0.5)


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_metrics_by_hand() -> None:
    three = math.log(3)  # accepts with probability 3/4
    counts = {"decisions": 2, "examined": 5, "interventions": 1, "forced": 0}
    one = Episode([5, 6, 7], True, trajectory([0.0, three], [three, 0.0], [False] * 2), **counts)
    counts = {"decisions": 1, "examined": 3, "interventions": 1, "forced": 1}
    other = Episode([5], False, trajectory([0.0, 9.0], [0.0, math.inf], [False, True]), **counts)
    found = metrics([one, other], [1.0, 2.0])
    divergence = (kl(0.5, 0.75) + kl(0.75, 0.5)) / 2  # per answer
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {
        "score": 1.5,
        "kl": divergence,
        "reward": 1.5 - 0.5 * divergence,
        "entropy": (2 * math.log(2) + entropy) / 3,  # of the states that are not forced
        "accept_rate": 2 / 8,
        "forced_rate": 1 / 3,
        "intervention_rate": 2 / 3,
        "decision_share": 3 / 5,  # the end-of-sequence token counts
        "answer_tokens": 2.0,
        "finished_share": 0.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["scores"] == {"one": 1.5, "other": 4.5}
    assert found["example"] == {"prompt": "prompt 0", "answer": "text 0", "score": 1.0}

    found = metrics([Episode([5, 6], True, trajectory([], [], []), 0, 0, 0, 0)], [1.0])  # without decisions
    rates = ("accept_rate", "forced_rate", "intervention_rate", "decision_share")
    assert {found[name] for name in ("kl", "entropy", *rates)} == {0.0}
    assert (found["reward"], found["answer_tokens"]) == (1.0, 2.0)


def test_every_lap_is_another_permutation_of_the_prompts() -> None:
    def laps(seed: int) -> list[list[int]]:
        config = TrainConfig(episodes=21, prompts_at_once=3, seed=seed)
        return np.concatenate([round_indices(at, config, 7) for at in range(0, 21, 3)]).reshape(3, 7).tolist()

    assert [sorted(lap) for lap in laps(0)] == [list(range(7))] * 3
    assert len({tuple(lap) for lap in [*laps(0), *laps(1)]}) == 6
    config = TrainConfig(episodes=21, prompts_at_once=4)  # the last round may be smaller
    assert [len(round_indices(at, config, 7)) for at in (0, 16, 20)] == [4, 4, 1]
