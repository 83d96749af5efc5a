"""AlignedDecoder over a table: prompts, capacity, the fallback in force, stop texts, results."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mara_runtime import AlignedDecoder, Bundle, DecodeConfig
from mara_runtime.errors import BundleError, EngineError, OptionError, PromptError
from mara_runtime.manifest import Noise
from mara_runtime.tensors import spare_slots
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit.decoders import GREEDY, PAIRS, REJECTING, VOCAB, ids_of, make_decoder, reciting, saying
from tests.unit.tiny_tokenizers import ASSISTANT, BOS, EOS, USER

# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

TALK = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("prompt", "options", "ids"),
    [
        ("hi", {}, [BOS, USER, *ids_of("hi"), ASSISTANT]),
        ("hi", {"raw": True}, [BOS, *ids_of("hi")]),
        (TALK, {}, [BOS, USER, *ids_of("a"), USER, *ids_of("b"), ASSISTANT]),
        ([7, ASSISTANT], {}, [7, ASSISTANT]),
        (np.array([0, VOCAB - 1]), {}, [0, VOCAB - 1]),
        (range(3), {}, [0, 1, 2]),
    ],
    ids=str,
)
def test_what_a_prompt_becomes(tmp_path, prompt, options, ids):
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    assert decoder.encode(prompt, **options) == ids
    assert decoder.generate(prompt, PAIRS, **options).stats.prompt_tokens == len(ids)
    assert engine.calls[0].tokens == ids


def test_without_a_template_text_is_raw(tmp_path):
    """A conversation needs one."""
    decoder, _ = make_decoder(tmp_path, saying("hello"))
    with pytest.raises(PromptError, match="a conversation needs the chat template, which raw text leaves out"):
        decoder.encode(TALK, raw=True)
    decoder, _ = make_decoder(tmp_path / "plain", saying("hello"), chat_template=None)
    with pytest.raises(PromptError, match=r"a conversation needs the chat template, which .*plain.* does not have"):
        decoder.encode(TALK)
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
def test_prompts_that_are_refused(tmp_path, prompt, options, named):
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    with pytest.raises((PromptError, OptionError), match=named):
        decoder.stream(prompt, **options)
    assert engine.calls == []


# ── the end of an answer ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("length", "schedule"), [(1, "adaptive"), (9, "together"), (9, "one-by-one")])
def test_an_answer_ends_with_the_context_and_needs_no_slot_more(tmp_path, length, schedule):
    decoder, engine = make_decoder(tmp_path, REJECTING, max_context=10, max_candidates=2)
    result = decoder.generate([5] * length, DecodeConfig(top_k=2, schedule=schedule, fallback="last"))
    assert (result.text, result.finish_reason) == ("!" * (10 - length), "length")
    assert engine.cache.capacity == 10 + spare_slots(2)


@pytest.mark.parametrize("ids", [[EOS], [300, 2]])
def test_any_end_of_sequence_id_ends_the_answer_and_is_in_its_ids_but_not_in_its_text(tmp_path, ids):
    decoder, _ = make_decoder(tmp_path, saying("h<bos>i", then=ids[-1]), eos_token_ids=ids)
    result = decoder.generate("q", GREEDY)
    assert (result.token_ids[-1], result.text, result.finish_reason) == (ids[-1], "hi", "stop")
    count = len(result.token_ids)
    assert result.stats.tokens == count
    for most, reason in ((count, "stop"), (count - 1, "length")):
        assert decoder.generate("q", replace(GREEDY, max_new_tokens=most)).finish_reason == reason


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "reason"),
    [
        ("ab## ###c", "###", ["a", "b", "", "", "## ", "", "", ""], "stop"),
        ("ab##", "###", ["a", "b", "", "", "##"], "stop"),  # by the end-of-sequence id: what was held back comes
        ("one. two", ". t", ["o", "n", "e", "", ""], "stop"),
    ],
)
def test_stop_texts(tmp_path, text, stop, pieces, reason):
    decoder, engine = make_decoder(tmp_path, saying(text))
    streamed = list(decoder.stream("q", DecodeConfig(align=False, stop=(stop,), draft=0)))
    assert [piece.text for piece in streamed] == pieces
    result = streamed[-1].result
    assert result is not None
    assert (result.text, result.finish_reason) == ("".join(pieces), reason)
    assert len(engine.calls) == 1 + result.stats.forwards == len(result.token_ids)  # nothing ran after it


# ── options ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_top_k_is_bounded_by_the_bundle(tmp_path):
    decoder, engine = make_decoder(tmp_path, REJECTING, max_candidates=4)
    for config in (DecodeConfig(top_k=40), DecodeConfig(align=False, sample=True, top_k=5)):
        with pytest.raises(OptionError, match=rf"--top-k is {config.top_k}.* 1 to 4 "):
            decoder.stream("q", config)
    assert engine.calls == []
    assert decoder.generate("q", DecodeConfig(top_k=4, max_new_tokens=1)).token_ids
    assert decoder.generate("q", DecodeConfig(max_new_tokens=1)).config.top_k == 4
    assert decoder.generate("q", replace(GREEDY, max_new_tokens=1)).token_ids  # it has no candidates


def test_an_answer_that_is_begun_goes_on(tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' * add_generation_prompt }}"
    )
    decoder, _ = make_decoder(tmp_path, saying("Hello there"), chat_template=template)
    begun = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Hello"}]
    result = decoder.generate(begun, GREEDY, continue_final_message=True)
    assert (result.text, result.finish_reason) == (" there", "stop")
    assert result.stats.tokens == len(result.token_ids) == len(ids_of("Hello there")) - len(ids_of("Hello")) + 1
    assert "".join(piece.text for piece in decoder.stream(begun, GREEDY, continue_final_message=True)) == " there"
    assert decoder.encode(begun, continue_final_message=True) == decoder.encode(begun)[:-1]  # <assistant> opens a turn
    for prompt in ("q", [1, 2]):
        with pytest.raises(PromptError, match="continue_final_message needs a conversation"):
            decoder.stream(prompt, GREEDY, continue_final_message=True)


@pytest.mark.parametrize(
    ("training", "given", "used"),
    [
        (None, {}, (8, 0.95)),  # 40, but the bundle allows 8
        (helpers.TRAINING, {}, (3, 0.4)),
        (helpers.TRAINING, {"top_p": 0.95}, (3, 0.95)),
        (helpers.TRAINING, {"top_k": 8, "top_p": 0.0}, (8, 0.0)),
        ({**helpers.TRAINING, "top_k": 50}, {}, (8, 0.4)),
    ],
)
def test_candidates_are_those_of_the_agents_training(tmp_path, training, given, used):
    decoder, _ = make_decoder(tmp_path, REJECTING, training=training, max_candidates=8)
    config = decoder.generate("q", DecodeConfig(max_new_tokens=2, **given)).config
    assert (config.top_k, config.top_p) == used


@pytest.mark.parametrize(
    ("recorded", "option", "used"),
    [("first", None, "first"), ("last", None, "last"), ("last", "first", "first"), ("first", "last", "last")],
)
def test_the_option_s_fallback_goes_before_the_agent_s(tmp_path, recorded, option, used):
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
def test_what_a_pass_holds_follows_the_options(tmp_path, options, widest):
    decoder, engine = make_decoder(tmp_path, reciting())
    result = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=30, **options))
    assert result.text == ("abc" * 11)[1:31]
    width = max(len(call.tokens) for call in engine.calls[1:])
    assert width == widest or (widest is None and width <= 2)
    assert (result.stats.drafted > 0) == bool(options.get("draft"))


def test_the_adaptive_schedule_drafts_by_default(tmp_path):
    decoder, _ = make_decoder(tmp_path, reciting())
    result = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40))
    assert 20 < result.stats.confirmed <= result.stats.drafted
    assert result.stats.forwards <= 20
    undrafted = decoder.generate([5], DecodeConfig(top_k=2, max_new_tokens=40, draft=0))
    assert (undrafted.stats.drafted, undrafted.token_ids) == (0, result.token_ids)
    assert undrafted.stats.algorithm() == result.stats.algorithm()


def test_drafted_tokens_after_a_stop_text_are_not_confirmed(tmp_path):
    decoder, _ = make_decoder(tmp_path, reciting("abcd"))
    config = DecodeConfig(top_k=2, max_new_tokens=40, schedule="one-by-one", draft=16)
    decoder.generate([5], config)
    pieces = list(decoder.stream([5], replace(config, stop=("da",))))
    result = pieces[-1].result
    assert result is not None
    assert (result.text, result.stats.tokens, len(result.token_ids)) == ("bc", 4, 4)
    assert result.stats.confirmed == sum(piece.step.drafted for piece in pieces) == 3 < result.stats.drafted


def test_the_agent_s_habits_are_learned_over_answers(tmp_path):
    # An agent that rejects everything is soon asked about both at once: a pass costs more than a row.
    decoder, _ = make_decoder(tmp_path, reciting(margin=-1.0))
    config = DecodeConfig(top_k=2, max_new_tokens=12, draft=0)
    decoder.generate([5], config)
    result = decoder.generate([6], config)
    assert (result.stats.forwards, result.stats.rows) == (12, 24)
    decoder.forget()
    assert decoder.generate([6], config).stats.forwards > 12


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_within_the_bundle_s_noise_are_counted(tmp_path):
    for index, (noise, within) in enumerate(((None, 0), (Noise(margins=1.5, logits=0.0), 4))):  # margins are 1
        decoder, _ = make_decoder(tmp_path / str(index), reciting(), noise=noise)
        result = decoder.generate([5], replace(PAIRS, top_p=1.0))
        assert result.to_json()["stats"]["within_noise"] == within


def test_the_result_as_json(tmp_path):
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


def test_a_bundle_without_a_tokenizer_decodes_ids(tmp_path):
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


def test_opens_a_path_a_text_or_an_open_bundle_and_verifies_it(tmp_path):
    folder, slots = helpers.make_bundle(tmp_path), 32 + spare_slots(8)
    engine = TableEngine(REJECTING, helpers.AGENTS, slots)
    manifest = Bundle.open(folder).manifest
    for bundle in (folder, str(folder), Bundle.open(folder)):
        assert AlignedDecoder(bundle, engine=engine).bundle.manifest == manifest
    with pytest.raises(OptionError, match="threads is 2"):
        AlignedDecoder(folder, engine=engine, threads=2)
    small = TableEngine(REJECTING, helpers.AGENTS, slots - 1)
    with pytest.raises(EngineError, match=f"{slots - 1} KV slots.* {slots}"):
        AlignedDecoder(folder, engine=small)
    (folder / "step.onnx.data").write_bytes(bytes(256))
    with pytest.raises(BundleError, match="damaged"):
        AlignedDecoder(folder, engine=engine)
    assert AlignedDecoder(folder, engine=engine, verify=False).text_side is None
