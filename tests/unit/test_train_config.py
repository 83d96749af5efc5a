"""`mara-train` before anything heavy is loaded: recipes, scores, the size of the replay buffer, cautions about a run.

test_refusals.py has what it rejects.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mara_deploy.commands import train
from mara_deploy.commands.options import from_args, given
from mara_deploy.commands.scoring import score_options
from mara_deploy.commands.train import TrainArguments
from mara_deploy.train.cautions import cautions
from mara_deploy.train.config import RECIPES, TrainConfig, capacity_for, reserve
from mara_runtime.errors import OptionError

NEW = ["--model", "demo", "--prompts", "demo", "--score", "demo", "--out", "x"]


def config_of(*argv: str) -> TrainConfig:
    args = train.parser().parse_args([*NEW, *argv])
    return train.new_config(from_args(TrainArguments, args), args)


def test_the_demo_model_brings_its_recipe() -> None:
    config = config_of("--n-step", "5", "--widths", "8", "4")
    assert (config.n_step, config.widths, config.episodes) == (5, (8, 4), RECIPES["demo"].episodes)
    assert config_of("--recipe", "paper") == RECIPES["paper"]
    assert config_of("--model", "other") == RECIPES["paper"]
    args = train.parser().parse_args([*NEW, "--seed", "0"])
    assert given(TrainConfig, args) == {"seed": 0}  # a given default is given


def test_settings_survive_json() -> None:
    for config in RECIPES.values():
        assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
        config.check_replay()


def test_weights_belong_to_the_score_before_them() -> None:
    args = train.parser().parse_args([*NEW, "--weight", "2", "--score", "someone/reward#good", "--weight=-1"])
    scores, device, batch = score_options(args)
    assert [(score.spec, score.weight) for score in scores] == [("demo", 2.0), ("someone/reward#good", -1.0)]
    assert (device, batch) == ("cpu", 8)
    args = train.parser().parse_args(NEW)
    assert score_options(args)[1:] == (None, None)  # no score is a model


def test_the_replay_buffer_must_take_a_round_of_full_answers() -> None:
    for transitions in (1, 7, 8, 9, 8192):
        capacity = capacity_for(transitions)
        assert reserve(capacity) >= transitions
        assert capacity == 1 or reserve(capacity - 1) < transitions
    config = config_of("--prompts-at-once", "16", "--max-new-tokens", "512", "--replay-transitions", "65529")
    with pytest.raises(OptionError, match=r"--replay-transitions is 65528.* 65529 or more.*--prompts-at-once"):
        replace(config, replay_transitions=65528).check_replay()
    replace(config, replay_transitions=8192, episodes=2).check_replay()  # a round is no larger than the run


ROW = {"episodes": 48, "updates": 0, "transitions": 1234, "decision_share": 0.5}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], None),
        ([ROW, {**ROW, "updates": 1}], None),
        ([ROW], ("1234 of the 65536", "--start-transitions", "48", "--resume")),
        ([{**ROW, "transitions": 70_000}], ("--updates-per-episode 10.0", "48 episodes", "--resume")),
        ([{**ROW, "decision_share": 0.0, "transitions": 0}] * 2, ("no decisions", "--top-p", "--top-k", "0.95 and 40")),
        ([ROW, {**ROW, "decision_share": 0.0}], ("1234 of the 65536",)),
    ],
)
def test_an_agent_that_was_never_updated_comes_with_a_caution(rows, named) -> None:
    given = cautions(rows, json.loads(json.dumps(TrainConfig().to_json())))
    assert len(given) == (named is not None)
    assert all(part in caution for caution in given for part in named), given
