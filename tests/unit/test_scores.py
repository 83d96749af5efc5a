"""Scores: functions by name, weighted sums, and what is said when one is not a number."""

from __future__ import annotations

import math
import sys

import pytest

from mara_deploy.scores.base import Combined, FunctionScore, ScoreError, checked_values, load_score
from mara_runtime.bundle import sha256

PROMPTS, ANSWERS = ["a", "bb"], ["x", "xyz"]


def length(prompts, answers):
    return [len(answer) for answer in answers]


def test_a_weighted_sum_keeps_each_score_by_itself() -> None:
    first = FunctionScore("of the prompt", lambda prompts, _: [len(p) for p in prompts])
    combined = Combined([(2.0, first), (-1.0, FunctionScore("length", length))])
    scored = combined.detail(PROMPTS, ANSWERS)
    assert scored.each == {"of the prompt": [1.0, 2.0], "length": [1.0, 3.0]}
    assert scored.combined == [2 * 1 - 1, 2 * 2 - 3] == combined(PROMPTS, ANSWERS)
    assert combined.name == "+2·of the prompt -1·length"
    assert combined.weights == (2.0, -1.0)


def test_one_score_of_weight_one_is_known_by_its_own_name() -> None:
    assert Combined([(1.0, FunctionScore("length", length))]).name == "length"


def test_equal_names_are_told_apart() -> None:
    score = FunctionScore("length", length)
    scored = Combined([(1.0, score), (0.5, score)]).detail(PROMPTS, ANSWERS)
    assert list(scored.each) == ["length (1)", "length (2)"]
    assert scored.combined == [1.5, 4.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_names_score_and_prompt(value) -> None:
    broken = FunctionScore("broken", lambda prompts, answers: [0.0, value])
    with pytest.raises(ScoreError, match=rf"the score broken is {value} for the answer to the prompt 'bb'"):
        Combined([(1.0, FunctionScore("length", length)), (1.0, broken)])(PROMPTS, ANSWERS)


def test_a_score_must_give_a_number_for_each_answer() -> None:
    with pytest.raises(ScoreError, match="the score short gave 1 numbers for 2 answers"):
        Combined([(1.0, FunctionScore("short", lambda *_: [1.0]))])(PROMPTS, ANSWERS)


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_weights_must_mean_something(weight) -> None:
    with pytest.raises(ScoreError, match="--weight of length is"):
        Combined([(weight, FunctionScore("length", length))])


def test_no_score_is_no_score() -> None:
    with pytest.raises(ScoreError, match="at least one --score"):
        Combined([])


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A working directory with modules of a user's; import leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_found_in_the_working_directory(modules) -> None:
    (modules / "scores_found_here.py").write_text(
        "def length(prompts, answers):\n    return [len(a) for a in answers]\n"
    )
    score = load_score("scores_found_here:length")
    assert score.name == "scores_found_here:length"
    assert list(score(PROMPTS, ANSWERS)) == [1.0, 3.0]
    assert score.fingerprint == sha256(modules / "scores_found_here.py")[:16]


def test_a_score_knows_itself_whatever_is_imported_later(modules) -> None:
    (modules / "known_score.py").write_text("def f(prompts, answers): ...\n")
    score = load_score("known_score:f")
    before = score.fingerprint
    del sys.modules["known_score"]
    (modules / "known_score.py").write_text("def f(prompts, answers): return [1.0]\n")
    assert score.fingerprint == before


@pytest.mark.parametrize(
    ("spec", "text", "said"),
    [
        ("nowhere_to_be_found:f", "", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("mine:other", "def f(): pass", "mine has no function 'other'"),
        ("mine:f", "f = 3.5", "'f' of mine is of type float, which is not callable: name a function"),
        ("mine:f", "\n1 / 0", r"ZeroDivisionError: division by zero \(mine\.py:2\)"),
        ("mine:f", "import nowhere_to_be_found", r"No module named 'nowhere_to_be_found' \(mine\.py:1\)"),
    ],
)
def test_a_function_that_cannot_be_had_is_said_in_one_line(modules, spec, text, said) -> None:
    (modules / "mine.py").write_text(text)
    with pytest.raises(ScoreError, match=f"the score {spec} cannot be loaded: .*{said}"):
        load_score(spec)


def test_what_a_function_raises_becomes_one_line() -> None:
    with pytest.raises(ScoreError, match="the score bad failed with KeyError: 'x'"):
        FunctionScore("bad", lambda *_: {}["x"])(PROMPTS, ANSWERS)


def test_the_line_of_the_users_code_that_failed_is_named(modules) -> None:
    (modules / "failing_score.py").write_text(
        "import json\n\ndef f(prompts, answers):\n    return [\n        json.loads(a) for a in answers\n    ]\n\n"
        "def g(prompts, answers):\n    yield 1.0\n    raise OSError('gone')\n"
    )
    with pytest.raises(
        ScoreError, match=r"the score failing_score:f failed with JSONDecodeError: .* \(failing_score.py:5\)"
    ):
        load_score("failing_score:f")(PROMPTS, ANSWERS)
    with pytest.raises(ScoreError, match=r"failed with OSError: gone \(failing_score.py:10\)"):
        load_score("failing_score:g")(PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["good", "bad"], "the score odd gave 'good', of type str, where an answer's number should be"),
        (["0.5", 1.0], "the score odd gave '0.5', of type str, where an answer's number should be"),
        ("12", "the score odd gave '12'; it must give a list with one number per answer"),
        ({0: 1.0, 1: 2.0}, "the score odd gave .*; it must give a list with one number per answer"),
        ({0.5, 1.0}, "the score odd gave .*; it must give a list with one number per answer"),
        ([1.0, None], "the score odd gave None, of type NoneType, where an answer's number should be"),
        ([[0.5], [0.5]], r"the score odd gave \[0.5\], of type list, where an answer's number should be"),
        ([10**400, 1], "the score odd gave 1000.*…, of type int, where an answer's number should be"),
        (0.5, "the score odd gave 0.5; it must give a list with one number per answer"),
        (None, "the score odd gave None; it must give a list with one number per answer"),
    ],
)
def test_what_is_no_number_is_named_and_did_not_fail(given, said) -> None:
    with pytest.raises(ScoreError, match=said) as caught:
        FunctionScore("odd", lambda *_: given)(PROMPTS, ANSWERS)
    assert "failed" not in str(caught.value)
    if isinstance(given, list):
        with pytest.raises(ScoreError, match=said):  # a score of another kind
            checked_values("odd", lambda *_: given, PROMPTS, ANSWERS)


def test_a_function_is_given_lists() -> None:
    def kinds(prompts, answers):
        return [isinstance(prompts, list), isinstance(answers, list)]

    assert FunctionScore("kinds", kinds)(tuple(PROMPTS), tuple(ANSWERS)) == [1.0, 1.0]


def test_templates_are_for_models() -> None:
    with pytest.raises(ScoreError, match="--score-template is for a model"):
        load_score("demo", template="{prompt} {answer}")


def test_the_demos_score_has_a_name() -> None:
    assert load_score("demo")(["How do I cook rice?"], [""]) == [-1.0]
