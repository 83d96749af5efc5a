"""Aligned decoding: agents accept or reject each token of a frozen LLM (MARA, arXiv 2505.19743).

    prefill → candidates ─┬─ one:     take it                                        ─┬─→ emit → commit → candidates → …
                          └─ several: run them; the first accepted, or the fallback  ─┘

docs/internals/method.md is the specification. Candidates of one position are *siblings*: each runs after the same
prefix. A pass may hold several of them and, under the first, a *draft*: guessed tokens, each judged by the same rule.
So every schedule of passes emits what the sequential procedure emits. After "the cat", a pass of three candidates
(sat, ran, lay) and a draft of two tokens (on, a):

    row              0     1     2     3     4
    token           sat    on    a    ran   lay       the cache holds the (slot 0) and cat (slot 1)
    position         2     3     4     2     2        a row attends to the slots below its position, and to itself
    slot             2     3     4     5     6        where its KV entry is written

sat accepted: its entry is in place, and so is that of "on" if "on" is then the next position's only candidate, or its
first and accepted. ran accepted: its entry moves from slot 5 to slot 2. What lies behind the sequence is overwritten.

The loop is a generator: it yields the passes that it needs and receives their outputs, and yields a Step for each
emitted token. Between two of them its only state is the cache and its own local variables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mara_runtime.candidates import Candidates, sample, select
from mara_runtime.config import DecodeConfig
from mara_runtime.decision import Decision, Examined, states_of
from mara_runtime.engines.base import Engine, Pass, StepOutput, is_finite
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.errors import NumericsError
from mara_runtime.manifest import Noise
from mara_runtime.passes import fill, find_fault
from mara_runtime.schedule.base import Company, PassContext, Schedule
from mara_runtime.schedule.drafts import NO_DRAFT, Draft, DraftSource
from mara_runtime.stats import Stats, Step
from mara_runtime.tensors import DRAFT_ROWS

T = TypeVar("T")
Events = Generator[Pass | Step, StepOutput, T]
"""Yields passes to run and steps; receives the output of a pass, and nothing for a step."""


@dataclass(frozen=True)
class Session:
    """What outlives an answer: the cache, and what was learned."""

    cache: KVCache
    """of the engine's `place`"""
    schedule: Schedule
    drafts: DraftSource | None = None
    """None: nothing is drafted"""
    noise: Noise | None = None
    """None: unknown"""
    company: Company = field(default_factory=Company)
    """who shares the next pass; kept up to date by whoever runs the passes"""
    place: int = 0


@dataclass(frozen=True)
class Request:
    """What to answer, and how."""

    prompt: Sequence[int]
    """token ids, at least one; with `limit` and the spare slots of a decision they fit into the cache"""
    config: DecodeConfig
    fallback: str
    """the first or the last candidate, emitted when all are rejected"""
    eos_token_ids: Set[int]
    """each ends the answer"""
    limit: int
    """tokens to emit at most, ≥ 1"""
    ends: Callable[[int], bool] = lambda _: False
    """told each emitted token: whether the answer ends with it, as with the last of a stop text"""
    states: bool = False
    """whether steps have the hidden states of the examined candidates"""


def decode(engine: Engine, session: Session, request: Request, stats: Stats) -> Iterator[Step]:
    """The steps of one answer, whose passes run on the engine by themselves; `stats` is filled on the way.

    Raises NumericsError with the position.
    """
    answer = conversation(session, request, stats)
    event = next(answer, None)
    while event is not None:
        if isinstance(event, Pass):
            event = answer.send(engine.run(event, session.place))
        else:
            yield event
            event = next(answer, None)


