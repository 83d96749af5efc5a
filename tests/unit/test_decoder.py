"""AlignedDecoder over a table: prompts, capacity, the fallback in force, stop texts, streams, results."""

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

from mara_runtime import AlignedDecoder, Bundle, DecodeConfig
from mara_runtime.config import SCHEDULES
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import BundleError, EngineError, MaraError, NumericsError, OptionError, PromptError
from mara_runtime.tensors import spare_slots
from tests.conformance import chain
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.helpers import ASSISTANT, BOS, EOS, USER

TOKENIZER = helpers.byte_level_tokenizer()
VOCAB = TOKENIZER.get_vocab_size()
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
GREEDY = DecodeConfig(align=False)
PAIRS = DecodeConfig(top_k=2, max_new_tokens=4)


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
    slots = options["max_context"] + spare_slots(candidates)
    engine = helpers.CountingEngine(lookup, slots=slots, max_candidates=candidates)
    return AlignedDecoder(helpers.make_bundle(folder, **options), engine=engine, cost=helpers.COST), engine


def saying(text: str, then: int = EOS) -> helpers.Lookup:
    """A language model that answers <assistant>, or else the whole prompt 'q', with a text, and then with one token."""
    answer = [*ids_of(text), then]

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start = prefix.index(ASSISTANT) + 1 if ASSISTANT in prefix else 1
        row = np.full(VOCAB, -100.0, np.float32)
        at = len(prefix) - start
        row[answer[at] if 0 <= at < len(answer) else ids_of("x")[0]] = 100.0
        return row, np.zeros(2, np.float32)

    return lookup


def reciting(text: str = "abc", margin: float = 1.0) -> helpers.Lookup:
    """A language model that repeats a text for ever, '!' in second place, and the agent's margin of every token."""
    ids = ids_of(text)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row = np.full(VOCAB, -100.0, np.float32)
        row[ids[len(prefix) % len(ids)]], row[ids_of("!")[0]] = 1.0, 0.5
        return row, np.array([margin, 0.0], np.float32)

    return lookup


REJECTING = reciting("#", -1.0)
"""'#' before '!' at every position; the agent rejects both."""


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TALK = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("prompt", "options", "ids"),
    [
        ("hi", {}, [BOS, USER, *ids_of("hi"), ASSISTANT]),
        ("hi", {"raw": True}, [BOS, *ids_of("hi")]),
        (TALK, {}, [BOS, USER, *ids_of("a"), USER, *ids_of("b"), ASSISTANT]),
        (TALK, {"raw": True}, [BOS, USER, *ids_of("a"), USER, *ids_of("b"), ASSISTANT]),
        ([7, ASSISTANT], {}, [7, ASSISTANT]),
        ((7, ASSISTANT), {}, [7, ASSISTANT]),
        (np.array([7, ASSISTANT]), {}, [7, ASSISTANT]),
        (range(3), {}, [0, 1, 2]),
        ([0, VOCAB - 1], {}, [0, VOCAB - 1]),
    ],
    ids=str,
)
def test_what_a_prompt_becomes(tmp_path: Path, prompt: Any, options: dict[str, Any], ids: list[int]) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    assert decoder.encode(prompt, **options) == ids
    result = decoder.generate(prompt, PAIRS, **options)
    assert engine.calls[0].tokens == ids
    assert result.stats.prompt_tokens == len(ids)


