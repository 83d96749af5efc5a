"""Errors, interrupts and agents of conversations that share passes: what is one's own reaches no other."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import BundleError, EngineError, NumericsError
from mara_runtime.schedule.base import Fixed
from tests.unit import helpers
from tests.unit.batches import CONFIG, PLAIN, SLOTS, TABLE, Crowd
from tests.unit.sessions import ALONE


@pytest.mark.parametrize("length", [3, 9])
def test_a_nan_ends_one_answer_and_names_the_position(length: int) -> None:
    """At the prompt's third token, or six tokens into the answer of the same conversation."""
    config = DecodeConfig(top_k=1, max_new_tokens=12, agents=ALONE)
    text = [3, 3, 3, *helpers.sequential(TABLE, [3, 3, 3], config).tokens]
    at = tuple(text[:length])

    def lookup(prefix: tuple[int, ...]) -> tuple[helpers.F32, helpers.F32]:
        row, state = TABLE(prefix)
        return (row * np.nan, state * np.nan) if prefix[: len(at)] == at else (row, state)

    crowd = Crowd(TABLE, 4, engine=helpers.CountingEngine(lookup, slots=SLOTS))
    ill = crowd.submit([3, 3, 3], config)
    others = [crowd.submit([i, 5], CONFIG) for i in range(3)]
    while not ill.done:
        crowd.step()
    assert isinstance(ill.error, NumericsError)
    assert f"hidden state at position {length - 1} (token {at[-1]})" in str(ill.error)
    assert len(crowd.steps[ill]) == max(0, length - 3)
    (place,) = [place for place, cache in enumerate(crowd.engine.places) if not cache.tokens]
    assert set(crowd.engine.memories[place].entries) == {None}
    others.append(crowd.submit([4, 4], CONFIG))
    crowd.run()
    for answer in others:
        assert answer.error is None
        crowd.check(answer)


def test_an_error_of_a_pass_is_its_own() -> None:
    class Small(helpers.CountingEngine):
        """The second place has no room for a tenth slot."""

        def _run(self, work: Pass, place: int) -> StepOutput:
            if place == 1 and work.slot + len(work.tokens) > 9:
                raise EngineError("no room for place 1")
            return super()._run(work, place)

    crowd = Crowd(TABLE, 3, engine=Small(TABLE, slots=SLOTS))
    answers = [crowd.submit([i, 1, 1], CONFIG) for i in range(3)]
    crowd.run()
    assert [str(answer.error) for answer in answers] == ["None", "no room for place 1", "None"]
    assert crowd.engine.places[1].tokens == []
    for answer in answers:
        crowd.check(answer)


def test_an_interrupt_passes_through_and_the_others_lose_nothing() -> None:
    class Interrupted(Fixed):
        def plan(self, context: Any) -> Any:
            countdown.pop()
            if not countdown:
                raise KeyboardInterrupt
            return super().plan(context)

    for start in range(1, 12):
        countdown = [0] * start
        crowd = Crowd(TABLE, 3, schedule=Interrupted(1))
        for i in range(3):
            crowd.submit([i, 1], CONFIG)
        with pytest.raises(KeyboardInterrupt):
            crowd.run()
        crowd.check_places()
        countdown = [0] * 1000
        crowd.run()
        short = [answer for answer in crowd.submitted if len(crowd.steps[answer]) < 12]
        assert len(short) == 1  # the one whose own code was interrupted
        for answer in crowd.submitted:
            crowd.check(answer, complete=answer not in short)


# ── agents ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Choosy(helpers.CountingEngine):
    """Has room for so many agents at once; one of them has a damaged file."""

    room = 8

    attempts = 0

    def use(self, agents: Sequence[str]) -> None:
        self.attempts += 1
        if "damaged" in agents:
            raise BundleError("damaged")
        if len(agents) > self.room:
            raise EngineError(f"no room for {len(agents)} agents")
        super().use(agents)


JUDGES: dict[str, helpers.Judge] = {
    **helpers.AGENTS, "third": lambda h: h[:, 1], "nan": lambda h: h[:, 0] * np.float32(math.nan)
}  # fmt: skip


def aligned(**agents: float) -> DecodeConfig:
    return DecodeConfig(top_k=5, top_p=1.0, max_new_tokens=10, agents=agents)


def test_the_engine_has_the_agents_of_everyone_seated_and_each_hears_its_own() -> None:
    crowd = Crowd(TABLE, 4, engine=Choosy(TABLE, JUDGES, slots=SLOTS))
    asked = [aligned(agent=1), aligned(other=1, agent=-0.5), aligned(third=2), PLAIN]
    for i, config in enumerate(asked):
        crowd.submit([i, 2], config)
    crowd.run()
    assert crowd.engine.uses == [("agent",), ("agent", "other"), ("agent", "other", "third")]
    crowd.submit([5, 2], aligned(third=1))
    crowd.submit([6, 2], PLAIN)
    crowd.run()
    assert crowd.engine.uses[3:] == [("third",)]
    for answer in crowd.submitted:
        expected = helpers.sequential(TABLE, answer.request.prompt, answer.request.config, agents=JUDGES)
        assert crowd.tokens(answer) == expected.tokens
        assert answer.stats.algorithm() == expected.counts[-1]


def test_agents_without_room_beside_others_wait_until_they_are_alone() -> None:
    engine = Choosy(TABLE, JUDGES, slots=SLOTS)
    engine.room = 2
    crowd = Crowd(TABLE, 4, engine=engine)
    two, third, damaged, last = (
        crowd.submit([i, 1], config)
        for i, config in enumerate([aligned(agent=1, other=1), aligned(third=1), aligned(damaged=1), aligned(agent=1)])
    )
    while not two.done:
        assert not crowd.steps[third]
        crowd.step()
    assert not third.done
    crowd.run()
    assert engine.attempts == 8  # not one a step
    assert isinstance(damaged.error, BundleError)
    for answer in (two, third, last):
        expected = helpers.sequential(TABLE, answer.request.prompt, answer.request.config, agents=JUDGES)
        assert crowd.tokens(answer) == expected.tokens


def test_a_nan_of_one_agent_does_not_reach_those_who_do_not_ask_it() -> None:
    crowd = Crowd(TABLE, 4, engine=Choosy(TABLE, JUDGES, slots=SLOTS))
    fine, ill = crowd.submit([1, 2], aligned(agent=1)), crowd.submit([2, 2], aligned(agent=1, nan=1))
    crowd.run()
    assert fine.error is None
    crowd.check(fine)
    assert "the agents' margin at position" in str(ill.error)
