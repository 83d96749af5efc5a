"""Scores: functions by name, weighted sums, and one-line errors that name the score."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import count

import numpy as np
import pytest

from mara_deploy.scores.base import Combined, ScoreError, WeightedScore, checked_values
from mara_deploy.scores.function import FunctionScore
from mara_deploy.scores.load import load_score

PROMPTS, ANSWERS = ["a", "bb"], ["x", "xyz"]


def length(prompts, answers):
    return [len(answer) for answer in answers]


LENGTH = FunctionScore("length", length)


def test_a_weighted_sum_keeps_the_values_of_each_score() -> None:
    """A function gets lists."""
    both = FunctionScore("lists", lambda prompts, answers: [isinstance(part, list) for part in (prompts, answers)])
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


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (["good", "bad"], "'good' of type str"),
        (["0.5", 1.0], "'0.5' of type str"),
        ([1.0, None], "None of type NoneType"),
        ([[0.5], [0.5]], r"\[0.5\] of type list"),
        ([10**400, 1], "1000.*… of type int"),
        ([1.0], "1 numbers for 2 answers"),
        ([1.0] * 3, "more than 2 numbers for 2 answers"),
        (count(), "more than 2 numbers for 2 answers"),
        (np.array(1.0), r"array\(1.\); it must return a list"),
        ([np.array([0.5, 1.0])] * 2, "of type ndarray"),
        ([1j, 0], "1j of type complex"),
        ("12", "'12'; it must return a list"),
        ({0: 1.0, 1: 2.0}, "must return a list"),
        ({0.5, 1.0}, "must return a list"),
        (0.5, "0.5; it must return a list"),
        (None, "None; it must return a list"),
    ],
)
def test_anything_but_numbers_is_named(returned, named) -> None:
    with pytest.raises(ScoreError, match=f"the score odd returned .*{named}"):
        checked_values("odd", FunctionScore("odd", lambda *_: returned), PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    "returned",
    [
        (1, True),
        np.array([1.0, 1.0], np.float16),
        [np.float32(1), np.bool_(True)],
        (x for x in (1, 1)),
        [Fraction(1)] * 2,
    ],
)
def test_whatever_is_a_number_is_one(returned) -> None:
    assert checked_values("s", FunctionScore("s", lambda *_: returned), PROMPTS, ANSWERS) == [1.0, 1.0]


class Rude(Exception):
    """What another's class may do."""

    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


@pytest.mark.parametrize(
    ("error", "named", "transient"),
    [
        (SystemExit(0), "SystemExit: 0", False),
        (ConnectionResetError("peer\nis gone"), "ConnectionResetError: peer is gone", True),
        (FileNotFoundError("no file"), "FileNotFoundError: no file", False),
        (type("APITimeoutError", (Exception,), {})("slow"), "APITimeoutError: slow", True),
        (RuntimeError("x" * 10_000), "RuntimeError: xxx", False),
        (Rude(), "Rude", False),
    ],
)
def test_whatever_a_score_raises_is_one_line(error, named, transient) -> None:
    def judge(prompts, answers):
        raise error

    with pytest.raises(ScoreError, match=rf"^the score s failed with {named}.* \(.*test_scores\.py:\d+\)$") as caught:
        checked_values("s", judge, PROMPTS, ANSWERS)
    assert caught.value.transient == transient
    assert len(str(caught.value)) < 600


def test_values_that_cannot_be_shown_are_named_by_their_type() -> None:
    with pytest.raises(ScoreError, match="returned a Rude of type Rude"):
        checked_values("s", lambda *_: [Rude(), 1], PROMPTS, ANSWERS)


def test_columns_are_the_parameters_that_a_function_needs_besides() -> None:
    def judge(prompts, answers, reference, scale=2.0, *, topic, **others):
        return [scale * (answer == right) for answer, right in zip(answers, reference, strict=True)]

    score = FunctionScore("judge", judge)
    assert score.columns == ("reference", "topic")
    combined = Combined([WeightedScore(LENGTH), WeightedScore(score)])
    assert combined(PROMPTS, ANSWERS, reference=["x", ""], topic=["", ""]) == [1.0 + 2.0, 3.0]


@pytest.mark.parametrize("function", [lambda prompts: [], list, lambda prompts, *, answers: []])
def test_functions_that_do_not_take_prompts_and_answers_are_refused(function) -> None:
    with pytest.raises(ScoreError, match="the score odd cannot be called with prompts and answers: "):
        FunctionScore("odd", function)


def test_the_demos_score_takes_no_template() -> None:
    assert load_score("demo")(["How do I cook rice?"], [""]) == [-1.0]
    with pytest.raises(ScoreError, match="--score-template"):
        load_score("demo", template="{prompt} {answer}")
