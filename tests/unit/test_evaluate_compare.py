"""Preference rates and intervals against numbers worked by hand, and what a bootstrap promises."""

from __future__ import annotations

import numpy as np
import pytest

from mara_deploy.evaluate.compare import Bootstrap, number_units, preference
from mara_deploy.evaluate.text_stats import text_stats

ALONE = np.arange(5)


def test_the_rate_by_hand():
    found = preference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 4.0, 3.0, 1.0], ALONE, Bootstrap())
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    assert found.rate == pytest.approx((3 - 1) / 5)
    assert (found.mean, found.baseline_mean) == (3.0, 2.0)


def test_of_a_cost_less_is_better():
    found = preference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 4.0, 3.0, 1.0], ALONE, Bootstrap(), sign=-0.5)
    assert (found.wins, found.ties, found.losses) == (1, 1, 3)
    assert (found.mean, found.baseline_mean) == (3.0, 2.0)  # as the score gives them


def test_a_tie_is_equal_to_the_last_bit():
    near = np.nextafter(1.0, 2.0)
    found = preference([1.0, near, 1.0, 0.1 + 0.2, 0.0], [1.0, 1.0, near, 0.3, -0.0], ALONE, Bootstrap())
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)


def test_two_units_by_hand():
    # Outcomes +1 and -1: a resample is both of one (a quarter each) or one of each (a half), so the mean is ±1 or 0.
    found = preference([1.0, 0.0], [0.0, 1.0], np.array([0, 1]), Bootstrap())
    assert found.interval == (-1.0, 1.0)
    assert Bootstrap(level=0.4).interval(np.array([1.0, -1.0]), np.array([0, 1])) == (0.0, 0.0)
    # Groups of different size, drawn whole: (+1 +1 +1 and -1) has the means 1, 0.5 and -1.
    assert Bootstrap(level=0.4).interval(np.array([1.0, 1.0, 1.0, -1.0]), np.array([0, 0, 0, 1])) == (0.5, 0.5)


def test_the_difference_has_an_interval_of_its_own():
    found = preference([3.0, 1.0], [0.0, 0.0], np.arange(2), Bootstrap())
    assert (found.interval, found.difference_interval) == ((1.0, 1.0), (1.0, 3.0))


def test_a_single_unit_has_no_interval():
    found = preference([1.0, 2.0], [0.0, 0.0], np.array([0, 0]), Bootstrap())
    assert (found.interval, found.difference_interval) == (None, None)


def test_the_same_seed_gives_the_same_interval_however_many_draws_are_made_at_a_time(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    units = np.arange(40)
    first = Bootstrap(resamples=500).interval(values, units)
    assert first == Bootstrap(resamples=500).interval(values, units)
    assert first != Bootstrap(resamples=500, seed=1).interval(values, units)
    monkeypatch.setattr("mara_deploy.evaluate.compare._DRAWS_AT_A_TIME", 41)
    assert first == pytest.approx(Bootstrap(resamples=500).interval(values, units))


def coverage(by_group: bool) -> float:
    """Share of 300 experiments whose interval holds the true rate, 0.2; prompts of a group share most of their luck."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(40), 6)
    held = 0
    for _ in range(300):
        luck = 0.9 * rng.normal(size=40)[units] + (1 - 0.9**2) ** 0.5 * rng.normal(size=240)
        outcome = np.where(luck < 0.2533471, 1.0, -1.0)  # the 60 % quantile: rate 0.6 - 0.4
        interval = Bootstrap(resamples=400).interval(outcome, units if by_group else np.arange(240))
        held += interval[0] <= 0.2 <= interval[1]
    return held / 300


def test_intervals_by_group_hold_the_truth_as_often_as_they_say_and_those_by_prompt_do_not():
    assert 0.90 <= coverage(by_group=True) <= 0.99
    assert coverage(by_group=False) < 0.75


def test_units_are_numbered_by_name():
    assert number_units(["a", "b", "a", None, "0", None]).tolist() == [0, 1, 0, 2, 3, 4]


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}, {"seed": -1}])
def test_a_bootstrap_out_of_range(options):
    with pytest.raises(ValueError, match="resamples ≥ 1"):
        Bootstrap(**options)


def test_as_many_scores_as_units():
    for ours, theirs, units in (([1.0], [1.0, 2.0], [0, 1]), ([], [], [])):
        with pytest.raises(ValueError, match="all must be equal"):
            preference(ours, theirs, np.array(units), Bootstrap())


# ── length and repetition ────────────────────────────────────────────────────────────────────────────────────────────


def test_text_stats_by_hand():
    texts = ["One two, one TWO. One two one two!", "One two.", "One two.", "?!"]
    found = text_stats(texts, [9, 3, 4, 2], ["stop", "length", "stop", "stop"])
    assert (found.tokens_mean, found.tokens_median, found.tokens_max) == (4.5, 3.5, 9)
    assert found.words_mean == 3.0
    assert (found.cut_off, found.empty, found.same_as_another) == (0.25, 0.25, 0.5)
    # Five 4-grams in the first answer, of which two are different; the others have none.
    assert found.repeated_4grams == pytest.approx(3 / 5)
    # Bigrams: seven in the first answer, "one two" or "two one", and one in each of the next two.
    assert found.distinct_2 == pytest.approx(2 / 9)


def test_text_stats_of_nothing_to_count():
    found = text_stats(["", "Yes."], [1, 2], ["stop", "stop"])
    assert (found.repeated_4grams, found.distinct_2) == (None, None)
    assert (found.words_mean, found.empty) == (0.5, 0.5)
