"""The decode loop by hand: what passes hold, where KV entries go, what becomes of drafts; errors and times.

The prompt is (1,), with candidates 2, 3, 4 after it, then 5 and 6, then 7 alone (`sessions.hand`).
"""

import math

import numpy as np
import pytest

from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.schedule.base import Fixed, PassContext, PassPlan
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from mara_runtime.tensors import spare_slots
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.helpers import sequential
from tests.unit.sessions import ACCEPT, ONE_BY_ONE, PROMPT, VOCAB, WIDE, Chat, Guesser, Scripted, hand, run


def hand_run(margins, limit=4, *, fallback="first", eos=None, schedule=ONE_BY_ONE, guess=None, **o):
    """(tokens, stats, engine). guess: what is drafted after the prompt and its first candidate."""
    engine = helpers.CountingEngine(hand(margins), slots=1 + limit + spare_slots(3), max_candidates=3)
    chat = Chat(engine, schedule, None if guess is None else Guesser(lambda index: guess[index - 2 :]))
    steps, stats = run(chat, PROMPT, DecodeConfig(**{**WIDE, **o}), fallback=fallback, eos=eos, limit=limit)
    return [step.token for step in steps], stats, engine


def test_accepting_rank_1_costs_what_greedy_decoding_costs():
    tokens, stats, engine = hand_run(ACCEPT, limit=3)
    plain_tokens, plain, plain_engine = hand_run(ACCEPT, limit=3, align=False)
    assert tokens == plain_tokens == [2, 5, 7]  # the last token does not run
    assert (stats.forwards, stats.rows) == (plain.forwards, plain.rows) == (2, 2)
    assert engine.headed == plain_engine.headed == [1, 1, 1]
    assert [(c.tokens, c.positions, c.slot) for c in engine.calls] == [([1], [0], 0), ([2], [1], 1), ([5], [2], 2)]
    assert engine.moves == []


@pytest.mark.parametrize(
    ("width", "fallback", "expected", "moves", "work"),
    [
        (1, "first", [2, 5], [(4, 1), (4, 2)], (3 + 2, 4 + 3)),  # run once more after the last, and moved
        (1, "last", [4, 6], [(3, 1), (3, 2)], (3 + 2, 3 + 2)),
        (None, "first", [2, 5], [], (2, 3 + 2)),
        (None, "last", [4, 6], [(3, 1), (3, 2)], (2, 3 + 2)),
    ],
)
def test_the_fallback_continues_the_sequence(width, fallback, expected, moves, work):
    tokens, stats, engine = hand_run({}, limit=2, fallback=fallback, schedule=Fixed(width))
    assert tokens == expected
    assert (stats.forwards, stats.rows, stats.forced, stats.accepted_rank) == (*work, 2, {})
    assert engine.moves == moves


@pytest.mark.parametrize(
    ("threshold", "token", "examined", "smallest"),
    [
        (0.25, 2, 1, 0.25),
        (0.5, 3, 2, 0.0),  # a margin must exceed the threshold
        (2.0, 4, 3, 1.25),
        (0.1, 2, 1, 0.4),
    ],
)
def test_a_threshold_other_than_0(threshold, token, examined, smallest):
    tokens, stats, _ = hand_run({(2,): 0.5, (3,): 0.75}, limit=1, threshold=threshold, fallback="last")
    assert (tokens, stats.examined, stats.smallest_margin) == ([token], examined, smallest)


def test_margins_are_compared_in_double_precision():
    margin = float(np.float32(0.1))  # exceeds 0.1
    tokens, stats, _ = hand_run({(2,): margin}, limit=1, threshold=0.1)
    assert (tokens, stats.forced, stats.smallest_margin) == ([2], 0, margin - 0.1)


@pytest.mark.parametrize(
    ("margins", "width", "guess", "tokens", "calls", "moves", "counts"),
    [
        # confirmed: one pass
        (ACCEPT, 1, [5, 7], [2, 5, 7, 7], [[2, 5, 7]], [], (0, 2, 2)),
        # siblings and a draft share a pass: the first candidate, the draft under it, then the others
        ({(3,): 1.0, (3, 5): 1.0}, None, [5, 7], [3, 5, 7], [[2, 5, 7, 3, 4], [5, 7, 6]], [(4, 1)], (0, 3, 1)),
        # 7 and not 6 follows 5, and runs in the slot of 6
        (ACCEPT, 1, [5, 6], [2, 5, 7, 7], [[2, 5, 6], [7]], [], (0, 2, 1)),
        # a drafted token that the agent rejects is an examined candidate: it does not run again
        ({(2,): 1.0, (2, 6): 0.25}, 1, [5, 7, 7], [2, 6, 7], [[2, 5, 7], [6]], [(3, 2)], (0, 2, 0)),
        # so is one whose margin equals the threshold
        ({(2,): 1.0, (2, 5): 0.0, (2, 6): 1.0}, 1, [5], [2, 6, 7], [[2, 5], [6]], [(3, 2)], (0, 1, 0)),
        # 5 is rejected, 6 too: 5 is emitted because nothing is left, not because it was guessed
        ({(2,): 1.0}, 1, [5], [2, 5, 7, 7], [[2, 5], [6], [7]], [], (1, 1, 0)),
        # a first candidate that becomes the fallback keeps its draft
        ({(2, 5): 1.0}, 1, [5], [2, 5, 7], [[2, 5], [3], [4]], [], (1, 1, 1)),
        ({(2, 5): 1.0}, None, [5, 7], [2, 5, 7], [[2, 5, 7, 3, 4]], [], (1, 2, 2)),
    ],
    ids=[
        "confirmed",
        "siblings",
        "wrong",
        "rejected",
        "equal",
        "fallback",
        "first is the fallback",
        "the same, together",
    ],
)
def test_what_becomes_of_a_draft(margins, width, guess, tokens, calls, moves, counts):
    emitted, stats, engine = hand_run(margins, len(tokens), schedule=Fixed(width, len(guess)), guess=guess)
    assert emitted == tokens
    assert [call.tokens for call in engine.calls[1:]] == calls
    assert engine.moves == moves
    assert (stats.forced, stats.drafted, stats.confirmed) == counts


