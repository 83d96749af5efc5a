"""The batcher over a table: company changes no answer; who joins, waits, leaves and fails."""

import random
from contextlib import suppress
from itertools import product
from typing import Any

import numpy as np
import pytest

from mara_runtime.batch import NARROW
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.engines.base import StepOutput, Works
from mara_runtime.errors import EngineError, PromptError
from mara_runtime.passes import SHARED_PREFILL_ROWS
from mara_runtime.schedule.base import Fixed, Schedule
from tests.unit import helpers
from tests.unit.batches import CONFIG, PLAIN, SLOTS, TABLE, Crowd, some_config
from tests.unit.sessions import MIXES, VOCAB, Draw, a_schedule, a_table


def every_config() -> list[DecodeConfig]:
    rng, kinds = random.Random(0), list(product(STRATEGIES, ORDERS))
    aligned = [
        DecodeConfig(
            top_k=rng.randint(2, VOCAB),
            top_p=rng.choice([0.8, 0.95, 1.0]),
            max_new_tokens=rng.randint(1, 30),
            strategy=strategy,
            order=order,
            threshold=rng.choice([-0.5, 0.0, 0.25, 9.0]),
            seed=rng.randint(0, 99),
            draft=rng.choice([None, 0, 5]),
            agents=rng.choice(MIXES),
        )
        for strategy, order in [*kinds, *kinds]
    ]
    plain = [
        DecodeConfig(align=False, sample=sample, seed=seed, max_new_tokens=20)
        for sample, seed in ((False, 0), (True, 1), (True, 2))
    ]
    return rng.sample([*aligned, *plain], len(aligned) + len(plain))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("fallback", FALLBACKS)
def test_in_company_each_answers_as_it_does_alone(fallback: str, share: bool) -> None:
    rng = random.Random(fallback)
    schedules: dict[int, Schedule] = {}
    crowd = Crowd(TABLE, share=share, schedule=lambda request: schedules[id(request)])
    system = [rng.randrange(VOCAB) for _ in range(40)]
    pending = every_config()
    while pending or crowd.batcher.busy:
        if pending and rng.random() < 0.4:
            prompt = rng.choice([[], system, system[:20]]) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))]
            answer = crowd.submit(prompt, pending.pop(), fallback)
            schedules[id(answer.request)] = a_schedule(Draw(rng.randint))
        crowd.step()
    for answer in crowd.submitted:
        assert answer.done
        assert crowd.tokens(answer)
        crowd.check(answer)
    crowd.check_places()
    works = [len(together) for together in crowd.engine.together]
    assert max(works) == 8
    assert len(works) < len(crowd.engine.calls) / 2
    assert (sum(answer.stats.reused_tokens for answer in crowd.submitted) > 40) == share


class Unreliable(helpers.CountingEngine):
    """Raises the errors in `fails`, one a pass, after it has written the entries."""

    def __init__(self, lookup: helpers.Lookup) -> None:
        super().__init__(lookup, slots=SLOTS)
        self.fails: list[BaseException] = []

    def run_together(self, works: Works) -> list[StepOutput]:
        out = super().run_together(works)
        if self.fails:
            raise self.fails.pop()
        return out


@pytest.mark.parametrize("part", [*range(3), *(pytest.param(i, marks=pytest.mark.long) for i in range(3, 20))])
def test_whatever_joins_leaves_fails_or_interrupts(part: int) -> None:
    """Drawn at random: joins, cancellations, interrupts in a pass, an error of a pass, prefixes, budgets, NaN."""
    for case in range(12):
        rng = random.Random(f"{part}, {case}")
        draw = Draw(rng.randint)
        sound, ill = a_table(draw), draw.one(0, 0, 97)

        def lookup(prefix: tuple[int, ...], sound: helpers.Lookup = sound, ill: int = ill) -> Any:
            row, state = sound(prefix)
            spoiled = ill and len(prefix) > 4 and hash(prefix) % ill == 0
            return (np.full_like(row, np.nan), np.full_like(state, np.nan)) if spoiled else (row, state)

        engine = Unreliable(lookup)
        schedule = a_schedule(draw)
        options = {"share": draw.one(True, True, False), "budget_slots": draw.one(None, None, 120)}
        crowd = Crowd(sound, draw.whole(1, 8), engine=engine, schedule=schedule, **options)
        texts: list[list[int]] = [[]]
        left = draw.whole(1, 14)
        broken = set()
        while left or crowd.batcher.busy:
            what = draw.whole(0, 19)
            if what < 6 and left:
                left -= 1
                before = draw.one(*texts)
                prompt = (before[: draw.whole(0, len(before))] + draw.some(1, draw.one(5, 40), draw.token))[:60]
                eos = frozenset(draw.some(0, 1, draw.token))
                crowd.submit(prompt, some_config(draw), draw.one(*FALLBACKS), eos_token_ids=eos)
                texts.append(prompt)
            elif what == 6 and crowd.submitted:
                crowd.batcher.cancel(answer := draw.one(*crowd.submitted))
                broken |= {answer}
            elif what == 7:
                engine.fails = [KeyboardInterrupt()]
            elif what == 8:
                engine.fails = [EngineError("no room"), EngineError("no room")]
            with suppress(KeyboardInterrupt):
                crowd.step()
            crowd.check_places()
        for answer in crowd.submitted:
            assert answer.done
            assert answer.error is None or isinstance(answer.error, EngineError) or ill
            crowd.check(answer, complete=answer not in broken)


