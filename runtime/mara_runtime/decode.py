"""The aligned decode loop: token-level accept or reject beside a frozen LLM.

Source: MARA (arXiv 2505.19743); docs/method.md is the specification. At each position the LLM's next-token
distribution gives a list of candidates; each is run through the LLM after the same prefix, and the agent looks at its
last hidden state. The first accepted candidate is emitted, and its next tokens and KV entry carry on the sequence.

A pass may hold several candidates of one position, and under the first of them a drafted continuation, each token of
which is verified by the same rule: it is confirmed if it is the only candidate of its position, or the first one and
accepted. So every pass settles what the sequential procedure would have settled, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mara_runtime.candidates import Candidates, sample, select
from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import Engine, Pass, StepOutput, check_row, is_finite
from mara_runtime.errors import NumericsError
from mara_runtime.manifest import Noise
from mara_runtime.schedule.base import PassContext, Schedule
from mara_runtime.schedule.drafts import NO_DRAFT, Draft, DraftSource
from mara_runtime.stats import Stats
from mara_runtime.strategies import choose, examination_order
from mara_runtime.tensors import DRAFT_ROWS

PREFILL_ROWS = 256
"""Rows of one prefill pass: scores and mask of a longer one grow to gigabytes."""


@dataclass(frozen=True)
class Step:
    """One emitted token and how it came about."""

    token: int
    position: int
    """of the token in the sequence, prompt included, from 0"""
    candidates: Candidates
    """by LM rank; in plain greedy decoding the best alone"""
    rank: int
    """LM rank of the token among the candidates, from 1"""
    margins: dict[int, float]
    """{LM rank: margin} of the examined candidates; empty when there was nothing to decide"""
    forced: bool
    """all candidates were rejected"""
    drafted: bool = False
    """it was guessed, and confirmed"""


@dataclass
class _Examined:
    rank: int  # 0-based LM rank
    margin: float
    slot: int  # where its KV entry lies
    following: Candidates | None = None  # of the position after it, if its row went through the head


@dataclass
class _Decision:
    """A position at which several candidates compete, as far as they were examined."""

    candidates: Candidates
    order: Sequence[int]
    """of examination: 0-based LM ranks"""
    probabilities: NDArray[np.float64]
    """in that order"""
    fallback: int
    """0-based LM rank of the candidate that is emitted when all are rejected"""
    examined: list[_Examined] = field(default_factory=list)
    rows_placed: int = 0
    """rows of its passes so far, in the slots from the position's own on"""

    @property
    def margins(self) -> list[float]:
        return [e.margin for e in self.examined]

    @property
    def complete(self) -> bool:
        return len(self.examined) == len(self.candidates)


@dataclass
class Session:
    """What an answer needs from outside, and leaves behind: the engine and what its cache holds, what was learned."""

    engine: Engine
    schedule: Schedule
    drafts: DraftSource | None = None
    """None: nothing is drafted"""
    noise: Noise | None = None
    """None: not known"""
    held: list[int] = field(default_factory=list)
    """tokens whose KV entries lie in slots 0, 1, …; true at any time, also when an answer is left half-way"""


def decode(
    session: Session,
    prompt: Sequence[int],
    config: DecodeConfig,
    *,
    fallback: str,
    eos_token_ids: Set[int],
    limit: int,
    stats: Stats,
) -> Iterator[Step]:
    """Emit up to `limit` tokens after `prompt`, ending with an end-of-sequence id if one is chosen.

    prompt: token ids, at least one. The caller ensures that prompt and answer, and the spare slots of a decision, fit
    into the engine's cache. `stats` is filled as the loop goes. Raises NumericsError, naming the position.
    """
    clock = _Clock()
    loop = _Loop(session, config, fallback, eos_token_ids, stats)
    try:
        steps = loop.prefill(prompt)
        stats.prefill_ms = clock.lap_ms()
        while True:
            for step in steps:
                stats.saw(step, config, session.noise)
                stats.decode_ms += clock.lap_ms()
                yield step
                clock.lap_ms()  # the caller's time
                if step.token in eos_token_ids or stats.tokens >= limit:
                    return
            steps = loop.next_pass(room=limit - stats.tokens)
    except NumericsError:
        _forget(session)  # a NaN left in a slot would reach the next answer
        raise


