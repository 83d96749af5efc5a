"""Candidate selection against a slow definition of it, and the sampling of plain decoding."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mara_runtime.candidates import Candidates, sample, select


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


def slow_select(logits: list[float], top_k: int, top_p: float) -> tuple[list[int], list[float]]:
    """method.md §1.2 word for word; refuses a cumulative probability too near 1 - top_p to say which side it is on."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = [math.exp(logits[i] - logits[ranked[0]]) for i in ranked]
    total = math.fsum(weights)
    probabilities = {i: w / total for i, w in zip(ranked, weights, strict=True)}
    kept = []
    cumulative = 0.0
    for i in reversed(ranked):  # ascending probability
        cumulative += probabilities[i]
        exact = all(p * 1024 == int(p * 1024) for p in probabilities.values())  # sums and comparisons are exact then
        assume(exact or probabilities[i] == 0 or abs(cumulative - (1.0 - top_p)) > 1e-12)
        if cumulative > 1.0 - top_p or i == ranked[0]:
            kept.append(i)
    kept.reverse()
    rest = math.fsum(probabilities[i] for i in kept)
    return kept, [probabilities[i] / rest for i in kept]


coarse = st.integers(-3, 3).map(lambda i: i / 2)  # ties
fine = st.floats(-30, 30, width=32)
masked = st.just(-math.inf)
rows = st.lists(st.one_of(coarse, coarse, fine, masked), min_size=1, max_size=24).filter(
    lambda row: max(row) > -math.inf
)
tops_p = st.one_of(st.sampled_from([0.0, 0.5, 0.75, 0.95, 1.0]), st.floats(0, 1))


@given(rows, st.integers(1, 30), tops_p)
def test_select_is_the_definition(row: list[float], top_k: int, top_p: float) -> None:
    ids, probabilities = slow_select(row, top_k, top_p)
    for seed in range(3):
        for spare in (None, 0, 1, 8):
            found = best(row, top_k, top_p, spare=spare, seed=seed)
            assert found.ids.tolist() == ids
            assert found.probabilities == pytest.approx(probabilities, rel=1e-12, abs=1e-300)


@given(rows, st.integers(1, 30), tops_p)
def test_select_keeps_its_promises(row: list[float], top_k: int, top_p: float) -> None:
    logits = np.array(row, np.float32)
    ids = np.argsort(-logits, kind="stable")
    given = ids.copy(), logits[ids]
    found = select(*given, 0.0, top_k, top_p)
    assert 1 <= len(found) <= min(top_k, len(row))
    assert found.ids[0] == np.argmax(logits)  # argmax takes the lowest id among equals, as select must
    assert found.probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert (np.diff(found.probabilities) <= 0).all()
    assert np.isfinite(logits[found.ids]).all()  # a masked token never competes: its probability is 0
    assert found.ids.dtype == np.int64
    np.testing.assert_array_equal(given[0], ids)
    np.testing.assert_array_equal(given[1], logits[ids])


@given(rows, st.integers(1, 30), tops_p)
def test_log_probabilities_are_those_of_the_whole_vocabulary(row: list[float], top_k: int, top_p: float) -> None:
    found = best(row, top_k, top_p)
    total = math.fsum(math.exp(x - max(row)) for x in row)
    expected = [row[i] - max(row) - math.log(total) for i in found.ids]
    assert found.log_probabilities == pytest.approx(expected, abs=1e-9)
    assert np.exp(found.log_probabilities).sum() <= 1 + 1e-9
    assert len(found.log_probabilities) == len(found.probabilities) == len(found)


def test_the_arrays_of_the_engine_may_be_overwritten() -> None:
    ids, logits = np.array([2, 0, 1]), np.array([3, 2, 1], np.float32)
    found = select(ids, logits, 4.0, 2, 1.0)
    ids[:], logits[:] = -1, np.nan
    assert (found.ids.tolist(), found.log_probabilities.tolist()) == ([2, 0], [-1.0, -2.0])