def test_without_a_template_text_is_raw(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello"), chat_template=None)
    assert decoder.encode("hi") == [BOS, *ids_of("hi")]
    with pytest.raises(OptionError, match="template"):
        decoder.encode("hi", template={"loud": True})


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        *((empty, {}, "empty") for empty in ("", [], (), [{"role": "user", "content": ""}])),
        *((odd, {}, "list of messages") for odd in ([1.5, 2.5], [1, 2.7], [1, "a"], [None], ["text"])),
        (None, {}, "NoneType"),
        (b"text", {}, "bytes"),
        ({1, 2}, {}, "set"),
        (np.array(5), {}, "int"),
        (np.zeros((1, 3), np.int64), {}, "flat list"),
        ([1, VOCAB], {}, rf"{VOCAB} at index 1 .* {VOCAB - 1}"),
        ([-1], {}, "-1 at index 0"),
        ([0, 2, 10**30], {}, f"{10**30} at index 2"),
        ([5] * 48, {}, "48 tokens.* 48 .*--max-context"),
        ([1, 2], {"template": {"loud": True}}, "template"),
        ("hi", {"template": {"loud": True}, "raw": True}, "template"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts_that_are_refused(tmp_path: Path, prompt: Any, options: dict[str, Any], named: str) -> None:
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    with pytest.raises((PromptError, OptionError), match=named):
        decoder.stream(prompt, **options)
    assert engine.calls == []


# ── the end of an answer ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_answer_ends_with_the_context_and_needs_no_slot_more(tmp_path: Path, length: int, schedule: str) -> None:
    decoder, engine = make_decoder(tmp_path, REJECTING, max_context=10, max_candidates=2)
    result = decoder.generate([5] * length, DecodeConfig(top_k=2, schedule=schedule, fallback="last"))
    assert (result.text, result.finish_reason) == ("!" * (10 - length), "length")
    assert engine.cache.capacity == 10 + spare_slots(2)


@pytest.mark.parametrize("ids", [[EOS], [USER, EOS], [300, 2]])
def test_any_end_of_sequence_id_ends_the_answer_and_is_in_its_ids_but_not_in_its_text(
    tmp_path: Path, ids: list[int]
) -> None:
    decoder, _ = make_decoder(tmp_path, saying("h<bos>i", then=ids[-1]), eos_token_ids=ids)
    result = decoder.generate("q", GREEDY)
    assert (result.token_ids[-1], result.text, result.finish_reason) == (ids[-1], "hi", "stop")
    assert result.stats.tokens == len(result.token_ids)


@pytest.mark.parametrize(("most", "reason"), [(2, "length"), (3, "stop")])
def test_max_new_tokens_counts_the_end_of_sequence(tmp_path: Path, most: int, reason: str) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hi"))
    result = decoder.generate("q", replace(GREEDY, max_new_tokens=most))
    assert (len(result.token_ids), result.finish_reason) == (most, reason)


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "reason"),
    [
        ("ab## ###c", "###", ["a", "b", "", "", "## ", "", "", ""], "stop"),
        ("ab##", "###", ["a", "b", "", "", "##"], "stop"),  # by the end-of-sequence id: what was held back comes
        ("one. two", ". t", ["o", "n", "e", "", ""], "stop"),
    ],
)
def test_stop_texts(tmp_path: Path, text: str, stop: str, pieces: list[str], reason: str) -> None:
    decoder, engine = make_decoder(tmp_path, saying(text))
    streamed = list(decoder.stream("q", DecodeConfig(align=False, stop=(stop,), draft=0)))
    assert [piece.text for piece in streamed] == pieces
    result = streamed[-1].result
    assert result is not None
    assert (result.text, result.finish_reason) == ("".join(pieces), reason)
    assert len(engine.calls) == 1 + result.stats.forwards == len(result.token_ids)  # nothing ran after it


def test_a_stop_text_may_be_completed_by_the_end_of_the_answer(tmp_path: Path) -> None:
    first_byte = ids_of("é")[0]  # at the end of the answer it becomes U+FFFD
    decoder, _ = make_decoder(tmp_path, saying("ab", then=first_byte))
    result = decoder.generate("q", DecodeConfig(align=False, max_new_tokens=3, stop=("b\ufffd",)))
    assert (result.token_ids, result.text, result.finish_reason) == ([*ids_of("ab"), first_byte], "a", "stop")


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_k_is_bounded_by_the_bundle(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, REJECTING, max_candidates=4)
    for config in (DecodeConfig(), DecodeConfig(align=False, sample=True)):
        with pytest.raises(OptionError, match=r"--top-k is 40.* 1 to 4 "):
            decoder.stream("q", config)
    assert engine.calls == []
    assert decoder.generate("q", DecodeConfig(top_k=4, max_new_tokens=1)).token_ids
    assert decoder.generate("q", replace(GREEDY, max_new_tokens=1)).token_ids  # it has no candidates


