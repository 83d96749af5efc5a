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
from mara_deploy.train.config import RECIPES, TrainConfig, fit
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


def test_weights_belong_to_the_score_before_them() -> None:
    args = train.parser().parse_args([*NEW, "--weight", "2", "--score", "someone/reward#good", "--weight=-1"])
    scores, device, batch = score_options(args)
    assert [(score.spec, score.weight) for score in scores] == [("demo", 2.0), ("someone/reward#good", -1.0)]
    assert (device, batch) == ("auto", 8)
    args = train.parser().parse_args(NEW)
    assert score_options(args)[1:] == (None, None)  # no score is a model


PLENTY = {"room": 10**9, "disk": 10**12, "sequences": 10**9}


@pytest.mark.parametrize(
    ("given", "machine", "lowered"),
    [
        ({}, {}, {}),
        ({}, {"room": 40}, {"max_new_tokens": 40}),
        ({}, {"sequences": 0}, {"prompts_at_once": 1}),
        ({}, {"disk": 200_000}, {"replay_transitions": 100_000}),
        ({}, {"disk": 1000}, {"replay_transitions": 500, "start_transitions": 500}),
        ({"episodes": 100}, {"room": 40}, {"max_new_tokens": 40, "start_transitions": 500}),
        ({"episodes": 1}, {"room": 2}, {"max_new_tokens": 2, "start_transitions": 1}),
        ({"replay_transitions": 1529}, {}, {"start_transitions": 1529}),
        # what is given stays
        ({"max_new_tokens": 100, "prompts_at_once": 64}, {"room": 40, "sequences": 2}, {}),
        ({"start_transitions": 1000, "episodes": 1}, {}, {}),
        ({"start_transitions": 1000}, {"disk": 100}, {"replay_transitions": 1000}),
    ],
)
def test_settings_that_are_not_given_fit_model_and_machine(given, machine, lowered) -> None:
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    config = config_of("--recipe", "paper", *flags)
    expected = replace(RECIPES["paper"], **given, **lowered)
    assert fit(config, given, **{**PLENTY, **machine}) == expected
    assert fit(expected, given, **{**PLENTY, **machine}) == expected


def test_a_replay_buffer_larger_than_the_disk_is_refused() -> None:
    config = TrainConfig(replay_transitions=100_000)
    with pytest.raises(OptionError, match=r"--replay-transitions is 100000, but .* takes 99999"):
        fit(config, ("replay_transitions",), **{**PLENTY, "disk": 99_999})


ROW = {
    "episodes": 48,
    "updates": 1,
    "transitions": 1234,
    "decision_share": 0.5,
    "finished_share": 0.5,
    "alpha": 0.01,
    "score": 1.0,
    "score_spread": 0.5,
    "entropy": 0.6,
    "answer_tokens": 100.0,
}


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([], None),
        ([{**ROW, "updates": 0}, ROW], None),
        ([{"updates": 0}], ("1234 of the 65536", "--start-transitions", "48", "--resume")),
        ([{"updates": 0, "transitions": 70_000}], ("--updates-per-episode 10.0", "48 episodes", "--resume")),
        ([{"updates": 0, "decision_share": 0.0}] * 2, ("no decisions", "--top-p", "--top-k", "0.95 and 40")),
        ([{}, {"updates": 0, "decision_share": 0.0}], ("1234 of the 65536",)),
        # the score is constant, or never sees a whole answer
        ([{"score_spread": 0.0}] * 3, ("same score, 1:", "--score")),
        ([{"score_spread": 0.0, "score": 0.1}, {"score_spread": 0.0, "score": 0.1 + 1e-17}], ("same score, 0.1:",)),
        ([{"score_spread": 0.0}, {"score_spread": 0.0, "score": 2.0}], None),
        ([{"score_spread": 0.0, "episodes": 1}], None),
        ([{"finished_share": 0.0}] * 2, ("ended by itself", "--max-new-tokens (now 512)", "chat template")),
        ([{"finished_share": 0.0}, {}], None),
        # α runs away
        ([{}] * 10 + [{"alpha": 2.0}], ("α is 2", "worth 60 ", "ranges over 0.5", "--target-entropy (now 0.6)")),
        ([{"alpha": 2.0}, *[{}] * 20], None),
    ],
)
def test_a_run_that_learned_nothing_comes_with_a_caution(rows, named) -> None:
    given = cautions([{**ROW, **row} for row in rows], json.loads(json.dumps(TrainConfig().to_json())))
    assert len(given) == (named is not None), given
    assert all(part in caution for caution in given for part in named), given