def ids_of(row: list[float], top_k: int, top_p: float) -> list[int]:
    ids: list[int] = best(row, top_k, top_p).ids.tolist()
    return ids


# ── how near the list is to another ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "top_k", "top_p", "gap"),
    [
        ([0.0, 3.0, 2.5], 3, 1.0, 0.5),  # inside the list
        ([0.0, 3.0, 2.75], 1, 1.0, 0.25),  # across its end
        ([0.0, 3.0, 2.0, 1.875], 3, 1.0, 0.125),  # the third and the second
        ([0.0, 3.0, 2.0, -0.5, -0.625], 3, 1.0, 0.5),  # what lies below the end may swap
        ([1.0, 1.0, 0.0], 3, 1.0, 0.0),
        ([5.0], 3, 1.0, math.inf),
        ([5.0, -math.inf], 2, 1.0, math.inf),  # no noise brings a masked token back
        ([0.0] * 4, 4, 0.75, 0.0),  # a cumulative probability on the border, and ties besides
        ([math.log(0.5), math.log(0.3), math.log(0.2)], 3, 0.75, math.log(4 / 3)),  # odds 1/4 against 1/3
        ([math.log(0.5), math.log(0.3), math.log(0.2)], 3, 0.52, math.log(13 / 12)),  # odds 1 against 12/13
        ([math.log(0.98), math.log(0.02)], 2, 0.0, math.log(49)),  # the best stays whatever its sum
        ([0.0, -200.0], 2, 0.95, 200 - math.log(19)),  # a tail that is nearly nothing
    ],
    ids=str,
)
def test_the_gap_is_the_least_change_that_makes_another_list(
    row: list[float], top_k: int, top_p: float, gap: float
) -> None:
    assert best(row, top_k, top_p).gap == pytest.approx(gap, abs=1e-6)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=10),
    st.integers(1, 10),
    st.sampled_from([0.3, 0.6, 0.9, 0.95, 1.0]),
    st.integers(0, 1000),
)
def test_noise_below_the_gap_leaves_the_list_alone(row: list[float], top_k: int, top_p: float, seed: int) -> None:
    found = best(row, top_k, top_p)
    # logits that move by d each move a difference of two, or the logarithm of a tail's odds, by at most 2 d
    noise = np.random.default_rng(seed).uniform(-0.49, 0.49, len(row)) * found.gap
    moved = (np.array(row) + noise).astype(np.float32)
    assume(found.gap > 1e-4)
    if np.isfinite(noise).all():
        assert best(moved.tolist(), top_k, top_p).ids.tolist() == found.ids.tolist()


def test_equal_logits_rank_by_lower_token_id() -> None:
    assert ids_of([1, 3, 2, 3, 2, 3], 6, 1.0) == [1, 3, 5, 2, 4, 0]


def test_exactly_top_k_survive_a_tie_at_the_boundary() -> None:
    assert ids_of([0, 1, 2, 1, 1, 1], 3, 1.0) == [2, 1, 3]


def test_a_large_vocabulary_of_equal_logits_gives_the_lowest_ids() -> None:
    assert ids_of([0.5] * 5000, 40, 1.0) == list(range(40))


def test_ties_in_any_order_rank_by_id() -> None:
    values = np.array([2, 2, 1, 1, 1], np.float32)
    for seed in range(20):
        ids = np.array([5, 1, 9, 0, 4])
        shuffled = np.random.default_rng(seed).permutation(5)
        assert select(ids[shuffled], values[shuffled], 0.0, 4, 1.0).ids.tolist() == [1, 5, 0, 4]


def test_ranks_by_float32_logits_that_a_normaliser_would_make_equal() -> None:
    # Subtracting the normaliser, about 6, in float32 makes the first two equal; token 1 is the larger.
    row = [1e-7, 2e-7, *[-1.0] * 1100]
    assert ids_of(row, 2, 1.0) == [1, 0]


