"""What every engine promises of several conversations; part of `Conformance` (tests/conformance.py)."""

import random
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest

from mara_runtime.batch import Batcher
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Request, Session
from mara_runtime.engines.base import Engine, Pass, is_finite
from mara_runtime.errors import EngineError
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Step
from tests.conformance_agents import MIXES, AgentConformance
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.written_model import CANDIDATES, CONTEXT, FINE, INFINITE, JUDGES, PLACES, SLOTS, table

Both = tuple[Engine, TableEngine]
WIDE = 11
"""Rows of a pass that some engine runs alone."""


class Conversation:
    """Random passes of one place, on an engine and on its table."""

    def __init__(self, rng: random.Random, place: int) -> None:
        self._rng, self.place, self.length = rng, place, 0

    def ask(self) -> Pass:
        rng = self._rng
        if self.length > CONTEXT - WIDE - 1:
            self.length = 0
        kind, width = rng.random(), rng.randint(1, 6)
        tokens = [rng.randrange(FINE) for _ in range(width if kind < 0.8 else WIDE)]
        chain = self.length == 0 or kind > 0.8
        if chain:
            self.work = Pass.prefill(tokens, self.length, last=True)
        elif kind > 0.7:
            self.work = Pass.full_outputs(tokens, [self.length] * width, self.length)
        else:
            self.work = Pass(
                tokens,
                [self.length] * width,
                self.length,
                head_rows=rng.choice([[], [0]]),
                agent_rows=range(width),
                mix=[1.0],
                priorities=[-float(i) for i in range(width)],
                threshold=rng.choice([-9.0, 0.0, 9.0]),
                fallback_row=rng.choice([None, width - 1]),
            )
        self._chain = chain
        return self.work

    def advance(self, engines: Both) -> None:
        """Keep a prompt whole, of candidates the last."""
        work = self.work
        for cache in (engine.places[self.place] for engine in engines):
            if self._chain:
                cache.extend(work.tokens)
            else:
                cache.commit(work.tokens[-1], work.slot + len(work.tokens) - 1)
        self.length += len(work.tokens) if self._chain else 1


