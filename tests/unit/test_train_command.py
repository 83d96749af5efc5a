"""`mara-train` before anything heavy is loaded: settings, their ranges, what goes with --resume."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mara_deploy.commands import train
from mara_deploy.train.cautions import cautions
from mara_deploy.train.config import RECIPES, TrainConfig
from mara_runtime.errors import OptionError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "onnx", "numpy", "matplotlib", "tensorboardX")
NEW = ["--model", "demo", "--prompts", "demo", "--score", "demo", "--out", "x"]


def refused(capsys, *argv: str) -> str:
    assert train.main(list(argv)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line.removeprefix("mara-train: error: ")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY}))\n"
        f"sys.path[:0] = {[str(ROOT / part) for part in ('', 'export', 'runtime')]!r}\n"
        "from mara_deploy.commands.train import main\nmain(['--help'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("usage: mara-train ")


def test_every_setting_is_an_option_with_help() -> None:
    assert list(train.SETTINGS) == [f.name for f in fields(TrainConfig)]
    text = train.parser().format_help()
    assert all("--" + f.name.replace("_", "-") in text for f in fields(TrainConfig))


def test_settings_survive_json() -> None:
    for recipe in RECIPES.values():
        again = TrainConfig.from_json({**recipe.to_json(), "widths": list(recipe.widths)})
        assert again == recipe


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("episodes", 0, "--episodes is 0; it must be a whole number of at least 1"),
        ("prompts_at_once", 0, "--prompts-at-once is 0"),
        ("max_new_tokens", 0, "--max-new-tokens is 0"),
        ("top_k", 1, "--top-k is 1; it must be a whole number of at least 2"),
        ("top_p", 0.0, "--top-p is 0.0; it must be in (0, 1]"),
        ("top_p", float("nan"), "--top-p is nan"),
        ("widths", (4, 0), "--widths is (4, 0)"),
        ("fallback", "best", "--fallback is 'best'; it must be one of first, last"),
        ("kl_weight", -0.1, "--kl-weight is -0.1"),
        ("score_baseline", float("inf"), "--score-baseline is inf"),
        ("discount", 1.5, "--discount is 1.5"),
        ("n_step", 0, "--n-step is 0"),
        ("target_entropy", 2.0, "--target-entropy is 2.0; it must be in [0, 1]"),
        ("batch", 0, "--batch is 0"),
        ("updates_per_episode", 0.0, "--updates-per-episode is 0.0; it must be a finite number above 0"),
        ("start_transitions", 0, "--start-transitions is 0"),
        ("replay_transitions", 10, "--replay-transitions is 10; it must be at least start_transitions (65536)"),
        ("learning_rate", float("inf"), "--learning-rate is inf"),
        ("clip_norm", -1.0, "--clip-norm is -1.0"),
        ("target_rate", 0.0, "--target-rate is 0.0; it must be in (0, 1]"),
        ("alpha", 0.0, "--alpha is 0.0"),
        ("alpha_rate", -1.0, "--alpha-rate is -1.0"),
        ("alpha_form", "sqrt", "--alpha-form is 'sqrt'; it must be one of log, direct"),
        ("seed", -1, "--seed is -1"),
        ("seed", 2**63, f"--seed is {2**63}; it must be a whole number from 0 to 2**63 - 1"),
        ("checkpoint_minutes", -1.0, "--checkpoint-minutes is -1.0"),
    ],
)
def test_settings_out_of_range_name_the_flag(name, value, said) -> None:
    with pytest.raises(OptionError) as error:
        TrainConfig(**{name: value})
    assert str(error.value).startswith(said)


def test_a_setting_out_of_range_is_one_line(capsys) -> None:
    assert refused(capsys, *NEW, "--top-k", "1") == "--top-k is 1; it must be a whole number of at least 2"


def test_a_replay_memory_that_cannot_take_a_round_is_refused_at_once(capsys) -> None:
    round_of = ("--prompts-at-once", "16", "--max-new-tokens", "512")  # 8192 transitions at one candidate a token
    said = refused(capsys, *NEW, *round_of, "--replay-transitions", "65528")
    assert said == (
        "--replay-transitions is 65528, which takes 8191 transitions between checkpoints, but 16 --prompts-at-once of "
        "512 --max-new-tokens may have 8192 at one candidate a token: raise --replay-transitions, or lower "
        "--prompts-at-once or --max-new-tokens; 65529 is the least that may do"
    )
    args = train.parser().parse_args([*NEW, *round_of, "--replay-transitions", "65529"])
    assert train._config(args).replay_transitions == 65529
    few = train.parser().parse_args([*NEW, *round_of, "--replay-transitions", "8192", "--episodes", "2"])
    assert train._config(few).episodes == 2  # a round is no larger than the run


ROW = {"episodes": 48, "updates": 0, "transitions": 1234, "decision_share": 0.5}
NEVER = "the agent was never updated: "


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], None),
        ([ROW, {**ROW, "updates": 1}], None),
        ([ROW], f"{NEVER}1234 of the 65536 transitions of --start-transitions were collected in 48 episodes; go on"),
        (
            [{**ROW, "transitions": 70_000}],
            f"{NEVER}with --updates-per-episode 10.0 none was due in 48 episodes; go on",
        ),
        ([{**ROW, "decision_share": 0.0, "transitions": 0}] * 2, f"{NEVER}no decision was ever met, as each position"),
        ([ROW, {**ROW, "decision_share": 0.0}], f"{NEVER}1234 of the 65536"),
    ],
)
def test_an_agent_that_was_never_updated_is_said_to_be_so(rows, said) -> None:
    found = cautions(rows, TrainConfig().to_json())
    assert len(found) == (said is not None)
    assert all(line.startswith(said) for line in found)


@pytest.mark.parametrize("missing", ["--model", "--prompts", "--score"])
def test_a_new_run_needs_model_prompts_and_score(capsys, missing) -> None:
    at = NEW.index(missing)
    assert refused(capsys, *NEW[:at], *NEW[at + 2 :]).startswith(f"{missing} is missing")


@pytest.mark.parametrize("options", [NEW[:-2], ["--resume"]])
def test_an_empty_name_is_no_folder(capsys, options) -> None:
    assert refused(capsys, *options, "--out", "") == "--out is empty: name the folder of the run"


def test_a_weight_that_means_nothing_is_refused_at_once(capsys) -> None:
    said = refused(capsys, *NEW, "--weight", "0")
    assert said == "--weight of demo is 0.0; it must be a finite number other than 0"


def test_resume_takes_nothing_but_more_episodes(capsys) -> None:
    said = refused(capsys, "--resume", "--out", "x", "--model", "demo", "--n-step", "3", "--threads", "2")
    assert said.endswith("leave out --model, --n-step, --threads")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--dtype", "auto"),
        ("--score-device", "cpu"),
        ("--score-batch", "8"),
    ],
)
def test_a_resumed_run_stays_where_it_began(capsys, flag, value) -> None:
    assert refused(capsys, "--resume", "--out", "x", flag, value).endswith(f"leave out {flag}")


def test_options_of_scores_are_checked_before_anything_is_loaded(capsys) -> None:
    model = [*NEW[:5], "someone/reward", *NEW[6:]]
    assert refused(capsys, *model, "--score-batch", "0") == "--score-batch is 0; it must be at least 1"
    for flag, value in (("--score-device", "cpu"), ("--score-batch", "8")):
        said = refused(capsys, *NEW, flag, value)
        assert said == f"{flag} is {value}, but no --score is a model: leave it out"


def test_weights_belong_to_the_score_before_them(capsys) -> None:
    args = train.parser().parse_args([*NEW, "--weight", "2", "--score", "a:b", "--weight=-1"])
    assert [(option.spec, option.weight) for option in args.score] == [("demo", 2.0), ("a:b", -1.0)]
    with pytest.raises(SystemExit) as left:
        train.parser().parse_args(["--out", "x", "--weight", "2"])
    assert left.value.code == 2
    assert "--weight belongs after the --score" in capsys.readouterr().err


def test_the_demo_model_brings_its_recipe() -> None:
    config = train._config(train.parser().parse_args([*NEW, "--n-step", "5", "--widths", "8", "4"]))
    assert (config.n_step, config.widths) == (5, (8, 4))
    assert config.episodes == RECIPES["demo"].episodes
    config = train._config(train.parser().parse_args([*NEW, "--recipe", "paper"]))
    assert config == RECIPES["paper"]