@pytest.mark.parametrize(
    ("recorded", "option", "used"),
    [("first", None, "first"), ("last", None, "last"), ("last", "first", "first"), ("first", "last", "last")],
)
def test_the_option_s_fallback_goes_before_the_agent_s(
    tmp_path: Path, recorded: str, option: str | None, used: str
) -> None:
    decoder, _ = make_decoder(tmp_path, REJECTING, fallback=recorded)
    result = decoder.generate("q", DecodeConfig(fallback=option, top_k=2, max_new_tokens=2))
    assert (result.text, result.stats.forced) == ({"first": "##", "last": "!!"}[used], 2)
    assert result.to_json()["config"]["fallback"] == used


@pytest.mark.parametrize(
    ("options", "widest"),
    [
        ({"schedule": "one-by-one"}, 1),
        ({"schedule": "one-by-one", "draft": 4}, 1 + 4),
        ({"schedule": "together"}, 2),
        ({"schedule": "together", "draft": 4}, 2 + 4),
        ({"schedule": "adaptive", "draft": 0}, None),
    ],
    ids=str,
)
def test_what_a_pass_holds_follows_the_options(tmp_path: Path, options: dict[str, Any], widest: int | None) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    result = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=30, **options))
    assert result.text == ("abc" * 11)[1:31]
    width = max(len(call.tokens) for call in engine.calls[1:])
    assert width == widest or (widest is None and width <= 2)
    assert (result.stats.drafted > 0) == bool(options.get("draft"))


def test_the_adaptive_schedule_drafts_by_default(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, reciting())
    result = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40))
    assert 20 < result.stats.confirmed <= result.stats.drafted
    assert result.stats.forwards <= 20
    undrafted = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40, draft=0))
    assert (undrafted.stats.drafted, undrafted.token_ids) == (0, result.token_ids)
    assert undrafted.stats.algorithm() == result.stats.algorithm()


def test_drafted_tokens_after_a_stop_text_are_not_confirmed(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, reciting("abcd"))
    config = DecodeConfig(top_k=2, max_new_tokens=40, schedule="one-by-one", draft=16)
    decoder.generate([5], config)
    pieces = list(decoder.stream([5], replace(config, stop=("da",))))
    result = pieces[-1].result
    assert result is not None
    assert (result.text, result.stats.tokens, len(result.token_ids)) == ("bc", 4, 4)
    assert result.stats.confirmed == sum(piece.step.drafted for piece in pieces) == 3 < result.stats.drafted


