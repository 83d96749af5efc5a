"""Requests over a table that share passes, and each of them by the sequential procedure alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mara_runtime.batch import Batcher, Event, Job
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Request, Session
from mara_runtime.engines.base import Engine
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Schedule
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Step
from tests.unit import helpers
from tests.unit.sessions import ALONE, VOCAB, Draw, a_config

SLOTS = 128
TABLE = helpers.hash_table(7, VOCAB, 256, 4.0, memory=3)
CONFIG = DecodeConfig(top_k=4, top_p=1.0, max_new_tokens=12, agents=ALONE)
PLAIN = DecodeConfig(align=False, max_new_tokens=12)


class Crowd:
    """A batcher over a table, or over another engine of the same model, and what it returned, by answer.

    schedule: of all requests, or of each; by default adaptive, with made up costs.
    """

    def __init__(
        self,
        table: helpers.Lookup,
        places: int = 8,
        *,
        engine: Engine | None = None,
        judges: Mapping[str, helpers.Judge] = helpers.AGENTS,
        schedule: Schedule | Callable[[Request], Schedule] | None = None,
        **options: Any,
    ) -> None:
        self.table, self.judges = table, judges
        self.engine: Any = engine or helpers.CountingEngine(table, slots=SLOTS)
        self.engine.places.open(places)
        self.sessions: dict[int, Session] = {}
        """the last of each place"""

        def session(place: int, request: Request) -> Session:
            planner = schedule(request) if callable(schedule) else schedule or Adaptive(helpers.COST)
            made = Session(self.engine.places[place], planner, NGrams(), place=place)
            self.sessions[place] = made
            return made

        self.batcher = Batcher(self.engine, session, **options)
        self.steps: dict[Job, list[Step]] = {}
        self.submitted: list[Job] = []

    def submit(self, prompt: Sequence[int], config: DecodeConfig, fallback: str = "first", **request: Any) -> Job:
        if config.align and not config.agents:
            config = replace(config, agents=ALONE)
        request = {"eos_token_ids": frozenset(), "limit": config.max_new_tokens, **request}
        answer = self.batcher.submit(Request(prompt, config, fallback, **request))
        self.submitted.append(answer)
        self.steps[answer] = []
        return answer

    def hear(self, events: Sequence[Event]) -> None:
        for answer, event in events:
            if isinstance(event, Step):
                assert answer.error is None
                self.steps[answer].append(event)
            else:
                assert (answer.done, answer.error) == (True, event)

    def step(self) -> None:
        self.hear(self.batcher.step())

    def run(self) -> None:
        while self.batcher.busy:
            self.step()

    def tokens(self, answer: Job) -> list[int]:
        return [step.token for step in self.steps[answer]]

    def check(self, answer: Job, complete: bool = True) -> None:
        """It is what the sequential procedure gives, and so are its counters; complete, unless an error ended it."""
        request, steps = answer.request, self.steps[answer]
        expected = helpers.sequential(
            self.table,
            request.prompt,
            request.config,
            request.fallback,
            request.eos_token_ids,
            request.limit,
            self.judges,
        )
        emitted = expected.positions[: len(steps)]
        assert [step.token for step in steps] == [position.token for position in emitted]
        assert [step.rank for step in steps] == [position.rank for position in emitted]
        assert [step.margins for step in steps] == [position.margins for position in emitted]
        if steps:
            assert answer.stats.algorithm() == expected.counts[len(steps) - 1]
        if request.states:
            check_states(self.table, request.prompt, steps)
        else:
            assert all(step.states is None for step in steps)
        if complete and answer.error is None:
            assert len(steps) == len(expected.positions)

    def check_places(self) -> None:
        """Every cache of a table holds what it says."""
        for place, cache in enumerate(self.engine.places):
            entries = self.engine.memories[place].entries
            assert entries[: len(cache.tokens)] == [(token, index) for index, token in enumerate(cache.tokens)]


def check_states(table: helpers.Lookup, prompt: Sequence[int], steps: Sequence[Step]) -> None:
    """Every step has the hidden states of the examined candidates."""
    text = [*prompt, *(step.token for step in steps)]
    for step in steps:
        assert step.states is not None
        assert list(step.states) == list(step.margins)
        for rank, state in step.states.items():
            candidate = (*text[: step.position], int(step.candidates.ids[rank - 1]))
            assert state.tolist() == table(candidate)[1].tolist()


def some_config(draw: Draw) -> DecodeConfig:
    """Any strategy, order, threshold, seed, agents and draft; or plain decoding."""
    config = a_config(draw, draw.one("any", "any", "verified", "verified", "greedy", "sampled"))
    return replace(config, agents=config.agents or ALONE) if config.align else config
