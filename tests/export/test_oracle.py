"""The oracle against cases worked out by hand: a disagreement with the product is to mean the product.

tests/export/test_tiny_models.py compares it with a second decoder.
"""

from __future__ import annotations

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import oracle
from tests.reference import FALLBACKS, ORDERS, STRATEGIES, candidates

EOS = 5
VOCAB = 6


# --- a stub model ----------------------------------------------------------------------------------------------------


class StubModel:
    """A language model as a table: history of ids -> {id: probability}, and history -> margin.

    Its cache is one list which every forward changes in place, so a cache shared by two candidates shows up as a
    history that is not in the table. Ids without a probability get minus infinity.
    """

    def __init__(self, rows: dict[tuple[int, ...], dict[int, float]], margins: dict[tuple[int, ...], float]) -> None:
        self.rows, self.margins = rows, margins
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> SimpleNamespace:
        history = SimpleNamespace(ids=[]) if past_key_values is None else past_key_values
        if past_key_values is None:
            input_ids = input_ids[:, 1:]  # the prompt is one token; the tables start after it
        history.ids += input_ids[0].tolist()
        key = tuple(history.ids)
        self.calls.append(key)
        logits = torch.full((1, 1, VOCAB), -math.inf)
        for token, probability in self.rows[key].items():
            logits[0, 0, token] = math.log(probability)
        state = torch.tensor([[[self.margins.get(key, 99.0)]]])  # (1, 1, 1)
        wrong = torch.full_like(state, 77.0)
        return SimpleNamespace(logits=logits, hidden_states=(wrong, state), past_key_values=history)


def stub_agent(states: torch.Tensor) -> torch.Tensor:
    """The state is the margin: z = (1, 1 + state)."""
    return torch.cat([torch.ones_like(states), 1.0 + states], dim=1)


def run(model: StubModel, **options: Any) -> oracle.OracleResult:
    return oracle.decode(model, stub_agent, [0], eos_ids=[EOS], **options)


def one_decision(*margins: float) -> StubModel:
    """Candidates 2, 0, 4 in this rank (tails 1, .5, .2) with their margins, then a lone EOS."""
    end = {EOS: 1.0}
    return StubModel(
        {(): {2: 0.5, 0: 0.3, 4: 0.2}, (2,): end, (0,): end, (4,): end},
        dict(zip([(2,), (0,), (4,)], margins, strict=True)),
    )


UNLIKE, ALIKE = (-1.0, 1.0, 2.0), (-1.0, 1.5, 1.5)


@pytest.mark.parametrize(
    ("margins", "strategy", "order", "threshold", "token", "examined", "smallest"),
    [
        (UNLIKE, "top1", "ranked", 0.0, 0, [2, 0], 1.0),
        (UNLIKE, "top1", "best_last", 0.0, 0, [0], 1.0),
        (UNLIKE, "top1", "reversed", 0.0, 4, [4], 2.0),
        (UNLIKE, "max_prob", "ranked", 0.0, 4, [2, 0, 4], 1.0),
        (UNLIKE, "max_prob", "best_last", 0.0, 4, [0, 4, 2], 1.0),
        # default_rng(0).integers(2) is 1: the second accepted one in the order of examination
        (UNLIKE, "random", "ranked", 0.0, 4, [2, 0, 4], 1.0),
        (UNLIKE, "random", "best_last", 0.0, 4, [0, 4, 2], 1.0),
        (UNLIKE, "random", "reversed", 0.0, 0, [4, 0, 2], 1.0),
        # a margin must exceed the threshold
        (UNLIKE, "top1", "ranked", 1.0, 4, [2, 0, 4], 0.0),
        (UNLIKE, "top1", "ranked", -1.0, 0, [2, 0], 0.0),
        (UNLIKE, "top1", "ranked", -1.5, 2, [2], 0.5),
        # of equal margins the earliest examined
        (ALIKE, "max_prob", "ranked", 0.0, 0, [2, 0, 4], 1.0),
        (ALIKE, "max_prob", "best_last", 0.0, 0, [0, 4, 2], 1.0),
        (ALIKE, "max_prob", "reversed", 0.0, 4, [4, 0, 2], 1.0),
    ],
)
def test_a_decision_by_hand(margins, strategy, order, threshold, token, examined, smallest) -> None:
    for fallback in FALLBACKS:
        model = one_decision(*margins)
        result = run(model, strategy=strategy, order=order, threshold=threshold, fallback=fallback)
        assert (result.token_ids, result.finish_reason) == ([token, EOS], "stop")
        assert result.positions[0]["candidates"] == [2, 0, 4]
        assert result.positions[0]["examined"] == examined
        assert result.counters == {
            "tokens": 2,
            "decisions": 1,
            "examined": len(examined),
            "forced": 0,
            "accepted_rank": {str([2, 0, 4].index(token) + 1): 1},
            "candidate_counts": {"1": 1, "3": 1},
            "smallest_margin": smallest,
        }