def test_the_agent_s_habits_are_learned_over_answers(tmp_path: Path) -> None:
    # An agent that rejects everything is soon asked about both at once: a pass costs more than a row.
    decoder, _ = make_decoder(tmp_path, reciting(margin=-1.0))
    config = DecodeConfig(top_k=2, max_new_tokens=12, draft=0)
    decoder.generate([5], config)
    result = decoder.generate([6], config)
    assert (result.stats.forwards, result.stats.rows) == (12, 24)
    decoder.forget()
    assert decoder.generate([6], config).stats.forwards > 12


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_one_piece_per_token_and_generate_its_last_result(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, saying("hello 中!"))
    pieces = list(decoder.stream("q", GREEDY))
    assert "".join(piece.text for piece in pieces) == "hello 中!"
    assert [piece.result is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    streamed, whole = pieces[-1].result, decoder.generate("q", GREEDY)
    assert streamed is not None
    assert streamed.token_ids == whole.token_ids == [piece.step.token for piece in pieces]
    assert (streamed.text, streamed.config) == (whole.text, whole.config)
    assert streamed.stats is not whole.stats
    assert streamed.stats.algorithm() == whole.stats.algorithm()


def test_an_answer_that_another_has_overtaken_cannot_go_on(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, REJECTING)
    first, unused = decoder.stream("q", PAIRS), decoder.stream("p", PAIRS)
    second = decoder.stream("r", PAIRS)
    next(second)
    for overtaken in (first, unused):
        with pytest.raises(MaraError, match="another"):
            next(overtaken)
    with pytest.raises(PromptError):
        decoder.stream("")  # refused: the running one goes on
    assert len(list(second)) == 3
    last = decoder.stream("q", PAIRS)
    next(last)
    decoder.forget()
    with pytest.raises(MaraError, match="another"):
        next(last)


def test_decoders_that_share_an_engine_share_its_cache(tmp_path: Path) -> None:
    one, engine = make_decoder(tmp_path, reciting())
    other = AlignedDecoder(one.bundle, engine=engine, cost=helpers.COST)
    first = one.generate([5, 6, 7, 8], PAIRS)
    assert other.generate([9, 6, 7], PAIRS).stats.reused_tokens == 0
    again = one.generate([5, 6, 7, 8], PAIRS)
    assert (again.token_ids, again.stats.reused_tokens) == (first.token_ids, 0)
    assert other.generate([5, 6, 7, 8], PAIRS).stats.reused_tokens == 3
    begun = one.stream([5, 6, 7, 8], PAIRS)
    next(begun)
    other.generate([9, 6, 7], PAIRS)
    with pytest.raises(MaraError, match="another"):
        next(begun)


@pytest.mark.parametrize("streamed", [False, True])
def test_threads_wait_for_each_other_or_a_stream_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
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

    def answer(prompt: list[int]) -> list[int] | None:
        if not streamed:
            return decoder.generate(prompt, config).token_ids
        try:
            return [piece.step.token for piece in decoder.stream(prompt, config)]
        except MaraError:
            return None

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(answer, prompts * 5))
    allowed = [(right, None) if streamed else (right,) for right in expected * 5]
    assert all(tokens in each for tokens, each in zip(answers, allowed, strict=True))
    assert any(answers)


# ── what lasts from one answer to the next ───────────────────────────────────────────────────────────────────────────


def test_the_next_turn_of_a_conversation_reuses_the_cache(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path / "one", saying("hello"))
    first = decoder.generate([7, ASSISTANT], GREEDY)
    assert (first.text, first.stats.reused_tokens) == ("hello", 0)
    turn = [7, ASSISTANT, *first.token_ids, 9, ASSISTANT]
    engine.calls.clear()
    second = decoder.generate(turn, GREEDY)
    assert second.stats.reused_tokens == 2 + len(first.token_ids) - 1  # the last token was not run
    assert engine.calls[0].tokens == [EOS, 9, ASSISTANT]
    fresh = make_decoder(tmp_path / "two", saying("hello"))[0].generate(turn, GREEDY)
    assert second.token_ids == fresh.token_ids


def test_answers_do_not_depend_on_those_before(tmp_path: Path) -> None:
    table = helpers.hash_table(7, VOCAB, 256, 5.0, memory=3)
    decoder, _ = make_decoder(tmp_path / "used", table)
    configs = [
        DecodeConfig(top_k=3, max_new_tokens=9, schedule=schedule, draft=draft, **options)
        for schedule in SCHEDULES
        for draft in (None, 5)
        for options in ({}, {"align": False}, {"strategy": "max_prob"}, {"threshold": -0.5})
    ]
    for index, config in enumerate(configs):
        prompt = [1, 2, 3, 4, 5][: index % 5 + 1]
        abandoned = decoder.stream([*prompt, 6], config)
        for _ in range(index % 4):
            next(abandoned)
        used = decoder.generate(prompt, config)
        expected = make_decoder(tmp_path / str(index), table)[0].generate(prompt, config)
        assert (used.token_ids, used.stats.algorithm()) == (expected.token_ids, expected.stats.algorithm())


def test_forget_leaves_a_decoder_as_it_was_at_first(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=12)
    first, again = decoder.generate([5, 6], config), decoder.generate([5, 6], config)
    assert (first.stats.reused_tokens, again.stats.reused_tokens) == (0, 1)
    assert first.stats.forwards > again.stats.forwards  # the n-grams are known
    decoder.forget()
    assert engine.entries(engine.cache.capacity) == [None] * engine.cache.capacity
    then = decoder.generate([5, 6], config)
    for name in ("reused_tokens", "forwards", "rows", "drafted", "confirmed"):
        assert getattr(then.stats, name) == getattr(first.stats, name)