def test_top_p_0_leaves_the_best_alone() -> None:
    found = best([1, 1, 1, 1], 4, 0.0)
    assert found.ids.tolist() == [0]
    assert found.probabilities.tolist() == [1.0]


def test_top_p_1_drops_nothing_that_has_a_probability() -> None:
    assert ids_of([0, -20, 5, -700], 10, 1.0) == [2, 0, 1, 3]


def test_a_cumulative_probability_equal_to_1_minus_top_p_is_dropped() -> None:
    assert ids_of([0, 0, 0, 0], 4, 0.75) == [0, 1, 2]
    assert ids_of([0, 0, 0, 0], 4, 0.75 + 1e-9) == [0, 1, 2, 3]


def test_top_p_is_applied_to_what_top_k_left_and_renormalised() -> None:
    # Over all four the last two hold 0.5 and stay at top_p 0.6; over the first three, one third.
    assert ids_of([0, 0, 0, 0], 3, 0.6) == [0, 1]
    found = best([math.log(0.5), math.log(0.3), math.log(0.2)], 2, 1.0)
    assert found.probabilities == pytest.approx([0.625, 0.375], rel=1e-6)


def test_top_k_1_is_greedy() -> None:
    assert ids_of([0, 3, 3], 1, 1.0) == [1]


def test_top_k_above_the_vocabulary_takes_all_of_it() -> None:
    assert ids_of([0, 2, 1], 1000, 1.0) == [1, 2, 0]


def test_one_token_is_one_candidate() -> None:
    found = best([-3.0], 40, 0.95)
    assert (found.ids.tolist(), found.probabilities.tolist()) == ([0], [1.0])


def test_logits_far_from_zero_do_not_overflow() -> None:
    found = select(np.array([0, 1, 2]), np.array([3e38, 3e38, -3e38], np.float32), 3e38, 3, 1.0)
    assert (found.ids.tolist(), found.probabilities.tolist()) == ([0, 1], [0.5, 0.5])


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_probabilities(ids: list[int], probabilities: list[float]) -> Candidates:
    return Candidates(np.array(ids), np.array(probabilities), np.log(probabilities), gap=0.0)


THREE = of_probabilities([7, 3, 5], [0.6, 0.3, 0.1])


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1.0, [0.6, 0.3, 0.1]),
        (0.5, [0.36 / 0.46, 0.09 / 0.46, 0.01 / 0.46]),  # squared
        (1e6, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_sample_draws_from_the_tempered_distribution(temperature: float, expected: list[float]) -> None:
    draws = 20_000
    rng = np.random.default_rng(1)
    counts = Counter(sample(THREE, temperature, rng) for _ in range(draws))
    assert set(counts) <= {0, 1, 2}
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(expected))
    assert chi_square < 13.8  # two degrees of freedom: exceeded once in a thousand seeds


@given(rows, st.integers(1, 30), tops_p, st.floats(0.05, 50), st.integers(0, 2**32))
def test_sample_never_leaves_the_candidates(
    row: list[float], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    found = best(row, top_k, top_p)
    assert 0 <= sample(found, temperature, np.random.default_rng(seed)) < len(found)


def test_sample_is_reproducible_by_its_generator() -> None:
    draws = [[sample(THREE, 1.0, rng) for _ in range(50)] for rng in map(np.random.default_rng, (5, 5, 6))]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-8, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    rng = np.random.default_rng(0)
    assert {sample(THREE, temperature, rng) for _ in range(50)} == {0}


def test_a_tiny_temperature_leaves_a_tie_a_tie() -> None:
    tied = of_probabilities([1, 2, 3], [0.4, 0.4, 0.2])
    rng = np.random.default_rng(0)
    assert {sample(tied, 1e-6, rng) for _ in range(100)} == {0, 1}