def test_everyone_seated_gets_a_pass_in_each_step_and_others_wait_in_order() -> None:
    crowd = Crowd(TABLE, 3, schedule=Fixed(1))
    answers = [crowd.submit([i], DecodeConfig(align=False, max_new_tokens=4 + i)) for i in range(6)]
    crowd.run()
    assert [[place for place, _ in together] for together in crowd.engine.together][:4] == [[0, 1, 2]] * 4
    assert [len(crowd.steps[answer]) for answer in answers] == [4, 5, 6, 7, 8, 9]
    assert len(crowd.engine.together) < sum(len(steps) for steps in crowd.steps.values()) / 2


def test_a_long_prompt_runs_alone_in_chunks_between_shared_passes() -> None:
    crowd = Crowd(TABLE, 4, engine=helpers.CountingEngine(TABLE, slots=600))
    talking = crowd.submit([1], DecodeConfig(align=False, max_new_tokens=60, draft=0))
    for _ in range(4):
        crowd.step()
    long = [crowd.submit([i] * 300, PLAIN) for i in (2, 3)]
    heard = len(crowd.steps[talking])
    crowd.step()
    first = [rows for together in crowd.engine.together for _, rows in together if rows > NARROW]
    assert first == [SHARED_PREFILL_ROWS]
    while not crowd.steps[long[1]]:
        crowd.step()
    wide = [together for together in crowd.engine.together if any(rows > NARROW for _, rows in together)]
    assert all(len(together) == 1 for together in wide)
    assert [together[0][0] for together in wide[:4]] in ([1, 2, 1, 2], [2, 1, 2, 1])  # in turn
    assert len(crowd.steps[talking]) - heard >= 2 * 4  # it went on between the chunks
    crowd.run()
    for answer in (talking, *long):
        crowd.check(answer)


def test_company_is_what_the_last_pass_was_shared_with() -> None:
    crowd = Crowd(TABLE, 4, schedule=Fixed(1))
    for i in range(3):
        crowd.submit([i, i], PLAIN)
    assert crowd.sessions == {}
    crowd.step()
    companies = [session.company for session in crowd.sessions.values()]
    assert [(company.rows, company.conversations) for company in companies] == [(4, 2)] * 3
    crowd.step()
    assert [(company.rows, company.conversations) for company in companies] == [(2, 2)] * 3
    crowd.batcher.cancel(crowd.submitted[0])
    crowd.batcher.cancel(crowd.submitted[1])
    crowd.step()
    assert (companies[2].rows, companies[2].conversations) == (0, 0)


def test_a_prompt_begins_with_what_any_place_holds_of_it() -> None:
    system = [token % VOCAB for token in range(40)]
    for share, reused in ((True, [0, 40, 40]), (False, [0, 0, 0])):
        crowd = Crowd(TABLE, 3, share=share)
        first = crowd.submit([*system, 1], PLAIN)
        crowd.step()
        others = [crowd.submit([*system, token], PLAIN) for token in (2, 3)]  # beside it
        crowd.run()
        assert [answer.stats.reused_tokens for answer in (first, *others)] == reused
        again = crowd.submit([*system, 1, *crowd.tokens(first), 4], PLAIN)  # the next turn
        crowd.run()
        assert again.stats.reused_tokens == (41 + 11 if share else 0)
        for answer in crowd.submitted:
            crowd.check(answer)


def test_slots_are_reserved_and_a_request_that_does_not_fit_is_not_passed_by() -> None:
    crowd = Crowd(TABLE, 8, budget_slots=70)
    with pytest.raises(PromptError, match=r"the prompt has 60 tokens and the answer may have 12: .* 70 KV slots"):
        crowd.submit([1] * 60, PLAIN)
    *first, long, short = (crowd.submit([1] * length, PLAIN) for length in (20, 10, 30, 1))
    crowd.step()
    assert [len(crowd.steps[answer]) for answer in (*first, long, short)] == [1, 1, 0, 0]
    while crowd.batcher.busy:
        assert crowd.steps[long] or not crowd.steps[short]  # which there is room for
        crowd.step()
    assert all(len(crowd.steps[answer]) == 12 for answer in crowd.submitted)


def test_a_cancelled_answer_ends_at_once_and_leaves_the_others() -> None:
    crowd = Crowd(TABLE, 2)
    seated, stays, waits, last = (crowd.submit([i, 1], CONFIG) for i in range(4))
    for _ in range(3):
        crowd.step()
    for answer in (seated, waits):
        crowd.batcher.cancel(answer)
        crowd.batcher.cancel(answer)
        assert answer.done
    before = len(crowd.steps[seated])
    crowd.run()
    assert (len(crowd.steps[seated]), crowd.steps[waits]) == (before, [])
    for answer in (stays, last):
        crowd.check(answer)
    assert all(answer.error is None for answer in crowd.submitted)