def test_after_an_error_the_next_answer_is_right(tmp_path: Path) -> None:
    sound = saying("hello")
    bad = {"token": ids_of("o")[0]}

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row, state = sound(prefix)
        return (row * np.float32(np.nan), state) if prefix[-1] == bad["token"] else (row, state)

    decoder, engine = make_decoder(tmp_path, lookup)
    with pytest.raises(NumericsError, match="logits after position"):
        decoder.generate("q")
    assert engine.entries(engine.cache.capacity) == [None] * engine.cache.capacity
    bad["token"] = -1
    result = decoder.generate("q")
    assert (result.text, result.stats.reused_tokens) == ("hello", 0)


# ── the cost of this machine ─────────────────────────────────────────────────────────────────────────────────────────


class Measured(helpers.CountingEngine):
    """Allows the passes of a measurement, which follow a context that was never written."""

    measuring = False

    def _prefix(self, position: int) -> tuple[int, ...]:
        try:
            return super()._prefix(position)
        except IndexError:
            if not self.measuring:
                raise
            return ()


def unmeasured(folder: Path, lookup: helpers.Lookup) -> tuple[AlignedDecoder, Measured, list[str]]:
    """A decoder that does not know what a row costs, and what it reports."""
    bundle = helpers.make_bundle(folder, vocab_size=VOCAB, max_context=48)
    engine = Measured(lookup, slots=48 + spare_slots(8), max_candidates=8)
    reported: list[str] = []

    def report(text: str) -> None:
        engine.measuring = True
        reported.append(text)

    return AlignedDecoder(bundle, engine=engine, report=report), engine, reported


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mara-deploy"


ADAPTIVE = DecodeConfig(top_k=2, max_new_tokens=5)


def test_the_first_adaptive_answer_measures_once_per_bundle_and_machine(tmp_path: Path, empty_cache: Path) -> None:
    decoder, engine, reported = unmeasured(tmp_path / "bundle", reciting())
    before = decoder.generate([5, 6], replace(ADAPTIVE, schedule="together"))
    assert (reported, list(empty_cache.parent.glob("*"))) == ([], [])
    first = decoder.generate([5, 6], ADAPTIVE)
    engine.measuring = False
    assert len(reported) == 1
    assert first.stats.reused_tokens == 0  # the measurement has overwritten it
    again = decoder.generate([5, 6], ADAPTIVE)
    assert (len(reported), again.stats.reused_tokens) == (1, 1)
    assert before.token_ids == first.token_ids == again.token_ids
    assert len(list(empty_cache.iterdir())) == 1

    other, _, reported = unmeasured(tmp_path / "bundle", reciting())  # another start
    assert other.generate([5, 6], replace(ADAPTIVE, schedule="together")).token_ids == first.token_ids
    assert other.generate([5, 6], ADAPTIVE).stats.reused_tokens == 1  # the measurement is read, and nothing run
    assert reported == []


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "one-by-one"},
        {"schedule": "together", "draft": 4},
        {"align": False, "draft": 0},
        {"align": False, "sample": True},
    ],
    ids=str,
)
def test_nothing_is_measured_where_no_cost_is_needed(
    tmp_path: Path, empty_cache: Path, options: dict[str, Any]
) -> None:
    decoder, _, reported = unmeasured(tmp_path / "bundle", reciting())
    decoder.generate([5, 6], replace(ADAPTIVE, **options))
    given, _ = make_decoder(tmp_path / "given", reciting())
    given.generate([5, 6], ADAPTIVE)
    assert reported == []
    assert not empty_cache.exists()


