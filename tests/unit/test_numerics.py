"""Values that are not finite: the error names the position and what is at fault, and nothing of it stays."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import NumericsError
from mara_runtime.schedule.base import Fixed, Schedule
from tests.table_engine import TableMemory
from tests.unit import helpers
from tests.unit.helpers import sequential
from tests.unit.sessions import (
    ACCEPT,
    CASES,
    NAMED,
    ONE_BY_ONE,
    PROMPT,
    TOGETHER,
    WIDE,
    Chat,
    Draw,
    Guesser,
    a_guessing,
    a_schedule,
    a_table,
    a_turn,
    hand,
    run,
)  # fmt: skip

MARK = 64.0
"""A hidden state that the spoiled agent cannot take."""


def spoiled(
    at: tuple[int, ...], what: str, bad: float = math.nan, table: helpers.Lookup | None = None
) -> helpers.Lookup:
    """The hand-worked table with one number of one prefix replaced.

    what: hidden (as in a network, its logits and all that follows become NaN, too), logits, or margin.
    """
    sound = table or hand(ACCEPT)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = (array.copy() for array in sound(prefix))
        if what == "hidden" and prefix[: len(at)] == at:
            row[:] = np.nan
            state[1 if len(prefix) == len(at) else 0] = bad if len(prefix) == len(at) else np.nan
        if what == "logits" and prefix == at:
            row[4] = bad
        if what == "margin" and prefix == at:
            state[:] = MARK, 0.0
        return row, state

    return lookup


def spoiled_agent(bad: float) -> helpers.Judge:
    return lambda hidden: np.where(hidden[:, 0] == MARK, np.float32(bad), helpers.sum_agent(hidden))


class Infectious(helpers.CountingEngine):
    """Where a state was not finite, its KV entry is not: every row of any pass then is NaN, though it masks the slot.

    That is what an additive mask does, 0 times NaN being NaN, until the entry is overwritten or cleared.
    """

    def __init__(self, lookup: helpers.Lookup, agents: Any = helpers.AGENTS, slots: int = 512) -> None:
        super().__init__(lookup, agents, slots)
        self._ill: set[int] = set()
        self.memory.zero = self._zero  # type: ignore[method-assign]
        self.culprits: list[tuple[int, int]] = []
        """(position, token) of the rows of the first pass that were at fault themselves"""

    def _zero(self) -> None:
        TableMemory.zero(self.memory)
        self._ill.clear()

    def _rows(self, work: Pass, place: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        hidden, logits = super()._rows(work, place)
        fine: list[bool] = np.isfinite(hidden).all(axis=1).tolist()
        for row, healthy in enumerate(fine):
            (self._ill.discard if healthy else self._ill.add)(work.slot + row)
        rows = list(zip(work.positions, work.tokens, strict=True))
        self.culprits = self.culprits or [row for row, healthy in zip(rows, fine, strict=True) if not healthy]
        if self._ill:
            hidden, logits = np.full_like(hidden, np.nan), np.full_like(logits, np.nan)
        return hidden, logits


NAMED_FAULTS = {
    "hidden": r"hidden state at position {} \(token {}\)",
    "logits": "logits after position {} ",
    "margin": "margin at position {} ",
}


def fails_and_recovers(
    at: tuple[int, ...],
    what: str,
    bad: float = math.nan,
    *,
    kind: type[helpers.CountingEngine] = Infectious,
    schedule: Schedule = ONE_BY_ONE,
    guess: Sequence[int] = (),
    guess_from: int = 2,
    prompt: list[int] = PROMPT,
    **options: Any,
) -> helpers.CountingEngine:
    """The error names what it should, nothing is left of the answer, and the next one is right.

    guess: the tokens from index `guess_from` of the text on; by default, after the first candidate.
    """
    config, lookup, model = DecodeConfig(**(options or WIDE)), spoiled(at, what, bad), {"now": hand(ACCEPT)}
    engine = kind(lambda prefix: model["now"](prefix), {helpers.AGENT: spoiled_agent(bad)})
    session = Chat(engine, schedule, Guesser(lambda index: guess[index - guess_from :]))
    run(session, [1, 0, 0], config, limit=3)  # so that there is something to drop
    assert session.cached
    model["now"] = lookup
    with pytest.raises(NumericsError, match=NAMED_FAULTS[what].format(len(at) - 1, at[-1])) as caught:
        run(session, prompt, config, limit=8)
    assert "\n" not in str(caught.value)
    assert session.cached == []
    assert engine.entries(512) == [None] * 512
    for sound, again in ((lookup, [6, 6]), (hand(ACCEPT), prompt)):
        model["now"] = sound
        steps, stats = run(session, again, config, limit=8)
        expected = sequential(hand(ACCEPT), again, config, limit=8)
        assert [step.token for step in steps] == expected.tokens
        assert stats.algorithm() == expected.counts[-1]
    return engine


@pytest.mark.parametrize("kind", [helpers.CountingEngine, Infectious])
@pytest.mark.parametrize(
    ("at", "prefill_rows", "bad"),
    [((1,), 256, math.nan), ((1, 0, 3), 256, -math.inf), ((1, 0, 3), 2, math.inf), ((1, 0, 3, 3), 2, math.nan)],
)
def test_the_error_names_a_hidden_state_of_the_prompt(monkeypatch, kind, at, prefill_rows, bad):
    monkeypatch.setattr("mara_runtime.passes.PREFILL_ROWS", prefill_rows)
    fails_and_recovers(at, "hidden", bad, kind=kind, prompt=[1, 0, 3, 3])


@pytest.mark.parametrize("kind", [helpers.CountingEngine, Infectious])
@pytest.mark.parametrize(
    ("at", "bad", "schedule", "guess"),
    [
        ((1, 2), math.nan, "adaptive", []),
        ((1, 2, 5), math.inf, "together", []),
        ((1, 2, 5, 7), -math.inf, "one-by-one", []),
        # As the method says, every row that runs counts. Of siblings that infect each other the one at fault is named.
        ((1, 4), math.nan, Fixed(None, 16), []),
        ((1, 4), math.nan, Fixed(None, 16), [5, 7]),
        # of a draft: the first, the second, and a wrong one
        ((1, 2, 5), math.nan, Fixed(1, 16), [5, 7, 7]),
        ((1, 2, 5, 7), math.inf, Fixed(None, 16), [5, 7, 7]),
        ((1, 2, 6), math.nan, Fixed(1, 16), [6, 7, 7]),
    ],
)
def test_the_error_names_a_hidden_state_of_a_row(kind, at, bad, schedule, guess):
    schedule = NAMED[schedule]() if isinstance(schedule, str) else schedule
    fails_and_recovers(at, "hidden", bad, kind=kind, schedule=schedule, guess=guess)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"align": False}])
@pytest.mark.parametrize("guess", [[], [2, 5, 7, 7]], ids=["alone", "with a draft"])
def test_the_error_names_a_hidden_state_where_there_is_nothing_to_decide(guess, options):
    engine = fails_and_recovers(
        (1, 2, 5, 7), "hidden", math.inf, schedule=Fixed(1, 16), guess=guess, guess_from=1, **options
    )
    assert any(len(call.tokens) > 1 and call.tokens[0] == 2 for call in engine.calls) == bool(guess)


@pytest.mark.parametrize("what", ["hidden", "margin"])
def test_the_error_names_a_fault_in_a_later_pass_of_a_decision(what):
    # The passes before it were sound; they do not run again to find it.
    engine = Infectious(spoiled((1, 4), what, table=hand({})), {helpers.AGENT: spoiled_agent(math.nan)})
    with pytest.raises(NumericsError, match=NAMED_FAULTS[what].format(1, 4)):
        run(engine, PROMPT, DecodeConfig(**WIDE), schedule=Fixed(2), limit=8)
    assert engine.cache.tokens == []


@pytest.mark.parametrize(
    ("at", "bad", "drafted", "options"),
    [
        ((1,), math.nan, 0, {}),
        ((1, 2), math.inf, 0, {"align": False}),  # an overflow leaves no probabilities: the normaliser is not finite
        ((1, 2, 5), math.nan, 16, {}),
        ((1, 2, 5, 7), math.inf, 16, {"align": False}),
    ],
)
def test_the_error_names_logits(at, bad, drafted, options):
    how = {"kind": helpers.CountingEngine, "schedule": Fixed(1, drafted), "guess": [5, 7, 7]}
    fails_and_recovers(at, "logits", bad, **how, **options)


def test_logits_that_rule_out_every_token():
    engine = helpers.CountingEngine(lambda prefix: (np.full(8, -np.inf, np.float32), np.zeros(2, np.float32)))
    with pytest.raises(NumericsError, match="logits after position 0 "):
        run(engine, PROMPT, DecodeConfig(**WIDE), limit=2)


def test_logits_of_a_candidate_that_does_not_continue_are_not_computed():
    table = spoiled((1, 2), "logits", table=hand({(3,): 1.0, (3, 5): 1.0}))
    for schedule in (ONE_BY_ONE, TOGETHER):
        steps, _ = run(helpers.CountingEngine(table), PROMPT, DecodeConfig(**WIDE), schedule=schedule, limit=3)
        assert [step.token for step in steps] == [3, 5, 7]


@pytest.mark.parametrize(
    ("at", "bad", "schedule", "guess"),
    [
        ((1, 2), math.nan, TOGETHER, []),
        ((1, 2, 5), math.inf, ONE_BY_ONE, []),
        ((1, 2, 5), -math.inf, Fixed(1, 16), [5, 7]),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")  # the table engine multiplies an infinite margin by 0
def test_the_error_names_a_margin(at, bad, schedule, guess):
    # An agent whose weights are NaN must not look like one that rejects everything.
    fails_and_recovers(at, "margin", bad, kind=helpers.CountingEngine, schedule=schedule, guess=guess)


@pytest.mark.filterwarnings("ignore:invalid value")  # as below
def test_the_error_names_a_mix_that_is_not_finite():
    engine = helpers.CountingEngine(hand({(2,): 2.0, (2, 5): 1.0}))
    with pytest.raises(NumericsError, match="margin at position 1 "):
        run(Chat(engine), PROMPT, DecodeConfig(agents={helpers.AGENT: 3e38}, **WIDE), limit=3)


def test_an_agent_that_is_left_out_is_not_at_fault():
    agents = {"other": helpers.sum_agent, helpers.AGENT: spoiled_agent(math.nan)}
    chat = Chat(helpers.CountingEngine(spoiled((1, 2), "margin", table=hand(ACCEPT)), agents))
    config = DecodeConfig(agents={"other": 1.0, helpers.AGENT: 0.0}, **WIDE)
    assert [step.token for step in run(chat, PROMPT, config, limit=3)[0]] == [2, 5, 7]


def test_a_fault_that_does_not_repeat_is_an_error_all_the_same():
    class Flaky(helpers.CountingEngine):
        def _run(self, work: Pass, place: int) -> StepOutput:
            out = super()._run(work, place)
            return replace(out, margins=out.margins * np.float32(np.nan)) if len(self.calls) == bad_pass else out

    bad_pass = 2
    session = Chat(Flaky(hand(ACCEPT)))
    with pytest.raises(NumericsError, match=r"a pass at position 1 .* run again"):
        run(session, PROMPT, DecodeConfig(**WIDE), limit=3)
    assert session.cached == []
    assert [step.token for step in run(session, PROMPT, DecodeConfig(**WIDE), limit=3)[0]] == [2, 5, 7]


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 6))])
def test_a_fault_anywhere_is_named_or_not_met(part):
    faults, fine, cases = 0, 0, CASES // 2
    for case in range(cases):
        rng = random.Random(f"{part}, {case}")
        draw = Draw(rng.randint)
        sound, often = a_table(draw), draw.one(10, 30, 100)

        def lookup(
            prefix: tuple[int, ...], sound: helpers.Lookup = sound, often: int = often
        ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            row, state = sound(prefix)
            ill = hash(prefix) % often == 0
            return (np.full_like(row, np.nan), np.full_like(state, np.nan)) if ill else (row, state)

        schedule, guessing = a_schedule(draw), a_guessing(draw)
        engine = Infectious(lookup)
        session = Chat(engine, schedule, guessing.source())
        for turn in (a_turn(draw, first=True) for _ in range(3)):
            config, fallback = turn.config, turn.fallback
            expected = sequential(sound, turn.drawn, config, fallback, turn.eos)
            if isinstance(session.session.drafts, Guesser):
                session.session.drafts.guess = guessing.guess(turn.drawn + expected.tokens)
            engine.culprits, complaint = [], ""
            try:
                steps, _ = run(session, turn.drawn, config, fallback=fallback, eos=turn.eos)
            except NumericsError as error:
                complaint = str(error)
            if complaint:
                position, token = engine.culprits[0]
                assert f"hidden state at position {position} (token {token})" in complaint
                assert session.cached == []
                assert engine.entries(512) == [None] * 512
                faults += 1
            else:
                assert engine.culprits == []
                assert [step.token for step in steps] == expected.tokens
                fine += 1
    assert min(faults, fine) > cases // 4