@pytest.mark.parametrize(("fallback", "token", "rank"), [("first", 2, 1), ("last", 4, 3)])
def test_when_all_are_rejected_the_fallback_counts_by_rank(fallback, token, rank) -> None:
    for strategy, order in product(STRATEGIES, ORDERS):
        result = run(one_decision(-3.0, 0.0, -0.5), strategy=strategy, order=order, fallback=fallback)
        assert result.token_ids == [token, EOS]
        assert (result.positions[0]["forced"], result.positions[0]["rank"]) == (True, rank)
        assert (result.counters["forced"], result.counters["examined"]) == (1, 3)
        assert (result.counters["accepted_rank"], result.counters["smallest_margin"]) == ({}, 0.0)


def test_random_draws_once_for_each_decision_with_an_accepted_candidate() -> None:
    # default_rng(0) gives integers(2), integers(3), integers(2), integers(2) = 1, 1, 1, 0.
    two, three, one = {1: 0.6, 3: 0.4}, {0: 0.5, 2: 0.3, 4: 0.2}, {1: 1.0}
    path = [3, 1, 1, 2, 3, 1, 1]
    rows: dict[tuple[int, ...], dict[int, float]] = {}
    margins: dict[tuple[int, ...], float] = {}
    for i, (row, accepted) in enumerate(
        [
            (two, (1, 3)),  # draw 1 of {1, 3}: 3
            (one, ()),  # no decision, no draw
            (two, ()),  # forced: the first, no draw
            (three, (0, 2, 4)),  # draw 1 of {0, 2, 4}: 2
            (two, (1, 3)),  # draw 1 of {1, 3}: 3
            (two, (1, 3)),  # draw 0 of {1, 3}: 1
            (one, ()),
        ]
    ):
        prefix = tuple(path[:i])
        rows[prefix] = row
        for token in row:
            margins[(*prefix, token)] = 1.0 if token in accepted else -1.0
            rows.setdefault((*prefix, token), {EOS: 1.0})
    result = run(StubModel(rows, margins), strategy="random", seed=0)
    assert result.token_ids == [*path, EOS]
    counted = [result.counters[name] for name in ("forced", "decisions", "examined")]
    assert counted == [1, 5, 11]
    assert result.counters["accepted_rank"] == {"1": 1, "2": 3}
    assert result.counters["candidate_counts"] == {"1": 3, "2": 4, "3": 1}


def test_a_decision_follows_the_accepted_prefix_only() -> None:
    # Two decisions in a row, the best rejected in both: a shared cache would hold (2, 0) or (2, 0, 1).
    end = {EOS: 1.0}
    model = StubModel(
        {(): {2: 0.6, 0: 0.4}, (2,): end, (0,): {1: 0.7, 2: 0.3}, (0, 1): end, (0, 2): {3: 1.0}, (0, 2, 3): end},
        {(2,): -1.0, (0,): 1.0, (0, 1): -2.0, (0, 2): 0.5},
    )
    result = run(model)
    assert result.token_ids == [0, 2, 3, EOS]
    assert model.calls == [(), (2,), (0,), (0, 1), (0, 2), (0, 2, 3)]  # the agent's forwards also continue the text
    assert [p["position"] for p in result.positions] == [1, 2, 3, 4]


def test_where_an_answer_ends() -> None:
    rows: dict[tuple[int, ...], dict[int, float]] = {tuple([1] * n): {1: 1.0} for n in range(6)}
    result = run(StubModel(rows, {}), max_new_tokens=5)
    assert (result.token_ids, result.finish_reason) == ([1] * 5, "length")
    assert (result.counters["smallest_margin"], result.counters["candidate_counts"]) == (None, {"1": 5})
    assert run(StubModel(rows, {}), max_new_tokens=0).token_ids == []
    last = run(one_decision(1.0, 1.0, 1.0), max_new_tokens=2)
    assert (last.token_ids, last.finish_reason) == ([2, EOS], "stop")
    other = oracle.decode(StubModel({(): {1: 1.0}, (1,): {3: 1.0}}, {}), stub_agent, [0], eos_ids=[EOS, 3])
    assert (other.token_ids, other.finish_reason) == ([1, 3], "stop")
    # EOS is a candidate that can be rejected; once it is emitted, nothing runs.
    rows = {(): {EOS: 0.6, 1: 0.4}, (EOS,): {}, (1,): {3: 0.5, EOS: 0.3, 2: 0.2}, (1, EOS): {}, (1, 3): {}}
    model = StubModel(rows, {(EOS,): -1.0, (1,): 1.0, (1, 3): -1.0, (1, EOS): 1.0})
    assert (run(model).token_ids, model.calls[-1]) == ([1, EOS], (1, EOS))


