"""Schedules: the costs that Adaptive weighs against brute force, and what Acceptance learns of made-up agents."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan
from mara_runtime.schedule.cost import WIDEST, Cost
from mara_runtime.schedule.drafts import Draft

Floats = NDArray[np.float64]


def candidates(count: int, margins: Sequence[float] = (), *, length: int = 0, **options: Any) -> PassContext:
    """The context of a position with so many equal candidates, some of them examined; 0: the token is chosen."""
    return PassContext(length, np.full(count, 1 / count) if count else np.empty(0), tuple(margins), **options)


def drafted(context: PassContext, *chances: float) -> PassContext:
    return replace(context, draft=Draft(tuple(range(len(chances))), tuple(chances)))


@pytest.mark.parametrize(
    ("schedule", "context", "plan"),
    [
        (Fixed(1), candidates(5), PassPlan(1, 0)),
        (Fixed(3), candidates(5, [-1.0] * 3), PassPlan(2, 0)),
        (Fixed(None), candidates(5), PassPlan(5, 0)),
        (Fixed(None), candidates(5, [-1.0]), PassPlan(4, 0)),
        (Fixed(1), drafted(candidates(5), 0.5, 0.5), PassPlan(1, 0)),
        (Fixed(1, 4), drafted(candidates(5), 0.5, 0.5), PassPlan(1, 2)),
        (Fixed(None, 1), drafted(candidates(5), 0.5, 0.5), PassPlan(5, 1)),
        (Fixed(2, 9), drafted(candidates(0), 0.5, 0.5), PassPlan(0, 2)),
    ],
    ids=str,
)
def test_fixed_takes_its_width_or_what_is_left(schedule, context, plan):
    assert schedule.plan(context) == plan


# ── what a pass costs ────────────────────────────────────────────────────────────────────────────────────────────────

MEASURED = Cost(
    contexts=(100, 300),
    widths=(1, 2, 4, 8),
    body_ms=((10.0, 11.0, 15.0, 31.0), (20.0, 22.0, 30.0, 62.0)),
    heads=(1, 2, 4),
    head_ms=(3.0, 4.0, 8.0),
)


def test_cost_is_exact_where_measured_interpolated_between_and_extrapolated_in_width():
    near = MEASURED.rows_ms(100)
    assert near[:11].tolist() == [0.0, 10.0, 11.0, 13.0, 15.0, 19.0, 23.0, 27.0, 31.0, 35.0, 39.0]
    assert near[WIDEST] == 31.0 + 4.0 * (WIDEST - 8)
    assert MEASURED.rows_ms(150)[[1, 4, 6]].tolist() == [12.5, 18.75, 28.75]
    assert MEASURED.heads_ms()[:7].tolist() == [0.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    for context, nearest in ((0, 100), (301, 300), (10**6, 300)):
        assert MEASURED.rows_ms(context).tolist() == MEASURED.rows_ms(nearest).tolist()
    one_width = Cost((1,), (1,), ((2.0,),), (1,), (0.5,))
    assert one_width.rows_ms(7)[[1, 2, 10]].tolist() == [2.0, 4.0, 20.0]


# ── the least expected cost ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Known(Acceptance):
    """An agent whose habits are known."""

    chances: Sequence[float]

    def estimate(self, probabilities: Floats, margins: Sequence[float], threshold: float = 0.0) -> list[float]:
        return list(self.chances[: len(probabilities)])


def cost_of_passes(
    chunks: Sequence[int],
    start: int,
    chances: Sequence[float],
    body: Floats,
    head: Floats,
    rerun: bool,
    guess: Sequence[float],
) -> float:
    """Expected cost of examining the candidates from `start` on in these chunks, with a draft under the very first.

    Each pass runs if those before it rejected everything. Its body is paid for every row, and the head for a row that
    continues: an accepted one, or in the last pass the fallback, which may have to run again there. Each drafted token
    takes a row of both, and each confirmed one saves a pass of one row.
    """
    total, reached, done = 0.0, 1.0, start
    for chunk in chunks:
        first, last = done == 0, done + chunk == len(chances)
        rejected = math.prod(1.0 - chance for chance in chances[done : done + chunk])
        again = 1 if last and not first and rerun else 0
        rows = chunk + again + (len(guess) if first else 0)
        paid = body[rows] + head[1] * (1.0 if last else 1.0 - rejected)
        if first and guess:
            saved = sum(math.prod(guess[: i + 1]) for i in range(len(guess)))
            paid = body[rows] + head[2 + len(guess)] - chances[0] * saved * (body[1] + head[1])
        total += reached * paid
        reached *= rejected
        done += chunk
    return total


def compositions(total: int) -> Iterator[list[int]]:
    """Every way to cut so many candidates into chunks."""
    if total == 0:
        yield []
    for size in range(1, total + 1):
        yield from ([size, *rest] for rest in compositions(total - size))


curves = st.lists(st.floats(0, 3), min_size=9, max_size=9).map(lambda steps: np.cumsum([0.2, *steps]).tolist())


@given(
    st.lists(st.floats(0.02, 0.98), min_size=2, max_size=6),
    curves,
    st.floats(0, 3),
    st.floats(0, 3),
    st.booleans(),
    st.lists(st.floats(0, 1), max_size=4),
    st.sampled_from([0, 0, 0, 1, 2, 5]),
    st.booleans(),
)
@example(
    [0.9, 0.5], list(np.linspace(1, 1.1, 10)), 1.0, 0.0, False, [0.9, 0.9], 0, False
)  # rows are free, so a draft pays
def test_the_plan_is_the_cheapest_of_all(chances, curve, head_first, head_more, rerun, guess, start, exhaustive):
    count = len(chances)
    start = min(start, count - 1)
    guess = [] if start else guess  # nothing is drafted under a later candidate
    cost = Cost((1,), (*range(1, 11),), (tuple(curve),), (1, 2), (head_first, head_first + head_more))
    context = candidates(count, [-1.0] * start, rerun_fallback=rerun, exhaustive=exhaustive)
    plan = Adaptive(cost, Known(chances)).plan(drafted(context, *guess))

    ends = [0.0] * count if exhaustive else chances  # where all are examined, no acceptance ends it
    body, head = cost.rows_ms(0), cost.heads_ms()
    costs: dict[PassPlan, float] = {}
    for chunks in compositions(count - start):
        for m in range(len(guess) + 1):
            candidate = PassPlan(chunks[0], m)
            expected = cost_of_passes(chunks, start, ends, body, head, rerun, guess[:m])
            costs[candidate] = min(expected, costs.get(candidate, math.inf))
    assert costs[plan] == pytest.approx(min(costs.values()), abs=1e-9)


@given(curves, st.floats(0, 3), st.floats(0, 1), st.lists(st.floats(0, 1), max_size=4))
def test_after_a_chosen_token_the_draft_is_the_one_that_saves_most(curve, head_first, head_more, guess):
    cost = Cost((1,), (*range(1, 11),), (tuple(curve),), (1, 2), (head_first, head_first + head_more))
    plan = Adaptive(cost).plan(drafted(candidates(0), *guess))
    body, head = cost.rows_ms(0), cost.heads_ms()

    def net(m: int) -> float:
        saved = sum(math.prod(guess[: i + 1]) for i in range(m)) * (body[1] + head[1])
        return float(body[1 + m] + head[1 + m] - saved)

    assert plan.candidates == 0
    assert net(plan.drafted) == pytest.approx(min(map(net, range(len(guess) + 1))), abs=1e-9)


def test_the_cost_is_that_of_the_context():
    cost = Cost((0, 1000), (1, 2), ((5.0, 10.0), (50.0, 50.0)), (1, 2), (0.0, 0.0))
    schedule = Adaptive(cost, Known([0.6] * 8))
    widths = [schedule.plan(candidates(8, length=length)).candidates for length in (0, 2000, 0)]
    assert widths == [1, 8, 1]


@given(st.integers(2, 200), st.integers(0, 199), st.integers(0, 16), st.booleans(), st.booleans())
def test_a_plan_is_always_possible(count, seen, guessed, rerun, exhaustive):
    seen = min(seen, count - 1)
    context = candidates(count, [-0.5] * seen, length=150, rerun_fallback=rerun, exhaustive=exhaustive)
    plan = Adaptive(MEASURED).plan(drafted(context, *[0.8] * (0 if seen else guessed)))
    assert 1 <= plan.candidates <= count - seen
    assert 0 <= plan.drafted <= (0 if seen else guessed)


def test_adaptive_learns_from_decisions():
    schedule = Adaptive(Cost((1,), (1, 2), ((5.0, 6.0),), (1, 2), (0.0, 0.0)), Acceptance())
    before = schedule.plan(candidates(8)).candidates
    for _ in range(50):
        schedule.update(np.full(8, 1 / 8), [-1.0] * 8, 0.0)
    assert before < schedule.plan(candidates(8)).candidates == 8


# ── how likely a candidate is accepted ───────────────────────────────────────────────────────────────────────────────

Rule = Callable[[Floats, np.random.Generator], Floats]


def logistic(x: Floats | float) -> Floats:
    result: Floats = 1 / (1 + np.exp(-np.asarray(x)))
    return result


def some_probabilities(rng: np.random.Generator) -> Floats:
    weights = np.sort(rng.exponential(size=rng.integers(2, 6)) ** 2)[::-1]
    result: Floats = weights / weights.sum()
    return result


def learned(rule: Rule, ask: Callable[[Acceptance], Floats], *, threshold: float = 0.0, scale: float = 1.0) -> Floats:
    """What is estimated on average, after some decisions, which end with the first accepted candidate."""
    rng, acceptance, answers = np.random.default_rng(1), Acceptance(), []
    for index in range(1200):
        probabilities = some_probabilities(rng)
        margins = rule(probabilities, rng) * scale
        accepted = np.flatnonzero(margins > 0)
        seen = margins[: accepted[0] + 1] if len(accepted) else margins
        acceptance.update(probabilities, (seen + threshold).tolist(), threshold)
        if index > 400 and index % 20 == 0:
            answers.append(ask(acceptance))
    result: Floats = np.mean(answers, axis=0)
    return result


def noise(rng: np.random.Generator, count: int) -> Floats:
    return rng.logistic(size=count)


def test_at_first_most_candidates_are_expected_to_be_accepted():
    assert min(Acceptance().estimate(np.array([0.5, 0.3, 0.2]), [])) > 0.5


@pytest.mark.parametrize(("slope", "offset", "scale"), [(2.0, 2.0, 0.01), (0.5, -1.0, 100.0)])
def test_it_learns_how_acceptance_depends_on_probability(slope, offset, scale):
    rng = np.random.default_rng(2)
    asked = [some_probabilities(rng) for _ in range(20)]
    truth = logistic(slope * np.log(np.concatenate(asked)) + offset)

    def rule(probabilities: Floats, rng: np.random.Generator) -> Floats:
        return slope * np.log(probabilities) + offset + noise(rng, len(probabilities))

    def answer(acceptance: Acceptance) -> Floats:
        estimate = np.concatenate([acceptance.estimate(probabilities, []) for probabilities in asked])
        return np.stack([estimate, np.abs(estimate - truth)])

    estimate, error = learned(rule, answer, scale=scale)
    assert np.abs(estimate - truth).mean() < 0.06
    assert np.abs(estimate - truth).max() < 0.25
    assert error.mean() < 0.12  # at any one time


def test_sixty_decisions_show_where_acceptance_turns():
    """An agent that rejects what is likelier than 0.3; it is asked about two close to that."""
    rng, acceptance = np.random.default_rng(3), Acceptance()
    for _ in range(60):
        likely = np.sort(rng.uniform(0.32, 0.4, rng.integers(0, 3)))[::-1]
        others = np.sort(rng.uniform(0.5, 1.0, 5))[::-1]
        probabilities = np.concatenate([likely, others * min((1 - likely.sum()) / others.sum(), 0.28 / others[0])])
        acceptance.update(probabilities, [-1.0] * len(likely) + [1.0], 0.0)
    assert acceptance.estimate(np.array([0.34, 0.26, 0.2, 0.2]), [])[0] < 0.2
    assert acceptance.estimate(np.array([0.26, 0.26, 0.25, 0.23]), [])[0] > 0.7


def test_it_learns_how_acceptance_depends_on_rank():
    estimate = learned(
        lambda p, rng: np.where(np.arange(len(p)) == 0, -2.2, 2.2) + noise(rng, len(p)),
        lambda acceptance: np.array(acceptance.estimate(np.array([0.5, 0.3, 0.2]), [])),
    )
    assert estimate == pytest.approx(logistic(np.array([-2.2, 2.2, 2.2])), abs=0.12)


def correlated(p: Floats, rng: np.random.Generator) -> Floats:
    """The first margin tells of the others."""
    first = rng.normal(0, 2)
    return np.array([first, *(first + 1.0 + 0.5 * noise(rng, len(p) - 1))])


@pytest.mark.parametrize(("threshold", "scale"), [(0.0, 100.0), (-5.0, 0.01)])
def test_it_learns_how_acceptance_depends_on_the_margins_before(threshold, scale):
    margins = np.array([-0.5, -1.0, -2.0, -3.0])

    def ask(acceptance: Acceptance) -> Floats:
        seen = [[threshold + scale * margin] for margin in margins.tolist()]
        return np.array([acceptance.estimate(np.array([0.5, 0.3, 0.2]), each, threshold)[1] for each in seen])

    estimate = learned(correlated, ask, threshold=threshold, scale=scale)
    assert (np.diff(estimate) < 0).all()
    assert estimate == pytest.approx(logistic((margins + 1.0) / 0.5), abs=0.12)


def test_it_follows_an_agent_that_changes():
    acceptance, probabilities, rng = Acceptance(), np.array([0.6, 0.4]), np.random.default_rng(0)
    for often, decisions in ((0.9, 2000), (0.1, 400)):
        for _ in range(decisions):
            acceptance.update(probabilities, [1.0] if rng.random() < often else [-1.0, -1.0], 0.0)
        assert acceptance.estimate(probabilities, [])[0] == pytest.approx(often, abs=0.2)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-1e6, 1e6, width=32), st.integers(1, 6)),
        max_size=20,
    ),
    st.floats(-1e3, 1e3),
)
def test_estimates_are_never_certain(decisions, threshold):
    acceptance = Acceptance()
    for probabilities, margin, count in decisions:
        margins = [margin * (i + 1) for i in range(min(count, len(probabilities)))]
        acceptance.update(np.array(probabilities), margins, threshold)
        estimate = acceptance.estimate(np.array(probabilities), margins)
        assert len(estimate) == len(probabilities)
        assert all(0.001 < chance < 0.999 for chance in estimate)
