"""Candidate selection against the reference, and the sampling of plain decoding."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mara_runtime.candidates import Candidates, sample, select
from tests import reference


def best(row: list[float], top_k: int, top_p: float, *, spare: int | None = None, seed: int = 0) -> Candidates:
    """`select`, given what an engine returns of a row: the best tokens, equal ones in any order.

    spare: how many tokens beyond top_k are returned; None: all there are.
    """
    logits = np.array(row, np.float32)
    count = len(row) if spare is None else min(len(row), top_k + spare)
    ids = np.lexsort((np.arange(len(row)), -logits))[:count]
    shuffled = np.random.default_rng(seed).permutation(count)
    ids = ids[shuffled][np.argsort(-logits[ids[shuffled]], kind="stable")]
    with np.errstate(over="ignore"):
        normaliser = math.log(math.fsum(math.exp(x - max(row)) for x in row)) + max(row)
    return select(ids, logits[ids], normaliser, top_k, top_p)


coarse = st.integers(-3, 3).map(lambda i: i / 2)  # ties
fine = st.floats(-30, 30, width=32)
masked = st.just(-math.inf)
rows = st.lists(st.one_of(coarse, coarse, fine, masked), min_size=1, max_size=24).filter(
    lambda row: max(row) > -math.inf
)
tops_p = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.95, 1.0]), st.floats(0, 1))


@given(rows, st.integers(1, 30), tops_p, st.sampled_from([None, 1, 8]), st.integers(0, 99))
def test_select_agrees_with_the_reference(row, top_k, top_p, spare, seed):
    expected = reference.candidates(row, top_k, top_p)
    assume(top_p == 1.0 or not 0.0 < expected.nucleus_gap < 1e-12)  # too near to say on which side it lies
    actual = best(row, top_k, top_p, spare=spare, seed=seed)
    assert actual.ids.tolist() == expected.ids
    assert actual.ids[0] == np.argmax(row)  # of equals the lowest id
    weights = [math.exp(row[i] - max(row)) for i in expected.ids]
    assert actual.probabilities == pytest.approx([w / math.fsum(weights) for w in weights], rel=1e-12, abs=1e-300)
    total = math.log(math.fsum(math.exp(x - max(row)) for x in row))
    assert actual.log_probabilities == pytest.approx([row[i] - max(row) - total for i in expected.ids], abs=1e-9)
    assert actual.gap <= expected.logit_gap
    assert (len(actual), actual.ids.dtype) == (len(expected.ids), np.int64)
    assert 0 <= sample(actual, 1.0, np.random.default_rng(seed)) < len(actual)


def test_the_engine_s_arrays_are_left_alone_and_may_be_overwritten():
    ids, logits = np.array([2, 0, 1]), np.array([3, 2, 1], np.float32)
    actual = select(ids, logits, 4.0, 2, 1.0)
    assert (ids.tolist(), logits.tolist()) == ([2, 0, 1], [3.0, 2.0, 1.0])
    ids[:], logits[:] = -1, np.nan
    assert (actual.ids.tolist(), actual.log_probabilities.tolist()) == ([2, 0], [-1.0, -2.0])


@pytest.mark.parametrize(
    ("row", "top_k", "top_p", "ids"),
    [
        ([0, 1, 2, 1, 1, 1], 3, 1.0, [2, 1, 3]),  # exactly top_k, also across a tie
        ([3e38, 3e38, -3e38], 3, 0.9, [0, 1]),
        ([1e-7, 2e-7, *[-1.0] * 1100], 2, 1.0, [1, 0]),  # subtracting the normaliser in float32 would make them equal
        ([1, 1, 1, 1], 4, 0.0, [0]),  # the best stays
        ([0, 0, 0, 0], 4, 0.75, [0, 1, 2]),  # a cumulative probability equal to 1 - top_p is dropped
        ([0, 0, 0, 0], 4, 0.75 + 1e-9, [0, 1, 2, 3]),
        ([0, 0, 0, 0], 3, 0.6, [0, 1]),  # renormalised over the top_k, a third each
        ([-3.0], 40, 0.95, [0]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_which_tokens_are_candidates(row, top_k, top_p, ids):
    assert best(row, top_k, top_p).ids.tolist() == ids


# ── the distance to another list ─────────────────────────────────────────────────────────────────────────────────────

LOGS = [math.log(0.5), math.log(0.3), math.log(0.2)]


@pytest.mark.parametrize(
    ("row", "top_k", "top_p", "gap"),
    [
        ([0.0, 3.0, 2.5], 3, 1.0, 0.5),  # inside the list
        ([0.0, 3.0, 2.75], 1, 1.0, 0.25),  # across its end
        ([0.0, 3.0, 2.0, -0.5, -0.625], 3, 1.0, 0.5),  # tokens below the end may swap
        ([5.0, -math.inf], 2, 1.0, math.inf),  # no noise brings a masked token back
        ([0.0] * 4, 4, 0.75, 0.0),
        (LOGS, 3, 0.75, math.log(4 / 3)),  # odds 1/4 against 1/3
        (LOGS, 3, 0.52, math.log(13 / 12)),  # odds 1 against 12/13
        ([math.log(0.98), math.log(0.02)], 2, 0.0, math.log(49)),  # the best stays whatever its sum
        ([0.0, -200.0], 2, 0.95, 200 - math.log(19)),  # a tail that is nearly nothing
    ],
    ids=str,
)
def test_the_gap_is_the_smallest_change_that_makes_another_list(row, top_k, top_p, gap):
    assert best(row, top_k, top_p).gap == pytest.approx(gap, abs=1e-6)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=10),
    st.integers(1, 10),
    st.sampled_from([0.3, 0.6, 0.9, 0.95, 1.0]),
    st.integers(0, 1000),
)
def test_noise_below_the_gap_leaves_the_list_as_it_is(row, top_k, top_p, seed):
    actual = best(row, top_k, top_p)
    # logits that move by d each move a difference of two, or the log-odds of a tail, by at most 2 d
    noise = np.random.default_rng(seed).uniform(-0.49, 0.49, len(row)) * actual.gap
    assume(actual.gap > 1e-4)
    if np.isfinite(noise).all():
        moved = (np.array(row) + noise).astype(np.float32)
        assert best(moved.tolist(), top_k, top_p).ids.tolist() == actual.ids.tolist()


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_probabilities(*probabilities: float) -> Candidates:
    return Candidates(np.arange(len(probabilities)), np.array(probabilities), np.log(probabilities), gap=0.0)


THREE = of_probabilities(0.6, 0.3, 0.1)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0.5, [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]),  # squared
        (1e6, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_sample_draws_from_the_tempered_distribution(temperature, expected):
    draws, rng = 4_000, np.random.default_rng(1)
    counts = Counter(sample(THREE, temperature, rng) for _ in range(draws))
    assert set(counts) <= {0, 1, 2}
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected))
    assert chi_square < 13.8  # two degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("temperature", [1e-2, 1e-8, 5e-324])
def test_a_tiny_temperature_is_greedy_and_leaves_a_tie_a_tie(temperature):
    rng = np.random.default_rng(0)
    assert {sample(THREE, temperature, rng) for _ in range(50)} == {0}
    assert {sample(of_probabilities(0.4, 0.4, 0.2), temperature, rng) for _ in range(100)} == {0, 1}
