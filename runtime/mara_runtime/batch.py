"""Several conversations at once: what they ask for next goes into one pass of the engine.

    waiting → seated: prompt, a chunk at a time ─┬─→ token, token, … → done: its place is free for the next
                      (runs alone)               └─ shares each pass with all others

A conversation is the decode loop as a generator (decode.py): it asks for a pass and is sent what came of it. Joining
and leaving happen between two passes. A row's numbers do not depend on the rows beside it: company changes no answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mara_runtime.answer import Assembler, Piece
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Events, Request, Session, conversation
from mara_runtime.engines.base import Engine, Pass, StepOutput
from mara_runtime.errors import MaraError, PromptError
from mara_runtime.stats import Stats, Step

NARROW = 32
"""Rows at most of a pass that others share; a wider one, part of a prompt, gains nothing by it and runs alone."""


@dataclass(eq=False)
class Job:
    """A request, and what has become of it."""

    request: Request
    stats: Stats = field(default_factory=Stats)
    done: bool = False
    """complete, cancelled, or ended by `error`"""
    error: MaraError | None = None

    @property
    def agents(self) -> tuple[str, ...]:
        """Those that it is decoded with."""
        config = self.request.config
        return tuple(config.agents or ()) if config.align else ()

    @property
    def slots(self) -> int:
        """KV slots that prompt and answer may need."""
        return len(self.request.prompt) + self.request.limit


@dataclass(eq=False)
class _Seat:
    """An answer in the making, in its place."""

    job: Job
    session: Session
    events: Events[None]
    work: Pass | None = None
    """what it waits for; None: it has not begun"""

    @property
    def place(self) -> int:
        return self.session.place

    @property
    def alone(self) -> bool:
        """Whether its pass runs by itself."""
        return self.work is not None and (len(self.work.tokens) > NARROW or self.work.logits)


Event = tuple[Job, Step | MaraError]
"""A token of an answer, or the error that ended it."""


class Batcher:
    """Decodes as many requests at once as there are places; others wait, and are served in the order of arrival.

    Everyone seated takes part in the one pass of each step; but of wide passes, which run alone, there is one a step.
    An error of one request (NumericsError, say) ends it alone. Hold the lock of the engine's places.

    session: makes what outlives an answer, for a place and a request, whose `config` names its agents where it aligns.
    share: a prompt begins with what any place holds of it; otherwise with nothing.
    budget_slots: of prompts and answers that are seated at once, together; default: no bound but the engine's.
    """

    def __init__(
        self,
        engine: Engine,
        session: Callable[[int, Request], Session],
        *,
        share: bool = True,
        budget_slots: int | None = None,
    ) -> None:
        self._engine, self._session, self._share, self._budget = engine, session, share, budget_slots
        self._waiting = deque[Job]()
        self._seats: dict[int, _Seat] = {}  # by place, in the order of arrival
        self._agents: tuple[str, ...] = ()  # in use, as far as is known
        self._unfit: Job | None = None  # whose agents had no room beside those of others
        self._last_alone = -1  # place of the wide pass before
        self._rows: dict[int, int] = {}  # of the last shared pass, by place
        self._events: list[Event] = []  # to be returned

    @property
    def busy(self) -> bool:
        """Whether anyone is seated or waits."""
        return bool(self._seats or self._waiting or self._events)

    @property
    def seated(self) -> int:
        """Places in use."""
        return len(self._seats)

    @property
    def waiting(self) -> int:
        """Requests that have no place yet."""
        return len(self._waiting)

    def submit(self, request: Request, stats: Stats | None = None) -> Job:
        """Queue a request. stats: filled on the way. Raises PromptError for one that alone exceeds the budget."""
        job = Job(request, stats or Stats())
        if self._budget is not None and job.slots > self._budget:
            raise PromptError(
                f"the prompt has {len(request.prompt)} tokens and the answer may have {request.limit}: more than the "
                f"{self._budget} KV slots for all conversations; shorten the prompt, or lower --max-new-tokens"
            )
        self._waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """End an answer; what its place holds stays there."""
        if job in self._waiting:
            self._waiting.remove(job)
        for seat in [*self._seats.values()]:
            if seat.job is job:
                self._leave(seat)
        job.done = True

    def run(self) -> Iterator[Event]:
        """Serve until nobody waits."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Event]:
        """Seat whom there is room for, run the shared pass and at most one wide one; returns what this settled.

        After an exception that is no MaraError, an interrupt say, `step` goes on where it was; only an answer whose own
        code raised has ended.
        """
        self._admit()
        if not set(self._needed()) <= set(self._agents):  # those of one more could not be had
            self._use(self._needed())
        for seat in [*self._seats.values()]:
            if seat.work is None:
                self._meet(seat)
                self._resume(seat, None)
        seats = sorted(self._seats.values(), key=lambda seat: seat.place)
        shared, wide = [s for s in seats if not s.alone], [s for s in seats if s.alone]
        self._rows = {seat.place: len(seat.work.tokens) for seat in shared if seat.work is not None}
        for seat in seats:
            self._meet(seat)
        if shared:
            self._run(shared)
        if wide:  # prompts in turn, so that answers go on between their chunks
            seat = next((s for s in wide if s.place > self._last_alone), wide[0])
            self._last_alone = seat.place
            self._run([seat])
        events, self._events = self._events, []
        return events

    # ── seats ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self) -> None:
        while self._waiting and len(self._seats) < len(self._engine.places):
            job = self._waiting[0]
            reserved = sum(seat.job.slots for seat in self._seats.values())
            if self._budget is not None and reserved + job.slots > self._budget:
                return
            if self._seats and job is self._unfit:
                return
            try:
                if job.agents:
                    self._use((*self._needed(), *job.agents))
            except MaraError as error:
                if self._seats:  # there may be room for them when it is alone
                    self._unfit = job
                    return
                self._end(job, error)
            else:
                self._seat(job)
            self._waiting.popleft()

    def _needed(self) -> list[str]:
        """Agents of everyone seated."""
        return [name for seat in self._seats.values() for name in seat.job.agents]

    def _use(self, agents: Sequence[str]) -> None:
        """Take these agents, each once. Raises BundleError or EngineError."""
        names = tuple(dict.fromkeys(agents))
        if names != self._agents:
            self._agents = ()  # until it has succeeded
            self._engine.use(names)
            self._agents = names

    def _seat(self, job: Job) -> None:
        request, places = job.request, self._engine.places
        free = [place for place in range(len(places)) if place not in self._seats]
        try:
            if self._share:
                place = places.seat(request.prompt, free)
            else:
                place = free[0]
                places[place].tokens.clear()
            session = self._session(place, request)
        except MaraError as error:
            self._end(job, error)
            return
        self._seats[place] = _Seat(job, session, conversation(session, request, job.stats))

    def _meet(self, seat: _Seat) -> None:
        """Let it know who shares its next pass, or waits for it."""
        company, rows = seat.session.company, self._rows
        company.rows = sum(rows.values()) - rows.get(seat.place, 0)
        company.conversations = len(rows) - (seat.place in rows)

    def _leave(self, seat: _Seat) -> None:
        seat.events.close()
        del self._seats[seat.place]
        self._rows.pop(seat.place, None)
        seat.job.done = True

    def _end(self, job: Job, error: MaraError) -> None:
        job.done, job.error = True, error
        self._events.append((job, error))

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, seats: Sequence[_Seat]) -> None:
        """Run what they ask for in one pass, and hand each what came of it."""
        works = [(seat.place, self._spread(seat)) for seat in seats]
        try:
            found = self._engine.run_together(works)
        except MaraError as error:
            if len(seats) == 1:
                self._fail(seats[0], error)
            else:  # whose is it? A pass may run again
                for seat in seats:
                    self._run([seat])
            return
        for seat, out in zip(seats, found, strict=True):
            self._resume(seat, out)

    def _spread(self, seat: _Seat) -> Pass:
        """Its pass, with a mix of all agents in use: those that are not its own have no part."""
        work, agents = seat.work, seat.job.agents
        assert work is not None
        if not agents or agents == self._agents or not len(work.agent_rows):
            return work
        given = np.asarray(work.mix, np.float32)
        mix = np.zeros((*given.shape[:-1], len(self._agents)), np.float32)
        mix[..., [self._agents.index(name) for name in agents]] = given
        return replace(work, mix=mix)

    def _resume(self, seat: _Seat, out: StepOutput | None) -> None:
        """Send what came of its pass, and take its tokens until it asks for another."""
        try:
            event = next(seat.events) if out is None else seat.events.send(out)
            while isinstance(event, Step):
                self._events.append((seat.job, event))
                event = next(seat.events)
            seat.work = event
        except StopIteration:
            self._leave(seat)
        except MaraError as error:
            self._fail(seat, error)
        except BaseException:
            self._leave(seat)
            raise

    def _fail(self, seat: _Seat, error: MaraError) -> None:
        """The error is its own: the others go on, and its place is clear."""
        self._leave(seat)
        self._engine.places[seat.place].clear()
        self._end(seat.job, error)


