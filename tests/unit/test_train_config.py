"""Training before anything heavy is loaded: recipes, the size of the replay buffer, cautions about a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mara_deploy.train.cautions import cautions
from mara_deploy.train.config import RECIPES, TrainConfig, capacity_for, reserve
from mara_runtime.errors import OptionError


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_survive_json(recipe) -> None:
    config = RECIPES[recipe]
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    config.check_replay()


def test_the_least_capacity_is_the_least() -> None:
    for transitions in (1, 7, 8, 9, 8192):
        capacity = capacity_for(transitions)
        assert reserve(capacity) >= transitions
        assert capacity == 1 or reserve(capacity - 1) < transitions


def test_the_replay_buffer_must_take_a_round_of_full_answers() -> None:
    config = TrainConfig(prompts_at_once=16, max_new_tokens=512, replay_transitions=65529, start_transitions=1)
    config.check_replay()
    small = replace(config, replay_transitions=65528)
    with pytest.raises(OptionError, match=r"--replay-transitions is 65528.* 65529 or more.*--prompts-at-once"):
        small.check_replay()
    replace(small, replay_transitions=8192, episodes=2).check_replay()  # a round is no larger than the run


ROW = {"episodes": 48, "updates": 0, "transitions": 1234, "decision_share": 0.5}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], None),
        ([ROW, {**ROW, "updates": 1}], None),
        ([ROW], ("1234 of the 65536", "--start-transitions", "--resume")),
        ([{**ROW, "transitions": 70_000}], ("--updates-per-episode 10.0", "48 episodes", "--resume")),
        ([{**ROW, "decision_share": 0.0, "transitions": 0}] * 2, ("no decisions", "--top-p", "0.95 and 40")),
        ([ROW, {**ROW, "decision_share": 0.0}], ("1234 of the 65536",)),
    ],
)
def test_a_run_without_updates_gives_a_caution(rows, named) -> None:
    given = cautions(rows, TrainConfig().to_json())
    assert len(given) == (named is not None)
    for caution in given:
        assert caution.startswith("the agent was never updated")
        assert all(part in caution for part in named), caution
