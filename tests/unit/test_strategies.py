"""Examination orders and selection strategies."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.config import ORDERS, STRATEGIES
from mara_runtime.strategies import choose, examination_order


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("order", "ranks"), [("ranked", [0, 1, 2, 3]), ("best_last", [1, 2, 3, 0]), ("reversed", [3, 2, 1, 0])]
)
def test_orders(order: str, ranks: list[int]) -> None:
    assert examination_order(order, 4) == ranks


@given(st.sampled_from(ORDERS), st.integers(1, 70))
def test_every_order_looks_at_every_candidate_once(order: str, count: int) -> None:
    assert sorted(examination_order(order, count)) == list(range(count))


def test_top1_takes_the_first_accepted() -> None:
    assert choose("top1", [-1, 0, 0.5, 3], 0.0, rng()) == 2


def test_max_prob_takes_the_largest_margin_and_the_earlier_of_equals() -> None:
    assert choose("max_prob", [-1, 0.5, 3, 1], 0.0, rng()) == 2
    assert choose("max_prob", [0.5, 2, 2], 0.0, rng()) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_margin_equal_to_the_threshold_rejects(strategy: str) -> None:
    assert choose(strategy, [0.0, -0.0], 0.0, rng()) is None
    assert choose(strategy, [0.25, 0.2500001], 0.25, rng()) == 1
    assert choose(strategy, [-0.5, -0.4], -0.5, rng()) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.integers(-4, 4), st.integers(0, 100))
def test_the_choice_is_accepted_and_there_is_one_when_any_is(
    strategy: str, margins: list[int], threshold: int, seed: int
) -> None:
    choice = choose(strategy, margins, threshold, rng(seed))
    if max(margins) <= threshold:
        assert choice is None
    else:
        assert choice is not None
        assert margins[choice] > threshold


def test_random_is_uniform_over_the_accepted() -> None:
    generator = rng(3)
    draws = 9000
    counts = Counter(choose("random", [1, -1, 5, 0, 2], 0.0, generator) for _ in range(draws))
    assert set(counts) == {0, 2, 4}
    assert sum((n - draws / 3) ** 2 / (draws / 3) for n in counts.values()) < 13.8  # chi-square, p = 0.001


def test_random_draws_once_a_decision_with_an_accepted_candidate_and_never_else() -> None:
    generator, twin = rng(7), rng(7)
    picks = [choose("random", margins, 0.0, generator) for margins in ([-1, -1], [1, 1, 1], [-2], [1, -1, 1, 1])]
    assert picks == [None, int(twin.integers(3)), None, [0, 2, 3][int(twin.integers(3))]]
    assert generator.integers(2**40) == twin.integers(2**40)


@pytest.mark.parametrize("strategy", ["top1", "max_prob"])
def test_the_other_strategies_leave_the_generator_alone(strategy: str) -> None:
    generator = rng(7)
    choose(strategy, [1, 1], 0.0, generator)
    assert generator.integers(2**40) == rng(7).integers(2**40)
