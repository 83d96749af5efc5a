"""Hidden states on request: those of the examined candidates, whatever runs beside them."""

import random
from itertools import product

import numpy as np
import pytest

from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.schedule.base import Fixed
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from tests.unit import helpers
from tests.unit.batches import SLOTS, Crowd, check_states, some_config
from tests.unit.sessions import ALONE, VOCAB, Draw, a_schedule, a_table


@pytest.mark.parametrize("part", range(3))
def test_steps_have_the_states_of_the_examined_candidates_where_they_are_asked_for(part: int) -> None:
    for case in range(10):
        draw = Draw(random.Random(f"{part}, {case}").randint)
        table, schedule = a_table(draw), a_schedule(draw)
        engine = helpers.CountingEngine(table, slots=SLOTS)
        crowd = Crowd(table, 4, engine=engine, schedule=schedule)
        for i in range(6):
            crowd.submit(draw.some(1, 9, draw.token), some_config(draw), states=i % 2 == 0)
        crowd.run()
        for answer in crowd.submitted:
            crowd.check(answer)


def test_states_of_drafted_tokens_and_that_others_ask_for_none() -> None:
    kinds: set[tuple[bool, ...]] = set()
    for seed, states in product(range(12), (True, False)):
        table = helpers.hash_table(seed, VOCAB, 256, 6.0 + 4 * (seed % 4), memory=1)  # it repeats itself
        config = DecodeConfig(top_k=3, top_p=0.9, max_new_tokens=40, threshold=-9.0, agents=ALONE)
        engine = helpers.CountingEngine(table)
        request = Request([1, 2], config, "first", frozenset(), 40, states=states)
        steps = list(decode(engine, Session(engine.cache, Fixed(1, 8), NGrams()), request, Stats()))
        decided = [bool(step.margins) for step in steps if step.drafted]
        kinds |= {tuple(decided[i : i + 3]) for i in range(len(decided))}
        assert all((step.states is not None) == states for step in steps)
        assert all(list(call.hidden_rows) == (list(call.agent_rows) if states else []) for call in engine.calls)
        kept = [state for step in steps for state in (step.states or {}).values()]
        assert all(np.isfinite(state).all() for state in kept)  # copies: the engine spoils what it returned before
        if states:
            check_states(table, [1, 2], steps)
    assert len(kinds) > 4  # with and without a decision
