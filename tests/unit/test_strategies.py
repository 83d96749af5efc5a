"""Examination orders and selection strategies."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.config import ORDERS, STRATEGIES
from mara_runtime.decision import choose, examination_order
from tests import reference


@pytest.mark.parametrize(
    ("order", "ranks"), [("ranked", [0, 1, 2, 3]), ("best_last", [1, 2, 3, 0]), ("reversed", [3, 2, 1, 0])]
)
def test_orders(order, ranks):
    assert examination_order(order, 4) == ranks
    assert set(ORDERS) == set(reference.ORDERS)


@pytest.mark.parametrize(
    ("strategy", "margins", "threshold", "index"),
    [
        ("top1", [-1, 0, 0.5, 3], 0.0, 2),
        ("max_prob", [-1, 0.5, 3, 1], 0.0, 2),
        ("max_prob", [0.5, 2, 2], 0.0, 1),  # the first examined of equals
        *((strategy, [0.0, -0.0], 0.0, None) for strategy in STRATEGIES),  # a margin must exceed the threshold
        *((strategy, [0.25, 0.2500001], 0.25, 1) for strategy in STRATEGIES),
    ],
)
def test_which_margin_is_chosen(strategy, margins, threshold, index):
    assert choose(strategy, margins, threshold, np.random.default_rng(0)) == index


@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.integers(-4, 4),
    st.integers(0, 100),
)
def test_the_choice_and_the_random_numbers_taken_are_the_reference_s(strategy, margins, threshold, seed):
    product, expected = np.random.default_rng(seed), np.random.default_rng(seed)
    by_index = dict(enumerate(map(float, margins)))
    assert choose(strategy, margins, threshold, product) == reference.pick(strategy, by_index, threshold, expected)
    assert product.integers(2**40) == expected.integers(2**40)


def test_random_is_uniform_over_the_accepted():
    generator, draws = np.random.default_rng(3), 3000
    counts = Counter(choose("random", [1, -1, 5, 0, 2], 0.0, generator) for _ in range(draws))
    assert set(counts) == {0, 2, 4}
    assert sum((n - draws / 3) ** 2 / (draws / 3) for n in counts.values()) < 13.8  # chi-square, p = 0.001
