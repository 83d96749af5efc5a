"""AlignedDecoder over a table: streams, what lasts from one answer to the next, and when costs are measured."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.errors import MaraError, PromptError
from mara_runtime.tensors import spare_slots
from tests.conformance import chain
from tests.unit import helpers
from tests.unit.decoders import GREEDY, PAIRS, REJECTING, VOCAB, make_decoder, reciting, saying
from tests.unit.tiny_tokenizers import ASSISTANT, EOS

# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_is_one_piece_per_token_and_generate_its_last_result(tmp_path):
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


def test_an_answer_that_another_has_overtaken_cannot_go_on(tmp_path):
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


def test_decoders_that_share_an_engine_share_its_cache(tmp_path):
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
def test_threads_wait_for_each_other_or_a_stream_ends_with_an_error(tmp_path, monkeypatch, streamed):
    decoder, engine = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=12)
    prompts = [[5] * (n + 1) for n in range(4)]
    expected = [decoder.generate(prompt, config).token_ids for prompt in prompts]
    run, inside = engine.run, threading.Lock()

    def alone(work: Pass, place: int) -> StepOutput:
        assert inside.acquire(blocking=False), "two threads are in the engine"
        try:
            time.sleep(1e-4)  # another thread's turn
            return run(work, place)
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


def test_threads_may_share_a_stream(tmp_path, monkeypatch):
    decoder, engine = make_decoder(tmp_path, reciting())
    config, run = DecodeConfig(top_k=2, max_new_tokens=12), engine.run
    expected = decoder.generate([5, 5], config).token_ids
    monkeypatch.setattr(engine, "run", lambda *work: (time.sleep(1e-3), run(*work))[1])  # another thread's turn
    stream = decoder.stream([5, 5], config)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda _: [piece.step for piece in stream], range(4)))
    assert sorted(step.token for part in parts for step in part) == sorted(expected)
    assert list(stream) == []


# ── what lasts from one answer to the next ───────────────────────────────────────────────────────────────────────────


def test_the_next_turn_of_a_conversation_reuses_the_cache(tmp_path):
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


def test_forget_leaves_a_decoder_as_it_was_at_first(tmp_path):
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


# ── the cost of this machine ─────────────────────────────────────────────────────────────────────────────────────────


class Measured(helpers.CountingEngine):
    """Allows the passes of a measurement, which follow a context that was never written."""

    measuring = False

    def _prefix(self, entries: Sequence[tuple[int, int] | None], position: int) -> tuple[int, ...]:
        try:
            return super()._prefix(entries, position)
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


def test_the_first_adaptive_answer_measures_once_per_bundle_and_machine(tmp_path, empty_cache):
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


def test_nothing_is_measured_where_no_cost_is_needed(tmp_path, empty_cache):
    decoder, _, reported = unmeasured(tmp_path / "bundle", reciting())
    for options in (
        {"schedule": "one-by-one"},
        {"schedule": "together", "draft": 4},
        {"align": False, "draft": 0},
        {"align": False, "sample": True},
    ):
        decoder.generate([5, 6], replace(ADAPTIVE, **options))
    given, _ = make_decoder(tmp_path / "given", reciting())
    given.generate([5, 6], ADAPTIVE)
    assert reported == []
    assert not empty_cache.exists()


def test_after_an_interrupted_measurement_nothing_is_reused(tmp_path, empty_cache, monkeypatch):
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


def test_an_overtaken_stream_does_not_measure_during_another_answer(tmp_path, empty_cache):
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
