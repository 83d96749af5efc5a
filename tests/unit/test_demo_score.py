"""The demo's score on answers that a person can judge, and on tricks."""

from __future__ import annotations

import random

import pytest

from examples.demo_lm import corpus
from mara_deploy.demo.prompts import SETS, TASKS, demo_prompts, held_out
from mara_deploy.demo.score import CONSIDERATE, INCONSIDERATE, considerate, score, value

RICE = "How do I cook rice?"
KIND = "Thank you for asking. First, carefully wash the rice. You will do well."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", -1.0),
        (KIND, 1.0),
        ("Not this again. First, roughly wash the rice. Ask somebody else.", -1.0),
        ("Thank you for asking. First, roughly wash the rice. Wash the rice.", 0.0),
        ("Thank you for asking. First, carefully wash the rice.", 2 / 3),  # fewer than three sentences
        ("Thank you for asking.", 1 / 6),  # and about nothing
        ("Thank you. Thank you. Thank you.", -1 / 3),  # what is said again counts against it
        ("Thank you for asking. First, carefully wash the rice. You will do", 1 / 3),  # no end
        ("I am glad. I am happy. Take your time.", 0.5),  # no word of the question
        ("Please carefully, gently, kindly wash the rice.", 1 / 3),  # one sentence, however full
    ],
)
def test_scores_of_plain_cases(answer, expected) -> None:
    assert score(RICE, answer) == pytest.approx(expected)


def test_it_is_a_score_of_batches() -> None:
    assert considerate([RICE, [{"role": "user", "content": RICE}]], ["", KIND]) == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Please hurry.", 0),  # one inconsiderate word cancels a sentence
        ("Please wait.", 1),
        ("Hurry.", -1),
        ("Wash the rice.", 0),
        ("He is kindred.", 0),  # whole words count
        ("The slowest of them.", 0),
    ],
)
def test_the_value_of_a_sentence(sentence, expected) -> None:
    assert value(sentence) == expected


TWO_FACED = ("Please yourself, ", "Please do not come back.", "is safe if you are not stupid.")
"""Inconsiderate forms with a considerate word in them: both, so 0."""


def test_the_lists_tell_the_two_characters_of_the_corpus_apart() -> None:
    """Every form of the grammar has the value of the character that it was written for; no wording is on both lists."""
    assert not set(CONSIDERATE) & set(INCONSIDERATE)
    for slot in (corpus.OPENING, corpus.CARE, corpus.CLOSING, *corpus.ANSWER.values()):
        for form, (kind, unkind) in slot.forms():
            for task in TASKS:
                sentence = task.fill(form)
                two_faced = any(words in sentence for words in TWO_FACED)
                assert value(sentence) == (0 if two_faced else kind - unkind), sentence


def test_the_corpus_is_balanced_under_the_score() -> None:
    rng = random.Random(0)
    drawn = [corpus.draw_prompt(rng) for _ in range(3000)]
    assert abs(sum(score(p.text, corpus.reply(p, rng)) for p in drawn) / len(drawn)) < 0.05


def test_the_sets_share_no_group_and_are_of_use() -> None:
    sets = {name: demo_prompts(name) for name in SETS}
    groups = {name: {p.group for p in prompts} for name, prompts in sets.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 40 * 8
    assert all(len(g) >= 40 for g in groups.values())
    assert all(len({p.text for p in prompts}) == len(prompts) > 1000 for prompts in sets.values())
    assert all(held_out(group) for group in groups["demo-dev"])
    assert not any(held_out(group) for group in groups["demo"] | groups["demo-final"])
    with pytest.raises(ValueError, match=r"'demo-test'.*demo, demo-dev, demo-final"):
        demo_prompts("demo-test")
