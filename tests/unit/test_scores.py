"""Scores: functions by name, weighted sums, and one-line errors that name the score."""

from __future__ import annotations

import math
import sys

import pytest

from mara_deploy.scores.base import Combined, ScoreError, WeightedScore, checked_values
from mara_deploy.scores.load import FunctionScore, load_score
from mara_runtime.bundle import sha256

PROMPTS, ANSWERS = ["a", "bb"], ["x", "xyz"]


def length(prompts, answers):
    return [len(answer) for answer in answers]


LENGTH = FunctionScore("length", length)


def test_a_weighted_sum_keeps_the_values_of_each_score() -> None:
    """A function gets lists."""
    both = FunctionScore("lists", lambda *given: [isinstance(part, list) for part in given])
    assert both(tuple(PROMPTS), tuple(ANSWERS)) == [1.0, 1.0]
    of_prompt = FunctionScore("of the prompt", lambda prompts, _: [len(p) for p in prompts])
    combined = Combined([WeightedScore(of_prompt, 2.0), WeightedScore(LENGTH, -1.0)])
    values = combined.detail(PROMPTS, ANSWERS)
    assert values.each == {"of the prompt": [1.0, 2.0], "length": [1.0, 3.0]}
    assert values.combined == [2 * 1 - 1, 2 * 2 - 3] == combined(PROMPTS, ANSWERS)
    assert combined.name == "+2·of the prompt -1·length"
    assert combined.weights == (2.0, -1.0)
    assert Combined([WeightedScore(LENGTH)]).name == "length"


def test_values_that_are_not_finite_weights_out_of_range_and_no_score_are_refused() -> None:
    for value in (math.nan, math.inf, -math.inf):
        broken = FunctionScore("broken", lambda prompts, answers, value=value: [0.0, value])
        with pytest.raises(ScoreError, match=rf"broken is {value} .*'bb'"):
            Combined([WeightedScore(LENGTH), WeightedScore(broken)])(PROMPTS, ANSWERS)
    large = FunctionScore("large", lambda prompts, answers: [0.0, 1e308])
    with pytest.raises(ScoreError, match=r"combined score is inf .*'bb'"):
        Combined([WeightedScore(large, 10.0)])(PROMPTS, ANSWERS)
    for weight in (0.0, math.nan, math.inf):
        with pytest.raises(ScoreError, match="--weight of length is"):
            Combined([WeightedScore(LENGTH, weight)])
    with pytest.raises(ScoreError, match="at least one --score"):
        Combined([])


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A working directory for the user's modules, which are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_of_the_working_directory_and_its_fingerprint(modules) -> None:
    """The fingerprint is that of the code which was imported, whatever the file becomes."""
    file = modules / "scores_found_here.py"
    file.write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    score = load_score("scores_found_here:length")
    expected = sha256(file)[:16]
    del sys.modules["scores_found_here"]
    file.write_text("def length(prompts, answers): return [1.0]\n")
    assert (score.name, score.fingerprint) == ("scores_found_here:length", expected)
    assert list(score(PROMPTS, ANSWERS)) == [1.0, 3.0]


@pytest.mark.parametrize(
    ("spec", "text", "reason"),
    [
        ("nowhere_to_be_found:f", "", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("mine:other", "def f(): pass", "mine has no function 'other'"),
        ("mine:f", "f = 3.5", "'f' in mine is of type float"),
        ("mine:f", "\n1 / 0", r"ZeroDivisionError: division by zero \(mine\.py:2\)"),
        ("mine:f", "import nowhere_to_be_found", r"No module named 'nowhere_to_be_found' \(mine\.py:1\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_gives_the_reason(modules, spec, text, reason) -> None:
    (modules / "mine.py").write_text(text)
    with pytest.raises(ScoreError, match=f"the score {spec} cannot be loaded: .*{reason}"):
        load_score(spec)


def test_an_error_of_the_function_names_the_line_that_failed(modules) -> None:
    (modules / "failing_score.py").write_text(
        "import json\n\ndef f(prompts, answers):\n    return [\n        json.loads(a) for a in answers\n    ]\n\n"
        "def g(prompts, answers):\n    yield 1.0\n    raise OSError('gone')\n"
    )
    with pytest.raises(ScoreError, match=r"failing_score:f failed with JSONDecodeError: .* \(failing_score.py:5\)"):
        load_score("failing_score:f")(PROMPTS, ANSWERS)
    with pytest.raises(ScoreError, match=r"failed with OSError: gone \(failing_score.py:10\)"):
        load_score("failing_score:g")(PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (["good", "bad"], "'good' of type str"),
        (["0.5", 1.0], "'0.5' of type str"),
        ([1.0, None], "None of type NoneType"),
        ([[0.5], [0.5]], r"\[0.5\] of type list"),
        ([10**400, 1], "1000.*… of type int"),
        ([1.0], "1 numbers for 2 answers"),
        ("12", "'12'; it must return a list"),
        ({0: 1.0, 1: 2.0}, "must return a list"),
        ({0.5, 1.0}, "must return a list"),
        (0.5, "0.5; it must return a list"),
        (None, "None; it must return a list"),
    ],
)
def test_anything_but_numbers_is_named(returned, named) -> None:
    kinds = [FunctionScore("odd", lambda *_: returned), *[lambda *_: returned] * isinstance(returned, list)]
    for score in kinds:  # a function, and a score of another kind
        with pytest.raises(ScoreError, match=f"the score odd returned .*{named}"):
            checked_values("odd", score, PROMPTS, ANSWERS)


def test_the_demos_score_takes_no_template() -> None:
    assert load_score("demo")(["How do I cook rice?"], [""]) == [-1.0]
    with pytest.raises(ScoreError, match="--score-template"):
        load_score("demo", template="{prompt} {answer}")
