"""What a round is reported as, worked by hand, and which prompts it is about."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mara_deploy.scores.base import Scored
from mara_deploy.train import loop
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Chain, Episode
from mara_deploy.train.task import Answers

CONFIG = TrainConfig(kl_weight=0.5)


def chain(margins: list[float], reference: list[float], forced: list[bool]) -> Chain:
    n = len(margins)
    numbers = (np.array(column, np.float32) for column in (margins, reference))
    return Chain(np.zeros((n, 2), np.float16), np.ones(n, np.bool_), *numbers, np.array(forced, np.bool_))


def row(episodes: list[Episode], scores: list[float], watched: list[dict[str, float]]) -> dict[str, Any]:
    asked, texts = tuple(f"prompt {i}" for i in range(len(episodes))), [f"text {i}" for i in range(len(episodes))]
    answers = Answers(asked, episodes, texts, Scored(scores, {"one": scores, "other": [3 * s for s in scores]}))
    learner, replay = SimpleNamespace(alpha=0.1), SimpleNamespace(added=40)
    return loop._row(answers, CONFIG, learner, loop._Progress(20, 7), replay, watched)


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_the_figures_of_a_round_by_hand() -> None:
    three, inf = math.log(3), math.inf  # accepting with probability 3/4, and with 1
    one = Episode(
        [5, 6, 7],
        True,
        chain([0.0, three], [three, 0.0], [False] * 2),
        decisions=2,
        examined=5,
        interventions=1,
        forced=0,
    )
    other = Episode(
        [5], False, chain([0.0, 9.0], [0.0, inf], [False, True]), decisions=1, examined=3, interventions=1, forced=1
    )
    found = row([one, other], [1.0, 2.0], [{"critic_loss": 1.0}, {"critic_loss": 2.0}])
    price = (kl(0.5, 0.75) + kl(0.75, 0.5)) / 2  # of an answer, not of a state
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {
        "episodes": 20,
        "updates": 7,
        "transitions": 40,
        "score": 1.5,
        "kl": price,
        "reward": 1.5 - 0.5 * price,
        "entropy": (2 * math.log(2) + entropy) / 3,  # of the states that are not forced
        "alpha": 0.1,
        "accept_rate": 2 / 8,
        "forced_rate": 1 / 3,
        "intervention_rate": 2 / 3,
        "decision_share": 3 / 5,  # the end of the first answer is a token, too
        "answer_tokens": 2.0,
        "finished_share": 0.5,
        "critic_loss": 1.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["scores"] == {"one": 1.5, "other": 4.5}
    assert found["example"] == {"prompt": "prompt 0", "answer": "text 0", "score": 1.0}


def test_a_round_without_a_decision_has_figures_too() -> None:
    found = row([Episode([5, 6], True, chain([], [], []), 0, 0, 0, 0)], [1.0], [])
    rates = ("accept_rate", "forced_rate", "intervention_rate", "decision_share")
    assert {found[name] for name in ("kl", "entropy", *rates)} == {0.0}
    assert (found["reward"], found["answer_tokens"]) == (1.0, 2.0)


def test_every_lap_has_each_prompt_once_and_an_order_of_its_own() -> None:
    def laps(seed: int) -> list[list[int]]:
        config = TrainConfig(episodes=21, prompts_at_once=3, seed=seed)
        drawn = np.concatenate([loop._chosen(at, config, 7) for at in range(0, 21, 3)])
        return drawn.reshape(3, 7).tolist()

    assert [sorted(lap) for lap in laps(0)] == [list(range(7))] * 3
    assert len({tuple(lap) for lap in [*laps(0), *laps(1)]}) == 6


def test_the_last_round_is_as_small_as_need_be() -> None:
    config = TrainConfig(episodes=21, prompts_at_once=4)
    assert [len(loop._chosen(at, config, 7)) for at in (0, 16, 20)] == [4, 4, 1]