class _Loop:
    """One answer in the making. A position is settled either by its only candidate, or by a decision.

    `_now` are the candidates of position len(held). When that position's token is settled before it was run, as a
    single candidate is, its step is `_pending`, and the next pass runs it. A decision that takes more than one pass is
    `_decision`.
    """

    def __init__(
        self, session: Session, config: DecodeConfig, fallback: str, eos_token_ids: Set[int], stats: Stats
    ) -> None:
        self._session, self._config, self._fallback = session, config, fallback
        self._eos, self._stats = eos_token_ids, stats
        self._rng = np.random.default_rng(config.seed)
        # a draft is verified as the first choice of its position: other strategies and orders look elsewhere first
        ranked = config.strategy == "top1" and config.order == "ranked" if config.align else not config.sample
        self._drafts = session.drafts if ranked else None
        self._exhaustive = config.strategy != "top1"  # every candidate is examined
        self._now: Candidates
        self._pending: Step | None = None
        self._decision: _Decision | None = None

    # ── the prompt ───────────────────────────────────────────────────────────────────────────────────────────────────

    def prefill(self, prompt: Sequence[int]) -> list[Step]:
        """Fill the cache with the prompt, except for what it holds already; returns the steps that this settles."""
        held = self._session.held
        kept = 0
        while kept < min(len(held), len(prompt) - 1) and held[kept] == prompt[kept]:
            kept += 1
        del held[kept:]
        self._session.engine.begin(kept, len(prompt))
        self._stats.prompt_tokens, self._stats.reused_tokens = len(prompt), kept
        self._now = self._fill(prompt)
        if self._drafts is not None:
            self._drafts.begin(prompt)
        return self._settle()

    def _fill(self, tokens: Sequence[int]) -> Candidates:
        """Run what the cache does not hold of `tokens`; returns the candidates after the last."""
        held = self._session.held
        while len(held) < len(tokens):
            start = len(held)
            chunk = tokens[start : start + PREFILL_ROWS]
            last = start + len(chunk) == len(tokens)
            work = Pass(chunk, range(start, start + len(chunk)), start, [len(chunk) - 1] if last else [])
            out = self._session.engine.run(work)
            if not is_finite(out):
                self._find_fault([], Pass(tokens, range(len(tokens)), 0))
            held.extend(chunk)
        return self._following(out)[len(chunk) - 1]

    # ── one pass ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_pass(self, room: int) -> list[Step]:
        """Run one pass and return the tokens that it settles, maybe none. room: tokens that may still be emitted."""
        return self._advance(self._pending, room) if self._pending is not None else self._examine(room)

    def _advance(self, settled: Step, room: int) -> list[Step]:
        """Run the settled token, a draft behind it."""
        token, length = settled.token, len(self._session.held)
        draft = self._draft(token, room)
        count = self._session.schedule.plan(PassContext(length, np.empty(0), draft=draft)).drafted
        chain = [token, *draft.tokens[:count]]
        rows = range(len(chain))
        asked = rows[1:] if self._config.align else []
        out = self._run(Pass(chain, range(length, length + len(chain)), length, rows, asked, [-np.inf] * len(asked)))
        following = self._following(out)
        self._go_on(settled, following[0])
        self._stats.drafted += count
        steps = self._verify(chain[1:], out.margins.tolist(), [following[row] for row in rows[1:]])
        return steps + self._settle()

    def _examine(self, room: int) -> list[Step]:
        """Run candidates that were not examined yet, a draft under the first; decide, if that is enough."""
        if self._decision is None:
            self._decision = self._begin_decision()
        decision, config = self._decision, self._config
        start = len(decision.examined)
        draft = self._draft(int(self._now.ids[0]), room - 1) if start == 0 else NO_DRAFT
        plan = self._session.schedule.plan(
            PassContext(
                len(self._session.held),
                decision.probabilities,
                tuple(decision.margins),
                config.threshold,
                self._exhaustive,
                refeed=decision.order[0] == decision.fallback and config.strategy != "random",
                draft=draft,
            )
        )
        ranks = decision.order[start : start + plan.candidates]
        chain = draft.tokens[: plan.drafted]
        work, row_of = self._pass_of(decision, ranks, chain)
        out = self._run(work)
        decision.rows_placed += len(work.tokens)
        self._stats.drafted += len(chain)

        following = self._following(out)
        for e in decision.examined:
            if e.rank in row_of:  # the fallback, once more
                e.slot, e.following = work.slot + row_of[e.rank], following.get(row_of[e.rank])
        for rank in ranks:
            row = row_of[rank]
            decision.examined.append(_Examined(rank, float(out.margins[row]), work.slot + row, following.get(row)))
        if not decision.complete and (self._exhaustive or max(decision.margins) <= config.threshold):
            return []
        rows = range(1, 1 + len(chain))
        margins = [float(out.margins[row]) for row in rows]  # before another pass writes over them
        step = self._decide(decision)
        if step.rank > 1 or not chain:
            return [step, *self._settle()]
        return [step, *self._verify(chain, margins, [following[row] for row in rows]), *self._settle()]

    def _begin_decision(self) -> _Decision:
        now, config = self._now, self._config
        order = examination_order(config.order, len(now))
        probabilities = now.probabilities if config.order == "ranked" else now.probabilities[order]
        return _Decision(now, order, probabilities, 0 if self._fallback == "first" else len(now) - 1)

    def _pass_of(self, decision: _Decision, ranks: Sequence[int], chain: Sequence[int]) -> tuple[Pass, dict[int, int]]:
        """A pass of the candidates `ranks`, `chain` drafted under the first; and {LM rank: row}.

        Its rows are the first candidate, the draft, the other candidates, and maybe an earlier fallback once more.
        """
        config, ids, length = self._config, decision.candidates.ids, len(self._session.held)
        row_of = {rank: i + len(chain) * (i > 0) for i, rank in enumerate(ranks)}
        tokens = [int(ids[ranks[0]]), *chain, *(int(ids[rank]) for rank in ranks[1:])]
        positions = [length, *range(length + 1, length + 1 + len(chain)), *[length] * (len(ranks) - 1)]
        agent_rows = range(len(tokens))
        priorities = [-np.inf] * len(tokens)
        fallback_row = None
        if config.strategy != "random":
            for i, row in enumerate(row_of.values()):
                priorities[row] = -float(i) if config.strategy == "top1" else 0.0
            last = len(decision.examined) + len(ranks) == len(ids)
            if last and not any(margin > config.threshold for margin in decision.margins):
                known = any(e.rank == decision.fallback and e.following is not None for e in decision.examined)
                if not known and decision.fallback not in row_of:
                    row_of[decision.fallback] = len(tokens)
                    tokens.append(int(ids[decision.fallback]))
                    positions.append(length)
                fallback_row = None if known else row_of[decision.fallback]
        work = Pass(
            tokens,
            positions,
            slot=length + decision.rows_placed,
            head_rows=range(1 + len(chain)) if chain else (),
            agent_rows=agent_rows,
            priorities=priorities,
            margin_weight=float(config.strategy == "max_prob"),
            threshold=config.threshold,
            fallback_row=fallback_row,
        )
        return work, row_of

    def _decide(self, decision: _Decision) -> Step:
        """Emit the chosen one of the examined candidates."""
        config, examined, margins = self._config, decision.examined, decision.margins
        self._session.schedule.learn(decision.probabilities, margins, config.threshold)
        choice = choose(config.strategy, margins, config.threshold, self._rng)
        if choice is None:
            chosen = next(e for e in examined if e.rank == decision.fallback)
        else:
            chosen = examined[choice]
            if config.strategy == "top1":
                examined = examined[: choice + 1]  # the sequential procedure stops here
        step = Step(
            int(decision.candidates.ids[chosen.rank]),
            len(self._session.held),
            decision.candidates,
            chosen.rank + 1,
            {e.rank + 1: e.margin for e in examined},
            forced=choice is None,
        )
        if chosen.following is None:
            self._pending = step
        else:
            if chosen.slot != step.position:
                self._session.engine.move(chosen.slot, step.position)
            self._go_on(step, chosen.following)
        return step

    def _verify(self, chain: Sequence[int], margins: Sequence[float], following: Sequence[Candidates]) -> list[Step]:
        """The drafted tokens that the sequential procedure would have chosen. Their entries are in place."""
        steps = []
        for index, token in enumerate(chain):
            now, position = self._now, len(self._session.held)
            if int(now.ids[0]) != token:
                break
            seen = {}
            if len(now) > 1:
                margin = margins[index]
                seen = {1: margin}
                if not margin > self._config.threshold:  # so much of the decision is made
                    self._decision = self._begin_decision()
                    self._decision.examined.append(_Examined(0, margin, position, following[index]))
                    self._decision.rows_placed = 1
                    break
                self._session.schedule.learn(now.probabilities, [margin], self._config.threshold)
            steps.append(Step(token, position, now, 1, seen, forced=False, drafted=True))
            self._go_on(steps[-1], following[index])
        return steps

    def _settle(self) -> list[Step]:
        """Emit the token of a position at which there is nothing to decide."""
        if self._pending is not None or (self._config.align and len(self._now) > 1):
            return []
        pick = sample(self._now, self._config.temperature, self._rng) if self._config.sample else 0
        step = Step(int(self._now.ids[pick]), len(self._session.held), self._now, pick + 1, {}, forced=False)
        self._pending = step
        return [step]

    # ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self, step: Step, following: Candidates) -> None:
        """The token's entry is in its place; its successors are known."""
        self._session.held.append(step.token)
        if self._drafts is not None:
            self._drafts.extend(step.token, first_choice=step.rank == 1 and not step.forced)
        self._now, self._pending, self._decision = following, None, None

    def _draft(self, following: int, most: int) -> Draft:
        if self._drafts is None or following in self._eos:
            return NO_DRAFT
        wanted = DRAFT_ROWS if self._config.draft is None else self._config.draft
        draft = self._drafts.draft(following, min(most, wanted))
        for index, token in enumerate(draft.tokens):
            if token in self._eos:
                return Draft(draft.tokens[: index + 1], draft.chances[: index + 1])
        return draft

    def _following(self, out: StepOutput) -> dict[int, Candidates]:
        """{row: candidates of the position after it} of the rows that went through the head."""
        greedy = not (self._config.align or self._config.sample)
        top_k = 1 if greedy else self._config.top_k
        normalisers = out.log_normaliser.tolist()
        return {
            row: select(out.top_ids[i], out.top_logits[i], normalisers[i], top_k, self._config.top_p)
            for i, row in enumerate(out.rows.tolist())
        }

    def _run(self, work: Pass) -> StepOutput:
        started = time.perf_counter()
        out = self._session.engine.run(work)
        self._stats.engine_ms += (time.perf_counter() - started) * 1e3
        self._stats.forwards += 1
        self._stats.rows += len(work.tokens)
        if not is_finite(out):
            self._find_fault(list(self._session.held), work)
        return out

    def _find_fault(self, before: list[int], work: Pass) -> None:
        """Raise NumericsError for a pass, after the tokens `before`, that gave something that is not a number.

        A NaN reaches other rows of its pass, so the rows are run again, one at a time, on a clean cache.
        """
        _forget(self._session)
        if before:
            self._fill(before)
        for row, (token, position) in enumerate(zip(work.tokens, work.positions, strict=True)):
            slot = position if position > len(before) else work.slot + row  # a chain's, or a sibling's
            check_row(self._session.engine, int(token), position, slot, margin=self._config.align and bool(before))
        raise NumericsError(
            f"a pass at position {len(before)} gave numbers that are not finite, and finite ones when it was repeated: "
            "run again, and if it persists, suspect the memory or the driver"
        )


def _forget(session: Session) -> None:
    session.held.clear()
    session.engine.clear()


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap_ms(self) -> float:
        """Milliseconds since the previous lap."""
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) * 1e3, now
        return elapsed
