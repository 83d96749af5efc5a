"""The decode loop: every schedule, draft, strategy and order against the sequential procedure (tests/reference.py).

The language models are tables: logits and hidden state by prefix. TableEngine keeps a KV cache of tokens and positions,
so an entry that the loop leaves in a wrong slot is an error, or another prefix and so another answer.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime.config import FALLBACKS, ORDERS, SCHEDULES, STRATEGIES, DecodeConfig
from mara_runtime.decode import Request, Session, conversation
from mara_runtime.engines.base import NEVER, Pass, StepOutput
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.passes import PREFILL_ROWS
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan, Schedule
from mara_runtime.schedule.drafts import NO_DRAFT, Draft, NGrams
from mara_runtime.stats import Stats, Step
from mara_runtime.tensors import DRAFT_ROWS, spare_slots
from tests.reference import Answer, examination_order, fallback_rank
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.helpers import sequential
from tests.unit.sessions import (
    ACCEPT,
    CASES,
    NAMED,
    ONE_BY_ONE,
    PROMPT,
    VOCAB,
    WIDE,
    Chat,
    Draw,
    Guesser,
    Guessing,
    Scripted,
    Turn,
    Watched,
    a_guessing,
    a_schedule,
    a_table,
    a_turn,
    hand,
    run,
)  # fmt: skip

# ── what an answer costs ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """Of an answer, after the prompt."""

    passes: int = 0
    rows: int = 0
    judged: int = 0
    """rows shown to the agent"""
    headed: int = 0
    """rows through the LM head"""

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def work_of(answer: Answer, config: DecodeConfig, fallback: str, width: int | None) -> Work:
    """Where every pass holds `width` candidates (None: all) and nothing is drafted.

    A pass with the last candidates carries the fallback's row once more, if it may be emitted and ran in an earlier
    pass; with `random` the chosen one always runs again. Only the row that continues goes through the LM head.
    """
    total = Work()
    for index, position in enumerate(answer.positions):
        follows = index < len(answer.positions) - 1
        if not position.margins:
            total += Work(1, 1, 0, 1) if follows else Work()
            continue
        count = len(position.candidates)
        order = examination_order(config.order, count)
        done, accepted = 0, False
        while done < count and not (accepted and config.strategy == "top1"):
            chunk = order[done : done + (width or count)]
            done += len(chunk)
            here = any(position.margins.get(rank + 1, -math.inf) > config.threshold for rank in chunk)
            forced = done == count and not accepted and config.strategy != "random"
            rows = len(chunk) + int(forced and fallback_rank(fallback, count) not in chunk)
            total += Work(1, rows, len(chunk), int(config.strategy != "random" and (here or forced)))
            accepted = accepted or here
        if config.strategy == "random" and follows:
            total += Work(1, 1, 0, 1)
    return total


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
    expected = sequential(table, prompt, config, turn.fallback, eos)
    text = prompt + expected.tokens
    watched, drafts = session.session.schedule, session.session.drafts
    assert isinstance(watched, Watched)
    watched.begin(session, config, turn.fallback)
    if isinstance(drafts, Guesser):
        drafts.guess = guessing.guess(text)
        drafts.text, drafts.choices, drafts.asked = [], [], []
    # As large as decode asks for: prompt and answer, and what one decision takes.
    engine.max_candidates = min(config.top_k, VOCAB)
    engine.extend_slots(len(prompt) + config.max_new_tokens + spare_slots(engine.max_candidates))
    before, cached_before = len(engine.calls), list(session.cached)

    stats = Stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mara_runtime.passes.PREFILL_ROWS", turn.prefill_rows)
        going = session.decode(prompt, config, stats, turn.fallback, eos)
        steps = list(take(going, turn.taken))
    complete = len(steps) == len(expected.tokens)
    if turn.taken == 0:  # nothing was asked for, so nothing happens
        assert (steps, engine.calls[before:], session.cached) == ([], [], cached_before)
        return stats
    assert complete or len(steps) == turn.taken

    # The turn.
    emitted = expected.positions[: len(steps)]
    assert [step.token for step in steps] == [position.token for position in emitted]
    assert stats.algorithm() == expected.counts[len(steps) - 1]
    assert [step.rank for step in steps] == [position.rank for position in emitted]
    assert [[*step.margins.items()] for step in steps] == [[*position.margins.items()] for position in emitted]
    assert [step.forced for step in steps] == [position.forced for position in emitted]
    assert [step.candidates.ids.tolist() for step in steps] == [position.candidates for position in emitted]
    assert [step.position for step in steps] == list(range(len(prompt), len(prompt) + len(steps)))

    # The cache holds the text, as far as its tokens say.
    assert session.cached == text[: len(session.cached)]
    assert engine.entries(len(session.cached)) == [(token, position) for position, token in enumerate(session.cached)]
    assert len(prompt) <= len(session.cached)

    # The prompt: cached tokens do not run again, except for the last one.
    kept = 0
    while kept < min(len(cached_before), len(prompt) - 1) and cached_before[kept] == prompt[kept]:
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
        assert sum(len(work.agent_rows) for work in passes) == cost.judged
        assert sum(engine.headed[before + prefills :]) == cost.headed

    # The schedule learns of every decision once, as far as it was examined.
    decisions = [position for position in emitted if position.margins]
    assert len(watched.learned) == len(decisions) if complete else len(watched.learned) >= len(decisions)
    for position, (probabilities, margins) in zip(decisions, watched.learned, strict=False):
        assert len(probabilities) == len(position.candidates)
        assert margins[: len(position.margins)] == list(position.margins.values())

    # The draft source hears the text, in order.
    if isinstance(drafts, Guesser) and not looks_first:
        assert drafts.asked == []
    if isinstance(drafts, Guesser) and looks_first:
        assert drafts.text == session.cached
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


def random_session(draw: Draw, seen: Counter[str]) -> None:
    """Answer a few prompts in one session, and count what occurred."""
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


@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 12))])
def test_every_schedule_and_draft_gives_the_sequential_answer(part: int) -> None:
    seen: Counter[str] = Counter()
    for case in range(CASES):
        random_session(Draw(random.Random(f"{part}, {case}").randint), seen)

    # Everything occurred.
    for strategy in STRATEGIES:
        assert all(seen[f"{strategy}, {order}"] > 15 for order in ORDERS)
        assert all(seen[f"{strategy}, {fallback} is forced"] > 5 for fallback in FALLBACKS)
    assert min(seen["top1"], seen["greedy"], seen["sampled"]) > 200
    assert min(seen["top1, confirmed"], seen["greedy, confirmed"]) > 40
    assert (seen["sampled, confirmed"], seen["random, confirmed"], seen["max_prob, confirmed"]) == (0, 0, 0)
    assert min(seen["truth guessed right"], seen["fickle guessed"], seen["random guessed"]) > 100
    assert 5 < seen["ngrams guessed right"] < seen["ngrams guessed"]
    assert 20 < seen["fickle guessed right"] < seen["fickle guessed"]
    assert min(seen["moves"], seen["reused"], seen["left"], seen["Adaptive"], seen["Scripted"], seen["Fixed"]) > 100
    assert all(seen[kind] > 15 for kind in ("shared", "same", "shorter", "cached", "part of the cached"))


@given(st.data())
def test_the_same_in_the_smallest_case(data: st.DataObject) -> None:
    # Hypothesis looks for the extremes, and makes a counterexample small.
    random_session(Draw(lambda least, most: data.draw(st.integers(least, most))), Counter())


# ── two conversations ────────────────────────────────────────────────────────────────────────────────────────────────


class SharedEngine:
    """A model with a KV cache per conversation: it runs the pass of any of them."""

    def __init__(self, table: helpers.Lookup, count: int) -> None:
        self.engines = [helpers.CountingEngine(table, slots=256) for _ in range(count)]

    def run(self, work: Pass, conversation: int) -> StepOutput:
        return self.engines[conversation].run(work)


def test_conversations_advance_independently_of_each_other() -> None:
    table = helpers.hash_table(11, VOCAB, 256, 4.0, memory=3)
    engine = SharedEngine(table, 3)
    configs = [
        DecodeConfig(max_new_tokens=30, top_k=4, threshold=0.25),
        DecodeConfig(max_new_tokens=20, top_k=3, strategy="random", seed=7),
        DecodeConfig(max_new_tokens=25, align=False),
    ]
    schedules: list[Schedule] = [Fixed(2, 4), Fixed(None), Fixed(1, 8)]
    prompts = [[1, 2, 3], [4], [5, 6]]
    tokens: list[list[int]] = [[], [], []]
    allstats = [Stats() for _ in configs]
    answers = {
        i: conversation(
            Session(engine.engines[i].cache, schedules[i], NGrams()),
            Request(prompts[i], config, "last", frozenset(), config.max_new_tokens),
            allstats[i],
        )
        for i, config in enumerate(configs)
    }
    waiting = {i: next(answer) for i, answer in answers.items()}
    rng = random.Random(1)
    turns = []
    while waiting:  # one event of one conversation at a time
        i = rng.choice(sorted(waiting))
        turns.append(i)
        event = waiting.pop(i)
        try:
            if isinstance(event, Pass):
                waiting[i] = answers[i].send(engine.run(event, i))
            else:
                tokens[i].append(event.token)
                waiting[i] = next(answers[i])
        except StopIteration:
            pass
    assert sum(a != b for a, b in pairwise(turns)) > 50  # they took turns
    for i, config in enumerate(configs):
        expected = sequential(table, prompts[i], config, "last")
        assert tokens[i] == expected.tokens
        assert allstats[i].algorithm() == expected.counts[-1]
        text = prompts[i] + tokens[i]
        assert engine.engines[i].cache.tokens == text[: len(engine.engines[i].cache.tokens)]


def test_a_conversation_needs_no_engine_but_the_outputs_of_its_passes() -> None:
    engine = helpers.CountingEngine(hand(ACCEPT))
    session = Session(KVCache(engine.memory), ONE_BY_ONE)
    answer = conversation(session, Request(PROMPT, DecodeConfig(**WIDE), "first", frozenset(), 2), Stats())
    work = next(answer)
    assert isinstance(work, Pass)
    assert (work.tokens, work.slot, session.cache.tokens) == (PROMPT, 0, [])
    work = answer.send(engine.run(work))
    assert isinstance(work, Pass)
    assert (work.tokens, work.slot, session.cache.tokens) == ([2], 1, PROMPT)
    step = answer.send(engine.run(work))
    assert isinstance(step, Step)
    assert (step.token, session.cache.tokens) == (2, [1, 2])
    work = next(answer)
    assert isinstance(work, Pass)
    assert work.tokens == [5]
    answer.close()  # the answer is abandoned: its tokens stay
    assert session.cache.tokens == [1, 2]


# ── hand-worked: prompt (1,), candidates 2, 3, 4 at the first position and 5, 6 at the second, then 7 alone ──────────


def hand_run(
    margins: dict[tuple[int, ...], float],
    limit: int = 4,
    fallback: str = "first",
    eos: set[int] | None = None,
    schedule: Schedule | str = ONE_BY_ONE,
    guess: Sequence[int] | None = None,
    **o: Any,
) -> tuple[list[int], Stats, helpers.CountingEngine]:
    """guess: what is drafted after the prompt and its first candidate."""
    engine = helpers.CountingEngine(hand(margins), slots=1 + limit + spare_slots(3), max_candidates=3)
    drafts = None if guess is None else Guesser(lambda index: guess[index - 2 :])
    session = Chat(engine, NAMED[schedule]() if isinstance(schedule, str) else schedule, drafts)
    steps, stats = run(session, PROMPT, DecodeConfig(**{**WIDE, **o}), fallback=fallback, eos=eos, limit=limit)
    return [step.token for step in steps], stats, engine


def test_accepting_rank_1_costs_what_greedy_decoding_costs() -> None:
    tokens, stats, engine = hand_run(ACCEPT, limit=3)
    plain_tokens, plain, plain_engine = hand_run(ACCEPT, limit=3, align=False)
    assert tokens == plain_tokens == [2, 5, 7]  # the last token does not run
    assert (stats.forwards, stats.rows) == (plain.forwards, plain.rows) == (2, 2)
    assert engine.headed == plain_engine.headed == [1, 1, 1]
    assert [(c.tokens, c.positions, c.slot) for c in engine.calls] == [([1], [0], 0), ([2], [1], 1), ([5], [2], 2)]
    assert engine.moves == []


@pytest.mark.parametrize(
    ("schedule", "fallback", "expected", "moves", "forwards", "rows"),
    [
        ("one-by-one", "first", [2, 5], [(4, 1), (4, 2)], 3 + 2, 4 + 3),  # run once more after the last, and moved
        ("one-by-one", "last", [4, 6], [(3, 1), (3, 2)], 3 + 2, 3 + 2),
        ("together", "first", [2, 5], [], 2, 3 + 2),
        ("together", "last", [4, 6], [(3, 1), (3, 2)], 2, 3 + 2),
    ],
)
def test_the_fallback_continues_the_sequence(
    schedule: str, fallback: str, expected: list[int], moves: list[tuple[int, int]], forwards: int, rows: int
) -> None:
    tokens, stats, engine = hand_run({}, limit=2, fallback=fallback, schedule=schedule)
    assert tokens == expected
    assert (stats.forwards, stats.rows, stats.forced, stats.decisions) == (forwards, rows, 2, 2)
    assert stats.accepted_rank == {}
    assert engine.moves == moves
    engine.run(Pass([7], [3], 3, [0]))
    assert engine.entries(4) == [(token, position) for position, token in enumerate([*PROMPT, *expected, 7])]


def test_the_passes_of_a_decision_in_two_parts() -> None:
    _, _, engine = hand_run({}, limit=1, schedule=Fixed(2))
    _, first, second = engine.calls
    assert first == Pass([2, 3], [1, 1], 1, [], [0, 1], [0.0, -1.0], 0.0, 0.0, None)
    # The last candidate, and the first again: its next tokens are needed if this one is rejected too.
    assert second == Pass([4, 2], [1, 1], 3, [], [0], [0.0], 0.0, 0.0, 1)
    assert engine.headed == [1, 0, 1]


ALL = {(2,): 1.0, (3,): 2.0, (4,): 3.0}
EQUAL = {(2,): 1.0, (3,): 1.0, (4,): 1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("margins", "options", "token", "examined", "smallest"),
    [
        (ALL, {"order": "ranked"}, 2, 1, 1.0),  # of the examined alone, whatever the pass has computed
        (ALL, {"order": "best_last"}, 3, 1, 2.0),
        (ALL, {"order": "reversed"}, 4, 1, 3.0),
        ({}, {"order": "reversed", "fallback": "first"}, 2, 3, 1.0),  # first and last mean LM rank
        ({}, {"order": "reversed", "fallback": "last"}, 4, 3, 1.0),
        ({(2,): 1.0, (3,): 3.0, (4,): 2.0}, {"strategy": "max_prob"}, 3, 3, 1.0),
        (EQUAL, {"strategy": "max_prob", "order": "ranked"}, 2, 3, 1.0),  # of equals the first examined
        (EQUAL, {"strategy": "max_prob", "order": "best_last"}, 3, 3, 1.0),
        (EQUAL, {"strategy": "max_prob", "order": "reversed"}, 4, 3, 1.0),
        ({(2,): 0.5, (3,): 0.75}, {"threshold": 0.25}, 2, 1, 0.25),
        ({(2,): 0.5, (3,): 0.75}, {"threshold": 0.5}, 3, 2, 0.0),  # a margin must exceed the threshold
        ({(2,): 0.5, (3,): 0.75}, {"threshold": 2.0, "fallback": "last"}, 4, 3, 1.25),
        # float32(0.1) exceeds 0.1
        ({(2,): float(np.float32(0.1))}, {"threshold": 0.1}, 2, 1, float(np.float32(0.1)) - 0.1),
    ],
)
def test_which_candidate_is_picked(
    schedule: str,
    margins: dict[tuple[int, ...], float],
    options: dict[str, Any],
    token: int,
    examined: int,
    smallest: float,
) -> None:
    tokens, stats, _ = hand_run(margins, limit=1, schedule=schedule, **options)
    assert (tokens, stats.examined, stats.smallest_margin) == ([token], examined, smallest)
    if examined == 1 and schedule != "adaptive":
        assert stats.forwards == 1


@pytest.mark.parametrize(
    ("strategy", "priorities", "weight", "fallback_row"),
    [("top1", [0.0, -1.0, -2.0], 0.0, 2), ("max_prob", [0.0] * 3, 1.0, 2), ("random", [NEVER] * 3, 0.0, None)],
)
def test_how_the_engine_elects_a_row(
    strategy: str, priorities: list[float], weight: float, fallback_row: int | None
) -> None:
    _, _, engine = hand_run({}, limit=1, strategy=strategy, threshold=0.5, schedule="together", fallback="last")
    assert engine.calls[1] == Pass([2, 3, 4], [1] * 3, 1, [], [0, 1, 2], priorities, weight, 0.5, fallback_row)


# ── drafts, by hand ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_confirmed_draft_takes_one_pass() -> None:
    tokens, stats, engine = hand_run(ACCEPT, schedule=Fixed(1, 2), guess=[5, 7])
    assert tokens == [2, 5, 7, 7]
    assert engine.calls[1:] == [Pass([2, 5, 7], [1, 2, 3], 1, [0, 1, 2], [0, 1, 2], [0.0, NEVER, NEVER])]
    assert (stats.forwards, stats.rows, stats.drafted, stats.confirmed) == (1, 3, 2, 2)
    assert (stats.decisions, stats.examined, dict(stats.accepted_rank)) == (2, 2, {1: 2})
    assert engine.moves == []


def test_which_steps_were_drafted() -> None:
    drafts = Guesser(lambda index: [5, 7][index - 2 :])
    session = Chat(helpers.CountingEngine(hand(ACCEPT)), Fixed(1, 2), drafts)
    steps, _ = run(session, PROMPT, DecodeConfig(**WIDE), limit=4)
    assert [step.drafted for step in steps] == [False, True, True, False]
    assert [step.margins for step in steps] == [{1: 1.0}, {1: 1.0}, {}, {}]
    assert [step.position for step in steps] == [1, 2, 3, 4]
    assert (drafts.text, drafts.choices) == ([1, 2, 5, 7], [True] * 3)  # what has run


def test_siblings_and_a_draft_share_a_pass() -> None:
    tokens, stats, engine = hand_run({(3,): 1.0, (3, 5): 1.0}, limit=3, schedule=Fixed(None, 2), guess=[5, 7])
    assert tokens == [3, 5, 7]
    work, then = engine.calls[1:]
    # The first candidate, the draft under it, then the other candidates.
    priorities = [0.0, NEVER, NEVER, -1.0, -2.0]
    assert work == Pass([2, 5, 7, 3, 4], [1, 2, 3, 1, 1], 1, [0, 1, 2], [0, 1, 2, 3, 4], priorities, fallback_row=0)
    assert engine.moves == [(4, 1)]
    assert (then.tokens, then.positions, then.slot) == ([5, 7, 6], [2, 3, 2], 2)
    assert (stats.drafted, stats.confirmed) == (3, 1)


@pytest.mark.parametrize(
    ("margins", "width", "guess", "tokens", "calls", "moves", "counts"),
    [
        # 7 and not 6 follows 5, and runs in the slot of 6
        (ACCEPT, 1, [5, 6], [2, 5, 7, 7], [[2, 5, 6], [7]], [], (0, 2, 1)),
        # a drafted token that the agent rejects is an examined candidate: it does not run again
        ({(2,): 1.0, (2, 6): 0.25}, 1, [5, 7, 7], [2, 6, 7], [[2, 5, 7], [6]], [(3, 2)], (0, 2, 0)),
        # 5 is rejected, 6 too: 5 is emitted because nothing is left, not because it was guessed
        ({(2,): 1.0}, 1, [5], [2, 5, 7, 7], [[2, 5], [6], [7]], [], (1, 1, 0)),
        # a first candidate that becomes the fallback keeps its draft
        ({(2, 5): 1.0}, 1, [5], [2, 5, 7], [[2, 5], [3], [4]], [], (1, 1, 1)),
        ({(2, 5): 1.0}, None, [5, 7], [2, 5, 7], [[2, 5, 7, 3, 4]], [], (1, 2, 2)),
    ],
    ids=["wrong", "rejected", "fallback", "first is the fallback", "first is the fallback, together"],
)
def test_what_becomes_of_a_draft(
    margins: dict[tuple[int, ...], float],
    width: int | None,
    guess: list[int],
    tokens: list[int],
    calls: list[list[int]],
    moves: list[tuple[int, int]],
    counts: tuple[int, int, int],
) -> None:
    emitted, stats, engine = hand_run(margins, len(tokens), schedule=Fixed(width, len(guess)), guess=guess)
    assert emitted == tokens
    assert [call.tokens for call in engine.calls[1:]] == calls
    assert engine.moves == moves
    assert (stats.forced, stats.drafted, stats.confirmed) == counts


@pytest.mark.parametrize(
    ("eos", "limit", "tokens", "first_pass"),
    [
        ({5}, 9, [2, 5], [2, 5]),  # a draft ends with an end-of-sequence id
        ({2}, 9, [2], [2]),
        (set(), 1, [2], [2]),
        (set(), 3, [2, 5, 7], [2, 5, 7]),
        (set(), 5, [2, 5, 7, 7, 7], [2, 5, 7, 7, 7]),
    ],
)
def test_a_draft_goes_no_further_than_the_answer(
    eos: set[int], limit: int, tokens: list[int], first_pass: list[int]
) -> None:
    emitted, stats, engine = hand_run(ACCEPT, limit, eos=eos, schedule=Fixed(1, 16), guess=[5, *[7] * 9])
    assert (emitted, engine.calls[1].tokens) == (tokens, first_pass)
    assert (stats.forwards, stats.drafted, stats.confirmed) == (1, len(tokens) - 1, len(tokens) - 1)


def test_greedy_decoding_confirms_sixteen_tokens_per_pass() -> None:
    table = helpers.hash_table(3, VOCAB, 256, 4.0)
    text = [1, *sequential(table, [1], DecodeConfig(align=False), limit=60).tokens]
    engine = helpers.CountingEngine(table)
    session = Chat(engine, Fixed(1, 16), Guesser(lambda index: text[index:]))
    steps, stats = run(session, [1], DecodeConfig(align=False), limit=60)
    assert [step.token for step in steps] == text[1:]
    # The prompt gives the first token; each pass runs it and sixteen guesses, and gives one more.
    assert stats.forwards == math.ceil((60 - 1) / 17)
    assert stats.confirmed <= stats.drafted == stats.rows - stats.forwards
    assert engine.asked == []


WAYS = {"decisions": DecodeConfig(**WIDE), "plain": DecodeConfig(align=False), "single": DecodeConfig(top_k=1)}


def periodic(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """0 1 2 3 4 5 6 0 1 …, with a second candidate that is never picked."""
    row = np.full(VOCAB, -np.inf, np.float32)
    row[(prefix[-1] + 1) % 7], row[8] = 1.0, 0.0
    return row, np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_a_repetitive_text_is_guessed_from_its_n_grams(config: DecodeConfig) -> None:
    session = Chat(helpers.CountingEngine(periodic), Fixed(1, 16), NGrams())
    steps, stats = run(session, [0], config, limit=100)
    assert [step.token for step in steps] == [(i + 1) % 7 for i in range(100)]
    assert stats.forwards <= 9 + math.ceil(91 / 17)  # once round it is new, then seventeen tokens per pass
    assert stats.confirmed >= 80


class Listener(Guesser):
    """Records the text so far and the token after it whenever it is asked for a guess."""

    def __init__(self) -> None:
        super().__init__(lambda index: ())
        self.prefixes: list[list[int]] = []

    def draft(self, following: int, most: int) -> Draft:
        self.prefixes.append([*self.text, following])
        return NO_DRAFT


@pytest.mark.parametrize("config", WAYS.values(), ids=WAYS)
def test_a_draft_continues_the_text_and_one_token_more(config: DecodeConfig) -> None:
    listener = Listener()
    steps, _ = run(Chat(helpers.CountingEngine(periodic), ONE_BY_ONE, listener), [0, 1], config, limit=5)
    text = [0, 1, *(step.token for step in steps)]
    assert listener.prefixes
    for prefix in listener.prefixes:
        assert prefix == text[: len(prefix)]


# ── errors and prompts ────────────────────────────────────────────────────────────────────────────────────────────────


def test_cached_tokens_are_right_after_an_error_in_any_pass() -> None:
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
    expected = sequential(table, [1, 2], config, "last")
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


@pytest.mark.parametrize("length", [PREFILL_ROWS, PREFILL_ROWS + 1])
def test_a_long_prompt_is_prefilled_in_chunks(length: int) -> None:
    table = helpers.hash_table(1, VOCAB, 256, 4.0)
    prompt = [i * 7 % VOCAB for i in range(length)]
    engine = helpers.CountingEngine(table, slots=length + 1)
    steps, stats = run(engine, prompt, DecodeConfig(align=False), limit=1)
    starts = range(0, length, PREFILL_ROWS)
    chunks = [prompt[start : start + PREFILL_ROWS] for start in starts]
    heads = [[]] * (len(chunks) - 1) + [[len(chunks[-1]) - 1]]  # the last row of all
    assert engine.calls == [
        Pass(chunk, list(range(start, start + len(chunk))), start, head, [], [])
        for start, chunk, head in zip(starts, chunks, heads, strict=True)
    ]
    assert steps[0].token == int(np.argmax(table(tuple(prompt))[0]))
    assert (stats.prompt_tokens, stats.reused_tokens, stats.forwards, stats.rows) == (length, 0, 0, 0)


# ── the table engine notices what it is there to notice ──────────────────────────────────────────────────────────────


def test_the_table_engine_notices_an_entry_that_was_not_moved() -> None:
    config = DecodeConfig(threshold=9.0, **WIDE)  # always the fallback, which is the last candidate
    for seed in range(5):
        table = helpers.hash_table(seed, VOCAB, 256, 1.0)
        engine, forgetful = (TableEngine(table, helpers.sum_agent, 64) for _ in range(2))
        forgetful.memory.move = lambda *_: None  # type: ignore[method-assign]
        tokens, others = (
            [s.token for s in run(e, [1, 4], config, fallback="last", limit=6)[0]] for e in (engine, forgetful)
        )
        assert tokens != others


def test_the_table_engine_notices_tokens_that_are_not_cached() -> None:
    session = Chat(TableEngine(helpers.hash_table(1, VOCAB, 256, 1.0), helpers.sum_agent, 64))
    session.cached.extend([3, 4, 5])
    with pytest.raises(IndexError, match="slot 0 holds None"):
        run(session, [3, 4, 5, 6], DecodeConfig(align=False), limit=1)


def test_times_leave_out_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("mara_runtime.decode.time.perf_counter", lambda: now)

    class Slow(TableEngine):
        def run(self, work: Pass) -> StepOutput:
            nonlocal now
            now += 1.0
            return super().run(work)

    class Thoughtful(Scripted):
        def plan(self, context: PassContext) -> PassPlan:
            nonlocal now
            now += 0.125
            return super().plan(context)

    stats = Stats()
    session = Chat(Slow(hand(ACCEPT), helpers.sum_agent, 16), Thoughtful([(1, 0)]))
    for _ in session.decode(PROMPT, DecodeConfig(**WIDE), stats, limit=4):
        now += 100.0
    # One pass for the prompt; one each for 2, for 5 and for the 7 that is not the last.
    assert (stats.prefill_ms, stats.engine_ms, stats.decode_ms) == (1000.0, 3000.0, 3375.0)
    assert stats.tokens_per_second == pytest.approx(3 / 3.375)  # the first comes with the prompt
