"""The decode loop: every schedule, strategy and order against a sequential procedure written here from method.md.

The language models are tables: logits and hidden state by prefix. TableEngine keeps a KV cache of tokens and positions,
so an entry that the loop leaves in a wrong slot is an error or another prefix, hence another answer.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mara_runtime import decode as decode_module
from mara_runtime.config import FALLBACKS, ORDERS, SCHEDULES, STRATEGIES, DecodeConfig
from mara_runtime.decode import PREFILL_ROWS, Step, decode
from mara_runtime.errors import NumericsError
from mara_runtime.stats import Stats
from mara_runtime.table_engine import TableEngine
from tests.unit import helpers

# ── the sequential procedure, one candidate at a time ────────────────────────────────────────────────────────────────


@dataclass
class Sequential:
    """The answer and the counters of method.md §1, and what it would have cost to compute them."""

    token_ids: list[int] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    margins: list[dict[int, float]] = field(default_factory=list)
    passes: dict[str, int] = field(default_factory=lambda: {"one-by-one": 0, "together": 0})
    rows: dict[str, int] = field(default_factory=lambda: {"one-by-one": 0, "together": 0})


def candidates_of(logits: list[float], top_k: int, top_p: float) -> list[int]:
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = [math.exp(logits[i] - logits[ranked[0]]) for i in ranked]
    kept = list(ranked)
    cumulative = 0.0
    while len(kept) > 1:
        cumulative += weights[len(kept) - 1] / sum(weights)
        if cumulative > 1.0 - top_p:
            break
        kept.pop()
    return kept


def sequential(
    table: helpers.Lookup, prompt: list[int], config: DecodeConfig, fallback: str, eos: set[int], limit: int
) -> Sequential:
    out = Sequential()
    rng = np.random.default_rng(config.seed)
    sequence = list(prompt)
    decisions = examined = forced = 0
    accepted_rank: Counter[str] = Counter()
    candidate_counts: Counter[str] = Counter()
    distances: list[float] = []
    while True:
        logits = [float(x) for x in table(tuple(sequence))[0]]
        ids = candidates_of(logits, config.top_k, config.top_p)
        candidate_counts[str(len(ids))] += 1
        margins: dict[int, float] = {}  # by rank from 0, in the order of examination
        accepted: list[int] = []
        if len(ids) == 1:
            rank = 0
        else:
            decisions += 1
            order = list(range(len(ids)))
            if config.order == "best_last":
                order = order[1:] + order[:1]
            if config.order == "reversed":
                order.reverse()
            for candidate in order:
                hidden = table((*sequence, ids[candidate]))[1]
                margins[candidate] = float(hidden[0]) + float(hidden[1])
                if margins[candidate] > config.threshold:
                    accepted.append(candidate)
                    if config.strategy == "top1":
                        break
            examined += len(margins)
            distances += [abs(margin - config.threshold) for margin in margins.values()]
            if not accepted:
                forced += 1
                rank = {"first": 0, "last": len(ids) - 1}[fallback]
            elif config.strategy == "top1":
                rank = accepted[0]
            elif config.strategy == "max_prob":
                rank = accepted[0]
                for candidate in accepted[1:]:
                    if margins[candidate] > margins[rank]:
                        rank = candidate
            else:
                rank = accepted[int(rng.integers(len(accepted)))]
            if accepted:
                accepted_rank[str(rank + 1)] += 1
        token = ids[rank]
        out.token_ids.append(token)
        out.ranks.append(rank + 1)
        out.margins.append({candidate + 1: margin for candidate, margin in margins.items()})
        sequence.append(token)
        ends = token in eos or len(out.token_ids) == limit
        if margins:
            out.passes["one-by-one"] += len(margins)
            out.rows["one-by-one"] += len(margins)
            out.passes["together"] += 1
            out.rows["together"] += len(ids)
        elif not ends:
            for schedule in SCHEDULES:
                out.passes[schedule] += 1
                out.rows[schedule] += 1
        if ends:
            break
    out.counts = {
        "tokens": len(out.token_ids),
        "decisions": decisions,
        "examined": examined,
        "forced": forced,
        "accepted_rank": dict(accepted_rank),
        "candidate_counts": dict(candidate_counts),
        "smallest_margin": min(distances, default=None),
    }
    return out


def run(
    engine: TableEngine,
    prompt: list[int],
    config: DecodeConfig,
    *,
    fallback: str = "first",
    eos: set[int] | None = None,
    limit: int | None = None,
) -> tuple[list[Step], Stats]:
    stats = Stats()
    steps = decode(
        engine,
        prompt,
        config,
        fallback=fallback,
        eos_token_ids=eos or set(),
        limit=limit or config.max_new_tokens,
        stats=stats,
    )
    return list(steps), stats


# ── any table, any option ────────────────────────────────────────────────────────────────────────────────────────────

VOCAB = 9
tables = st.builds(
    helpers.hash_table,
    seed=st.integers(0, 2**32),
    vocab_size=st.just(VOCAB),
    levels=st.sampled_from([3, 8, 256]),
    peak=st.sampled_from([0.0, 2.0, 6.0, 16.0, 40.0]),
)
configs = st.builds(
    DecodeConfig,
    top_k=st.integers(1, VOCAB + 2),
    top_p=st.sampled_from([0.0, 0.5, 0.8, 0.95, 0.999, 1.0]),
    max_new_tokens=st.integers(1, 12),
    strategy=st.sampled_from(STRATEGIES),
    order=st.sampled_from(ORDERS),
    threshold=st.sampled_from([-2.5, -0.5, 0.0, 0.25, 0.7, 1.0, 9.0]),
    schedule=st.sampled_from(SCHEDULES),
    seed=st.integers(0, 1000),
)
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=11)
end_sets = st.sets(st.integers(0, VOCAB - 1), max_size=2)


@settings(max_examples=500)
@given(tables, configs, prompts, st.sampled_from(FALLBACKS), end_sets, st.integers(1, 6))
def test_every_schedule_is_the_sequential_procedure(
    table: helpers.Lookup, config: DecodeConfig, prompt: list[int], fallback: str, eos: set[int], prefill_rows: int
) -> None:
    expected = sequential(table, prompt, config, fallback, eos, config.max_new_tokens)
    # As large as decode asks for: prompt and answer, and a spare slot a candidate.
    engine = helpers.CountingEngine(table, slots=len(prompt) + config.max_new_tokens + min(config.top_k, VOCAB))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "PREFILL_ROWS", prefill_rows)
        steps, stats = run(engine, prompt, config, fallback=fallback, eos=eos)

    assert [step.token for step in steps] == expected.token_ids
    assert stats.algorithm() == expected.counts
    assert [step.rank for step in steps] == expected.ranks
    assert [step.margins for step in steps] == expected.margins
    assert [step.position for step in steps] == list(range(len(prompt), len(prompt) + len(steps)))
    assert (stats.forwards, stats.rows) == (expected.passes[config.schedule], expected.rows[config.schedule])

    # What the counters mean.
    assert stats.tokens == len(steps) == sum(stats.candidate_counts.values())
    assert stats.decisions == stats.tokens - stats.candidate_counts[1]
    assert stats.decisions == sum(stats.accepted_rank.values()) + stats.forced
    assert stats.forced == sum(step.forced for step in steps)
    assert stats.examined == sum(len(step.margins) for step in steps)
    assert stats.prompt_tokens == len(prompt)
    for step in steps:
        assert step.candidates.ids[step.rank - 1] == step.token
        assert not (step.forced and max(step.margins.values()) > config.threshold)

    # What the work was: the agent is asked in the passes that have candidates to decide on, and never else.
    prefills = math.ceil(len(prompt) / prefill_rows)
    assert len(engine.calls) == prefills + stats.forwards
    assert sum(len(tokens) for tokens, *_ in engine.calls) == len(prompt) + stats.rows
    shown = stats.examined if config.schedule == "one-by-one" else sum(len(s.candidates) for s in steps if s.margins)
    assert sum(engine.asked) == shown


@settings(max_examples=150)
@given(tables, configs, prompts, st.sampled_from(FALLBACKS), end_sets)
def test_schedules_agree(
    table: helpers.Lookup, config: DecodeConfig, prompt: list[int], fallback: str, eos: set[int]
) -> None:
    answers = []
    for schedule in SCHEDULES:
        changed = DecodeConfig(**{**config.to_json(), "stop": (), "schedule": schedule})
        steps, stats = run(TableEngine(table, helpers.sum_agent, 64), prompt, changed, fallback=fallback, eos=eos)
        answers.append(([s.token for s in steps], [s.margins for s in steps], stats.algorithm()))
    assert answers[0] == answers[1]


@settings(max_examples=100)
@given(tables, prompts, st.integers(1, 12), end_sets)
def test_plain_greedy_takes_the_best_token_each_time(
    table: helpers.Lookup, prompt: list[int], limit: int, eos: set[int]
) -> None:
    sequence = list(prompt)
    while True:
        logits = table(tuple(sequence))[0]
        sequence.append(max(range(VOCAB), key=lambda i: (logits[i], -i)))
        if sequence[-1] in eos or len(sequence) - len(prompt) == limit:
            break
    expected = sequence[len(prompt) :]

    engine = helpers.CountingEngine(table)
    steps, stats = run(engine, prompt, DecodeConfig(align=False), eos=eos, limit=limit)
    assert [step.token for step in steps] == expected
    assert [(step.candidates.ids.tolist(), step.rank, step.forced) for step in steps] == [
        ([token], 1, False) for token in expected
    ]
    assert (stats.forwards, stats.rows) == (len(expected) - 1, len(expected) - 1)
    assert engine.asked == []
    assert stats.algorithm() == {
        "tokens": len(expected),
        "decisions": 0,
        "examined": 0,
        "forced": 0,
        "accepted_rank": {},
        "candidate_counts": {},
        "smallest_margin": None,
    }


# ── hand-worked: prompt (1,), candidates 2, 3, 4 at the first position and 5, 6 at the second, then 7 alone ──────────

PROMPT = [1]
FIRST = {2: 3.0, 3: 2.0, 4: 1.0}
SECOND = {5: 1.0, 6: 0.5}
WIDE = {"top_k": 8, "top_p": 1.0}


def hand(margins: dict[tuple[int, ...], float]) -> helpers.Lookup:
    """Margins by what follows the prompt."""
    logits = {(1,): FIRST, (1, 2): SECOND, (1, 3): SECOND, (1, 4): SECOND}
    return helpers.scripted(logits, {(1, *after): margin for after, margin in margins.items()})


def hand_run(
    margins: dict[tuple[int, ...], float],
    limit: int = 4,
    fallback: str = "first",
    eos: set[int] | None = None,
    **o: Any,
) -> tuple[list[int], Stats, helpers.CountingEngine]:
    engine = helpers.CountingEngine(hand(margins), slots=1 + limit + 3)
    config = DecodeConfig(**{**WIDE, **o})
    steps, stats = run(engine, PROMPT, config, fallback=fallback, eos=eos, limit=limit)
    return [step.token for step in steps], stats, engine


def test_accepting_rank_1_one_by_one_costs_what_plain_greedy_costs() -> None:
    accept_all = {(2,): 1.0, (2, 5): 1.0}
    tokens, stats, engine = hand_run(accept_all, limit=3, schedule="one-by-one")
    plain_tokens, plain, plain_engine = hand_run(accept_all, limit=3, align=False)
    assert tokens == plain_tokens == [2, 5, 7]
    # Plain: 2, 5 are run, the last token is not. Aligned: 2 and 5 are run to be examined, 7 stands alone.
    assert (plain.forwards, plain.rows) == (2, 2)
    assert (stats.forwards, stats.rows) == (2, 2)
    assert engine.calls == plain_engine.calls
    assert engine.moves == []


@pytest.mark.parametrize(("schedule", "forwards", "rows"), [("one-by-one", 2 + 2 + 1, 5), ("together", 3, 3 + 2 + 1)])
def test_work_when_the_second_candidate_is_accepted_twice(schedule: str, forwards: int, rows: int) -> None:
    tokens, stats, engine = hand_run({(3,): 0.5, (3, 6): 2.0}, schedule=schedule)
    assert tokens == [3, 6, 7, 7]  # 7 alone, once run, once the last
    assert (stats.forwards, stats.rows) == (forwards, rows)
    assert (stats.decisions, stats.examined, stats.forced) == (2, 4, 0)
    assert dict(stats.accepted_rank) == {2: 2}
    assert dict(stats.candidate_counts) == {3: 1, 2: 1, 1: 2}
    assert stats.smallest_margin == 0.5
    assert engine.moves == [(2, 1), (3, 2)]


@pytest.mark.parametrize(("schedule", "forwards", "rows"), [("one-by-one", 3 + 2, 5), ("together", 2, 5)])
@pytest.mark.parametrize(("fallback", "expected", "moves"), [("first", [2, 5], []), ("last", [4, 6], [(3, 1), (3, 2)])])
def test_the_fallback_after_several_passes_is_in_its_place(
    schedule: str, forwards: int, rows: int, fallback: str, expected: list[int], moves: list[tuple[int, int]]
) -> None:
    tokens, stats, engine = hand_run({}, limit=2, fallback=fallback, schedule=schedule)
    assert tokens == expected
    assert (stats.forwards, stats.rows, stats.forced, stats.decisions) == (forwards, rows, 2, 2)
    assert stats.accepted_rank == {}
    assert engine.moves == moves
    # The cache now holds the sequence: the next token sees it.
    engine.forward([7], [3], 3, [0])
    assert [entry[0] for entry in engine._entries[:4] if entry] == [*PROMPT, *expected, 7]


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


def test_random_is_reproducible_by_its_seed_and_only_by_it() -> None:
    table = helpers.hash_table(5, VOCAB, 256, 1.0)
    always = DecodeConfig(strategy="random", threshold=-9.0, max_new_tokens=20, **WIDE)

    def answer(seed: int, schedule: str) -> list[int]:
        config = DecodeConfig(**{**always.to_json(), "stop": (), "seed": seed, "schedule": schedule})
        return [step.token for step in run(TableEngine(table, helpers.sum_agent, 64), PROMPT, config)[0]]

    assert answer(1, "together") == answer(1, "together") == answer(1, "one-by-one")
    assert answer(1, "together") != answer(2, "together")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_threshold_is_what_a_margin_must_exceed(schedule: str) -> None:
    margins = {(2,): 0.5, (3,): 0.75}
    assert hand_run(margins, limit=1, threshold=0.25, schedule=schedule)[0] == [2]
    tokens, stats, _ = hand_run(margins, limit=1, threshold=0.5, schedule=schedule)
    assert (tokens, stats.smallest_margin) == ([3], 0.0)
    tokens, stats, _ = hand_run(margins, limit=1, threshold=2.0, schedule=schedule, fallback="last")
    assert (tokens, stats.forced) == ([4], 1)


def test_a_threshold_that_float32_cannot_hold_stops_the_examination_all_the_same() -> None:
    # float32(0.1) exceeds 0.1: the first candidate is accepted, so a second pass would be wasted.
    tokens, stats, _ = hand_run({(2,): float(np.float32(0.1))}, limit=1, threshold=0.1, schedule="one-by-one")
    assert tokens == [2]
    assert (stats.examined, stats.forwards) == (1, 1)


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
    assert all(7 not in call[0] for call in engine.calls)


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
    steps = decode(engine, PROMPT, DecodeConfig(**WIDE), fallback="first", eos_token_ids=set(), limit=9, stats=stats)
    assert engine.calls == []
    assert next(steps).token == 2
    assert (len(engine.calls), stats.tokens, stats.forwards) == (2, 1, 1)


# ── prefill ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, PREFILL_ROWS, PREFILL_ROWS + 1, 2 * PREFILL_ROWS + 88])
def test_a_long_prompt_is_prefilled_in_chunks(length: int) -> None:
    table = helpers.hash_table(1, VOCAB, 256, 4.0)
    prompt = [i * 7 % VOCAB for i in range(length)]
    engine = helpers.CountingEngine(table, slots=length + 16)
    steps, stats = run(engine, prompt, DecodeConfig(align=False), limit=1)
    assert [tokens for tokens, *_ in engine.calls] == [
        prompt[at : at + PREFILL_ROWS] for at in range(0, length, PREFILL_ROWS)
    ]
    assert [positions for _, positions, *_ in engine.calls] == [
        list(range(at, min(at + PREFILL_ROWS, length))) for at in range(0, length, PREFILL_ROWS)
    ]
    assert [slot for *_, slot, _ in engine.calls] == list(range(0, length, PREFILL_ROWS))
    # Logits are wanted of the very last row alone.
    assert [rows for *_, rows in engine.calls] == [[]] * ((length - 1) // PREFILL_ROWS) + [
        [(length - 1) % PREFILL_ROWS]
    ]
    assert steps[0].token == int(np.argmax(table(tuple(prompt))[0]))
    assert (stats.prompt_tokens, stats.forwards, stats.rows) == (length, 0, 0)


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


# ── numbers that are none ────────────────────────────────────────────────────────────────────────────────────────────


def spoiled(at: tuple[int, ...], *, logits: float | None = None, hidden: float | None = None) -> helpers.Lookup:
    """The hand-worked table, one number of one prefix replaced."""
    table = hand({(2,): 1.0, (2, 5): 1.0})

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = table(prefix)
        if prefix == at and logits is not None:
            row[4] = logits
        if prefix == at and hidden is not None:
            state[1] = hidden
        return row, state

    return lookup


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("at", "position", "token"),
    [((1, 0, 3), 2, 3), ((1, 0, 3, 3), 3, 3)],
    ids=["inside the prompt", "at its end"],
)
def test_a_hidden_state_of_the_prompt_that_is_not_finite(
    bad: float, at: tuple[int, ...], position: int, token: int
) -> None:
    with pytest.raises(NumericsError, match=rf"position {position} \(token {token}\) is not finite"):
        run(helpers.CountingEngine(spoiled(at, hidden=bad)), [1, 0, 3, 3], DecodeConfig(**WIDE))


def test_a_hidden_state_in_a_later_chunk_of_the_prompt_is_named_by_its_position() -> None:
    prompt = [i % 5 for i in range(PREFILL_ROWS + 10)]
    at = tuple(prompt[: PREFILL_ROWS + 4])
    with pytest.raises(NumericsError, match=rf"position {PREFILL_ROWS + 3} \(token {at[-1]}\)"):
        run(helpers.CountingEngine(spoiled(at, hidden=math.nan)), prompt, DecodeConfig(**WIDE))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("at", "position", "token"),
    [((1, 2), 1, 2), ((1, 2, 5), 2, 5), ((1, 2, 5, 7), 3, 7)],
    ids=["first candidate", "second position", "single candidate"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_hidden_state_of_a_candidate_that_is_not_finite(
    schedule: str, at: tuple[int, ...], position: int, token: int, bad: float
) -> None:
    engine = helpers.CountingEngine(spoiled(at, hidden=bad))
    with pytest.raises(NumericsError, match=rf"position {position} \(token {token}\) is not finite"):
        run(engine, PROMPT, DecodeConfig(schedule=schedule, **WIDE), limit=8)


def test_a_sibling_whose_hidden_state_is_not_finite_is_named_by_its_own_token() -> None:
    engine = helpers.CountingEngine(spoiled((1, 4), hidden=math.nan))
    with pytest.raises(NumericsError, match=r"position 1 \(token 4\)"):
        run(engine, PROMPT, DecodeConfig(schedule="together", **WIDE))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("at", "position"),
    [((1,), 0), ((1, 2), 1), ((1, 2, 5), 2), ((1, 2, 5, 7), 3)],
    ids=["prompt", "first candidate", "second position", "single candidate"],
)
@pytest.mark.parametrize("align", [True, False])
def test_logits_that_are_nan_or_infinite(align: bool, at: tuple[int, ...], position: int, bad: float) -> None:
    # An infinite logit (an overflow in half precision) leaves no probabilities: the softmax of it is NaN.
    engine = helpers.CountingEngine(spoiled(at, logits=bad))
    with pytest.raises(NumericsError, match=rf"logits after position {position} "):
        run(engine, PROMPT, DecodeConfig(align=align, **({} if not align else WIDE)), limit=8)


def test_logits_that_rule_out_every_token() -> None:
    def nothing(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.full(8, -np.inf, np.float32), np.zeros(2, np.float32)

    with pytest.raises(NumericsError, match="logits after position 0 "):
        run(helpers.CountingEngine(nothing), PROMPT, DecodeConfig(**WIDE), limit=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_margin_that_is_not_finite(bad: float, schedule: str) -> None:
    # Weights of the agent that are NaN must not look like an agent that rejects everything.
    engine = helpers.CountingEngine(hand({}), agent=lambda hidden: np.full(len(hidden), bad, np.float32))
    with pytest.raises(NumericsError, match="position 1"):
        run(engine, PROMPT, DecodeConfig(schedule=schedule, **WIDE), limit=2)


# ── the test engine notices what it is there to notice ───────────────────────────────────────────────────────────────


def test_table_engine_notices_an_entry_that_was_not_moved() -> None:
    class Forgetful(TableEngine):
        def move(self, source: int, target: int) -> None:
            """Leave the entry where it is."""

    prompt, limit = [1, 4], 6
    for seed in range(5):
        table = helpers.hash_table(seed, VOCAB, 256, 1.0)
        config = DecodeConfig(threshold=9.0, **WIDE)  # always the fallback, which is the last candidate
        good = [
            s.token
            for s in run(TableEngine(table, helpers.sum_agent, 64), prompt, config, fallback="last", limit=limit)[0]
        ]
        bad = [
            s.token
            for s in run(Forgetful(table, helpers.sum_agent, 64), prompt, config, fallback="last", limit=limit)[0]
        ]
        assert bad != good


def test_table_engine_refuses_a_prefix_with_a_hole_or_a_sibling_in_it() -> None:
    table = helpers.hash_table(0, VOCAB, 256, 1.0)
    engine = TableEngine(table, helpers.sum_agent, 8)
    engine.forward([1, 2], [0, 1], 0, [])
    with pytest.raises(IndexError, match="slot 2 holds None"):
        engine.forward([3], [3], 3, [0])
    engine.forward([5, 6], [2, 2], 2, [])  # siblings in slots 2 and 3
    with pytest.raises(IndexError, match="slot 3 holds"):
        engine.forward([7], [4], 4, [0])
    with pytest.raises(IndexError):
        engine.forward([7, 7], [2, 2], 7, [0])  # beyond the cache


def test_table_engine_shows_a_row_the_prefix_and_itself() -> None:
    seen: list[tuple[int, ...]] = []

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        seen.append(prefix)
        return np.arange(3, dtype=np.float32) + len(prefix), np.zeros(2, np.float32)

    engine = TableEngine(lookup, helpers.sum_agent, 8)
    engine.forward([4, 5], [0, 1], 0, [])
    out = engine.forward([1, 2, 3], [2, 2, 2], 2, [2, 0])
    assert seen == [(4,), (4, 5), (4, 5, 1), (4, 5, 2), (4, 5, 3)]
    assert out.hidden.shape == (3, 2)
    assert out.logits.tolist() == [[3, 4, 5]] * 2


def test_time_is_that_of_decoding_without_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(decode_module.time, "perf_counter", lambda: now)

    class Slow(TableEngine):
        def forward(self, *arguments: Any) -> Any:
            nonlocal now
            now += 1.0
            return super().forward(*arguments)

    stats = Stats()
    engine = Slow(hand({(2,): 1.0, (2, 5): 1.0}), helpers.sum_agent, 16)
    for _ in decode(engine, PROMPT, DecodeConfig(**WIDE), fallback="first", eos_token_ids=set(), limit=4, stats=stats):
        now += 100.0
    # A pass for the prompt; one each for 2, for 5 and for the 7 that is not the last.
    assert stats.prefill_ms == 1000.0
    assert stats.decode_ms == 3000.0
    assert stats.tokens_per_second == pytest.approx(4 / 3)
    assert Stats().tokens_per_second == 0.0
