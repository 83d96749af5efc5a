"""The decode loop: every schedule, draft, strategy and order against the sequential procedure (tests/reference.py).

The language models are tables: logits and hidden state by prefix. TableEngine keeps a KV cache of tokens and positions,
so an entry that the loop leaves in a wrong slot is an error, or another prefix and so another answer.
"""

import math
import random
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.decode import Request, Session, conversation
from mara_runtime.engines.base import Pass
from mara_runtime.schedule.base import Fixed
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from mara_runtime.tensors import DRAFT_ROWS, spare_slots
from tests.reference import Answer, examination_order, fallback_rank
from tests.unit import helpers
from tests.unit.helpers import sequential
from tests.unit.sessions import (
    CASES,
    VOCAB,
    Chat,
    Draw,
    Guesser,
    Guessing,
    Turn,
    Watched,
    a_guessing,
    a_schedule,
    a_table,
    a_turn,
)  # fmt: skip

# ── what an answer costs ─────────────────────────────────────────────────────────────────────────────────────────────


def work_of(answer: Answer, config: DecodeConfig, fallback: str, width: int | None) -> tuple[int, int, int, int]:
    """(passes, rows, rows shown to the agent, rows through the LM head) after the prompt.

    Every pass holds `width` candidates (None: all), and nothing is drafted. A pass with the last candidates carries the
    fallback's row once more, if it may be emitted and ran in an earlier pass; with `random` the chosen one always runs
    again. Only the row that continues goes through the LM head.
    """
    work = [(0, 0, 0, 0)]
    for index, position in enumerate(answer.positions):
        last = index == len(answer.positions) - 1
        if not last and (not position.margins or config.strategy == "random"):
            work.append((1, 1, 0, 1))  # the emitted token by itself
        count = len(position.candidates) if position.margins else 0
        order = examination_order(config.order, count)
        done, accepted = 0, False
        while done < count and not (accepted and config.strategy == "top1"):
            chunk = order[done : done + (width or count)]
            done += len(chunk)
            here = any(position.margins.get(rank + 1, -math.inf) > config.threshold for rank in chunk)
            forced = done == count and not accepted and config.strategy != "random"
            rows = len(chunk) + int(forced and fallback_rank(fallback, count) not in chunk)
            work.append((1, rows, len(chunk), int(config.strategy != "random" and (here or forced))))
            accepted = accepted or here
    passes, rows, judged, headed = map(sum, zip(*work, strict=True))
    return passes, rows, judged, headed


def check(session: Chat, table: helpers.Lookup, guessing: Guessing, prompt: list[int], turn: Turn) -> Stats:
    """Decode, and compare all that can be compared with the sequential procedure."""
    config, eos, engine = turn.config, turn.eos, session.engine
    assert isinstance(engine, helpers.CountingEngine)
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
        steps = list(islice(going, turn.taken))
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
    assert [list(chunk.head_rows) for chunk in chunks] == [[]] * (prefills - 1) + [[len(chunks[-1].tokens) - 1]]
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
        judged, headed = sum(len(work.agent_rows) for work in passes), sum(engine.headed[before + prefills :])
        cost = work_of(expected, config, turn.fallback, watched.inner.width)
        assert (stats.forwards, stats.rows, judged, headed) == cost

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
        for heard, following, most in drafts.asked:  # after the emitted token, or after the first candidate
            assert following in (text[heard], expected.positions[heard - len(prompt)].candidates[0])
            assert most <= (DRAFT_ROWS if config.draft is None else config.draft)
    return stats


def random_session(draw: Draw, seen: Counter[str]) -> None:
    """Answer a few prompts in one session, and count what occurred."""
    table, schedule, guessing = a_table(draw), a_schedule(draw), a_guessing(draw)
    engine = helpers.CountingEngine(table, slots=0)
    session = Chat(engine, Watched(schedule), guessing.source())
    prompt: list[int] = []
    for index in range(draw.one(1, 1, 2, 3, 4)):
        turn = a_turn(draw, first=not index)
        prompt = turn.prompt_after(prompt, list(session.cached))
        moves = len(engine.moves)
        try:
            stats = check(session, table, guessing, prompt, turn)
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
def test_every_schedule_and_draft_gives_the_sequential_answer(part):
    seen: Counter[str] = Counter()
    for case in range(CASES):
        random_session(Draw(random.Random(f"{part}, {case}").randint), seen)
    if part:
        return
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


@pytest.mark.long
@given(st.data())
def test_the_same_in_the_smallest_case(data):
    # Hypothesis looks for the extremes, and makes a counterexample small.
    random_session(Draw(lambda least, most: data.draw(st.integers(least, most))), Counter())


def test_conversations_advance_independently_of_each_other():
    """Whoever runs the passes of `conversation` may take those of several in turn."""
    table = helpers.hash_table(11, VOCAB, 256, 4.0, memory=3)
    cases = [
        (DecodeConfig(max_new_tokens=30, top_k=4, threshold=0.25), Fixed(2, 4), [1, 2, 3]),
        (DecodeConfig(max_new_tokens=20, top_k=3, strategy="random", seed=7), Fixed(None), [4]),
        (DecodeConfig(max_new_tokens=25, align=False), Fixed(1, 8), [5, 6]),
    ]
    engines, allstats = [helpers.CountingEngine(table) for _ in cases], [Stats() for _ in cases]
    answers = [
        conversation(
            Session(engine.cache, schedule, NGrams()),
            Request(prompt, config, "last", frozenset(), config.max_new_tokens),
            stats,
        )
        for (config, schedule, prompt), engine, stats in zip(cases, engines, allstats, strict=True)
    ]
    tokens: list[list[int]] = [[] for _ in cases]
    waiting = {i: next(answer) for i, answer in enumerate(answers)}
    rng, turns = random.Random(1), []
    while waiting:  # one event of one conversation at a time
        i = rng.choice(sorted(waiting))
        turns.append(i)
        event = waiting.pop(i)
        try:
            if isinstance(event, Pass):
                waiting[i] = answers[i].send(engines[i].run(event))
            else:
                tokens[i].append(event.token)
                waiting[i] = next(answers[i])
        except StopIteration:
            pass
    assert sum(a != b for a, b in pairwise(turns)) > 50  # they took turns
    for i, (config, _, prompt) in enumerate(cases):
        expected = sequential(table, prompt, config, "last")
        assert (tokens[i], allstats[i].algorithm()) == (expected.tokens, expected.counts[-1])
