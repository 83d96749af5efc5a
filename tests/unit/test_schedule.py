"""Schedules: the costs that Adaptive weighs against brute force, and what Acceptance learns against rules made up."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime.schedule.acceptance import Acceptance, _solution
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan
from mara_runtime.schedule.cost import WIDEST, Cost
from mara_runtime.schedule.drafts import NO_DRAFT, Draft

Floats = NDArray[np.float64]


def candidates(count: int, margins: Sequence[float] = (), *, length: int = 0, **options: Any) -> PassContext:
    """A view of a position with so many equal candidates, some of them examined."""
    return PassContext(length, np.full(count, 1 / count) if count else np.empty(0), tuple(margins), **options)


def drafted(view: PassContext, *chances: float) -> PassContext:
    return replace(view, draft=Draft(tuple(range(len(chances))), tuple(chances)))


# ── fixed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schedule", "view", "plan"),
    [
        (Fixed(1), candidates(5), PassPlan(1, 0)),
        (Fixed(1), candidates(5, [-1.0] * 4), PassPlan(1, 0)),
        (Fixed(3), candidates(5), PassPlan(3, 0)),
        (Fixed(3), candidates(5, [-1.0] * 3), PassPlan(2, 0)),
        (Fixed(None), candidates(5), PassPlan(5, 0)),
        (Fixed(None), candidates(5, [-1.0]), PassPlan(4, 0)),
        (Fixed(None), candidates(0), PassPlan(0, 0)),
        (Fixed(1), candidates(0), PassPlan(0, 0)),
        (Fixed(1), drafted(candidates(5), 0.5, 0.5), PassPlan(1, 0)),
        (Fixed(1, 4), drafted(candidates(5), 0.5, 0.5), PassPlan(1, 2)),
        (Fixed(None, 1), drafted(candidates(5), 0.5, 0.5), PassPlan(5, 1)),
        (Fixed(2, 9), drafted(candidates(0), 0.5, 0.5), PassPlan(0, 2)),
    ],
    ids=str,
)
def test_fixed_takes_its_width_or_what_is_left(schedule: Fixed, view: PassContext, plan: PassPlan) -> None:
    assert schedule.plan(view) == plan


# ── what a pass costs ────────────────────────────────────────────────────────────────────────────────────────────────

MEASURED = Cost(
    contexts=(100, 300),
    widths=(1, 2, 4, 8),
    body_ms=((10.0, 11.0, 15.0, 31.0), (20.0, 22.0, 30.0, 62.0)),
    heads=(1, 2, 4),
    head_ms=(3.0, 4.0, 8.0),
)


def test_cost_is_exact_where_it_was_measured() -> None:
    assert MEASURED.rows_ms(100)[[1, 2, 4, 8]].tolist() == [10.0, 11.0, 15.0, 31.0]
    assert MEASURED.rows_ms(300)[[1, 2, 4, 8]].tolist() == [20.0, 22.0, 30.0, 62.0]
    assert MEASURED.heads_ms()[[1, 2, 4]].tolist() == [3.0, 4.0, 8.0]


def test_cost_is_interpolated_in_between() -> None:
    assert MEASURED.rows_ms(100)[[3, 5, 6, 7]].tolist() == [13.0, 19.0, 23.0, 27.0]
    assert MEASURED.rows_ms(150)[[1, 4, 6]].tolist() == [12.5, 18.75, 28.75]
    assert MEASURED.heads_ms()[3] == 6.0


def test_cost_goes_on_with_its_last_slope() -> None:
    rows = MEASURED.rows_ms(100)
    assert rows[[9, 10, WIDEST]].tolist() == [35.0, 39.0, 31.0 + 4.0 * (WIDEST - 8)]
    assert MEASURED.heads_ms()[6] == 12.0


def test_beyond_the_contexts_that_were_measured_it_costs_what_it_costs_at_the_last() -> None:
    for context, nearest in ((0, 100), (99, 100), (301, 300), (10**6, 300)):
        assert MEASURED.rows_ms(context).tolist() == MEASURED.rows_ms(nearest).tolist()


def test_no_rows_cost_nothing() -> None:
    assert MEASURED.rows_ms(200)[0] == MEASURED.heads_ms()[0] == 0.0
    assert len(MEASURED.rows_ms(200)) == len(MEASURED.heads_ms()) == WIDEST + 1


def test_a_measurement_of_one_width_is_taken_as_a_price_a_row() -> None:
    cost = Cost((1,), (1,), ((2.0,),), (1,), (0.5,))
    assert cost.rows_ms(7)[[1, 2, 10]].tolist() == [2.0, 4.0, 20.0]
    assert cost.heads_ms()[[1, 4]].tolist() == [0.5, 2.0]


@given(
    st.lists(st.floats(0, 100), min_size=4, max_size=4),
    st.lists(st.floats(0, 100), min_size=4, max_size=4),
    st.lists(st.floats(0, 100), min_size=3, max_size=3),
    st.integers(0, 500),
)
def test_cost_never_falls_with_more_rows_whatever_was_measured(
    near: list[float], far: list[float], head: list[float], context: int
) -> None:
    cost = Cost((100, 300), (1, 2, 4, 8), (tuple(near), tuple(far)), (1, 2, 4), tuple(head))
    rows, heads = cost.rows_ms(context), cost.heads_ms()
    assert (np.diff(rows) >= -1e-9).all()
    assert (np.diff(heads) >= -1e-9).all()
    assert np.isfinite(rows).all()
    assert rows[1] >= min(near[0], far[0]) - 1e-9


# ── the least expected cost ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Told(Acceptance):
    """An agent whose habits are known."""

    chances: Sequence[float]

    def estimate(self, probabilities: Floats, margins: Sequence[float], threshold: float = 0.0) -> list[float]:
        return list(self.chances[: len(probabilities)])

    def learn(self, probabilities: Floats, margins: Sequence[float], threshold: float) -> None:
        """Nothing."""


def test_a_good_draft_does_not_hide_a_wider_pass() -> None:
    cost = Cost((1,), (*range(1, 11),), (tuple(10 + 0.1 * rows for rows in range(10)),), (1, 2), (0.0, 0.0))
    assert Adaptive(cost, Told([0.5] * 4)).plan(drafted(candidates(4), *[1.0] * 6)).candidates == 4


def cost_of_passes(
    chunks: Sequence[int],
    start: int,
    chances: Sequence[float],
    body: Floats,
    head: Floats,
    refeed: bool,
    guess: Sequence[float],
) -> float:
    """Expected cost of examining the candidates from `start` on in these chunks, a guess under the very first.

    Every pass runs if all before it were rejected. Its body is paid for every row, and the head where a row goes on:
    an accepted one, or in the last pass the fallback, which may have to run again there. A guess takes a row of both
    for every token, and the row that goes on besides; a token that it confirms saves a pass of one row.
    """
    total, reached, done = 0.0, 1.0, start
    for chunk in chunks:
        first, last = done == 0, done + chunk == len(chances)
        rejected = math.prod(1.0 - chance for chance in chances[done : done + chunk])
        again = 1 if last and not first and refeed else 0
        rows = chunk + again + (len(guess) if first else 0)
        pays = body[rows] + head[1] * (1.0 if last else 1.0 - rejected)
        if first and guess:
            pays = body[rows] + head[2 + len(guess)]
            saved = sum(math.prod(guess[: i + 1]) for i in range(len(guess)))
            pays -= chances[0] * saved * (body[1] + head[1])
        total += reached * pays
        reached *= rejected
        done += chunk
    return total


def compositions(total: int, sizes: Sequence[int]) -> Iterator[list[int]]:
    """Every way to cut so many candidates into chunks: of the sizes given, or all that are left."""
    if total == 0:
        yield []
    for size in range(1, total + 1):
        if size == total or size in sizes:
            yield from ([size, *rest] for rest in compositions(total - size, sizes))


chances_of = st.lists(st.floats(0.02, 0.98), min_size=2, max_size=7)
curves = st.lists(st.floats(0, 3), min_size=9, max_size=9).map(lambda steps: np.cumsum([0.2, *steps]).tolist())


@settings(max_examples=300)
@given(
    chances_of,
    curves,
    st.floats(0, 3),
    st.floats(0, 3),
    st.booleans(),
    st.lists(st.floats(0, 1), max_size=6),
    st.sampled_from([0, 0, 0, 1, 2, 5]),
    st.booleans(),
)
def test_the_plan_is_the_least_of_all_there_are(
    chances: list[float],
    curve: list[float],
    head_first: float,
    head_more: float,
    refeed: bool,
    guess: list[float],
    start: int,
    exhaustive: bool,
) -> None:
    count = len(chances)
    start = min(start, count - 1)
    widths = (*range(1, 11),)
    cost = Cost((1,), widths, (tuple(curve),), (1, 2), (head_first, head_first + head_more))
    schedule = Adaptive(cost, Told(chances))
    view = candidates(count, [-1.0] * start, refeed=refeed, exhaustive=exhaustive)
    plan = schedule.plan(drafted(view, *guess))

    ends = [0.0] * count if exhaustive else chances  # where all are examined, no acceptance ends it
    body, head = cost.rows_ms(0), cost.heads_ms()
    lengths = [m for m in schedule._DRAFTS if m <= len(guess) and (not m or not start)]  # no guess under a later one
    costs: dict[PassPlan, float] = {}
    for chunks in compositions(count - start, schedule._CHUNKS):
        for m in lengths:
            here = PassPlan(chunks[0], m)
            found = cost_of_passes(chunks, start, ends, body, head, refeed, guess[:m])
            costs[here] = min(found, costs.get(here, math.inf))
    assert plan in costs
    assert costs[plan] == pytest.approx(min(costs.values()), abs=1e-9)


@given(curves, st.floats(0, 3), st.floats(0, 1), st.lists(st.floats(0, 1), max_size=8))
def test_behind_a_settled_token_the_draft_is_the_one_that_pays_most(
    curve: list[float], head_first: float, head_more: float, guess: list[float]
) -> None:
    cost = Cost((1,), (*range(1, 11),), (tuple(curve),), (1, 2), (head_first, head_first + head_more))
    schedule = Adaptive(cost)
    plan = schedule.plan(drafted(candidates(0), *guess))
    body, head = cost.rows_ms(0), cost.heads_ms()

    def pays(m: int) -> float:
        saved = sum(math.prod(guess[: i + 1]) for i in range(m)) * (body[1] + head[1])
        return float(body[1 + m] + head[1 + m] - saved)

    lengths = [m for m in schedule._DRAFTS if m <= len(guess)]
    assert plan.candidates == 0
    assert plan.drafted in lengths
    assert pays(plan.drafted) == pytest.approx(min(map(pays, lengths)), abs=1e-9)


def priced(first: float, more: float, head: float = 0.0, head_more: float = 0.0) -> Cost:
    """The first row, every row more, and the same of the head."""
    return Cost((1,), (1, 2), ((first, first + more),), (1, 2), (head, head + head_more))


@pytest.mark.parametrize("chance", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("count", [2, 3, 7, 13, 40, 64, 100])
def test_where_width_is_free_all_candidates_share_a_pass(chance: float, count: int) -> None:
    plan = Adaptive(priced(5.0, 0.0), Told([chance] * count)).plan(candidates(count))
    assert plan.drafted == 0
    assert plan.candidates == count or (1 - chance) ** plan.candidates < 1e-15  # a second pass is beyond all numbers


@pytest.mark.parametrize("count", [2, 3, 7, 13, 40, 100])
def test_where_every_row_costs_the_same_a_likely_candidate_goes_alone(count: int) -> None:
    plan = Adaptive(priced(5.0, 5.0, head=1.0), Told([0.95] * count)).plan(candidates(count))
    assert plan == PassPlan(1, 0)


def test_the_less_likely_the_first_the_more_go_with_it() -> None:
    sizes = [
        Adaptive(priced(5.0, 1.0), Told([chance] * 20)).plan(candidates(20)).candidates
        for chance in (0.98, 0.8, 0.6, 0.4, 0.2, 0.02)
    ]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 20)


def test_a_first_pass_ends_where_acceptance_becomes_likely() -> None:
    # The first three are hopeless, the fourth is certain: three more rows are cheaper than a pass more.
    plan = Adaptive(priced(5.0, 1.0), Told([0.02, 0.02, 0.02, 0.98, 0.02, 0.02])).plan(candidates(6))
    assert plan == PassPlan(4, 0)


def test_after_rejections_the_next_pass_is_planned_for_what_is_left() -> None:
    schedule = Adaptive(priced(5.0, 0.5), Told([0.98, 0.02, 0.02, 0.02]))
    assert schedule.plan(candidates(4)) == PassPlan(1, 0)
    assert schedule.plan(candidates(4, [-1.0])) == PassPlan(3, 0)


def test_who_examines_all_anyway_takes_them_together() -> None:
    cost = priced(5.0, 1.0, head=1.0)
    assert Adaptive(cost, Told([0.98] * 5)).plan(candidates(5)) == PassPlan(1, 0)
    assert Adaptive(cost, Told([0.98] * 5)).plan(candidates(5, exhaustive=True)) == PassPlan(5, 0)


def test_a_fallback_that_must_run_again_speaks_for_one_pass() -> None:
    # Two passes: 1 + 0.55 × 1; with the fallback once more 1 + 0.55 × 2. One pass: 2 × 0.9.
    cost, told = Cost((1,), (1, 2), ((1.0, 1.8),), (1, 2), (0.0, 0.0)), Told([0.45, 0.45])
    assert Adaptive(cost, told).plan(candidates(2)) == PassPlan(1, 0)
    assert Adaptive(cost, told).plan(candidates(2, refeed=True)) == PassPlan(2, 0)


# ── whether to draft ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draft_that_is_sure_and_free_is_taken_whole() -> None:
    schedule = Adaptive(priced(5.0, 0.0), Told([0.98] * 4))
    assert schedule.plan(drafted(candidates(4), *[1.0] * 16)).drafted == 16
    assert schedule.plan(drafted(candidates(0), *[1.0] * 16)) == PassPlan(0, 16)


@pytest.mark.parametrize("count", [0, 4])
def test_a_draft_that_is_unlikely_is_left_out(count: int) -> None:
    schedule = Adaptive(priced(5.0, 0.5), Told([0.9] * 4))
    assert schedule.plan(drafted(candidates(count), *[0.02] * 16)).drafted == 0


@pytest.mark.parametrize("count", [0, 4])
def test_where_every_row_costs_the_same_nothing_is_drafted(count: int) -> None:
    # A guess that may fail costs what it saves.
    schedule = Adaptive(priced(5.0, 5.0, 1.0, 1.0), Told([0.98] * 4))
    assert schedule.plan(drafted(candidates(count), *[0.99] * 16)).drafted == 0


@pytest.mark.parametrize("count", [0, 4])
def test_a_draft_is_cut_where_it_stops_paying(count: int) -> None:
    schedule = Adaptive(priced(5.0, 1.0), Told([0.98] * 4))
    assert schedule.plan(drafted(candidates(count), 0.9, 0.9, 0.9, 0.05, 0.9, 0.9)).drafted == 3


def test_a_draft_under_a_candidate_that_is_rejected_is_worth_nothing() -> None:
    likely, unlikely = ([chance] * 4 for chance in (0.98, 0.05))
    view = drafted(candidates(4), 0.9, 0.9)
    assert Adaptive(priced(5.0, 1.0), Told(likely)).plan(view).drafted == 2
    assert Adaptive(priced(5.0, 1.0), Told(unlikely)).plan(view).drafted == 0


def test_the_head_is_paid_for_every_drafted_token_and_the_one_before() -> None:
    # Under a candidate two rows of the head for the first guess, where without one there is one.
    cost = Cost((1,), (1, 2), ((5.0, 5.0),), (1, 2, 3), (0.0, 0.0, 9.0))
    assert Adaptive(cost, Told([0.98] * 4)).plan(drafted(candidates(4), 0.9)).drafted == 0
    assert Adaptive(cost).plan(drafted(candidates(0), 0.9)).drafted == 1
    view = drafted(candidates(0), *[0.9] * 4)
    assert Adaptive(priced(5.0, 0.5, head=1.0, head_more=0.0)).plan(view).drafted == 4
    assert Adaptive(priced(5.0, 0.5, head=1.0, head_more=9.0)).plan(view).drafted == 0


def test_nothing_is_drafted_beside_a_later_candidate() -> None:
    schedule = Adaptive(priced(5.0, 0.0), Told([0.98] * 4))
    assert schedule.plan(drafted(candidates(4, [-1.0]), *[1.0] * 16)).drafted == 0


def test_with_nothing_to_guess_nothing_is_drafted() -> None:
    schedule = Adaptive(priced(5.0, 0.0))
    assert schedule.plan(PassContext(3, np.empty(0), draft=NO_DRAFT)) == PassPlan(0, 0)


def test_the_cost_is_that_of_the_context() -> None:
    # Near the start a row more is dear, far from it free.
    cost = Cost((0, 1000), (1, 2), ((5.0, 10.0), (50.0, 50.0)), (1, 2), (0.0, 0.0))
    schedule = Adaptive(cost, Told([0.6] * 8))
    assert schedule.plan(candidates(8, length=0)) == PassPlan(1, 0)
    assert schedule.plan(candidates(8, length=2000)) == PassPlan(8, 0)
    assert schedule.plan(candidates(8, length=0)) == PassPlan(1, 0)


@given(st.integers(2, 200), st.integers(0, 199), st.integers(0, 16), st.booleans(), st.booleans())
def test_a_plan_is_always_possible(count: int, seen: int, guessed: int, refeed: bool, exhaustive: bool) -> None:
    seen = min(seen, count - 1)
    schedule = Adaptive(MEASURED)
    view = candidates(count, [-0.5] * seen, length=150, refeed=refeed, exhaustive=exhaustive)
    plan = schedule.plan(drafted(view, *[0.8] * (0 if seen else guessed)))
    assert 1 <= plan.candidates <= count - seen
    assert 0 <= plan.drafted <= (0 if seen else guessed)


def test_adaptive_learns_what_it_is_taught() -> None:
    acceptance = Acceptance()
    schedule = Adaptive(priced(5.0, 1.0), acceptance)
    before = schedule.plan(candidates(8)).candidates
    for _ in range(50):
        schedule.learn(np.full(8, 1 / 8), [-1.0] * 8, 0.0)
    assert before < schedule.plan(candidates(8)).candidates == 8
    assert max(acceptance.estimate(np.full(8, 1 / 8), [])) < 0.2


# ── how likely a candidate is accepted ───────────────────────────────────────────────────────────────────────────────

Rule = Callable[[Floats, np.random.Generator], Floats]


def logistic(x: Floats | float) -> Floats:
    result: Floats = 1 / (1 + np.exp(-np.asarray(x)))
    return result


def some_probabilities(rng: np.random.Generator) -> Floats:
    weights = np.sort(rng.exponential(size=rng.integers(2, 6)) ** 2)[::-1]
    result: Floats = weights / weights.sum()
    return result


def taught(
    rule: Rule,
    ask: Callable[[Acceptance], Floats],
    *,
    threshold: float = 0.0,
    scale: float = 1.0,
    decisions: int = 1500,
) -> Floats:
    """What is answered on an average, once there was time to learn of decisions.

    They end with the first accepted candidate, as those of top1 do; each moves what was learned, so one answer alone
    says little.
    """
    rng = np.random.default_rng(1)
    acceptance = Acceptance()
    answers = []
    for index in range(decisions):
        probabilities = some_probabilities(rng)
        margins = rule(probabilities, rng) * scale
        accepted = np.flatnonzero(margins > 0)
        seen = margins[: accepted[0] + 1] if len(accepted) else margins
        acceptance.learn(probabilities, (seen + threshold).tolist(), threshold)
        if index > decisions // 3 and index % 20 == 0:
            answers.append(ask(acceptance))
    result: Floats = np.mean(answers, axis=0)
    return result


def noise(rng: np.random.Generator, count: int) -> Floats:
    return rng.logistic(size=count)


def test_at_first_most_are_expected_to_be_accepted() -> None:
    assert min(Acceptance().estimate(np.array([0.5, 0.3, 0.2]), [])) > 0.5


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
@pytest.mark.parametrize(("slope", "offset"), [(1.0, 1.0), (2.0, 2.0), (0.5, -1.0), (0.0, 0.0)])
def test_it_learns_how_acceptance_depends_on_probability(slope: float, offset: float, scale: float) -> None:
    rng = np.random.default_rng(2)
    asked = [some_probabilities(rng) for _ in range(20)]
    truth = logistic(slope * np.log(np.concatenate(asked)) + offset)

    def rule(probabilities: Floats, rng: np.random.Generator) -> Floats:
        return slope * np.log(probabilities) + offset + noise(rng, len(probabilities))

    def answer(acceptance: Acceptance) -> Floats:
        return np.concatenate([acceptance.estimate(probabilities, []) for probabilities in asked])

    found = taught(rule, answer, scale=scale)
    assert np.abs(found - truth).mean() < 0.06
    assert np.abs(found - truth).max() < 0.25
    assert taught(rule, lambda acceptance: np.abs(answer(acceptance) - truth)).mean() < 0.12  # at any one time


def test_sixty_decisions_teach_it_where_acceptance_turns() -> None:
    """An agent that rejects what is likelier than 0.3; it is asked about two close to that."""
    rng, acceptance = np.random.default_rng(3), Acceptance()
    for _ in range(60):
        likely = np.sort(rng.uniform(0.32, 0.4, rng.integers(0, 3)))[::-1]
        others = np.sort(rng.uniform(0.5, 1.0, 5))[::-1]
        probabilities = np.concatenate([likely, others * min((1 - likely.sum()) / others.sum(), 0.28 / others[0])])
        acceptance.learn(probabilities, [-1.0] * len(likely) + [1.0], 0.0)
    assert acceptance.estimate(np.array([0.34, 0.26, 0.2, 0.2]), [])[0] < 0.2
    assert acceptance.estimate(np.array([0.26, 0.26, 0.25, 0.23]), [])[0] > 0.7


@pytest.mark.parametrize(("first", "others"), [(2.2, -2.2), (-2.2, 2.2), (0.0, 2.2)])
def test_it_learns_how_acceptance_depends_on_the_place(first: float, others: float) -> None:
    found = taught(
        lambda p, rng: np.where(np.arange(len(p)) == 0, first, others) + noise(rng, len(p)),
        lambda acceptance: np.array(acceptance.estimate(np.array([0.5, 0.3, 0.2]), [])),
    )
    assert found == pytest.approx(logistic(np.array([first, others, others])), abs=0.12)


def in_a_mood(p: Floats, rng: np.random.Generator) -> Floats:
    """The first margin tells of the others."""
    first = rng.normal(0, 2)
    return np.array([first, *(first + 1.0 + 0.5 * noise(rng, len(p) - 1))])


@pytest.mark.parametrize(
    ("threshold", "scale"),
    [(0.0, 1.0), (0.0, 0.01), (0.0, 100.0), (5.0, 1.0), (-5.0, 1.0), (-5.0, 0.01)],
)
def test_it_learns_how_acceptance_depends_on_the_margins_before(threshold: float, scale: float) -> None:
    margins = np.array([-0.5, -1.0, -2.0, -3.0])

    def ask(acceptance: Acceptance) -> Floats:
        seen = [[threshold + scale * margin] for margin in margins.tolist()]
        return np.array([acceptance.estimate(np.array([0.5, 0.3, 0.2]), each, threshold)[1] for each in seen])

    found = taught(in_a_mood, ask, threshold=threshold, scale=scale)
    assert (np.diff(found) < 0).all()
    assert found == pytest.approx(logistic((margins + 1.0) / 0.5), abs=0.12)


def test_it_follows_an_agent_that_changes() -> None:
    acceptance, probabilities, rng = Acceptance(), np.array([0.6, 0.4]), np.random.default_rng(0)
    for often, decisions in ((0.9, 3000), (0.1, 400)):
        for _ in range(decisions):
            acceptance.learn(probabilities, [1.0] if rng.random() < often else [-1.0, -1.0], 0.0)
        assert acceptance.estimate(probabilities, [])[0] == pytest.approx(often, abs=0.2)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-1e6, 1e6, width=32), st.integers(1, 6)),
        max_size=20,
    ),
    st.floats(-1e3, 1e3),
)
def test_estimates_are_never_certain(decisions: list[tuple[list[float], float, int]], threshold: float) -> None:
    acceptance = Acceptance()
    for probabilities, margin, count in decisions:
        margins = [margin * (i + 1) for i in range(min(count, len(probabilities)))]
        acceptance.learn(np.array(probabilities), margins, threshold)
        estimate = acceptance.estimate(np.array(probabilities), margins)
        assert len(estimate) == len(probabilities)
        assert all(0.001 < chance < 0.999 for chance in estimate)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_equations_of_a_lesson_are_solved_as_numpy_solves_them(size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(50):
        factor = rng.normal(size=(size, size))
        matrix = (factor @ factor.T + 0.1 * np.eye(size)).tolist()
        right = rng.normal(size=size).tolist()
        kept = [row[:] for row in matrix]
        np.testing.assert_allclose(_solution(matrix, right), np.linalg.solve(matrix, right), rtol=1e-9)
        assert matrix == kept