def test_a_non_finite_state_is_an_error_naming_the_position() -> None:
    # The logits stay fine: only the state of rank 2 is broken, after rank 1 was rejected.
    with pytest.raises(ValueError, match="position 1: candidate 0 has a non-finite hidden state"):
        run(one_decision(-1.0, math.nan, 1.0))


# --- the candidate list ----------------------------------------------------------------------------------------------


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "ids"),
    [
        ([1.0, 3.0, 2.0, 3.0, 2.0], 40, 1.0, [1, 3, 2, 4, 0]),  # of equal logits the lower id
        ([0.0, -0.0, 0.0], 40, 1.0, [0, 1, 2]),
        ([0.0] * 5000, 40, 1.0, list(range(40))),
        ([1.0, 2.0, 1.0, 1.0], 2, 1.0, [1, 0]),
        ([0.0, 1e-8, -1.0], 3, 1.0, [1, 0, 2]),  # by logits: log_softmax in float32 makes a tie of the first two
        ([0.0] * 4, 40, 0.5, [0, 1]),  # tails 1, .75, .5, .25: what is at or below 1 - top_p is dropped
        ([0.0] * 4, 40, 0.75, [0, 1, 2]),
        ([0.0] * 4, 40, 0.76, [0, 1, 2, 3]),
        (logs(0.96, 0.03, 0.01), 40, 0.95, [0]),
        (logs(0.01, 0.94, 0.05), 40, 0.95, [1, 2]),
        (logs(0.4, 0.3, 0.2, 0.1), 2, 0.6, [0, 1]),  # .4 and .3 renormalise to .571 and .429
        (logs(0.4, 0.3, 0.2, 0.1), 2, 0.56, [0]),
        ([0.0] * 4, 40, 0.0, [0]),  # the best stays even where it does not lead
        ([0.0, 5.0, 1.0, 4.9], 1, 1.0, [1]),
        ([0.0, 5.0, 1.0, 4.9], 99, 1.0, [1, 3, 2, 0]),
        ([0.0, -math.inf], 40, 1.0, [0]),
    ],
    ids=str,
)
def test_a_candidate_list_by_hand(logits, top_k, top_p, ids) -> None:
    assert candidates(logits, top_k, top_p).ids == ids


@pytest.mark.parametrize("logits", [[math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_without_probabilities_are_an_error(logits) -> None:
    with pytest.raises(ValueError, match="non-finite"):
        candidates(logits, 40, 0.95)


def test_gaps_are_the_smallest_changes_that_could_matter() -> None:
    found = candidates(logs(0.5, 0.3, 0.16, 0.04), 4, 0.95)
    assert found.ids == [0, 1, 2]
    assert found.logit_gap == pytest.approx(math.log(0.5 / 0.3))
    assert found.nucleus_gap == pytest.approx(0.01)  # .04 against .05; .2 is farther
    # The swap of ranks 3 and 4 matters at top_k = 3 with top_p = 1, not where top_p drops both.
    close = logs(0.6, 0.3799, 0.0101, 0.01)
    assert candidates(close, 3, 1.0).logit_gap == pytest.approx(math.log(1.01))
    assert candidates(close, 3, 0.95).logit_gap == pytest.approx(math.log(0.6 / 0.3799))
    # A single candidate: only the distance to the runner-up. The whole vocabulary: no end to cross.
    assert candidates([0.0, 2.0], 1, 0.5).logit_gap == 2.0
    assert candidates([0.0], 9, 1.0).logit_gap == math.inf
    # Of a position: margins too, those that were examined.
    ranks = math.log(0.3 / 0.2)
    for margins, options, gap in (
        ((-1.0, 1.0, 2.0), {}, ranks),
        ((-0.25, 1.0, 2.0), {}, 0.25),
        ((1.0, 0.125, 2.0), {}, ranks),
        ((-1.0, 1.75, 2.0), {"strategy": "max_prob"}, 0.25),
        (ALIKE, {"strategy": "max_prob"}, 0.0),
    ):
        result = run(one_decision(*margins), top_p=1.0, **options)
        assert result.gaps[0] == pytest.approx(gap, abs=1e-6)
        assert len(result.gaps) == len(result.positions) == 2
