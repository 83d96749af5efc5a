"""`mara-train` before anything heavy is loaded: recipes, scores, cautions. test_refusals.py has what it rejects."""

from __future__ import annotations

import json

import pytest

from mara_deploy.commands import train
from mara_deploy.commands.options import from_args, given
from mara_deploy.commands.scoring import score_options
from mara_deploy.commands.train import TrainArguments
from mara_deploy.train.cautions import cautions
from mara_deploy.train.config import RECIPES, TrainConfig

NEW = ["--model", "demo", "--prompts", "demo", "--score", "demo", "--out", "x"]


def config_of(*argv: str) -> TrainConfig:
    args = train.parser().parse_args([*NEW, *argv])
    return train.new_config(from_args(TrainArguments, args), args)


def test_the_demo_model_brings_its_recipe() -> None:
    config = config_of("--n-step", "5", "--widths", "8", "4")
    assert (config.n_step, config.widths, config.episodes) == (5, (8, 4), RECIPES["demo"].episodes)
    assert config_of("--recipe", "paper") == RECIPES["paper"]
    assert config_of("--model", "other") == RECIPES["paper"]


def test_the_replay_buffer_takes_one_round_of_rollouts() -> None:
    round_of = ("--prompts-at-once", "16", "--max-new-tokens", "512")  # 8192 transitions at one candidate a token
    assert config_of(*round_of, "--replay-transitions", "65529").replay_transitions == 65529
    few = config_of(*round_of, "--replay-transitions", "8192", "--episodes", "2")
    assert few.episodes == 2  # a round is no larger than the run


def test_a_given_default_is_given() -> None:
    args = train.parser().parse_args([*NEW, "--seed", "0"])
    assert given(TrainConfig, args) == {"seed": 0}


def test_weights_belong_to_the_score_before_them() -> None:
    args = train.parser().parse_args([*NEW, "--weight", "2", "--score", "someone/reward#good", "--weight=-1"])
    scores, device, batch = score_options(args)
    assert [(score.spec, score.weight) for score in scores] == [("demo", 2.0), ("someone/reward#good", -1.0)]
    assert (device, batch) == ("cpu", 8)
    args = train.parser().parse_args(NEW)
    assert score_options(args)[1:] == (None, None)  # no score is a model


ROW = {"episodes": 48, "updates": 0, "transitions": 1234, "decision_share": 0.5}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], None),
        ([ROW, {**ROW, "updates": 1}], None),
        ([ROW], ("1234", "65536", "--start-transitions", "48", "--resume")),
        ([{**ROW, "transitions": 70_000}], ("--updates-per-episode 10.0", "48", "--resume")),
        ([{**ROW, "decision_share": 0.0, "transitions": 0}] * 2, ("--top-p", "--top-k")),
        ([ROW, {**ROW, "decision_share": 0.0}], ("1234", "65536")),
    ],
)
def test_an_agent_that_was_never_updated_comes_with_a_warning(rows, named) -> None:
    warnings = cautions(rows, json.loads(json.dumps(TrainConfig().to_json())))
    assert len(warnings) == (named is not None)
    assert all(text in warnings[0] for text in named or ())
