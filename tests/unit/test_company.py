"""What a row costs beside those of others."""

import random
from itertools import pairwise

import numpy as np
import pytest

from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import ALONE, Company, PassContext
from mara_runtime.schedule.cost import WIDEST, Cost, beside
from mara_runtime.schedule.drafts import Draft
from tests.unit.helpers import COST
from tests.unit.sessions import some_cost

CURVE = COST.rows_ms(40).tolist()
FREE = some_cost(4.0, 0.01, 0.1)
"""A row more costs next to nothing, as on a GPU."""
DEAR = some_cost(1.0, 0.9, 0.1)
"""Every row costs nearly as much as the first."""


def test_nobody_beside_is_as_alone() -> None:
    assert beside(CURVE, 0, 0) == pytest.approx(CURVE)
    for count in range(2, 20):
        context = PassContext(40, np.full(count, 1 / count), draft=Draft((1, 2, 3), (0.9, 0.5, 0.2)))
        assert context.company is ALONE
        company = PassContext(40, context.probabilities, draft=context.draft, company=Company())
        assert Adaptive(COST).plan(context) == Adaptive(COST).plan(company)


@pytest.mark.parametrize("rows", [1, 3, 8, 40, 63, 64, 500])
@pytest.mark.parametrize("cost", [COST, FREE, DEAR])
def test_a_price_grows_with_the_rows_and_falls_with_the_number_who_share(cost: Cost, rows: int) -> None:
    alone = cost.rows_ms(40).tolist()
    before = None
    for conversations in (1, 2, 7):
        prices = beside(alone, rows, conversations)
        assert len(prices) == WIDEST + 1
        assert prices[0] == 0.0
        assert all(0 <= low <= high + 1e-9 for low, high in pairwise(prices))
        assert all(now <= earlier + 1e-9 for now, earlier in zip(prices, before or prices, strict=True))
        before = prices


def test_shares_add_up_to_what_the_pass_costs() -> None:
    """On a curve that is straight from the others' rows on, which is where the tangent is exact."""
    straight = some_cost(2.0, 0.5, 0.0)
    alone = straight.rows_ms(1).tolist()
    for conversations, each in ((2, 3), (4, 2), (8, 5)):
        others = conversations - 1
        assert conversations * beside(alone, others * each, others)[each] == pytest.approx(alone[conversations * each])


def test_company_makes_passes_narrower_as_there_is_less_to_share() -> None:
    rng, narrower = random.Random(0), 0
    for _ in range(50):
        probabilities = np.sort(np.array([rng.random() + 0.01 for _ in range(rng.randint(2, 12))]))[::-1]
        probabilities /= probabilities.sum()
        for cost in (DEAR, FREE, COST):
            plans = [
                Adaptive(cost).plan(PassContext(40, probabilities, company=company)).candidates
                for company in (ALONE, Company(4, 2), Company(30, 7))
            ]
            assert all(1 <= plan <= len(probabilities) for plan in plans)
            if cost is not FREE:
                assert plans[0] >= plans[1] >= plans[2]
            narrower += plans[2] < plans[0]
    assert narrower > 20