Prepare = Callable[[list[int], DecodeConfig, Sequence[int], bool], tuple[Request, Assembler]]
"""Of token ids, a configuration in force, tokens whose text the answer continues, and whether steps have states."""


class Answers:
    """What a batcher decodes, as pieces of text. Others may join between two passes.

    lock: of the engine's places, held during each step. check: raises MaraError if another call has taken the engine.
    """

    def __init__(
        self, batcher: Batcher, prepare: Prepare, lock: AbstractContextManager[Any], check: Callable[[], None]
    ) -> None:
        self.batcher = batcher
        self._prepare, self._lock, self._check = prepare, lock, check
        self._assemblers: dict[Job, Assembler] = {}

    def submit(self, ids: list[int], config: DecodeConfig, context: Sequence[int] = (), states: bool = False) -> Job:
        """Queue an answer; see `AlignedDecoder.encode` and `resolve` for what it takes. Raises PromptError."""
        request, assembler = self._prepare(ids, config, context, states)
        job = self.batcher.submit(request, assembler.stats)
        self._assemblers[job] = assembler
        return job

    def cancel(self, job: Job) -> None:
        """End an answer: its place is free for the next step."""
        with self._lock:
            self._assemblers.pop(job, None)
            self.batcher.cancel(job)

    def step(self) -> list[tuple[Job, Piece | MaraError]]:
        """Run the next passes; returns what came of them: pieces, the last of an answer with its result, and errors."""
        told: list[tuple[Job, Piece | MaraError]] = []
        with self._lock:
            self._check()
            for job, event in self.batcher.step():
                if job not in self._assemblers:  # cancelled
                    continue
                item = event if isinstance(event, MaraError) else self._assemblers[job].piece(event)
                told.append((job, item))
                if isinstance(item, MaraError) or item.result is not None:
                    del self._assemblers[job]
        return told