def test_after_an_interrupted_measurement_nothing_is_reused(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, _, _ = unmeasured(tmp_path / "bundle", reciting())
    fixed = replace(ADAPTIVE, schedule="together")
    first = decoder.generate([5, 6], fixed)

    def stop(engine: Measured, *_: Any) -> None:
        engine.run(chain([0] * 4))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mara_runtime.schedule.calibrate.measure", stop)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate([5, 6], ADAPTIVE)
    again = decoder.generate([5, 6], fixed)
    assert (again.token_ids, again.stats.reused_tokens) == (first.token_ids, 0)


def test_an_overtaken_stream_does_not_measure_during_another_answer(tmp_path: Path, empty_cache: Path) -> None:
    table = helpers.hash_table(7, VOCAB, 256, 1.0)
    fixed = DecodeConfig(top_k=2, max_new_tokens=8, schedule="one-by-one")
    expected = unmeasured(tmp_path / "one", table)[0].generate([5, 6], fixed).token_ids
    decoder, engine, reported = unmeasured(tmp_path / "two", table)
    overtaken, running = decoder.stream([7], ADAPTIVE), decoder.stream([5, 6], fixed)
    tokens = [next(running).step.token]
    with pytest.raises(MaraError, match="another"):
        next(overtaken)
    engine.measuring = False
    assert tokens + [piece.step.token for piece in running] == expected
    assert reported == []


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("noise", "within"),
    [
        (None, 0),
        ({"margins": 1.0, "logits": 0.5}, 0),  # the margins are 1 from the threshold, the logits 0.5 from each other
        ({"margins": 1.5, "logits": 0.0}, 4),
        ({"margins": 0.0, "logits": 0.75}, 4),
    ],
    ids=str,
)
def test_positions_within_the_bundle_s_noise_are_counted(
    tmp_path: Path, noise: dict[str, float] | None, within: int
) -> None:
    decoder, _ = make_decoder(tmp_path, reciting(), noise=noise)
    result = decoder.generate([5], replace(PAIRS, top_p=1.0))
    assert result.to_json()["stats"]["within_noise"] == within


def test_the_result_as_json(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, REJECTING)
    result = decoder.generate("q", DecodeConfig(top_k=2, max_new_tokens=2, stop=("zzz",), schedule="together"))
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert list(value) == ["token_ids", "text", "finish_reason", "stats", "config"]
    assert value["config"]["stop"] == ["zzz"]
    stats = value["stats"]
    assert stats["engine"] == {"name": "table", "declined": {}}
    expected = {"tokens": 2, "decisions": 2, "examined": 4, "forced": 2, "forwards": 2, "rows": 4, "prompt_tokens": 4}
    assert {name: stats[name] for name in expected} == expected
    assert (stats["accepted_rank"], stats["candidate_counts"], stats["smallest_margin"]) == ({}, {"2": 2}, 1.0)


def test_a_bundle_without_a_tokenizer_decodes_ids(tmp_path: Path) -> None:
    decoder, _ = make_decoder(tmp_path, REJECTING, tokenizer=None, chat_template=None)
    pieces = list(decoder.stream([5], replace(PAIRS, max_new_tokens=2)))
    assert [piece.text for piece in pieces] == ["", ""]
    result = pieces[-1].result
    assert result is not None
    assert (result.text, result.token_ids) == (None, ids_of("##"))
    for prompt in ("text", TALK):
        with pytest.raises(BundleError, match="--input-ids"):
            decoder.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="--stop"):
        decoder.stream([5], replace(PAIRS, stop=("x",)))


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_opens_a_path_a_text_or_an_open_bundle_and_verifies_it(tmp_path: Path) -> None:
    folder, slots = helpers.make_bundle(tmp_path), 32 + spare_slots(8)
    engine = TableEngine(REJECTING, helpers.sum_agent, slots)
    manifest = Bundle.open(folder).manifest
    for bundle in (folder, str(folder), Bundle.open(folder)):
        assert AlignedDecoder(bundle, engine=engine).bundle.manifest == manifest
    with pytest.raises(OptionError, match="threads is 2"):
        AlignedDecoder(folder, engine=engine, threads=2)
    small = TableEngine(REJECTING, helpers.sum_agent, slots - 1)
    with pytest.raises(EngineError, match=f"{slots - 1} KV slots.* {slots}"):
        AlignedDecoder(folder, engine=small)
    (folder / "step.onnx").write_bytes(b"A graph")
    with pytest.raises(BundleError, match="damaged"):
        AlignedDecoder(folder, engine=engine)
    assert AlignedDecoder(folder, engine=engine, verify=False).text_side is None