def conversation(session: Session, request: Request, stats: Stats) -> Events[None]:
    """The passes and steps of one answer, for whoever runs the passes; see `decode`."""
    clock = _Clock()
    decoder = _Decoder(session, request, stats)
    try:
        candidates = yield from decoder.prefill()
        stats.prefill_ms = clock.lap_ms()
        events = decoder.steps(candidates)
        event = next(events)
        while True:
            if isinstance(event, Pass):
                event = events.send((yield event))
                continue
            stats.record(event, request.config, session.noise)
            stats.decode_ms += clock.lap_ms()
            ended = request.ends(event.token) or event.token in request.eos_token_ids or stats.tokens >= request.limit
            yield event
            clock.lap_ms()  # the caller's time
            if ended:
                return
            event = next(events)
    except NumericsError:
        session.cache.clear()  # a NaN left in a slot would reach the next answer
        raise


class _Decoder:
    """One answer in the making."""

    def __init__(self, session: Session, request: Request, stats: Stats) -> None:
        self._cache, self._schedule, self._company = session.cache, session.schedule, session.company
        self._request, self._config, self._stats = request, request.config, stats
        self._rng = np.random.default_rng(self._config.seed)
        # a draft continues the first choice of its position: other strategies and orders look elsewhere first
        in_order = self._config.strategy == "top1" and self._config.order == "ranked"
        self._drafts = session.drafts if (in_order if self._config.align else not self._config.sample) else None

    def prefill(self) -> Events[Candidates]:
        """Fill the cache with what it lacks of the prompt; returns the first position's candidates."""
        prompt, cache = self._request.prompt, self._cache
        self._stats.prompt_tokens, self._stats.reused_tokens = len(prompt), cache.reuse(prompt)
        out = yield from fill(cache, prompt, self._company)
        if not is_finite(out):
            yield from find_fault(cache, (), Pass(prompt, range(len(prompt)), 0), judged=False)
        if self._drafts is not None:
            self._drafts.begin(prompt)
        (candidates,) = self._next_candidates(out).values()
        return candidates

    def steps(self, candidates: Candidates) -> Events[None]:
        """The main path: tokens without end, from the first position's candidates on."""
        rejected: list[Examined] = []  # the first candidate, if a draft has examined it
        while True:
            if self._config.align and len(candidates) > 1:
                step, next_candidates, draft = yield from self._decide(candidates, rejected)
            else:
                step, next_candidates, draft = self._take_only(candidates), None, []
            yield step
            if next_candidates is None:  # the token has not run yet, or not through the LM head
                next_candidates, draft = yield from self._run_token(step)
            candidates, rejected = yield from self._confirm(draft, next_candidates)

    def _take_only(self, candidates: Candidates) -> Step:
        """The token of a position at which there is nothing to decide."""
        pick = sample(candidates, self._config.temperature, self._rng) if self._config.sample else 0
        states: dict[int, NDArray[np.float32]] | None = {} if self._request.states else None
        token, position = int(candidates.ids[pick]), len(self._cache.tokens)
        return Step(token, position, candidates, pick + 1, {}, forced=False, states=states)

    def _decide(
        self, candidates: Candidates, examined: Sequence[Examined]
    ) -> Events[tuple[Step, Candidates | None, list[Examined]]]:
        """Examine candidates until one is accepted or all are rejected.

        Returns the step, the candidates after it (None: it has yet to run), and the draft that was run after it.
        """
        config = self._config
        decision = Decision(candidates, config, self._request.fallback, len(self._cache.tokens), examined)
        while not decision.complete:
            draft = NO_DRAFT if decision.examined else self._draft(int(candidates.ids[0]), after=1)
            plan = self._schedule.plan(decision.context(draft, self._company))
            work, ranks = decision.next_pass(plan.candidates, draft.tokens[: plan.drafted])
            out = yield from self._run(work)
            self._stats.drafted += plan.drafted
            decision.add(work, ranks, out, self._next_candidates(out))
        self._schedule.update(decision.probabilities, decision.margins, config.threshold)
        step, picked = decision.pick(self._rng)
        if picked.next_candidates is not None:
            self._commit(step, picked.slot)
        return step, picked.next_candidates, decision.draft if picked.rank == 0 else []

    def _run_token(self, step: Step) -> Events[tuple[Candidates, list[Examined]]]:
        """Run an emitted token, and a draft after it. Returns the candidates after the token, and the draft."""
        start, draft = len(self._cache.tokens), self._draft(step.token)
        count = self._schedule.plan(PassContext(start, np.empty(0), draft=draft, company=self._company)).drafted
        mix = self._config.mix if self._config.align else None
        work = Pass.sequence([step.token, *draft.tokens[:count]], start, mix=mix)
        out = yield from self._run(work)
        self._stats.drafted += count
        following = self._next_candidates(out)
        margins = out.margins.tolist() or [0.0] * count  # plain decoding asks no agent
        states = states_of(out, count)
        self._commit(step, start)
        return following[0], [
            Examined(0, work.tokens[row], margins[row - 1], start + row, following[row], states[row - 1])
            for row in range(1, 1 + count)
        ]

    def _confirm(
        self, draft: Sequence[Examined], candidates: Candidates
    ) -> Generator[Step, StepOutput, tuple[Candidates, list[Examined]]]:
        """Emit the drafted tokens that the sequential procedure emits: the only candidate, or the first and accepted.

        Returns the candidates of the position after them, and the one that the draft has examined there.
        """
        for drafted in draft:
            margins: dict[int, float] = {}
            states: dict[int, NDArray[np.float32]] | None = {} if self._request.states else None
            if int(candidates.ids[0]) != drafted.token:
                break
            if len(candidates) > 1:
                if not drafted.margin > self._config.threshold:
                    return candidates, [drafted]
                margins = {1: drafted.margin}
                states = None if drafted.state is None else {1: drafted.state}
                self._schedule.update(candidates.probabilities, [drafted.margin], self._config.threshold)
            step = Step(drafted.token, drafted.slot, candidates, 1, margins, False, drafted=True, states=states)
            self._commit(step, drafted.slot)
            yield step
            assert drafted.next_candidates is not None  # all drafted rows go through the LM head
            candidates = drafted.next_candidates
        return candidates, []

    def _commit(self, step: Step, slot: int) -> None:
        """The sequence goes on with this token; its KV entry lies in `slot`."""
        self._cache.commit(step.token, slot)
        if self._drafts is not None:
            self._drafts.extend(step.token, first_choice=step.rank == 1 and not step.forced)

    def _draft(self, token: int, after: int = 0) -> Draft:
        """Guess what follows `token`, up to an end-of-sequence id. after: tokens that will be emitted before it."""
        if self._drafts is None or token in self._request.eos_token_ids:
            return NO_DRAFT
        most = DRAFT_ROWS if self._config.draft is None else self._config.draft
        draft = self._drafts.draft(token, min(most, self._request.limit - self._stats.tokens - after))
        end = next((i for i, guess in enumerate(draft.tokens, 1) if guess in self._request.eos_token_ids), None)
        return Draft(draft.tokens[:end], draft.chances[:end])

    def _next_candidates(self, out: StepOutput) -> dict[int, Candidates]:
        """{row: candidates of the position after it} of the rows that went through the LM head."""
        greedy = not (self._config.align or self._config.sample)
        top_k, top_p = self._config.candidates
        normalisers = out.log_normaliser.tolist()
        return {
            row: select(out.top_ids[i], out.top_logits[i], normalisers[i], 1 if greedy else top_k, top_p)
            for i, row in enumerate(out.rows.tolist())
        }

    def _run(self, work: Pass) -> Events[StepOutput]:
        """Run and count a pass after the prompt."""
        if self._request.states:
            work = replace(work, hidden_rows=work.agent_rows)
        started = time.perf_counter()
        out = yield work
        self._stats.engine_ms += (time.perf_counter() - started) * 1e3
        self._stats.forwards += 1
        self._stats.rows += len(work.tokens)
        if not is_finite(out):
            yield from find_fault(self._cache, list(self._cache.tokens), work, judged=self._config.align)
        return out


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the previous lap."""
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) * 1e3, now
        return elapsed
