"""AlignedDecoder over a table: prompts, capacity, the fallback in force, stop texts, results."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mara_runtime import AlignedDecoder, Bundle, DecodeConfig, Generation
from mara_runtime.config import SCHEDULES
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import BundleError, EngineError, MaraError, NumericsError, OptionError, PromptError
from mara_runtime.schedule.acceptance import Acceptance
from mara_runtime.tensors import spare_slots
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.helpers import ASSISTANT, BOS, EOS, USER

TOKENIZER = helpers.byte_level_tokenizer()
VOCAB = TOKENIZER.get_vocab_size()
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
GREEDY = DecodeConfig(align=False)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def make_decoder(folder: Path, lookup: helpers.Lookup, **options: Any) -> tuple[AlignedDecoder, helpers.CountingEngine]:
    """A decoder of a bundle with tokenizer and template, unless the options say otherwise."""
    defaults = {
        "tokenizer": TOKENIZER,
        "chat_template": helpers.CHAT_TEMPLATE,
        "special_tokens": SPECIAL,
        "vocab_size": VOCAB,
        "eos_token_ids": [EOS],
        "max_context": 48,
        "max_candidates": 40,
    }
    options = {**defaults, **options}
    candidates = options["max_candidates"]
    engine = helpers.CountingEngine(
        lookup, slots=options["max_context"] + spare_slots(candidates), max_candidates=candidates
    )
    return AlignedDecoder(helpers.make_bundle(folder, **options), engine=engine, cost=helpers.COST), engine


def saying(text: str, then: int | None = EOS, vocab: int = VOCAB) -> helpers.Lookup:
    """A language model that answers <assistant>, or else the whole prompt 'q', with a text, and then with one token."""
    answer = [*ids_of(text), *([] if then is None else [then])]

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start = prefix.index(ASSISTANT) + 1 if ASSISTANT in prefix else 1
        row = np.full(vocab, -100.0, np.float32)
        at = len(prefix) - start
        row[answer[at] if 0 <= at < len(answer) else ids_of("x")[0]] = 100.0
        return row, np.zeros(2, np.float32)

    return lookup


def choosing(vocab: int = VOCAB) -> helpers.Lookup:
    """Two candidates at every position, '#' before '!', of which the agent rejects both."""
    better, worse = ids_of("#")[0], ids_of("!")[0]

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row = np.full(vocab, -100.0, np.float32)
        row[better], row[worse] = 1.0, 0.5
        return row, np.array([-1.0, 0.0], np.float32)

    return lookup


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def prompt_seen(engine: helpers.CountingEngine) -> list[int]:
    return list(engine.calls[0].tokens)


def test_a_text_goes_through_the_chat_template(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    result = decoder.generate("hi")
    assert prompt_seen(engine) == [BOS, USER, *ids_of("hi"), ASSISTANT]
    assert result.text == "hello"
    assert result.stats.prompt_tokens == 5


def test_a_raw_text_does_not(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    decoder.generate("hi", raw=True)
    assert prompt_seen(engine) == [BOS, *ids_of("hi")]


def test_a_bundle_without_a_template_is_raw(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"), chat_template=None)
    decoder.generate("hi")
    assert prompt_seen(engine) == [BOS, *ids_of("hi")]


@pytest.mark.parametrize("raw", [True, False])
def test_variables_without_a_template_are_refused(tmp_path: Path, raw: bool) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"), **({} if raw else {"chat_template": None}))
    with pytest.raises(OptionError, match="which raw text leaves out" if raw else "does not have"):
        decoder.generate("hi", raw=raw, template={"loud": True})


@pytest.mark.parametrize("raw", [True, False])
def test_a_conversation_goes_through_the_template_raw_or_not(tmp_path: Path, raw: bool) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    decoder.generate([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], raw=raw)
    assert prompt_seen(engine) == [BOS, USER, *ids_of("a"), USER, *ids_of("b"), ASSISTANT]


@pytest.mark.parametrize("kind", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, kind: Any) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    result = decoder.generate(kind([7, ASSISTANT]))
    assert prompt_seen(engine) == [7, ASSISTANT]
    assert result.text == "hello"


@pytest.mark.parametrize("prompt", ["", [], (), [{"role": "user", "content": ""}]], ids=repr)
def test_an_empty_prompt_is_refused(tmp_path: Path, prompt: Any) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(PromptError, match="empty"):
        decoder.generate(prompt)
    assert engine.calls == []


@pytest.mark.parametrize("prompt", [[1.5, 2.5], [1, 2.7], [1, "a"], [None], ["text"]], ids=repr)
def test_a_prompt_of_no_known_kind_is_refused(tmp_path: Path, prompt: Any) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(PromptError):
        decoder.encode(prompt)


@pytest.mark.parametrize("prompt", [None, b"text", {1, 2}, iter([1, 2])], ids=lambda prompt: type(prompt).__name__)
def test_a_prompt_of_another_type_is_told_what_it_can_be(tmp_path: Path, prompt: Any) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(PromptError, match=f"^the prompt is of type {type(prompt).__name__}; it must be a text, "):
        decoder.encode(prompt)


def test_token_ids_may_be_a_range_or_a_numpy_array(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    assert decoder.encode(range(3)) == decoder.encode(np.arange(3)) == [0, 1, 2]
    with pytest.raises(PromptError, match=r"^the prompt is of type int; "):
        decoder.encode(np.array(5))
    with pytest.raises(PromptError, match=r"token ids are a flat list$"):
        decoder.encode(np.zeros((1, 3), np.int64))


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(OptionError, match=r"which token ids leave out$"):
        decoder.encode([1, 2], template={"enable_thinking": False})
    with pytest.raises(OptionError, match=r"^threads is 2, and the engine is open already"):
        AlignedDecoder(decoder.bundle, engine=engine, threads=2)


@pytest.mark.parametrize(
    ("ids", "token", "index"), [([1, VOCAB], VOCAB, 1), ([-1], -1, 0), ([0, 2, 10**30], 10**30, 2)]
)
def test_a_token_out_of_the_vocabulary_is_named(tmp_path: Path, ids: list[int], token: int, index: int) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(PromptError, match=rf"token id {token} at index {index} .* 0 to {VOCAB - 1}$"):
        decoder.encode(ids)
    assert decoder.encode([0, VOCAB - 1]) == [0, VOCAB - 1]


# ── capacity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [10, 11, 500])
def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path, length: int) -> None:
    decoder, engine = make_decoder(tmp_path, choosing(), max_context=10)
    with pytest.raises(PromptError, match=rf"has {length} tokens; this bundle holds 10 .*--max-context"):
        decoder.stream([5] * length)
    assert engine.calls == []


@pytest.mark.parametrize("prompt_length", [1, 6, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_full_capacity_ends_the_answer(tmp_path: Path, prompt_length: int, schedule: str) -> None:
    decoder, engine = make_decoder(tmp_path, choosing(), max_context=10, max_candidates=2)
    result = decoder.generate([5] * prompt_length, DecodeConfig(top_k=2, schedule=schedule, fallback="last"))
    assert len(result.token_ids) == 10 - prompt_length
    assert result.finish_reason == "length"
    assert result.text == "!" * (10 - prompt_length)
    assert engine.slots == 10 + spare_slots(2)  # what the real engine has: no slot beyond it was touched


def test_max_new_tokens_ends_the_answer_before(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    result = decoder.generate([5], DecodeConfig(max_new_tokens=3, top_k=2))
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


def test_an_end_of_sequence_id_as_the_last_token_allowed_is_a_stop(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hi"))
    assert decoder.generate("q", DecodeConfig(align=False, max_new_tokens=3)).finish_reason == "stop"
    assert decoder.generate("q", DecodeConfig(align=False, max_new_tokens=2)).finish_reason == "length"


@pytest.mark.parametrize("ids", [[EOS], [USER, EOS], [300, 2]])
def test_any_id_of_the_list_ends_the_answer(tmp_path: Path, ids: list[int]) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hi", then=ids[-1]), vocab_size=VOCAB, eos_token_ids=ids)
    result = decoder.generate("q")
    assert (result.token_ids, result.finish_reason) == ([*ids_of("hi"), ids[-1]], "stop")


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_k_above_the_bundle_s_candidates_is_refused(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, choosing(), max_candidates=4)
    with pytest.raises(OptionError, match=r"^--top-k is 5; this bundle allows 1 to 4 "):
        decoder.stream("q", DecodeConfig(top_k=5))
    assert engine.calls == []
    assert decoder.generate("q", DecodeConfig(top_k=4, max_new_tokens=1)).token_ids


def test_the_default_top_k_of_40_needs_a_bundle_that_allows_it(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing(), max_candidates=39)
    with pytest.raises(OptionError, match="--top-k is 40"):
        decoder.generate("q", DecodeConfig())


@pytest.mark.parametrize(
    ("recorded", "option", "used", "text"),
    [
        ("first", None, "first", "##"),
        ("last", None, "last", "!!"),
        ("last", "first", "first", "##"),
        ("first", "last", "last", "!!"),
    ],
)
def test_the_fallback_in_force(tmp_path: Path, recorded: str, option: str | None, used: str, text: str) -> None:
    decoder, _ = make_decoder(tmp_path, choosing(), fallback=recorded)
    result = decoder.generate("q", DecodeConfig(fallback=option, top_k=2, max_new_tokens=2))
    assert (result.text, result.config.fallback) == (text, used)
    assert result.to_json()["config"]["fallback"] == used
    assert result.stats.forced == 2


# ── stop texts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_text_ends_the_decoding(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, saying("one. two. three."))
    result = decoder.generate("q", DecodeConfig(align=False, stop=(". t",), draft=0))
    assert result.text == "one"
    assert result.finish_reason == "stop"
    assert TOKENIZER.decode(result.token_ids) == "one. t"  # the ids hold what was decoded
    assert len(engine.calls) == 1 + result.stats.forwards == len(result.token_ids)  # and nothing was run after it


def test_the_pieces_with_a_stop_text_are_the_text(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("ab## ###c"))
    pieces = list(decoder.stream("q", DecodeConfig(align=False, stop=("###",))))
    assert "".join(piece.text for piece in pieces) == "ab## "
    assert pieces[-1].result is not None
    assert pieces[-1].result.text == "ab## "


def test_what_was_held_back_comes_with_the_last_piece(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("ab##"))
    pieces = list(decoder.stream("q", DecodeConfig(align=False, stop=("###",))))
    assert [piece.text for piece in pieces] == ["a", "b", "", "", "##"]
    assert pieces[-1].step.token == EOS
    assert pieces[-1].result is not None
    assert pieces[-1].result.finish_reason == "stop"


def test_a_stop_text_that_only_the_end_completes_is_a_stop(tmp_path: Path) -> None:
    first_byte = ids_of("é")[0]  # no character yet; at the end of the answer it becomes U+FFFD
    decoder, _ = make_decoder(tmp_path, saying("ab", then=first_byte))
    result = decoder.generate("q", DecodeConfig(align=False, max_new_tokens=3, stop=("b\ufffd",)))
    assert (result.token_ids, result.text, result.finish_reason) == ([*ids_of("ab"), first_byte], "a", "stop")


def test_a_stop_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing(), tokenizer=None, chat_template=None)
    with pytest.raises(OptionError, match="--stop"):
        decoder.stream([5], DecodeConfig(stop=("x",), top_k=2))


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_a_piece_a_token_and_the_last_has_the_result(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello 中!"))
    pieces = list(decoder.stream("q"))
    assert "".join(piece.text for piece in pieces) == "hello 中!"
    assert [piece.result is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    result = pieces[-1].result
    assert result is not None
    assert result.token_ids == [piece.step.token for piece in pieces]
    assert result.to_json()["token_ids"] == decoder.generate("q").token_ids


def test_two_streams_at_once_are_refused(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    config = DecodeConfig(top_k=2, max_new_tokens=4)
    first = decoder.stream("q", config)
    next(first)
    second = decoder.stream("r", config)
    next(second)
    with pytest.raises(MaraError, match="another"):
        next(first)
    assert len(list(second)) == 3  # the second goes on unharmed


def test_a_stream_that_was_never_begun_is_refused_too(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    first = decoder.stream("q", DecodeConfig(top_k=2))
    decoder.generate("r", DecodeConfig(top_k=2, max_new_tokens=1))
    with pytest.raises(MaraError, match="another"):
        next(first)


def test_one_after_the_other_is_fine_even_when_the_first_was_left(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    fresh = decoder.generate("q").token_ids
    abandoned = decoder.stream("a longer question")
    next(abandoned)
    next(abandoned)
    assert decoder.generate("q").token_ids == fresh


def test_a_prompt_that_was_refused_leaves_the_running_stream_alone(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    stream = decoder.stream("q", DecodeConfig(top_k=2, max_new_tokens=3))
    next(stream)
    with pytest.raises(PromptError):
        decoder.stream("")
    assert len(list(stream)) == 2


# ── what lasts from one answer to the next ───────────────────────────────────────────────────────────────────────────


def reciting(text: str = "abc", accepts: bool = True) -> helpers.Lookup:
    """A language model that repeats a text for ever, '#' in second place, beside an agent that accepts all, or not."""
    ids = ids_of(text)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row = np.full(VOCAB, -100.0, np.float32)
        row[ids[len(prefix) % len(ids)]], row[ids_of("#")[0]] = 1.0, 0.5
        return row, np.array([1.0 if accepts else -1.0, 0.0], np.float32)

    return lookup


def test_a_conversation_keeps_what_the_cache_holds(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path / "one", saying("hello"))
    first = decoder.generate([7, ASSISTANT], GREEDY)
    assert (first.text, first.stats.reused_tokens) == ("hello", 0)
    turn = [7, ASSISTANT, *first.token_ids, 9, ASSISTANT]
    engine.calls.clear()
    second = decoder.generate(turn, GREEDY)
    assert second.stats.reused_tokens == 2 + len(first.token_ids) - 1  # the end of the answer was not run
    assert prompt_seen(engine) == [EOS, 9, ASSISTANT]
    fresh = make_decoder(tmp_path / "two", saying("hello"))[0].generate(turn, GREEDY)
    assert second.token_ids == fresh.token_ids


def test_every_answer_of_a_decoder_is_that_of_a_fresh_one(tmp_path: Path) -> None:
    table = helpers.hash_table(7, VOCAB, 256, 5.0, memory=3)
    decoder, _ = make_decoder(tmp_path / "used", table)
    configs = [
        DecodeConfig(top_k=3, max_new_tokens=9, schedule=schedule, draft=draft, **options)
        for schedule in SCHEDULES
        for draft in (None, 0, 5)
        for options in ({}, {"align": False}, {"strategy": "max_prob"}, {"threshold": -0.5})
    ]
    for index, config in enumerate(configs):
        prompt = [1, 2, 3, 4, 5][: index % 5 + 1]
        abandoned = decoder.stream([*prompt, 6], config)
        for _ in range(index % 4):
            next(abandoned)
        fresh, _ = make_decoder(tmp_path / str(index), table)
        used = decoder.generate(prompt, config)
        expected = fresh.generate(prompt, config)
        assert (used.token_ids, used.stats.algorithm()) == (expected.token_ids, expected.stats.algorithm())


def test_decoders_that_share_an_engine_know_what_it_holds(tmp_path: Path) -> None:
    one, engine = make_decoder(tmp_path, reciting())
    other = AlignedDecoder(one.bundle, engine=engine, cost=helpers.COST)
    config = DecodeConfig(top_k=2, max_new_tokens=4)
    first = one.generate([5, 6, 7, 8], config)
    assert other.generate([9, 6, 7], config).stats.reused_tokens == 0
    again = one.generate([5, 6, 7, 8], config)
    assert (again.token_ids, again.stats.reused_tokens) == (first.token_ids, 0)
    assert other.generate([5, 6, 7, 8], config).stats.reused_tokens == 3

    begun = one.stream([5, 6, 7, 8], config)
    next(begun)
    other.generate([9, 6, 7], config)
    with pytest.raises(MaraError, match="cannot go on"):
        next(begun)


def test_threads_that_ask_at_the_same_time_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=12)
    prompts = [[5] * (n + 1) for n in range(4)]
    expected = [decoder.generate(prompt, config).token_ids for prompt in prompts]
    run, inside = engine.run, threading.Lock()

    def alone(work: Pass) -> StepOutput:
        assert inside.acquire(blocking=False), "two threads are in the engine"
        try:
            time.sleep(1e-4)  # another thread's turn
            return run(work)
        finally:
            inside.release()

    monkeypatch.setattr(engine, "run", alone)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(decoder.generate, prompt, config) for prompt in prompts * 5]
        assert [each.result().token_ids for each in asked] == expected * 5


def test_streams_in_threads_are_right_or_end_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=12)
    prompts = [[5] * (n + 1) for n in range(4)]
    expected = [decoder.generate(prompt, config).token_ids for prompt in prompts]
    run = engine.run

    def slow(work: Pass) -> StepOutput:
        time.sleep(1e-4)
        return run(work)

    monkeypatch.setattr(engine, "run", slow)

    def answer(prompt: list[int]) -> list[int] | None:
        try:
            return [piece.step.token for piece in decoder.stream(prompt, config)]
        except MaraError:
            return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, prompts * 10))
    assert all(tokens in (None, right) for tokens, right in zip(found, expected * 10, strict=True))
    assert any(found)


def test_forget_leaves_a_decoder_as_it_was_at_first(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=12)
    first = decoder.generate([5, 6], config)
    again = decoder.generate([5, 6], config)
    assert (first.stats.reused_tokens, again.stats.reused_tokens) == (0, 1)
    assert first.stats.forwards > again.stats.forwards  # it has heard this text before

    decoder.forget()
    assert engine.cleared == 1
    assert engine.entries(engine.slots) == [None] * engine.slots
    then = decoder.generate([5, 6], config)
    counters = ("reused_tokens", "forwards", "rows", "drafted", "confirmed")
    assert [getattr(then.stats, name) for name in counters] == [getattr(first.stats, name) for name in counters]


def test_forget_forgets_what_the_agent_accepts(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    pair = np.array([0.6, 0.4])
    new = Acceptance().estimate(pair, [])
    decoder.generate("q", DecodeConfig(top_k=2, max_new_tokens=4))
    assert decoder._acceptance.estimate(pair, []) != new
    decoder.forget()
    assert decoder._acceptance.estimate(pair, []) == new


def test_forget_ends_a_running_stream(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    stream = decoder.stream("q", DecodeConfig(top_k=2, max_new_tokens=4))
    next(stream)
    decoder.forget()
    with pytest.raises(MaraError, match="another"):
        next(stream)


def test_after_an_error_the_next_answer_is_right(tmp_path: Path) -> None:
    sound = saying("hello")
    bad = {"at": ids_of("o")[0]}

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = sound(prefix)
        return (row * np.float32(np.nan), state) if prefix[-1] == bad["at"] else (row, state)

    decoder, engine = make_decoder(tmp_path, lookup)
    with pytest.raises(NumericsError, match="logits after position"):
        decoder.generate("q")
    assert engine.entries(engine.slots) == [None] * engine.slots
    bad["at"] = -1
    result = decoder.generate("q")
    assert (result.text, result.stats.reused_tokens) == ("hello", 0)


# ── schedules and drafts ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "widest"),
    [
        ({"schedule": "one-by-one"}, 1),
        ({"schedule": "one-by-one", "draft": 0}, 1),
        ({"schedule": "one-by-one", "draft": 4}, 1 + 4),
        ({"schedule": "together"}, 2),
        ({"schedule": "together", "draft": 4}, 2 + 4),
        ({"schedule": "adaptive", "draft": 0}, 2),
    ],
    ids=str,
)
def test_what_a_pass_holds_by_the_options(tmp_path: Path, options: dict[str, Any], widest: int) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=30, **options)
    result = decoder.generate([5], config)
    assert result.text == ("abc" * 11)[1:31]
    widths = [len(call.tokens) for call in engine.calls[1:]]
    assert max(widths) <= widest
    if options["schedule"] != "adaptive":
        assert max(widths) == widest
    assert (result.stats.drafted > 0) == bool(options.get("draft"))


def test_the_adaptive_schedule_drafts_by_itself(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, reciting())
    result = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40))
    assert result.text == ("abc" * 14)[1:41]
    assert 20 < result.stats.confirmed <= result.stats.drafted
    assert result.stats.forwards <= 20
    plain = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40, draft=0))
    assert (plain.stats.drafted, plain.token_ids) == (0, result.token_ids)
    assert plain.stats.algorithm() == result.stats.algorithm()


def test_confirmed_tokens_are_those_emitted_up_to_a_stop_text(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, reciting("abcd"))
    config = DecodeConfig(top_k=2, max_new_tokens=40, schedule="one-by-one", draft=16)
    decoder.generate([5], config)
    pieces = list(decoder.stream([5], DecodeConfig(**{**config.to_json(), "stop": ("da",)})))
    result = pieces[-1].result
    assert result is not None
    assert (result.text, result.finish_reason) == ("bc", "stop")
    assert result.stats.tokens == len(result.token_ids) == 4
    assert result.stats.confirmed == sum(piece.step.drafted for piece in pieces) == 3 < result.stats.drafted


def test_the_agent_s_habits_are_learned_over_the_answers(tmp_path: Path) -> None:
    # Whoever is always rejected is not asked alone for long: a pass more costs more than a row more.
    decoder, _ = make_decoder(tmp_path, reciting(accepts=False))
    config = DecodeConfig(top_k=2, max_new_tokens=12, draft=0)
    decoder.generate([5], config)
    result = decoder.generate([6], config)
    assert (result.stats.forwards, result.stats.rows) == (12, 24)


# ── the cost of this machine ─────────────────────────────────────────────────────────────────────────────────────────


class Measured(helpers.CountingEngine):
    """Allows the passes of a measurement, which stand behind a context that nobody has written."""

    measuring = False

    def _prefix(self, position: int) -> tuple[int, ...]:
        try:
            return super()._prefix(position)
        except IndexError:
            if not self.measuring:
                raise
            return ()


def unmeasured(folder: Path, lookup: helpers.Lookup) -> tuple[AlignedDecoder, Measured, list[str]]:
    """A decoder that does not know what width costs, and what it reports."""
    bundle = helpers.make_bundle(folder, vocab_size=VOCAB, max_context=48)
    engine = Measured(lookup, slots=48 + spare_slots(8), max_candidates=8)
    told: list[str] = []

    def report(text: str) -> None:
        engine.measuring = True
        told.append(text)

    return AlignedDecoder(bundle, engine=engine, report=report), engine, told


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mara-deploy"


ADAPTIVE = DecodeConfig(top_k=2, max_new_tokens=5)


def test_the_first_adaptive_answer_measures_and_says_so(tmp_path: Path, empty_cache: Path) -> None:
    decoder, engine, told = unmeasured(tmp_path / "bundle", reciting())
    before = decoder.generate([5, 6], DecodeConfig(top_k=2, max_new_tokens=5, schedule="together"))
    assert (told, list(empty_cache.parent.glob("*"))) == ([], [])
    first = decoder.generate([5, 6], ADAPTIVE)
    engine.measuring = False
    assert len(told) == 1
    assert "once for this bundle and machine" in told[0]
    assert first.stats.reused_tokens == 0  # the measurement has written over it
    assert engine.cleared == 1
    again = decoder.generate([5, 6], ADAPTIVE)
    assert (len(told), again.stats.reused_tokens) == (1, 1)
    assert before.token_ids == first.token_ids == again.token_ids
    assert len(list(empty_cache.iterdir())) == 1

    other, _, told = unmeasured(tmp_path / "bundle", reciting())  # another start
    assert other.generate([5, 6], replace(ADAPTIVE, schedule="together")).token_ids == first.token_ids
    assert other.generate([5, 6], ADAPTIVE).stats.reused_tokens == 1  # what was measured is read, and nothing run
    assert told == []


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(top_k=2, max_new_tokens=3, schedule="one-by-one"),
        DecodeConfig(top_k=2, max_new_tokens=3, schedule="together", draft=4),
        DecodeConfig(align=False, max_new_tokens=3, draft=0),
        DecodeConfig(align=False, sample=True, top_k=2, max_new_tokens=3),
    ],
    ids=["one-by-one", "together", "plain without drafts", "sampled"],
)
def test_who_has_no_use_for_a_cost_does_not_measure_it(tmp_path: Path, empty_cache: Path, config: DecodeConfig) -> None:
    decoder, _, told = unmeasured(tmp_path / "bundle", reciting())
    decoder.generate([5, 6], config)
    assert told == []
    assert not empty_cache.exists()


def test_after_a_measurement_that_was_interrupted_nothing_is_held(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, _, _ = unmeasured(tmp_path / "bundle", reciting())
    by_pairs = DecodeConfig(top_k=2, max_new_tokens=3, schedule="together")
    first = decoder.generate([5, 6], by_pairs)

    def stop(engine: Measured, *_: Any) -> None:
        engine.run(Pass([0] * 4, range(4), 0))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mara_runtime.schedule.calibrate.measure", stop)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate([5, 6], ADAPTIVE)
    again = decoder.generate([5, 6], by_pairs)
    assert (again.token_ids, again.stats.reused_tokens) == (first.token_ids, 0)


def test_a_cost_that_is_given_is_not_measured(tmp_path: Path, empty_cache: Path) -> None:
    decoder, _ = make_decoder(tmp_path / "bundle", reciting())
    decoder.generate([5, 6], ADAPTIVE)
    assert not empty_cache.exists()


def test_a_stale_stream_does_not_measure_under_a_running_answer(tmp_path: Path, empty_cache: Path) -> None:
    table = helpers.hash_table(7, VOCAB, 256, 1.0)
    fixed = DecodeConfig(top_k=2, max_new_tokens=8, schedule="one-by-one")
    expected = unmeasured(tmp_path / "one", table)[0].generate([5, 6], fixed).token_ids
    decoder, engine, _ = unmeasured(tmp_path / "two", table)
    stale = decoder.stream([7], ADAPTIVE)
    running = decoder.stream([5, 6], fixed)
    tokens = [next(running).step.token]
    with pytest.raises(MaraError, match="another"):
        next(stale)
    engine.measuring = False
    tokens += [piece.step.token for piece in running]
    assert tokens == expected


# ── noise ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("noise", "within"),
    [
        (None, 0),
        ({"margins": 0.0, "logits": 0.0}, 0),
        ({"margins": 1.0, "logits": 0.5}, 0),  # the margins are 1 from the threshold, the logits 0.5 from each other
        ({"margins": 1.5, "logits": 0.0}, 4),
        ({"margins": 0.0, "logits": 0.75}, 4),
    ],
    ids=str,
)
def test_the_bundle_s_noise_says_what_lies_within_it(
    tmp_path: Path, noise: dict[str, float] | None, within: int
) -> None:
    decoder, _ = make_decoder(tmp_path, reciting(), noise=noise)
    result = decoder.generate([5], DecodeConfig(top_k=2, top_p=1.0, max_new_tokens=4))
    assert result.stats.within_noise == within
    assert result.to_json()["stats"]["within_noise"] == within


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ids_hold_the_end_of_sequence_and_the_text_does_not(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    result = decoder.generate("q", GREEDY)
    assert result.token_ids == [*ids_of("hello"), EOS]
    assert (result.text, result.finish_reason) == ("hello", "stop")
    assert result.stats.tokens == len(result.token_ids)


def test_special_tokens_inside_an_answer_are_no_text(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("a<user>b"))
    result = decoder.generate("q", GREEDY)
    assert USER in result.token_ids
    assert result.text == "ab"


def test_the_result_as_json(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    result = decoder.generate("q", DecodeConfig(top_k=2, max_new_tokens=2, stop=("zzz",), schedule="together"))
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(value) == ["token_ids", "text", "finish_reason", "stats", "config"]
    assert value["stats"]["engine"] == {"name": "table", "declined": {}}
    assert value["config"]["stop"] == ["zzz"]
    stats = value["stats"]
    counters = ("tokens", "decisions", "examined", "forced", "forwards", "rows", "smallest_margin", "prompt_tokens")
    assert [stats[name] for name in counters] == [2, 2, 4, 2, 2, 4, 1.0, 4]
    assert (stats["accepted_rank"], stats["candidate_counts"]) == ({}, {"2": 2})
    zeros = ("within_noise", "reused_tokens", "drafted", "confirmed")
    assert [stats[name] for name in zeros] == [0, 0, 0, 0]
    assert {"prefill_ms", "decode_ms", "engine_ms", "tokens_per_second"} <= set(stats)


def test_every_result_has_counters_of_its_own(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    config = DecodeConfig(top_k=2, max_new_tokens=2)
    first, second = decoder.generate("q", config), decoder.generate("q", config)
    assert first.stats is not second.stats
    assert first.stats.algorithm() == second.stats.algorithm()


def test_a_bundle_without_a_tokenizer_decodes_ids(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing(), tokenizer=None, chat_template=None)
    pieces = list(decoder.stream([5], DecodeConfig(top_k=2, max_new_tokens=2)))
    assert [piece.text for piece in pieces] == ["", ""]
    result = pieces[-1].result
    assert result is not None
    assert (result.text, result.token_ids) == (None, ids_of("##"))
    assert json.loads(json.dumps(result.to_json()))["text"] is None
    for prompt in ("text", [{"role": "user", "content": "text"}]):
        with pytest.raises(BundleError, match="--input-ids"):
            decoder.generate(prompt)  # type: ignore[arg-type]


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_takes_a_path_a_text_or_an_open_bundle(tmp_path: Path) -> None:
    folder = helpers.make_bundle(tmp_path)
    engine = TableEngine(choosing(), helpers.sum_agent, 32 + spare_slots(8))
    manifest = Bundle.open(folder).manifest
    for bundle in (folder, str(folder), Bundle.open(folder)):
        assert AlignedDecoder(bundle, engine=engine).bundle.manifest == manifest


def test_a_damaged_bundle_is_refused_unless_one_does_not_look(tmp_path: Path) -> None:
    folder = helpers.make_bundle(tmp_path)
    (folder / "step.onnx").write_bytes(b"A graph")
    engine = TableEngine(choosing(), helpers.sum_agent, 32 + spare_slots(8))
    with pytest.raises(BundleError, match="damaged"):
        AlignedDecoder(folder, engine=engine)
    assert AlignedDecoder(folder, engine=engine, verify=False).text_side is None


def test_an_engine_that_is_too_small_for_the_bundle_is_refused(tmp_path: Path) -> None:
    folder = helpers.make_bundle(tmp_path, max_context=32, max_candidates=8)
    needed = 32 + spare_slots(8)
    with pytest.raises(EngineError, match=f"has {needed - 1} KV slots; .* needs {needed}: "):
        AlignedDecoder(folder, engine=TableEngine(choosing(), helpers.sum_agent, needed - 1))
    assert AlignedDecoder(folder, engine=TableEngine(choosing(), helpers.sum_agent, needed)).engine.slots == needed


def test_generate_is_the_last_piece_of_stream(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, choosing())
    config = DecodeConfig(top_k=2, max_new_tokens=5, strategy="random", threshold=-9.0, seed=3)
    streamed = list(decoder.stream("q", config))[-1].result
    whole = decoder.generate("q", config)
    assert isinstance(streamed, Generation)
    assert (streamed.token_ids, streamed.text, streamed.config) == (whole.token_ids, whole.text, whole.config)
