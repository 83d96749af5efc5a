"""The decode loop: every schedule, draft, strategy and order against the sequential procedure (sequential.py).

The language models are tables: logits and hidden state by prefix. TableEngine keeps a KV cache of tokens and positions,
so an entry that the loop leaves in a wrong slot is an error or another prefix, hence another answer.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.unit.sequential import candidates_of, sequential, work_of

from mara_runtime.config import FALLBACKS, ORDERS, SCHEDULES, STRATEGIES, DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import NumericsError
from mara_runtime.passes import PREFILL_ROWS
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan, Schedule
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NO_DRAFT, Draft, DraftSource, NGrams
from mara_runtime.stats import Stats, Step
from mara_runtime.tensors import DRAFT_ROWS, spare_slots
from tests.table_engine import TableEngine, TableMemory
from tests.unit import helpers

ONE_BY_ONE, TOGETHER = Fixed(1), Fixed(None)
NAMED: dict[str, Callable[[], Schedule]] = {
    "adaptive": lambda: Adaptive(helpers.COST),
    "one-by-one": lambda: ONE_BY_ONE,
    "together": lambda: TOGETHER,
}


class Chat:
    """An engine and what outlives its answers."""

    def __init__(self, engine: TableEngine, schedule: Schedule = ONE_BY_ONE, drafts: DraftSource | None = None) -> None:
        self.engine, self.session = engine, Session(engine.cache, schedule, drafts)
        if isinstance(drafts, Guesser):
            drafts.chat = self

    @property
    def cached(self) -> list[int]:
        return self.engine.cache.tokens

    def decode(
        self,
        prompt: Sequence[int],
        config: DecodeConfig,
        stats: Stats,
        fallback: str = "first",
        eos: set[int] | None = None,
        limit: int | None = None,
    ) -> Iterator[Step]:
        request = Request(prompt, config, fallback, eos or set(), limit or config.max_new_tokens)
        return decode(self.engine, self.session, request, stats)


def run(
    chat: TableEngine | Chat,
    prompt: Sequence[int],
    config: DecodeConfig,
    *,
    schedule: Schedule = ONE_BY_ONE,
    drafts: DraftSource | None = None,
    **request: Any,
) -> tuple[list[Step], Stats]:
    stats = Stats()
    chat = chat if isinstance(chat, Chat) else Chat(chat, schedule, drafts)
    return list(chat.decode(prompt, config, stats, **request)), stats


# ── schedules and drafts that know no mercy ──────────────────────────────────────────────────────────────────────────


class Wilful:
    """Plans what it was told to, whatever that costs: (candidates, drafted tokens) of one pass after the other."""

    def __init__(self, plans: Sequence[tuple[int, int]]) -> None:
        self._plans = plans
        self._turn = 0

    def plan(self, view: PassContext) -> PassPlan:
        candidates, drafted = self._plans[self._turn % len(self._plans)]
        self._turn += 1
        left = len(view.probabilities) - len(view.margins)
        return PassPlan(min(candidates, left), min(drafted, len(view.draft.tokens)))

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        """Nothing."""


class Watched:
    """Another schedule, and whether it was asked what the protocol says it is."""

    def __init__(self, inner: Schedule) -> None:
        self.inner = inner
        self.chat: Chat
        self.config: DecodeConfig
        self.fallback: str
        self.drafted = 0
        self.examined = (-1, 0)
        """position, and how many of its candidates were examined"""
        self.learned: list[tuple[list[float], list[float]]] = []
        """(probabilities, margins) of every decision"""

    def begin(self, chat: Chat, config: DecodeConfig, fallback: str) -> None:
        self.chat, self.config, self.fallback = chat, config, fallback
        self.drafted, self.examined = 0, (-1, 0)
        self.learned = []

    def plan(self, view: PassContext) -> PassPlan:
        count, seen, config = len(view.probabilities), len(view.margins), self.config
        assert view.length == len(self.chat.cached)
        assert count != 1
        if count:
            assert view.probabilities.sum() == pytest.approx(1.0)
            assert seen < count
            if config.order == "ranked":
                assert (np.diff(view.probabilities) <= 0).all()
            assert view.exhaustive == (config.strategy != "top1")
            assert view.exhaustive or all(margin <= config.threshold for margin in view.margins)
            position, examined = self.examined
            assert seen == examined if position == view.length else seen <= 1  # one may have been drafted
            first = {"ranked": 0, "best_last": 1, "reversed": count - 1}[config.order]
            again = first == {"first": 0, "last": count - 1}[self.fallback]
            assert view.rerun_fallback == (again and config.strategy != "random")
        assert (
            len(view.draft.tokens) == len(view.draft.chances) <= (DRAFT_ROWS if config.draft is None else config.draft)
        )
        assert view.draft == NO_DRAFT or not seen
        plan = self.inner.plan(view)
        assert min(1, count) <= plan.candidates <= count - seen
        assert 0 <= plan.drafted <= len(view.draft.tokens)
        self.drafted += plan.drafted
        self.examined = (view.length, seen + plan.candidates)
        return plan

    def update(self, probabilities: NDArray[np.float64], margins: Sequence[float], threshold: float) -> None:
        assert threshold == self.config.threshold
        self.learned.append((probabilities.tolist(), [float(margin) for margin in margins]))
        self.inner.update(probabilities, margins, threshold)


class Guesser:
    """A draft source that writes down what it is told. `guess` is handed the index of the token to guess first."""

    def __init__(self, guess: Callable[[int], Sequence[int]]) -> None:
        self.guess = guess
        self.told: list[int] = []
        self.choices: list[bool] = []
        self.asked: list[int] = []
        """`most`, one a draft"""
        self.chat: Chat | None = None

    def begin(self, tokens: Sequence[int]) -> None:
        self.told, self.choices = [int(token) for token in tokens], []

    def extend(self, token: int, first_choice: bool) -> None:
        self.told.append(token)
        self.choices.append(first_choice)

    def draft(self, following: int, most: int) -> Draft:
        assert self.chat is not None
        assert 0 <= most <= DRAFT_ROWS
        self.asked.append(most)
        tokens = tuple(self.guess(len(self.chat.cached) + 1))[:most]
        return Draft(tokens, (0.75,) * len(tokens))


# ── any table, any option ────────────────────────────────────────────────────────────────────────────────────────────

VOCAB = 9
MOST_PROMPT = 30
CASES = 250 * settings.default.max_examples // 100
"""Sessions of a part: more of them with `--hypothesis-profile=search`."""


@dataclass(frozen=True)
class Draw:
    """Draws whatever a case is made of, from `random` or from hypothesis: a whole number between two, both included."""

    whole: Callable[[int, int], int]

    def one(self, *options: Any) -> Any:
        return options[self.whole(0, len(options) - 1)]

    def some(self, least: int, most: int, item: Callable[[], Any]) -> list[Any]:
        return [item() for _ in range(self.whole(least, most))]

    def token(self) -> int:
        return self.whole(0, VOCAB - 1)


@dataclass(frozen=True)
class Guessing:
    """How to guess. `text` below is what the sequential procedure makes of the prompt."""

    kind: str
    """none; ngrams; random: whatever `material` says; truth: the text; fickle: the text, every third token another"""
    material: list[list[int]]

    def source(self) -> DraftSource | None:
        if self.kind == "none":
            return None
        return NGrams() if self.kind == "ngrams" else Guesser(lambda index: ())

    def guess(self, text: list[int]) -> Callable[[int], Sequence[int]]:
        if self.kind == "random":
            return lambda index: self.material[index % len(self.material)]
        wrong = 3 if self.kind == "fickle" else len(text) + 1
        changed = [(token + (index % wrong == wrong - 1)) % VOCAB for index, token in enumerate(text)]
        return lambda index: changed[index:]


@dataclass(frozen=True)
class Turn:
    """One prompt of a session, and how its answer is made."""

    prompt: str
    """what it has to do with what went before"""
    drawn: list[int]
    shared: int
    config: DecodeConfig
    fallback: str
    eos: set[int]
    prefill_rows: int
    taken: int | None
    """the answer is left after so many tokens; None: it is not"""

    def prompt_after(self, before: list[int], held: list[int]) -> list[int]:
        return {
            "new": self.drawn,
            "shared": before[: self.shared] + self.drawn,
            "same": before,
            "shorter": before[: self.shared],
            "held": held,
            "part of what is held": held[: self.shared],
            "held and more": held + self.drawn,
        }[self.prompt][:MOST_PROMPT] or self.drawn


def a_table(draw: Draw) -> helpers.Lookup:
    return helpers.hash_table(
        seed=draw.whole(0, 2**32),
        vocab_size=VOCAB,
        levels=draw.one(3, 8, 256),
        peak=draw.one(0.0, 2.0, 6.0, 6.0, 16.0, 40.0),
        memory=draw.one(None, None, None, 1, 2, 3),
    )


def a_config(draw: Draw, kind: str) -> DecodeConfig:
    """kind: any; verified: aligned as drafts need it; greedy; sampled."""
    options: dict[str, Any] = {
        "top_k": draw.whole(1, VOCAB + 2),
        "top_p": draw.one(0.0, 0.5, 0.8, 0.95, 0.95, 0.999, 1.0, 1.0),
        "max_new_tokens": draw.one(1, 2, 3, 5, 8, 12, 12, 24),
        "draft": draw.one(None, None, None, 0, draw.whole(1, DRAFT_ROWS)),
        "seed": draw.whole(0, 1000),
    }
    if kind in ("any", "verified"):
        options["threshold"] = draw.one(-2.5, -0.75, -0.5, 0.0, 0.0, 0.25, 0.7, 1.0, 9.0)
    if kind == "any":
        options |= {"strategy": draw.one(*STRATEGIES), "order": draw.one(*ORDERS)}
    if kind == "sampled":
        options |= {"sample": True, "temperature": draw.one(0.3, 1.0, 3.0)}
    return DecodeConfig(align=kind in ("any", "verified"), **options)


def a_turn(draw: Draw, first: bool) -> Turn:
    kinds = ("new", "shared", "same", "shorter", "held", "part of what is held", "held and more", "held and more")
    return Turn(
        prompt="new" if first else draw.one(*kinds),
        drawn=draw.some(1, 11, draw.token),
        shared=draw.whole(0, 20),
        config=a_config(draw, draw.one("any", "any", "verified", "verified", "verified", "greedy", "sampled")),
        fallback=draw.one(*FALLBACKS),
        eos=set(draw.some(0, draw.one(0, 0, 1, 2), draw.token)),
        prefill_rows=draw.whole(1, 6),
        taken=draw.one(None, None, draw.whole(0, 8)),
    )


def some_cost(row: float, more: float, head: float) -> Cost:
    """Milliseconds of a row, of every row more, of a row through the head."""
    return Cost((1, 128), (1, 2, 8), ((row, row + more, row + 7 * more), (2 * row,) * 3), (1, 4), (head, 4 * head))


def a_schedule(draw: Draw) -> Schedule:
    kind = draw.one("fixed", "fixed", "adaptive", "wilful", "wilful")
    if kind == "fixed":
        return Fixed(draw.one(None, 1, 1, 2, 3, 4), draw.one(0, 0, 3, draw.whole(1, DRAFT_ROWS)))
    if kind == "adaptive":
        return Adaptive(some_cost(*(draw.one(0.0, 0.1, 0.5, 1.0, 4.0) for _ in range(3))))
    return Wilful(draw.some(1, 7, lambda: (draw.whole(1, VOCAB + 1), draw.whole(0, DRAFT_ROWS))))


def a_guessing(draw: Draw) -> Guessing:
    return Guessing(
        draw.one("none", "ngrams", "random", "truth", "truth", "fickle"),
        draw.some(1, 4, lambda: draw.some(0, DRAFT_ROWS + 1, draw.token)),
    )


def a_session(table: helpers.Lookup, schedule: Schedule, guessing: Guessing) -> tuple[Chat, helpers.CountingEngine]:
    engine = helpers.CountingEngine(table, slots=0)
    return Chat(engine, Watched(schedule), guessing.source()), engine


def check(
    session: Chat,
    engine: helpers.CountingEngine,
    table: helpers.Lookup,
    guessing: Guessing,
    prompt: list[int],
    turn: Turn,
) -> Stats:
    """Decode, and compare all that can be compared with the sequential procedure."""
    config, eos = turn.config, turn.eos
    expected = sequential(table, prompt, config, turn.fallback, eos, config.max_new_tokens)
    text = prompt + expected.tokens
    watched, drafts = session.session.schedule, session.session.drafts
    assert isinstance(watched, Watched)
    watched.begin(session, config, turn.fallback)
    if isinstance(drafts, Guesser):
        drafts.guess = guessing.guess(text)
        drafts.told, drafts.choices, drafts.asked = [], [], []
    # As large as decode asks for: prompt and answer, and what one decision takes.
    engine.max_candidates = min(config.top_k, VOCAB)
    engine.extend_slots(len(prompt) + config.max_new_tokens + spare_slots(engine.max_candidates))
    before, held = len(engine.calls), list(session.cached)

    stats = Stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mara_runtime.passes.PREFILL_ROWS", turn.prefill_rows)
        going = session.decode(prompt, config, stats, turn.fallback, eos)
        steps = list(take(going, turn.taken))
    complete = len(steps) == len(expected.tokens)
    if turn.taken == 0:  # nothing was asked for, so nothing happens
        assert (steps, engine.calls[before:], session.cached) == ([], [], held)
        return stats
    assert complete or len(steps) == turn.taken

    # The turn.
    wanted = expected.positions[: len(steps)]
    assert [step.token for step in steps] == [position.token for position in wanted]
    assert stats.algorithm() == expected.counts[len(steps) - 1]
    assert [step.rank for step in steps] == [position.rank for position in wanted]
    assert [step.margins for step in steps] == [position.margins for position in wanted]
    assert [list(step.margins) for step in steps] == [list(position.margins) for position in wanted]  # in their order
    assert [step.forced for step in steps] == [position.forced for position in wanted]
    assert [step.candidates.ids.tolist() for step in steps] == [position.ids for position in wanted]
    assert [step.position for step in steps] == list(range(len(prompt), len(prompt) + len(steps)))

    # What the cache holds: the text, as far as it says.
    assert session.cached == text[: len(session.cached)]
    assert engine.entries(len(session.cached)) == [(token, position) for position, token in enumerate(session.cached)]
    assert len(prompt) <= len(session.cached)

    # The prompt: what was held is not run again, except for the last token.
    kept = 0
    while kept < min(len(held), len(prompt) - 1) and held[kept] == prompt[kept]:
        kept += 1
    prefills = math.ceil((len(prompt) - kept) / turn.prefill_rows)
    chunks, passes = engine.calls[before : before + prefills], engine.calls[before + prefills :]
    assert [token for chunk in chunks for token in chunk.tokens] == prompt[kept:]
    assert [chunk.slot for chunk in chunks] == list(range(kept, len(prompt), turn.prefill_rows))
    assert not any(chunk.agent_rows for chunk in chunks)
    assert (stats.prompt_tokens, stats.reused_tokens) == (len(prompt), kept)

    # The work.
    assert (stats.forwards, stats.rows) == (len(passes), sum(len(work.tokens) for work in passes))
    assert stats.drafted == watched.drafted
    assert stats.confirmed == sum(step.drafted for step in steps) <= stats.drafted
    for step in steps:
        assert not step.drafted or (step.rank == 1 and not step.forced and len(step.margins) <= 1)
    looks_first = config.strategy == "top1" and config.order == "ranked" if config.align else not config.sample
    if drafts is None or config.draft == 0 or not looks_first:
        assert stats.drafted == 0
    if not config.align:
        assert not any(work.agent_rows for work in passes)
    for work in passes:
        assert len(work.agent_rows) == len(work.priorities)
    if complete and stats.drafted == 0 and isinstance(watched.inner, Fixed):
        cost = work_of(expected, config, turn.fallback, watched.inner.width)
        assert (stats.forwards, stats.rows) == (cost.passes, cost.rows)
        assert sum(len(work.agent_rows) for work in passes) == cost.shown
        assert sum(engine.headed[before + prefills :]) == cost.headed

    # What the schedule was taught: every decision once, as far as it was examined.
    decisions = [position for position in wanted if position.margins]
    assert len(watched.learned) == len(decisions) if complete else len(watched.learned) >= len(decisions)
    for position, (probabilities, margins) in zip(decisions, watched.learned, strict=False):
        assert len(probabilities) == len(position.ids)
        assert margins[: len(position.margins)] == list(position.margins.values())

    # What the drafts were told: the text, in its order.
    if isinstance(drafts, Guesser) and looks_first:
        assert drafts.told == session.cached
        answered = expected.positions[: len(session.cached) - len(prompt)]
        assert drafts.choices == [position.rank == 1 and not position.forced for position in answered]
        assert max(drafts.asked, default=0) <= (DRAFT_ROWS if config.draft is None else config.draft)
    return stats


def take(steps: Iterator[Step], count: int | None) -> Iterator[Step]:
    """The first so many, and then leave."""
    if count == 0:
        return
    for index, step in enumerate(steps, start=1):
        yield step
        if index == count:
            return


def hold_a_session(draw: Draw, seen: Counter[str]) -> None:
    """Answer a few prompts with one session, and note what occurred."""
    table, schedule, guessing = a_table(draw), a_schedule(draw), a_guessing(draw)
    session, engine = a_session(table, schedule, guessing)
    prompt: list[int] = []
    for index in range(draw.one(1, 1, 2, 3, 4)):
        turn = a_turn(draw, first=not index)
        prompt = turn.prompt_after(prompt, list(session.cached))
        moves = len(engine.moves)
        try:
            stats = check(session, engine, table, guessing, prompt, turn)
        except Exception:
            print(f"{schedule}\n{guessing}\nturn {index}: {prompt}\n{turn}")
            raise
        kind = turn.config.strategy if turn.config.align else "sampled" if turn.config.sample else "greedy"
        seen.update({kind: stats.tokens, f"{kind}, {turn.config.order}": stats.decisions, turn.prompt: 1})
        seen.update({f"{kind}, {turn.fallback} is forced": stats.forced, "moves": len(engine.moves) - moves})
        seen.update({"reused": stats.reused_tokens, type(schedule).__name__: stats.forwards})
        seen.update({f"{guessing.kind} guessed": stats.drafted, f"{guessing.kind} guessed right": stats.confirmed})
        seen.update({f"{kind}, confirmed": stats.confirmed, "left": turn.taken is not None})


@pytest.mark.parametrize("part", range(8))
def test_every_schedule_and_draft_is_the_sequential_procedure(part: int) -> None:
    seen: Counter[str] = Counter()
    for case in range(CASES):
        hold_a_session(Draw(random.Random(f"{part}, {case}").randint), seen)

    # It was no idle talk.
    for strategy in STRATEGIES:
        assert all(seen[f"{strategy}, {order}"] > 15 for order in ORDERS)
        assert all(seen[f"{strategy}, {fallback} is forced"] > 5 for fallback in FALLBACKS)
    assert min(seen["top1"], seen["greedy"], seen["sampled"]) > 200
    assert min(seen["top1, confirmed"], seen["greedy, confirmed"]) > 40
    assert (seen["sampled, confirmed"], seen["random, confirmed"], seen["max_prob, confirmed"]) == (0, 0, 0)
    assert min(seen["truth guessed right"], seen["fickle guessed"], seen["random guessed"]) > 100
    assert 5 < seen["ngrams guessed right"] < seen["ngrams guessed"]
    assert 20 < seen["fickle guessed right"] < seen["fickle guessed"]
    assert min(seen["moves"], seen["reused"], seen["left"], seen["Adaptive"], seen["Wilful"], seen["Fixed"]) > 100
    assert all(seen[kind] > 15 for kind in ("shared", "same", "shorter", "held", "part of what is held"))


@given(st.data())
def test_every_schedule_and_draft_is_the_sequential_procedure_in_the_smallest_case(data: st.DataObject) -> None:
    # The same, from hypothesis, which looks for the extremes and makes a counterexample small.
    hold_a_session(Draw(lambda least, most: data.draw(st.integers(least, most))), Counter())


def test_schedules_are_what_the_options_name() -> None:
    assert set(NAMED) == set(SCHEDULES)


# ── hand-worked: prompt (1,), candidates 2, 3, 4 at the first position and 5, 6 at the second, then 7 alone ──────────

PROMPT = [1]
FIRST = {2: 3.0, 3: 2.0, 4: 1.0}
SECOND = {5: 1.0, 6: 0.5}
WIDE: dict[str, Any] = {"top_k": 8, "top_p": 1.0}


def hand(margins: dict[tuple[int, ...], float]) -> helpers.Lookup:
    """Margins by what follows the prompt."""
    logits = {(1,): FIRST, (1, 2): SECOND, (1, 3): SECOND, (1, 4): SECOND}
    return helpers.scripted(logits, {(1, *after): margin for after, margin in margins.items()})


def hand_run(
    margins: dict[tuple[int, ...], float],
    limit: int = 4,
    fallback: str = "first",
    eos: set[int] | None = None,
    schedule: Schedule | str = ONE_BY_ONE,
    guess: Sequence[int] | None = None,
    **o: Any,
) -> tuple[list[int], Stats, helpers.CountingEngine]:
    """guess: what is drafted behind the prompt and its first candidate."""
    engine = helpers.CountingEngine(hand(margins), slots=1 + limit + spare_slots(3), max_candidates=3)
    drafts = None if guess is None else Guesser(lambda index: guess[index - 2 :])
    session = Chat(engine, NAMED[schedule]() if isinstance(schedule, str) else schedule, drafts)
    steps, stats = run(session, PROMPT, DecodeConfig(**{**WIDE, **o}), fallback=fallback, eos=eos, limit=limit)
    return [step.token for step in steps], stats, engine


def test_accepting_rank_1_one_by_one_costs_what_plain_greedy_costs() -> None:
    accept_all = {(2,): 1.0, (2, 5): 1.0}
    tokens, stats, engine = hand_run(accept_all, limit=3)
    plain_tokens, plain, plain_engine = hand_run(accept_all, limit=3, align=False)
    assert tokens == plain_tokens == [2, 5, 7]
    # Plain: 2, 5 are run, the last token is not. Aligned: 2 and 5 are run to be examined, 7 stands alone.
    assert (plain.forwards, plain.rows) == (2, 2)
    assert (stats.forwards, stats.rows) == (2, 2)
    assert engine.headed == plain_engine.headed == [1, 1, 1]
    assert [(c.tokens, c.positions, c.slot) for c in engine.calls] == [([1], [0], 0), ([2], [1], 1), ([5], [2], 2)]
    assert engine.moves == []


@pytest.mark.parametrize(("schedule", "forwards", "rows"), [("one-by-one", 2 + 2 + 1, 6), ("together", 3, 3 + 2 + 1)])
def test_work_when_the_second_candidate_is_accepted_twice(schedule: str, forwards: int, rows: int) -> None:
    tokens, stats, engine = hand_run({(3,): 0.5, (3, 6): 2.0}, schedule=schedule)
    assert tokens == [3, 6, 7, 7]  # 7 alone, once run, once the last
    # One by one, 6 is the last candidate: the first goes with it once more, as 6 might be rejected too.
    assert (stats.forwards, stats.rows) == (forwards, rows)
    assert (stats.decisions, stats.examined, stats.forced) == (2, 4, 0)
    assert dict(stats.accepted_rank) == {2: 2}
    assert dict(stats.candidate_counts) == {3: 1, 2: 1, 1: 2}
    assert stats.smallest_margin == 0.5
    assert engine.moves == [(2, 1), (3, 2)]


@pytest.mark.parametrize(
    ("schedule", "fallback", "expected", "moves", "forwards", "rows"),
    [
        ("one-by-one", "first", [2, 5], [(4, 1), (4, 2)], 3 + 2, 4 + 3),  # run once more behind the last, and moved
        ("one-by-one", "last", [4, 6], [(3, 1), (3, 2)], 3 + 2, 3 + 2),
        ("together", "first", [2, 5], [], 2, 3 + 2),
        ("together", "last", [4, 6], [(3, 1), (3, 2)], 2, 3 + 2),
    ],
)
def test_the_fallback_after_several_passes_is_in_its_place(
    schedule: str, fallback: str, expected: list[int], moves: list[tuple[int, int]], forwards: int, rows: int
) -> None:
    tokens, stats, engine = hand_run({}, limit=2, fallback=fallback, schedule=schedule)
    assert tokens == expected
    assert (stats.forwards, stats.rows, stats.forced, stats.decisions) == (forwards, rows, 2, 2)
    assert stats.accepted_rank == {}
    assert engine.moves == moves
    # The cache now holds the sequence: the next token sees it.
    engine.run(Pass([7], [3], 3, [0]))
    assert engine.entries(4) == [(token, position) for position, token in enumerate([*PROMPT, *expected, 7])]


def test_the_passes_of_a_decision_in_two_parts() -> None:
    _, _, engine = hand_run({}, limit=1, schedule=Fixed(2))
    _, first, second = engine.calls
    assert first == Pass([2, 3], [1, 1], 1, [], [0, 1], [0.0, -1.0], 0.0, 0.0, None)
    # The last candidate, and the first again: its next tokens are wanted if this one is rejected too.
    assert second == Pass([4, 2], [1, 1], 3, [], [0], [0.0], 0.0, 0.0, 1)
    assert engine.headed == [1, 0, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("order", "fallback", "expected"), [("reversed", "first", 2), ("reversed", "last", 4)])
def test_first_and_last_mean_rank_whatever_the_order(schedule: str, order: str, fallback: str, expected: int) -> None:
    tokens, _, _ = hand_run({}, limit=1, order=order, fallback=fallback, schedule=schedule)
    assert tokens == [expected]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("order", "expected", "examined"), [("ranked", 2, 1), ("best_last", 3, 1), ("reversed", 4, 1)])
def test_top1_takes_the_first_accepted_of_the_order(schedule: str, order: str, expected: int, examined: int) -> None:
    accept_all = {(2,): 1.0, (3,): 2.0, (4,): 3.0}
    tokens, stats, _ = hand_run(accept_all, limit=1, order=order, schedule=schedule)
    assert tokens == [expected]
    assert stats.examined == examined
    assert stats.smallest_margin == float(expected - 1)  # of the examined alone, whatever the pass has computed


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_max_prob_examines_all_and_takes_the_largest_margin(schedule: str) -> None:
    tokens, stats, _ = hand_run({(2,): 1.0, (3,): 3.0, (4,): 2.0}, limit=1, strategy="max_prob", schedule=schedule)
    assert tokens == [3]
    assert (stats.examined, stats.smallest_margin) == (3, 1.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("order", "expected"), [("ranked", 2), ("best_last", 3), ("reversed", 4)])
def test_max_prob_takes_the_earliest_examined_of_equal_margins(schedule: str, order: str, expected: int) -> None:
    equal = {(2,): 1.0, (3,): 1.0, (4,): 1.0}
    tokens, _, _ = hand_run(equal, limit=1, strategy="max_prob", order=order, schedule=schedule)
    assert tokens == [expected]


def test_max_prob_in_parts_keeps_what_follows_an_earlier_best() -> None:
    margins = {(2,): 1.0, (3,): 3.0, (4,): 2.0, (3, 5): 1.0}
    tokens, stats, engine = hand_run(margins, limit=3, strategy="max_prob")
    assert tokens == [3, 5, 7]
    assert (stats.forwards, stats.rows) == (3 + 2, 5)  # 3 is not run again, and no fallback is wanted
    assert engine.headed == [1, 1, 1, 1, 1, 0]


def test_random_feeds_the_chosen_token_again() -> None:
    tokens, stats, engine = hand_run({(3,): 1.0}, limit=2, strategy="random", schedule="together")
    assert tokens == [3, 5]
    assert [call.tokens for call in engine.calls] == [[1], [2, 3, 4], [3], [5, 6]]  # 5, the last, is not
    assert engine.headed == [1, 0, 1, 0]
    assert (stats.forwards, stats.rows, stats.examined, stats.forced) == (3, 6, 5, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_elected_is_told_to_the_engine(strategy: str) -> None:
    _, _, engine = hand_run({}, limit=1, strategy=strategy, threshold=0.5, schedule="together", fallback="last")
    work = engine.calls[1]
    minus = -math.inf
    expected = {"top1": [0.0, -1.0, -2.0], "max_prob": [0.0, 0.0, 0.0], "random": [minus, minus, minus]}
    assert (work.agent_rows, work.priorities) == ([0, 1, 2], expected[strategy])
    assert (work.margin_weight, work.threshold) == (float(strategy == "max_prob"), 0.5)
    assert work.fallback_row == (None if strategy == "random" else 2)


def test_random_is_reproducible_by_its_seed_and_only_by_it() -> None:
    table = helpers.hash_table(5, VOCAB, 256, 1.0)
    always = DecodeConfig(strategy="random", threshold=-9.0, max_new_tokens=20, **WIDE)

    def answer(seed: int, schedule: Schedule) -> list[int]:
        steps, _ = run(helpers.CountingEngine(table), PROMPT, replace(always, seed=seed), schedule=schedule)
        return [step.token for step in steps]

    assert answer(1, TOGETHER) == answer(1, TOGETHER) == answer(1, ONE_BY_ONE) == answer(1, Wilful([(2, 0), (1, 0)]))
    assert answer(1, TOGETHER) != answer(2, TOGETHER)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_threshold_is_what_a_margin_must_exceed(schedule: str) -> None:
    margins = {(2,): 0.5, (3,): 0.75}
    assert hand_run(margins, limit=1, threshold=0.25, schedule=schedule)[0] == [2]
    tokens, stats, _ = hand_run(margins, limit=1, threshold=0.5, schedule=schedule)
    assert (tokens, stats.smallest_margin) == ([3], 0.0)
    tokens, stats, _ = hand_run(margins, limit=1, threshold=2.0, schedule=schedule, fallback="last")
    assert (tokens, stats.forced) == ([4], 1)


@pytest.mark.parametrize("schedule", ["one-by-one", "together"])
def test_a_threshold_that_float32_cannot_hold_stops_the_examination_all_the_same(schedule: str) -> None:
    # float32(0.1) exceeds 0.1: the first candidate is accepted, so a second pass would be wasted.
    tokens, stats, _ = hand_run({(2,): float(np.float32(0.1))}, limit=1, threshold=0.1, schedule=schedule)
    assert tokens == [2]
    assert (stats.examined, stats.forwards) == (1, 1)


# ── drafts, by hand ──────────────────────────────────────────────────────────────────────────────────────────────────

ACCEPT = {(2,): 1.0, (2, 5): 1.0}  # 2 5, then 7 7 7 …


def test_a_draft_that_is_right_takes_one_pass() -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=4, schedule=Fixed(1, 2), guess=[5, 7])
    assert tokens == [2, 5, 7, 7]
    assert engine.calls[1:] == [
        Pass([2, 5, 7], [1, 2, 3], 1, [0, 1, 2], [0, 1, 2], [0.0, -math.inf, -math.inf], 0.0, 0.0, None)
    ]
    assert (stats.forwards, stats.rows, stats.drafted, stats.confirmed) == (1, 3, 2, 2)
    assert (stats.decisions, stats.examined, dict(stats.accepted_rank)) == (2, 2, {1: 2})
    assert engine.moves == []


def test_which_steps_were_drafted() -> None:
    engine = helpers.CountingEngine(hand(ACCEPT))
    drafts = Guesser(lambda index: [5, 7][index - 2 :])
    session = Chat(engine, Fixed(1, 2), drafts)
    steps, _ = run(session, PROMPT, DecodeConfig(**WIDE), limit=4)
    assert [step.drafted for step in steps] == [False, True, True, False]
    assert [step.margins for step in steps] == [{1: 1.0}, {1: 1.0}, {}, {}]
    assert [step.position for step in steps] == [1, 2, 3, 4]
    assert drafts.told == [1, 2, 5, 7]  # what was run
    assert drafts.choices == [True] * 3


def test_siblings_and_a_draft_share_a_pass() -> None:
    tokens, stats, engine = hand_run({(3,): 1.0, (3, 5): 1.0}, limit=3, schedule=Fixed(None, 2), guess=[5, 7])
    assert tokens == [3, 5, 7]
    work, then = engine.calls[1:]
    # The first candidate, the draft under it, the other candidates: those stand beside the first.
    assert (work.tokens, work.positions, work.slot) == ([2, 5, 7, 3, 4], [1, 2, 3, 1, 1], 1)
    assert (work.head_rows, work.agent_rows) == ([0, 1, 2], [0, 1, 2, 3, 4])
    assert work.priorities == [0.0, -math.inf, -math.inf, -1.0, -2.0]
    assert work.fallback_row == 0
    assert engine.moves == [(4, 1)]
    assert (then.tokens, then.positions, then.slot) == ([5, 7, 6], [2, 3, 2], 2)
    assert (stats.drafted, stats.confirmed) == (3, 1)


def test_a_wrong_token_ends_the_draft() -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=4, schedule=Fixed(1, 16), guess=[5, 6])
    assert tokens == [2, 5, 7, 7]
    assert engine.calls[1].tokens == [2, 5, 6]
    # 6 is not what follows 5; 7 is, alone, and is run in the slot where 6 stood.
    assert (engine.calls[2].tokens, engine.calls[2].slot) == ([7], 3)
    assert (stats.forwards, stats.rows, stats.drafted, stats.confirmed) == (2, 4, 2, 1)


def test_a_drafted_token_that_the_agent_rejects_is_an_examined_candidate() -> None:
    tokens, stats, engine = hand_run({(2,): 1.0, (2, 6): 0.25}, limit=3, schedule=Fixed(1, 16), guess=[5, 7, 7])
    assert tokens == [2, 6, 7]
    assert (stats.decisions, stats.examined, dict(stats.accepted_rank)) == (2, 3, {1: 1, 2: 1})
    assert [call.tokens for call in engine.calls] == [[1], [2, 5, 7], [6]]  # 5 is not run again; two more fitted
    assert (engine.calls[2].positions, engine.calls[2].slot) == ([2], 3)
    assert engine.moves == [(3, 2)]
    assert (stats.drafted, stats.confirmed) == (2, 0)


def test_the_fallback_that_was_drafted_is_not_run_again() -> None:
    tokens, stats, engine = hand_run({(2,): 1.0}, limit=4, schedule=Fixed(1, 1), guess=[5])
    assert tokens == [2, 5, 7, 7]  # 5 is rejected, and 6 too
    assert [call.tokens for call in engine.calls] == [[1], [2, 5], [6], [7]]
    assert [call.fallback_row for call in engine.calls] == [None] * 4
    assert engine.headed == [1, 2 + 1, 0, 1]
    assert (stats.forced, stats.confirmed) == (
        1,
        0,
    )  # emitted because nothing else was left, not because it was guessed
    assert engine.moves == []


def test_a_first_candidate_that_becomes_the_fallback_keeps_the_draft_under_it() -> None:
    tokens, stats, engine = hand_run({(2, 5): 1.0}, limit=3, schedule=Fixed(1, 1), guess=[5])
    assert tokens == [2, 5, 7]
    assert [call.tokens for call in engine.calls] == [[1], [2, 5], [3], [4]]  # neither 2 nor 5 runs again
    assert (stats.forced, stats.drafted, stats.confirmed) == (1, 1, 1)
    assert engine.moves == []


def test_the_draft_under_a_first_candidate_that_is_the_fallback_is_right_all_the_same() -> None:
    tokens, stats, engine = hand_run({(2, 5): 1.0}, limit=3, schedule=Fixed(None, 2), guess=[5, 7])
    assert tokens == [2, 5, 7]
    assert [call.tokens for call in engine.calls] == [[1], [2, 5, 7, 3, 4]]
    assert (stats.forced, stats.drafted, stats.confirmed) == (1, 2, 2)


def test_an_end_of_sequence_id_ends_a_draft() -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=9, eos={5}, schedule=Fixed(1, 16), guess=[5, 7, 7])
    assert tokens == [2, 5]
    assert engine.calls[1].tokens == [2, 5]
    assert (stats.forwards, stats.drafted, stats.confirmed) == (1, 1, 1)


def test_nothing_is_drafted_under_an_end_of_sequence_id() -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=9, eos={2}, schedule=Fixed(1, 16), guess=[5, 7, 7])
    assert (tokens, stats.drafted) == ([2], 0)
    assert engine.calls[1].tokens == [2]


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_draft_does_not_go_beyond_the_limit(limit: int) -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=limit, schedule=Fixed(1, 16), guess=[5, 7, 7, 7, 7, 7, 7, 7])
    assert tokens == [2, 5, 7, 7, 7][:limit]
    assert max(call.slot + len(call.tokens) for call in engine.calls) <= 1 + limit
    assert (stats.forwards, stats.drafted, stats.confirmed) == (1, limit - 1, limit - 1)


@pytest.mark.parametrize(("draft", "drafted"), [(None, 16), (16, 16), (3, 3), (1, 1)])
def test_the_option_bounds_a_draft(draft: int | None, drafted: int) -> None:
    right = [5, *[7] * 30]
    _, stats, engine = hand_run(ACCEPT, limit=30, schedule=Fixed(1, 99), guess=right, draft=draft)
    assert len(engine.calls[1].tokens) == 1 + drafted
    assert stats.confirmed <= stats.drafted


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "max_prob"},
        {"strategy": "random"},
        {"order": "best_last"},
        {"order": "reversed"},
        {"align": False, "sample": True},
    ],
    ids=str,
)
def test_where_no_draft_could_be_verified_none_is_asked_for(options: dict[str, Any]) -> None:
    engine = helpers.CountingEngine(hand(ACCEPT))
    drafts = Guesser(lambda index: [5, 7, 7])
    session = Chat(engine, Fixed(None, 16), drafts)
    _, stats = run(session, PROMPT, DecodeConfig(**WIDE, **options), limit=5)
    assert (stats.drafted, stats.confirmed, drafts.asked) == (0, 0, [])


def test_plain_greedy_with_a_draft_that_is_right_takes_a_pass_for_seventeen_tokens() -> None:
    table = helpers.hash_table(3, VOCAB, 256, 4.0)
    text = [1, *sequential(table, [1], DecodeConfig(align=False), "first", set(), 60).tokens]
    engine = helpers.CountingEngine(table)
    drafts = Guesser(lambda index: text[index:])
    session = Chat(engine, Fixed(1, 16), drafts)
    steps, stats = run(session, [1], DecodeConfig(align=False), limit=60)
    assert [step.token for step in steps] == text[1:]
    # The prompt gives the first token, every pass runs it and sixteen guesses, and gives one more.
    assert stats.forwards == math.ceil((60 - 1) / 17)
    assert stats.confirmed <= stats.drafted == stats.rows - stats.forwards
    assert engine.asked == []


WAYS = {"decisions": DecodeConfig(**WIDE), "plain": DecodeConfig(align=False), "single": DecodeConfig(top_k=1)}


def periodic(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """0 1 2 3 4 5 6 0 1 …, with a second candidate that is never wanted."""
    row = np.full(VOCAB, -np.inf, np.float32)
    row[(prefix[-1] + 1) % 7], row[8] = 1.0, 0.0
    return row, np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_a_text_that_repeats_itself_is_guessed_from_its_n_grams(config: DecodeConfig) -> None:
    session = Chat(helpers.CountingEngine(periodic), Fixed(1, 16), NGrams())
    steps, stats = run(session, [0], config, limit=100)
    assert [step.token for step in steps] == [(i + 1) % 7 for i in range(100)]
    # Once round it is news; then seventeen tokens a pass.
    assert stats.forwards <= 9 + math.ceil(91 / 17)
    assert stats.confirmed >= 80


class Listener(Guesser):
    """Notes what it had been told when it was asked for a guess."""

    def __init__(self) -> None:
        super().__init__(lambda index: ())
        self.known: list[tuple[list[int], int]] = []

    def draft(self, following: int, most: int) -> Draft:
        self.known.append((list(self.told), following))
        return NO_DRAFT


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_a_guess_is_asked_for_after_the_text_so_far_and_one_token_more(config: DecodeConfig) -> None:
    drafts = Listener()
    steps, _ = run(Chat(helpers.CountingEngine(periodic), ONE_BY_ONE, drafts), [0, 1], config, limit=5)
    text = [0, 1, *(step.token for step in steps)]
    assert drafts.known
    for told, following in drafts.known:
        assert [*told, following] == text[: len(told) + 1]


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("eos", "limit"), [({3}, 50), (set(), 3)], ids=["end", "limit"])
@pytest.mark.parametrize("drafted", [0, 1, 16])
def test_drafts_are_told_the_text_and_nothing_else(
    config: DecodeConfig, eos: set[int], limit: int, drafted: int
) -> None:
    drafts = Guesser(lambda index: [(index + i) % 7 for i in range(20)])
    session = Chat(helpers.CountingEngine(periodic), Fixed(1, drafted), drafts)
    steps, _ = run(session, [0], config, eos=eos, limit=limit)
    assert [step.token for step in steps] == [1, 2, 3]
    assert drafts.told == session.cached == [0, 1, 2, 3][: len(session.cached)]  # the last may not have been run
    assert len(session.cached) >= 3


# ── reuse ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_next_turn_runs_only_what_is_new() -> None:
    table = helpers.hash_table(4, VOCAB, 256, 3.0)
    engine = helpers.CountingEngine(table)
    session = Chat(engine, ONE_BY_ONE)
    config = DecodeConfig(align=False)
    first = [step.token for step in run(session, [1, 2, 3], config, limit=5)[0]]
    assert session.cached == [1, 2, 3, *first[:-1]]  # the last token was not run
    prompt = [1, 2, 3, *first, 4, 5]
    engine.calls.clear()
    steps, stats = run(session, prompt, config, limit=3)
    assert (engine.calls[0].tokens, engine.calls[0].positions, engine.calls[0].slot) == (
        [first[-1], 4, 5],
        [7, 8, 9],
        7,
    )
    assert (stats.prompt_tokens, stats.reused_tokens) == (10, 7)
    fresh, _ = run(helpers.CountingEngine(table), prompt, config, limit=3)
    assert [step.token for step in steps] == [step.token for step in fresh]


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [([1, 2, 3], 2), ([1, 2], 1), ([1], 0), ([1, 2, 4, 5], 2), ([2, 2, 3], 0), ([1, 2, 3, 9 - 1], 3)],
    ids=str,
)
def test_what_is_kept_of_a_held_text(prompt: list[int], reused: int) -> None:
    # The last token of a prompt is always run: what follows it is not held.
    table = helpers.hash_table(6, VOCAB, 256, 3.0)
    engine = helpers.CountingEngine(table)
    session = Chat(engine, ONE_BY_ONE)
    run(session, [1, 2, 3], DecodeConfig(align=False), limit=1)
    assert session.cached == [1, 2, 3]
    engine.calls.clear()
    _, stats = run(session, prompt, DecodeConfig(align=False), limit=1)
    assert stats.reused_tokens == reused
    assert [(call.tokens, call.slot) for call in engine.calls] == [(prompt[reused:], reused)]
    assert session.cached == prompt


def test_what_is_held_is_true_after_an_error_in_between() -> None:
    table = helpers.hash_table(4, VOCAB, 256, 3.0)

    class Failing(helpers.CountingEngine):
        fails = -1

        def run(self, work: Pass) -> StepOutput:
            out = super().run(work)
            self.fails -= 1
            if self.fails == 0:
                raise OSError("out of order")
            return out

    config = DecodeConfig(threshold=0.5, max_new_tokens=12, **WIDE)
    expected = sequential(table, [1, 2], config, "last", set(), 12)
    for passes in range(1, 30):
        engine = Failing(table)
        session = Chat(engine, Fixed(2))
        engine.fails = passes
        try:
            run(session, [1, 2], config, fallback="last")
        except OSError:
            text = [1, 2, *expected.tokens]
            assert session.cached == text[: len(session.cached)]
        else:
            break
        steps, _ = run(session, [1, 2], config, fallback="last")
        assert [step.token for step in steps] == expected.tokens
    assert passes > 10


# ── the end of an answer ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_end_of_sequence_id_that_is_accepted_ends_and_is_emitted(schedule: str) -> None:
    tokens, stats, _ = hand_run({(2,): 1.0}, eos={2}, schedule=schedule)
    assert tokens == [2]
    assert (stats.tokens, stats.decisions, stats.forwards) == (1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_end_of_sequence_id_that_is_rejected_is_passed_over(schedule: str) -> None:
    tokens, stats, _ = hand_run({(3,): 1.0, (3, 5): 1.0}, eos={2, 5}, schedule=schedule)
    assert tokens == [3, 5]  # 2 was rejected; 5, another of the ids, was not
    assert dict(stats.accepted_rank) == {2: 1, 1: 1}


def test_an_end_of_sequence_id_alone_ends_without_being_run() -> None:
    tokens, stats, engine = hand_run({(2,): 1.0, (2, 5): 1.0}, limit=9, eos={7})
    assert tokens == [2, 5, 7]
    assert stats.forwards == 2
    assert all(7 not in call.tokens for call in engine.calls)


@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("align", [True, False])
def test_the_limit_ends_the_answer(limit: int, align: bool) -> None:
    tokens, stats, _ = hand_run({}, limit=limit, align=align)
    assert tokens == [2, 5, 7, 7, 7][:limit]
    assert stats.tokens == limit


def test_a_single_candidate_is_emitted_without_asking_the_agent() -> None:
    engine = helpers.CountingEngine(helpers.scripted({}, {}))
    steps, stats = run(engine, PROMPT, DecodeConfig(**WIDE), limit=4)
    assert [step.token for step in steps] == [7] * 4
    assert engine.asked == []
    assert (stats.decisions, stats.examined, stats.forwards, stats.rows) == (0, 0, 3, 3)
    assert [(step.margins, step.forced, step.rank) for step in steps] == [({}, False, 1)] * 4


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    engine = helpers.CountingEngine(hand({(2,): 1.0}))
    stats = Stats()
    session = Chat(engine, ONE_BY_ONE)
    steps = session.decode(PROMPT, DecodeConfig(**WIDE), stats, limit=9)
    assert engine.calls == []
    assert next(steps).token == 2
    assert (len(engine.calls), stats.tokens, stats.forwards) == (2, 1, 1)


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, PREFILL_ROWS, PREFILL_ROWS + 1, 2 * PREFILL_ROWS + 88])
def test_a_long_prompt_is_prefilled_in_chunks(length: int) -> None:
    table = helpers.hash_table(1, VOCAB, 256, 4.0)
    prompt = [i * 7 % VOCAB for i in range(length)]
    engine = helpers.CountingEngine(table, slots=length + 1)
    steps, stats = run(engine, prompt, DecodeConfig(align=False), limit=1)
    assert [call.tokens for call in engine.calls] == [
        prompt[at : at + PREFILL_ROWS] for at in range(0, length, PREFILL_ROWS)
    ]
    assert [call.positions for call in engine.calls] == [
        list(range(at, min(at + PREFILL_ROWS, length))) for at in range(0, length, PREFILL_ROWS)
    ]
    assert [call.slot for call in engine.calls] == list(range(0, length, PREFILL_ROWS))
    # The next tokens are wanted of the very last row alone.
    assert [call.head_rows for call in engine.calls] == [[]] * ((length - 1) // PREFILL_ROWS) + [
        [(length - 1) % PREFILL_ROWS]
    ]
    assert steps[0].token == int(np.argmax(table(tuple(prompt))[0]))
    assert (stats.prompt_tokens, stats.reused_tokens, stats.forwards, stats.rows) == (length, 0, 0, 0)


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_sampling_draws_from_the_candidates_and_is_reproducible_by_its_seed() -> None:
    table = helpers.hash_table(2, VOCAB, 256, 3.0)

    def answer(seed: int, temperature: float = 1.0, top_k: int = 3) -> tuple[list[int], Stats, list[Step]]:
        config = DecodeConfig(align=False, sample=True, top_k=top_k, top_p=1.0, seed=seed, temperature=temperature)
        engine = helpers.CountingEngine(table)
        steps, stats = run(engine, PROMPT, config, limit=30)
        assert engine.asked == []
        return [step.token for step in steps], stats, steps

    tokens, stats, steps = answer(1)
    assert tokens == answer(1)[0] != answer(2)[0]
    assert len({step.rank for step in steps}) == 3  # each rank comes up in 30 draws
    for index, step in enumerate(steps):
        prefix = (*PROMPT, *tokens[:index])
        assert step.candidates.ids.tolist() == candidates_of(table(prefix)[0].tolist(), 3, 1.0)
        assert step.candidates.ids[step.rank - 1] == step.token
    assert (stats.forwards, stats.rows, stats.decisions) == (29, 29, 0)
    greedy = [step.token for step in run(helpers.CountingEngine(table), PROMPT, DecodeConfig(align=False), limit=30)[0]]
    assert answer(1, top_k=1)[0] == greedy
    assert answer(1, temperature=1e-3, top_k=9)[0] == greedy


def test_plain_decoding_counts_nothing_of_the_agent() -> None:
    _, stats = run(helpers.CountingEngine(hand({})), PROMPT, DecodeConfig(align=False), limit=3)
    assert stats.algorithm() == {
        "tokens": 3,
        "decisions": 0,
        "examined": 0,
        "forced": 0,
        "accepted_rank": {},
        "candidate_counts": {},
        "smallest_margin": None,
    }


# ── numbers that are none ────────────────────────────────────────────────────────────────────────────────────────────


def spoiled(
    at: tuple[int, ...],
    *,
    logits: float | None = None,
    hidden: float | None = None,
    table: helpers.Lookup | None = None,
) -> helpers.Lookup:
    """The hand-worked table, one number of one prefix replaced; as in a network, the logits come of the hidden state
    and what follows sees it."""
    sound = table or hand(ACCEPT)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = (array.copy() for array in sound(prefix))
        if prefix == at and logits is not None:
            row[4] = logits
        if prefix == at and hidden is not None:
            state[1] = hidden
            row[:] = np.nan
        if prefix[: len(at)] == at and len(prefix) > len(at) and hidden is not None:
            state[:] = np.nan
            row[:] = np.nan
        return row, state

    return lookup


class Infectious(helpers.CountingEngine):
    """Where a state was not finite, its KV entry is not: every row of any pass then is NaN, though it masks the slot.

    That is what an additive mask does, 0 times NaN being NaN, until the entry is overwritten or cleared.
    """

    def __init__(self, lookup: helpers.Lookup, agent: Any = helpers.sum_agent, slots: int = 512) -> None:
        super().__init__(lookup, agent, slots)
        self._ill: set[int] = set()
        self.memory.zero = self._zero  # type: ignore[method-assign]
        self.culprits: list[tuple[int, int]] = []
        """(position, token) of the rows of the first pass that were at fault themselves"""

    def _zero(self) -> None:
        TableMemory.zero(self.memory)
        self._ill.clear()

    def _rows(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        hidden, logits = super()._rows(tokens, positions, slot)
        fine: list[bool] = np.isfinite(hidden).all(axis=1).tolist()
        for row, healthy in enumerate(fine):
            (self._ill.discard if healthy else self._ill.add)(slot + row)
        rows = list(zip(positions, tokens, strict=True))
        self.culprits = self.culprits or [row for row, healthy in zip(rows, fine, strict=True) if not healthy]
        if self._ill:
            hidden, logits = np.full_like(hidden, np.nan), np.full_like(logits, np.nan)
        return hidden, logits


@dataclass
class Broken:
    """An engine whose model can be mended, in a session that was used before."""

    engine: helpers.CountingEngine
    chat: Chat
    model: dict[str, helpers.Lookup]


def broken(
    kind: type[helpers.CountingEngine], lookup: helpers.Lookup, schedule: Schedule, guess: Sequence[int] = ()
) -> Broken:
    model = {"now": hand(ACCEPT)}
    engine = kind(lambda prefix: model["now"](prefix))
    drafts = Guesser(lambda index: guess[index - 2 :])
    session = Chat(engine, schedule, drafts)
    run(session, [1, 0, 0], DecodeConfig(**WIDE), limit=3)  # so that there is something to forget
    assert session.cached
    model["now"] = lookup
    return Broken(engine, session, model)


def fails_and_recovers(
    it: Broken, prompt: list[int], match: str, config: DecodeConfig | None = None, mends: bool = True
) -> None:
    """The error names what it should; nothing is left of the answer; the next one is right."""
    config = config or DecodeConfig(**WIDE)
    with pytest.raises(NumericsError, match=match) as caught:
        run(it.chat, prompt, config, limit=8)
    assert "\n" not in str(caught.value)
    assert it.chat.cached == []
    assert it.engine.entries(512) == [None] * 512
    assert it.engine.memory.zeroed >= 1
    # Another prompt that does not meet it; and the same one, were the model sound.
    if mends:
        for model, again in ((it.model["now"], [6, 6]), (hand(ACCEPT), prompt)):
            it.model["now"] = model
            steps, stats = run(it.chat, again, config, limit=8)
            expected = sequential(hand(ACCEPT), again, config, "first", set(), 8)
            assert [step.token for step in steps] == expected.tokens
            assert stats.algorithm() == expected.counts[-1]


ENGINES_THAT_SPOIL = [helpers.CountingEngine, Infectious]
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("kind", ENGINES_THAT_SPOIL)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("prefill_rows", [2, 256])
@pytest.mark.parametrize(
    ("at", "position", "token"),
    [((1,), 0, 1), ((1, 0, 3), 2, 3), ((1, 0, 3, 3), 3, 3)],
    ids=["at the start of the prompt", "inside it", "at its end"],
)
def test_a_hidden_state_of_the_prompt_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[helpers.CountingEngine],
    bad: float,
    prefill_rows: int,
    at: tuple[int, ...],
    position: int,
    token: int,
) -> None:
    monkeypatch.setattr("mara_runtime.passes.PREFILL_ROWS", prefill_rows)
    it = broken(kind, spoiled(at, hidden=bad), ONE_BY_ONE)
    fails_and_recovers(it, [1, 0, 3, 3], rf"position {position} \(token {token}\) is not finite")


def test_a_hidden_state_in_a_later_chunk_of_the_prompt_is_named_by_its_position() -> None:
    prompt = [i % 5 for i in range(PREFILL_ROWS + 10)]
    at = tuple(prompt[: PREFILL_ROWS + 4])
    it = broken(Infectious, spoiled(at, hidden=math.nan), ONE_BY_ONE)
    fails_and_recovers(it, prompt, rf"position {PREFILL_ROWS + 3} \(token {at[-1]}\)")


@pytest.mark.parametrize("kind", ENGINES_THAT_SPOIL)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("at", "position", "token"),
    [((1, 2), 1, 2), ((1, 2, 5), 2, 5), ((1, 2, 5, 7), 3, 7)],
    ids=["first candidate", "second position", "single candidate"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hidden_state_of_a_candidate_that_is_not_finite(
    schedule: str, at: tuple[int, ...], position: int, token: int, bad: float, kind: type[helpers.CountingEngine]
) -> None:
    it = broken(kind, spoiled(at, hidden=bad), NAMED[schedule]())
    fails_and_recovers(it, PROMPT, rf"position {position} \(token {token}\) is not finite")


@pytest.mark.parametrize("align", [True, False])
def test_a_hidden_state_of_a_settled_token_that_is_not_finite(align: bool) -> None:
    config = DecodeConfig(align=align, top_k=1)
    it = broken(Infectious, spoiled((1, 2, 5), hidden=math.inf), ONE_BY_ONE)
    fails_and_recovers(it, PROMPT, r"position 2 \(token 5\) is not finite", config)


def test_a_sibling_whose_hidden_state_is_not_finite_is_named_by_its_own_token() -> None:
    it = broken(helpers.CountingEngine, spoiled((1, 4), hidden=math.nan), TOGETHER)
    fails_and_recovers(it, PROMPT, r"position 1 \(token 4\)")


@pytest.mark.parametrize("guess", [[], [5, 7]], ids=["alone", "beside a draft"])
def test_of_siblings_that_infect_each_other_the_one_at_fault_is_named(guess: list[int]) -> None:
    it = broken(Infectious, spoiled((1, 4), hidden=math.nan), Fixed(None, 16), guess)
    fails_and_recovers(it, PROMPT, r"position 1 \(token 4\)")


@pytest.mark.parametrize("bad", ["fault", "agent"])
def test_a_fault_in_a_later_pass_of_a_decision(bad: str) -> None:
    # The passes before it were sound; they are not run again to find it.
    if bad == "fault":
        it = broken(Infectious, spoiled((1, 4), hidden=math.nan, table=hand({})), Fixed(2))
        match = r"hidden state at position 1 \(token 4\)"
    else:
        it = broken(Infectious, marked((1, 4), hand({})), Fixed(2))
        it.engine._agent = spoiled_agent(math.nan)
        match = "the agent's margin at position 1 "
    fails_and_recovers(it, PROMPT, match)


def test_a_fault_that_does_not_come_again_is_a_fault_all_the_same() -> None:
    class Flaky(helpers.CountingEngine):
        def run(self, work: Pass) -> StepOutput:
            out = super().run(work)
            return replace(out, margins=out.margins * np.float32(np.nan)) if len(self.calls) == passes + 2 else out

    engine = Flaky(hand(ACCEPT))
    session, passes = Chat(engine, ONE_BY_ONE), 0
    with pytest.raises(NumericsError, match=r"a pass at position 1 .* finite ones when repeated"):
        run(session, PROMPT, DecodeConfig(**WIDE), limit=3)
    assert session.cached == []
    passes = len(engine.calls) + 100
    assert [step.token for step in run(session, PROMPT, DecodeConfig(**WIDE), limit=3)[0]] == [2, 5, 7]


def test_a_sibling_that_the_sequential_procedure_would_not_have_run_counts_too() -> None:
    # As docs/internals/method.md says: every row that is run is looked at.
    table = spoiled((1, 4), hidden=math.nan)
    steps, _ = run(helpers.CountingEngine(table), PROMPT, DecodeConfig(**WIDE), limit=3)
    assert [step.token for step in steps] == [2, 5, 7]
    with pytest.raises(NumericsError):
        run(helpers.CountingEngine(table), PROMPT, DecodeConfig(**WIDE), schedule=TOGETHER, limit=3)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("guess", "at", "position", "token"),
    [
        ([5, 7, 7], (1, 2, 5), 2, 5),
        ([5, 7, 7], (1, 2, 5, 7), 3, 7),
        ([6, 7, 7], (1, 2, 6), 2, 6),  # a guess that is wrong, but it was run
    ],
    ids=["first", "second", "wrong"],
)
@pytest.mark.parametrize("width", [1, None])
@pytest.mark.parametrize("kind", ENGINES_THAT_SPOIL)
def test_a_hidden_state_of_a_draft_that_is_not_finite(
    kind: type[helpers.CountingEngine],
    width: int | None,
    guess: list[int],
    at: tuple[int, ...],
    position: int,
    token: int,
    bad: float,
) -> None:
    it = broken(kind, spoiled(at, hidden=bad), Fixed(width, 16), guess)
    fails_and_recovers(it, PROMPT, rf"position {position} \(token {token}\) is not finite", mends=at != (1, 2, 6))


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("kind", ENGINES_THAT_SPOIL)
def test_a_hidden_state_of_a_draft_behind_a_settled_token(kind: type[helpers.CountingEngine], align: bool) -> None:
    config = DecodeConfig(align=align, top_k=1)
    it = broken(kind, spoiled((1, 2, 5, 7), hidden=math.nan), Fixed(1, 16), [5, 7, 7])
    it.chat.session.drafts.guess = lambda index: [2, 5, 7, 7][index - 1 :]  # type: ignore[union-attr]
    fails_and_recovers(it, PROMPT, r"position 3 \(token 7\) is not finite", config)
    assert any(len(call.tokens) > 2 for call in it.engine.calls)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("at", "position"),
    [((1,), 0), ((1, 2), 1), ((1, 2, 5), 2), ((1, 2, 5, 7), 3)],
    ids=["prompt", "first candidate", "second position", "single candidate"],
)
@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("drafted", [0, 16])
def test_logits_that_are_nan_or_infinite(
    drafted: int, align: bool, at: tuple[int, ...], position: int, bad: float
) -> None:
    # An infinite logit (an overflow in half precision) leaves no probabilities: the normaliser is not finite.
    it = broken(helpers.CountingEngine, spoiled(at, logits=bad), Fixed(1, drafted), [5, 7, 7])
    config = DecodeConfig(align=align, **({} if not align else WIDE))
    fails_and_recovers(it, PROMPT, rf"logits after position {position} are not finite", config)


def test_logits_of_a_candidate_that_nobody_goes_on_with_are_not_computed() -> None:
    table = spoiled((1, 2), logits=math.nan, table=hand({(3,): 1.0, (3, 5): 1.0}))
    for schedule in (ONE_BY_ONE, TOGETHER):
        steps, _ = run(helpers.CountingEngine(table), PROMPT, DecodeConfig(**WIDE), schedule=schedule, limit=3)
        assert [step.token for step in steps] == [3, 5, 7]


def test_logits_that_rule_out_every_token() -> None:
    def nothing(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.full(8, -np.inf, np.float32), np.zeros(2, np.float32)

    with pytest.raises(NumericsError, match="logits after position 0 "):
        run(helpers.CountingEngine(nothing), PROMPT, DecodeConfig(**WIDE), limit=2)


def marked(at: tuple[int, ...], table: helpers.Lookup | None = None) -> helpers.Lookup:
    """The hand-worked table, with a hidden state at one prefix that a spoiled agent cannot take."""
    sound = table or hand(ACCEPT)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = sound(prefix)
        return row, np.array([64.0, 0.0], np.float32) if prefix == at else state

    return lookup


def spoiled_agent(bad: float) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    return lambda hidden: np.where(hidden[:, 0] == 64.0, np.float32(bad), helpers.sum_agent(hidden))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(("at", "position"), [((1, 2), 1), ((1, 2, 5), 2)])
@pytest.mark.filterwarnings("ignore:invalid value")  # the test engine multiplies an infinite margin by 0
def test_a_margin_that_is_not_finite(bad: float, schedule: str, at: tuple[int, ...], position: int) -> None:
    # Weights of the agent that are NaN must not look like an agent that rejects everything.
    it = broken(helpers.CountingEngine, marked(at), NAMED[schedule]())
    it.engine._agent = spoiled_agent(bad)
    fails_and_recovers(it, PROMPT, rf"the agent's margin at position {position} is not finite")


def test_a_margin_in_a_draft_that_is_not_finite() -> None:
    it = broken(helpers.CountingEngine, marked((1, 2, 5)), Fixed(1, 16), [5, 7])
    it.engine._agent = spoiled_agent(math.nan)
    fails_and_recovers(it, PROMPT, r"the agent's margin at position 2 ")


@pytest.mark.parametrize("part", range(2))
def test_a_fault_anywhere_is_named_or_not_met(part: int) -> None:
    faults = fine = 0
    for case in range(CASES):
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
            expected = sequential(sound, turn.drawn, config, fallback, turn.eos, config.max_new_tokens)
            if isinstance(session.session.drafts, Guesser):
                session.session.drafts.guess = guessing.guess(turn.drawn + expected.tokens)
            engine.culprits, complaint = [], ""
            try:
                steps, _ = run(session, turn.drawn, config, fallback=fallback, eos=turn.eos)
            except NumericsError as error:
                complaint = str(error)
            if complaint:
                position, token = engine.culprits[0]
                assert f"hidden state at position {position} (token {token}) is not finite" in complaint
                assert session.cached == []
                assert engine.entries(512) == [None] * 512
                faults += 1
            else:
                assert engine.culprits == []
                assert [step.token for step in steps] == expected.tokens
                fine += 1
    assert min(faults, fine) > CASES // 4


# ── the test engine notices what it is there to notice ───────────────────────────────────────────────────────────────


def test_table_engine_notices_an_entry_that_was_not_moved() -> None:
    prompt, limit = [1, 4], 6
    for seed in range(5):
        table = helpers.hash_table(seed, VOCAB, 256, 1.0)
        config = DecodeConfig(threshold=9.0, **WIDE)  # always the fallback, which is the last candidate
        engine, forgetful = (TableEngine(table, helpers.sum_agent, 64) for _ in range(2))
        forgetful.memory.move = lambda *_: None  # type: ignore[method-assign]
        tokens, others = (
            [s.token for s in run(e, prompt, config, fallback="last", limit=limit)[0]] for e in (engine, forgetful)
        )
        assert tokens != others


def test_table_engine_notices_a_text_that_is_not_held() -> None:
    table = helpers.hash_table(1, VOCAB, 256, 1.0)
    session = Chat(TableEngine(table, helpers.sum_agent, 64))
    session.cached.extend([3, 4, 5])
    with pytest.raises(IndexError, match="slot 0 holds None"):
        run(session, [3, 4, 5, 6], DecodeConfig(align=False), limit=1)


def test_time_is_that_of_decoding_without_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("mara_runtime.decode.time.perf_counter", lambda: now)

    class Slow(TableEngine):
        def run(self, work: Pass) -> StepOutput:
            nonlocal now
            now += 1.0
            return super().run(work)

    class Thoughtful(Wilful):
        def plan(self, view: PassContext) -> PassPlan:
            nonlocal now
            now += 0.125
            return super().plan(view)

    stats = Stats()
    session = Chat(Slow(hand(ACCEPT), helpers.sum_agent, 16), Thoughtful([(1, 0)]))
    for _ in session.decode(PROMPT, DecodeConfig(**WIDE), stats, limit=4):
        now += 100.0
    # A pass for the prompt; one each for 2, for 5 and for the 7 that is not the last.
    assert stats.prefill_ms == 1000.0
    assert stats.engine_ms == 3000.0
    assert stats.decode_ms == 3375.0
    assert stats.tokens_per_second == pytest.approx(3 / 3.375)  # the first comes with the prompt
    assert Stats().tokens_per_second == 0.0
