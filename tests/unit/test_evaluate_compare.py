"""Preference rates, intervals and text statistics against numbers worked by hand, and the coverage of intervals."""

from __future__ import annotations

import numpy as np
import pytest

from mara_deploy.evaluate.compare import Bootstrap, preference, unit_numbers
from mara_deploy.evaluate.text_stats import text_stats

ALONE = np.arange(5)


@pytest.mark.parametrize(("sign", "wins", "losses"), [(1.0, 3, 1), (-0.5, 1, 3)])
def test_the_rate_by_hand(sign, wins, losses):
    found = preference([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 2.0, 4.0, 3.0, 1.0], ALONE, Bootstrap(), sign=sign)
    assert (found.wins, found.ties, found.losses) == (wins, 1, losses)
    assert found.rate == pytest.approx((wins - losses) / 5)
    assert (found.mean, found.baseline_mean, found.units) == (3.0, 2.0, 5)  # whatever the sign
    near = np.nextafter(1.0, 2.0)  # a tie is exact
    found = preference([1.0, near, 1.0, 0.1 + 0.2, 0.0], [1.0, 1.0, near, 0.3, -0.0], ALONE, Bootstrap())
    assert (found.wins, found.ties, found.losses) == (2, 2, 1)


def test_two_units_by_hand():
    # Outcomes +1 and -1: a resample is both of one (a quarter each) or one of each (a half), so the mean is ±1 or 0.
    found = preference([1.0, 0.0], [0.0, 1.0], np.array([0, 1]), Bootstrap())
    assert found.interval == (-1.0, 1.0)
    assert Bootstrap(level=0.4).interval(np.array([1.0, -1.0]), np.array([0, 1])) == (0.0, 0.0)
    # Groups of different size, drawn whole: (+1 +1 +1 and -1) has the means 1, 0.5 and -1.
    assert Bootstrap(level=0.4).interval(np.array([1.0, 1.0, 1.0, -1.0]), np.array([0, 0, 0, 1])) == (0.5, 0.5)


def test_the_difference_has_an_interval_of_its_own_and_a_single_unit_has_none():
    found = preference([3.0, 1.0], [0.0, 0.0], np.arange(2), Bootstrap())
    assert (found.interval, found.difference_interval) == ((1.0, 1.0), (1.0, 3.0))
    found = preference([1.0, 2.0], [0.0, 0.0], np.array([0, 0]), Bootstrap())
    assert (found.interval, found.difference_interval) == (None, None)


def test_the_seed_decides_the_interval():
    values, units = np.random.default_rng(0).normal(size=40), np.arange(40)
    first = Bootstrap(resamples=500).interval(values, units)
    assert first == Bootstrap(resamples=500).interval(values, units)
    assert first != Bootstrap(resamples=500, seed=1).interval(values, units)


def test_many_units_are_resampled_in_blocks_with_the_same_result():
    """Of a million units, a few resamples at a time."""
    n, values = 1 << 20, np.arange(1 << 20) % 7.0
    drawn = np.random.default_rng(0).integers(n, size=(5, n))
    expected = np.quantile(values[drawn].mean(axis=1), [0.25, 0.75])
    assert Bootstrap(resamples=5, level=0.5).interval(values, np.arange(n)) == pytest.approx(tuple(expected))


def coverage(by_group: bool) -> float:
    """Share of 300 experiments whose interval contains the true rate, 0.2; outcomes within a group are correlated."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(40), 6)
    covered = 0
    for _ in range(300):
        luck = 0.9 * rng.normal(size=40)[units] + (1 - 0.9**2) ** 0.5 * rng.normal(size=240)
        outcome = np.where(luck < 0.2533471, 1.0, -1.0)  # the 60 % quantile: rate 0.6 - 0.4
        interval = Bootstrap(resamples=400).interval(outcome, units if by_group else np.arange(240))
        covered += interval[0] <= 0.2 <= interval[1]
    return covered / 300


def test_intervals_by_group_have_their_coverage_and_those_by_prompt_do_not():
    assert 0.90 <= coverage(by_group=True) <= 0.99
    assert coverage(by_group=False) < 0.75


def test_groups_are_numbered_by_name():
    assert unit_numbers(["a", "b", "a", None, "0", None]).tolist() == [0, 1, 0, 2, 3, 4]


def test_settings_out_of_range_and_scores_that_do_not_match_are_refused():
    for options in ({"resamples": 0}, {"level": 0.0}, {"level": 1.0}, {"seed": -1}):
        with pytest.raises(ValueError, match="resamples ≥ 1"):
            Bootstrap(**options)
    for ours, theirs, units in (([1.0], [1.0, 2.0], [0, 1]), ([], [], [])):
        with pytest.raises(ValueError, match="expected equal numbers"):
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

    found = text_stats(["", "Yes."], [1, 2], ["stop", "stop"])
    assert (found.repeated_4grams, found.distinct_2) == (None, None)
    assert (found.words_mean, found.empty) == (0.5, 0.5)