@pytest.mark.parametrize(
    ("eos", "limit", "first_pass"),
    [
        ({5}, 9, [2, 5]),  # a draft ends with an end-of-sequence id
        ({2}, 9, [2]),
        (set(), 1, [2]),
        (set(), 5, [2, 5, 7, 7, 7]),
    ],
)
def test_a_draft_goes_no_further_than_the_answer(eos, limit, first_pass):
    tokens, stats, engine = hand_run(ACCEPT, limit, eos=eos, schedule=Fixed(1, 16), guess=[5, *[7] * 9])
    assert tokens == engine.calls[1].tokens == first_pass
    assert (stats.forwards, stats.drafted, stats.confirmed) == (1, len(tokens) - 1, len(tokens) - 1)


@pytest.mark.parametrize("options", [WIDE, {"align": False}, {"top_k": 1}], ids=["decisions", "plain", "single"])
def test_a_repetitive_text_is_guessed_from_its_n_grams(options):
    def periodic(prefix):
        """0 1 2 3 4 5 6 0 1 …, with a second candidate that is never picked."""
        row = np.full(VOCAB, -np.inf, np.float32)
        row[(prefix[-1] + 1) % 7], row[8] = 1.0, 0.0
        return row, np.array([1.0, 0.0], np.float32)

    chat = Chat(helpers.CountingEngine(periodic), Fixed(1, 16), NGrams())
    steps, stats = run(chat, [0], DecodeConfig(**options), limit=100)
    assert [step.token for step in steps] == [(i + 1) % 7 for i in range(100)]
    assert stats.forwards <= 9 + math.ceil(91 / 17)  # once round it is new, then seventeen tokens per pass
    assert stats.confirmed >= 80


# ── errors and times ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_cached_tokens_are_right_after_an_error_in_any_pass():
    class Failing(helpers.CountingEngine):
        fails = -1

        def run(self, work: Pass, place: int = 0) -> StepOutput:
            out = super().run(work, place)
            self.fails -= 1
            if self.fails == 0:
                raise OSError("out of order")
            return out

    table = helpers.hash_table(4, VOCAB, 256, 3.0)
    config = DecodeConfig(threshold=0.5, max_new_tokens=12, **WIDE)
    expected = sequential(table, [1, 2], config, "last")
    for passes in range(1, 30):
        engine = Failing(table)
        chat = Chat(engine, Fixed(2))
        engine.fails = passes
        try:
            run(chat, [1, 2], config, fallback="last")
        except OSError:
            assert chat.cached == [1, 2, *expected.tokens][: len(chat.cached)]
        else:
            break
        steps, _ = run(chat, [1, 2], config, fallback="last")
        assert [step.token for step in steps] == expected.tokens
    assert passes > 10


def test_times_leave_out_the_caller(monkeypatch):
    now = 0.0
    monkeypatch.setattr("mara_runtime.decode.time.perf_counter", lambda: now)

    class Slow(TableEngine):
        def run(self, work: Pass, place: int = 0) -> StepOutput:
            nonlocal now
            now += 1.0
            return super().run(work, place)

    class Thoughtful(Scripted):
        def plan(self, context: PassContext) -> PassPlan:
            nonlocal now
            now += 0.125
            return super().plan(context)

    stats = Stats()
    engine = Slow(hand(ACCEPT), helpers.AGENTS, 16)
    engine.use([helpers.AGENT])
    session = Chat(engine, Thoughtful([(1, 0)]))
    for _ in session.decode(PROMPT, DecodeConfig(**WIDE), stats, limit=4):
        now += 100.0
    # One pass for the prompt; one each for 2, for 5 and for the 7 that is not the last.
    assert (stats.prefill_ms, stats.engine_ms, stats.decode_ms) == (1000.0, 3000.0, 3375.0)
    assert stats.tokens_per_second == pytest.approx(3 / 3.375)  # the first comes with the prompt
