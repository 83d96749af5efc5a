"""Several answers at once, and the conversations whose tokens a decoder keeps."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from mara_runtime import AlignedDecoder, DecodeConfig, Generation, MaraError, Piece
from mara_runtime.errors import EngineError, NumericsError, OptionError, PromptError
from tests.unit import helpers
from tests.unit.decoders import GREEDY, PAIRS, VOCAB, ids_of, make_decoder, reciting, saying
from tests.unit.tiny_tokenizers import ASSISTANT

TABLE = helpers.hash_table(5, VOCAB, 256, 4.0, memory=2)
CONFIGS = [
    PAIRS,
    replace(PAIRS, strategy="random", seed=3, max_new_tokens=9),
    replace(PAIRS, fallback="last", threshold=0.5, top_k=5, max_new_tokens=20),
    DecodeConfig(align=False, sample=True, seed=1, max_new_tokens=7),
    replace(GREEDY, max_new_tokens=12),
    replace(PAIRS, schedule="together", draft=3, max_new_tokens=15),
]


def answers(decoder: AlignedDecoder, prompts: Any, config: Any = None, **options: Any) -> list[Generation | MaraError]:
    """By prompt. Every answer is in pieces, the last with the whole."""
    pieces: dict[int, list[Piece]] = defaultdict(list)
    found: dict[int, Generation | MaraError] = {}
    for index, piece in decoder.generate_many(prompts, config, **options):
        assert index not in found
        if isinstance(piece, MaraError):
            found[index] = piece
            continue
        pieces[index].append(piece)
        if piece.result is not None:
            found[index] = piece.result
            assert [each.step.token for each in pieces[index]] == piece.result.token_ids
            assert piece.result.text is None or "".join(each.text for each in pieces[index]) == piece.result.text
    return [found[index] for index in range(len(prompts))]


@pytest.mark.parametrize("options", [{}, {"places": 2}, {"share": False}, {"places": 1, "share": False}], ids=str)
def test_many_answers_are_those_of_one_at_a_time(tmp_path, options):
    one, _ = make_decoder(tmp_path / "one", TABLE)
    many, engine = make_decoder(tmp_path / "many", TABLE)
    prompts = [[7 + i % 3, *range(i % 4 + 1)] for i in range(12)]
    configs = CONFIGS * 2
    expected = [one.generate(prompt, config) for prompt, config in zip(prompts, configs, strict=True)]
    found = answers(many, prompts, configs, **options)
    for result, single in zip(found, expected, strict=True):
        assert isinstance(result, Generation)
        assert (result.token_ids, result.text, result.config) == (single.token_ids, single.text, single.config)
        assert result.finish_reason == single.finish_reason
        assert result.stats.algorithm() == single.stats.algorithm()
        assert result.stats.prompt_tokens == single.stats.prompt_tokens
    assert len(engine.places) == options.get("places", 8)
    assert [one.generate(prompt, PAIRS).token_ids for prompt in prompts] == [
        many.generate(prompt, PAIRS).token_ids for prompt in prompts
    ]


def test_without_sharing_what_ran_before_does_not_even_show_in_the_counters(tmp_path):
    decoder, _ = make_decoder(tmp_path, reciting())
    config = DecodeConfig(top_k=2, max_new_tokens=30, schedule="one-by-one", draft=4)
    for share, kinds in ((False, 1), (True, 2)):
        found = answers(decoder, [[5, 6]] * 6, config, places=2, share=share)
        work = [(s.reused_tokens, s.forwards, s.drafted, s.confirmed) for s in (r.stats for r in found)]
        assert len(set(work)) == kinds
        assert work[0][2] > 0


def test_pieces_come_as_the_answers_grow(tmp_path):
    decoder, engine = make_decoder(tmp_path, saying("hello"))
    indices = [index for index, _ in decoder.generate_many(["a", "b", "c"], GREEDY)]
    assert indices[:9] == [0, 1, 2] * 3 or sorted(indices[:3]) == [0, 1, 2] == sorted(indices[3:6])
    assert len(engine.places) == 3  # no more than there are prompts
    assert list(decoder.generate_many([], GREEDY)) == []


def test_each_answer_stops_at_its_own_stop_text_and_nothing_is_counted_after_it(tmp_path):
    one, _ = make_decoder(tmp_path / "one", reciting("abcd"))
    many, _ = make_decoder(tmp_path / "many", reciting("abcd"))
    drafted = DecodeConfig(top_k=2, max_new_tokens=30, schedule="one-by-one", draft=16)
    configs = [replace(drafted, stop=(stop,)) for stop in ("da", "bcdab", "zz", "c")]
    expected = []
    for config in configs:
        one.forget()
        one.generate([5], drafted)
        expected.append(one.generate([5], config))
    many.generate([5], drafted)
    for result, single in zip(answers(many, [[5]] * 4, configs, places=1), expected, strict=True):
        assert isinstance(result, Generation)
        assert (result.text, result.finish_reason, result.token_ids) == (
            single.text, single.finish_reason, single.token_ids,
        )  # fmt: skip
        assert (result.stats.tokens, result.stats.confirmed) == (single.stats.tokens, single.stats.confirmed)


def test_a_bad_prompt_or_option_or_a_nan_is_the_error_of_its_answer(tmp_path):
    sound = reciting()

    def lookup(prefix):
        row, state = sound(prefix)
        return (row, state * float("nan")) if prefix[:2] == (9, 9) and len(prefix) > 4 else (row, state)

    decoder, _ = make_decoder(tmp_path, lookup)
    prompts = [[5], [], [9, 9], "q", [VOCAB], [5, 6]]
    found = answers(decoder, prompts, [*[PAIRS] * 5, replace(PAIRS, top_k=41)])
    kinds = [Generation, PromptError, NumericsError, Generation, PromptError, OptionError]
    assert [type(each) for each in found] == kinds
    assert decoder.generate([9], PAIRS).text


@pytest.mark.parametrize(
    ("config", "options", "named"),
    [
        (PAIRS, {"places": 0}, "places is 0; it must be at least 1"),
        ([PAIRS], {}, "config has 1 entries, and there are 2 prompts"),
        (replace(PAIRS, top_k=41), {}, "--top-k is 41"),
    ],
)
def test_what_is_refused_before_anything_runs(tmp_path, config, options, named):
    decoder, engine = make_decoder(tmp_path, reciting())
    with pytest.raises(OptionError, match=named):
        decoder.generate_many([[5], [6]], config, **options)
    assert (engine.calls, len(engine.places)) == ([], 1)


def test_conversations_that_are_begun_go_on(tmp_path):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<assistant>' * add_generation_prompt }}"
    )
    decoder, _ = make_decoder(tmp_path, saying("Hello there"), chat_template=template)
    begun = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}] for text in ("Hello", "Hello t")
    ]
    found = answers(decoder, begun, GREEDY, continue_final_message=True)
    assert [each.text for each in found if isinstance(each, Generation)] == [" there", "here"]


def test_another_call_ends_many_answers_as_it_ends_a_stream(tmp_path):
    decoder, _ = make_decoder(tmp_path, reciting())
    many = decoder.generate_many([[5], [6]], PAIRS)
    next(many)
    decoder.generate([7], PAIRS)
    with pytest.raises(MaraError, match="another"):
        list(many)
    stream = decoder.stream([5], PAIRS)
    next(stream)
    assert all(isinstance(each, Generation) for each in answers(decoder, [[5], [6]], PAIRS))
    with pytest.raises(MaraError, match="another"):
        next(stream)


def test_a_caller_who_leaves_loses_nothing(tmp_path):
    decoder, _ = make_decoder(tmp_path, TABLE)
    expected = decoder.generate([5, 6], PAIRS).token_ids
    many = decoder.generate_many([[5, 6], [5, 6, 7]], replace(PAIRS, max_new_tokens=20))
    for _ in range(3):
        next(many)
    del many
    assert decoder.generate([5, 6], PAIRS).token_ids == expected


def test_without_a_tokenizer_there_are_ids(tmp_path):
    decoder, _ = make_decoder(tmp_path, reciting("#"), tokenizer=None, chat_template=None)
    (result,) = answers(decoder, [[5]], replace(PAIRS, max_new_tokens=2))
    assert isinstance(result, Generation)
    assert (result.text, result.token_ids) == (None, ids_of("##"))


# ── conversations that are kept ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("places", "reused"), [(1, [0, 0, 0, 0]), (2, [0, 0, 6, 6])])
def test_the_next_turn_of_any_kept_conversation_goes_on(tmp_path, places, reused):
    first, engine = make_decoder(tmp_path, reciting())
    decoder = AlignedDecoder(first.bundle, engine=engine, cost=helpers.COST, places=places)
    assert len(engine.places) == places
    talks, found = [[10, ASSISTANT], [20, ASSISTANT]], []
    for turn in range(2):
        for talk in talks:
            result = decoder.generate(talk, PAIRS)
            found.append(result.stats.reused_tokens)
            assert result.token_ids == first_answer(tmp_path / f"{turn}{talk[0]}", talk)
            talk += [*result.token_ids, 7, ASSISTANT]
    assert found == reused
    decoder.forget()
    assert all(cache.tokens == [] for cache in engine.places)
    assert {entry for place in range(places) for entry in engine.memories[place].entries} == {None}


def first_answer(folder, prompt):
    return make_decoder(folder, reciting())[0].generate(prompt, PAIRS).token_ids


def test_an_engine_that_has_fewer_places_says_so(tmp_path):
    bundle = make_decoder(tmp_path, TABLE)[0].bundle
    engine = helpers.CountingEngine(TABLE, slots=512, most_places=2)
    with pytest.raises(EngineError, match="3 conversations at once are more than the 2"):
        AlignedDecoder(bundle, engine=engine, places=3)
    with pytest.raises(OptionError, match="places is 0"):
        AlignedDecoder(bundle, engine=engine, places=0)
    decoder = AlignedDecoder(bundle, engine=engine, cost=helpers.COST)
    assert len(answers(decoder, [[5], [6], [7]], PAIRS)) == 3  # two at a time
    assert len(engine.places) == 2