class PlacesConformance(AgentConformance):
    """Tests of any engine on the written model."""

    def opened(self, engine: Engine) -> Both:
        """With a place for each of several conversations, as its table has."""
        if engine.places.most < PLACES:
            pytest.skip("the engine takes one conversation")
        both = engine, self.twin()
        for each in both:
            each.places.open(PLACES)
            for cache in each.places:
                cache.clear()
        return both

    @pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 6))])
    def test_whatever_conversations_ask_together_each_gets_what_it_gets_alone(self, engine: Engine, part: int) -> None:
        both, rng = self.opened(engine), random.Random(part)
        talks = [Conversation(rng, place) for place in range(PLACES)]
        for turn in range(60):
            asking = [talk for talk in talks if rng.random() < 0.7] or talks[:1]
            works = [(talk.place, talk.ask()) for talk in asking]
            for actual, expected in zip(*(each.run_together(works) for each in both), strict=True):
                self.check(actual, expected)
            for talk in asking:
                talk.advance(both)
            if turn % 20 == 10:  # a text goes on in another place
                source, target = rng.sample(talks, 2)
                text = list(both[1].places[source.place].tokens)
                copied = both[0].places[target.place].copy(source.place, text)
                target.length = len(text) if copied else 0
                if copied:
                    both[1].places[target.place].copy(source.place, text)
            if turn % 20 == 15:
                gone = rng.choice(talks)
                gone.length = 0
                for each in both:
                    each.places[gone.place].clear()

    def test_nan_stays_in_its_conversation(self, engine: Engine) -> None:
        both, sound, bad = self.opened(engine), (0, 2), 1

        def work(*tokens: int) -> Pass:
            return Pass(tokens, [position] * 2, position, [0], [0, 1], [0.0, -1.0], mix=[1.0])

        for position in range(20):
            works = [(place, work(place, 5)) for place in sound]
            asked = [*works, (bad, work(INFINITE, 1))] if position % 4 else works  # else it is idle between them
            found = dict(zip((place for place, _ in sorted(asked)), engine.run_together(sorted(asked)), strict=True))
            for (place, _), expected in zip(works, both[1].run_together(works), strict=True):
                self.check(found[place], expected)
                for each in both:
                    each.places[place].commit(5, position + 1)
            assert bad not in found or not is_finite(found[bad])
        engine.places[bad].clear()
        first = Pass([3], [0], 0, [0])
        self.check(engine.run(first, bad), both[1].run(first, bad))

    def test_an_infinite_margin_decides_nobody_else_s_election(self, engine: Engine) -> None:
        both = self.opened(engine)
        for each in both:
            each.use(["agent", "endless"])
        elected = set()
        for token in range(FINE):
            for mixes in permutations([(1.0, 0.0), (0.0, 1.0)]):
                works = [
                    (place, Pass([token, 5], [0, 0], 0, (), [0, 1], [0.0, -1.0], 1.0, mix=mix, fallback_row=1))
                    for place, mix in enumerate(mixes)
                ]
                for actual, expected in zip(*(each.run_together(works) for each in both), strict=True):
                    self.check(actual, expected)
                    elected.update(expected.rows.tolist())
        assert elected == {0, 1}

    def test_answers_in_company_are_those_of_the_sequential_procedure(self, engine: Engine) -> None:
        rng = random.Random(0)
        engine, _ = self.opened(engine)
        batcher = Batcher(engine, lambda place, _: session(engine, place))
        asked: dict[Any, Sequence[int]] = {}
        steps: dict[Any, list[Step]] = {}
        system = [rng.randrange(FINE) for _ in range(20)]  # that others begin with, too
        for turn in range(200):
            if len(asked) < 12 and turn % 3 == 0:
                prompt = rng.choice([[], system]) + [rng.randrange(FINE) for _ in range(rng.randint(1, 8))]
                config = DecodeConfig(
                    agents=rng.choice(MIXES[:2]),
                    top_k=rng.randint(1, CANDIDATES),
                    top_p=1.0,
                    threshold=rng.choice([-2.0, 0.0, 3.0]),
                    max_new_tokens=rng.randint(1, CONTEXT - len(prompt)),
                )
                answer = batcher.submit(Request(prompt, config, "last", frozenset(), config.max_new_tokens))
                asked[answer], steps[answer] = prompt, []
            for answer, event in batcher.step():
                assert isinstance(event, Step)
                steps[answer].append(event)
            if turn > 40 and not batcher.busy:
                break
        assert not batcher.busy
        for answer, prompt in asked.items():
            config = answer.request.config
            expected = helpers.sequential(table, prompt, config, "last", frozenset(), config.max_new_tokens, JUDGES)
            assert [step.token for step in steps[answer]] == expected.tokens
            assert [step.margins for step in steps[answer]] == [position.margins for position in expected.positions]


def session(engine: Engine, place: int) -> Session:
    return Session(engine.places[place], Adaptive(helpers.COST), NGrams(), place=place)

    def test_a_refused_pass_leaves_the_others_whole(self, engine: Engine) -> None:
        both = self.opened(engine)
        fine = [(place, Pass([1, 2], [3, 3], 3, [1])) for place in range(PLACES)]
        for each in both:
            for place, cache in enumerate(each.places):
                each.run(Pass.prefill([5, 4, 3 + place], 0, last=True), place)
                cache.extend([5, 4, 3 + place])
        with pytest.raises(EngineError, match=f"{SLOTS + 1} slots .* {SLOTS}"):
            engine.run_together([*fine[:-1], (PLACES - 1, Pass([1, 1], [3, 3], SLOTS - 1))])
        for actual, expected in zip(*(each.run_together(fine) for each in both), strict=True):
            self.check(actual, expected)
        assert [cache.tokens for cache in engine.places] == [[5, 4, 3 + place] for place in range(PLACES)]

    def test_more_places_than_an_engine_takes_are_refused(self, engine: Engine) -> None:
        most = engine.places.most
        with pytest.raises(EngineError, match=f"{most + 1} conversations at once are more than the {most}"):
            engine.places.open(most + 1)
