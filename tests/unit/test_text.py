"""Prompts into token ids, token ids into streamed text, stop texts."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, PromptError
from mara_runtime.text import TextSide, TextStream
from tests.unit import helpers, tiny_tokenizers
from tests.unit.tiny_tokenizers import ASSISTANT, BOS, EOS, USER


def side_of(folder: Path, tokenizer: Tokenizer, chat_template: str | None = None) -> TextSide:
    helpers.make_bundle(
        folder,
        tokenizer=tokenizer,
        chat_template=chat_template,
        special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"},
    )
    return TextSide(Bundle.open(folder))


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> TextSide:
    return side_of(
        tmp_path_factory.mktemp("bundle"), tiny_tokenizers.byte_level_tokenizer(), tiny_tokenizers.CHAT_TEMPLATE
    )


@pytest.fixture(scope="module")
def fallback_side(tmp_path_factory: pytest.TempPathFactory) -> TextSide:
    return side_of(tmp_path_factory.mktemp("bundle"), tiny_tokenizers.byte_fallback_tokenizer())


def ids_of(side: TextSide, text: str) -> list[int]:
    ids: list[int] = side.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def byte_ids(side: TextSide, text: str) -> list[int]:
    """A token for every byte of a text."""
    if side.tokenizer.token_to_id("<0x00>") is not None:
        return [side.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [side.tokenizer.token_to_id(character) for piece, _ in pieces for character in piece]


def stream(side: TextSide, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], str, bool]:
    """(a piece a token, the last of them with what was held back; the stream's text; whether a stop text came)."""
    texts = TextStream(side, stop)
    pieces = []
    for token in ids:
        pieces.append(texts.push(token))
        if texts.stopped:
            break
    pieces.append(texts.finish())
    return pieces, texts.text, texts.stopped


# ── streaming ────────────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARY = tiny_tokenizers.byte_level_tokenizer().get_vocab_size()
FALLBACK_VOCABULARY = tiny_tokenizers.byte_fallback_tokenizer().get_vocab_size()
any_ids = st.lists(st.integers(0, VOCABULARY - 1), max_size=24)
high_ids = st.lists(
    st.integers(170, VOCABULARY - 1), max_size=12
)  # bytes of characters of several bytes, mostly broken


@given(ids=any_ids | high_ids)
def test_the_pieces_of_any_tokens_are_their_text(side, ids):
    pieces, text, stopped = stream(side, ids)
    assert "".join(pieces) == text == side.tokenizer.decode(ids, skip_special_tokens=True)
    assert not stopped


@given(text=st.text(max_size=20))
@example(text="中é👩‍👩‍👧‍👦 and 🇩🇪")
def test_the_pieces_of_an_encoded_text_are_the_text(side, text):
    for ids in (ids_of(side, text), byte_ids(side, text)):
        pieces, _, _ = stream(side, ids)
        assert "".join(pieces) == text


def test_a_character_comes_with_the_last_of_its_bytes(side):
    assert stream(side, byte_ids(side, "a中👍é")) == (
        ["a", "", "", "中", "", "", "", "👍", "", "é", ""], "a中👍é", False
    )  # fmt: skip
    ids = ids_of(side, "中")
    assert len(ids) == 2  # the tokenizer has a merge of its first two bytes
    assert stream(side, ids)[0] == ["", "中", ""]
    assert stream(side, []) == ([""], "", False)


def test_bytes_that_never_become_a_character_come_at_the_end(side):
    pieces, text, _ = stream(side, byte_ids(side, "a中")[:-1])
    assert pieces[:-1] == ["a", "", ""]
    assert "".join(pieces) == text == "a\ufffd"
    assert stream(side, byte_ids(side, "a\ufffdb\ufffd"))[1] == "a\ufffdb\ufffd"  # true replacement characters


def test_special_tokens_and_unknown_ids_are_not_text(side):
    ids = [BOS, *ids_of(side, "he"), USER, 9_999, *ids_of(side, "llo"), EOS]
    pieces, text, _ = stream(side, ids)
    assert "".join(pieces) == text == "hello"
    split = byte_ids(side, "中")
    assert stream(side, [split[0], ASSISTANT, *split[1:]])[1] == "中"


# ── tokenizers with byte fallback: Llama 2, Mistral ──────────────────────────────────────────────────────────────────


@given(text=st.text(alphabet="ab é中👍x\n", max_size=16))
def test_byte_fallback_the_pieces_of_an_encoded_text_are_the_text(fallback_side, text):
    ids = ids_of(fallback_side, text)
    pieces, joined, _ = stream(fallback_side, ids)
    assert "".join(pieces) == joined == fallback_side.decode(ids)


@pytest.mark.parametrize(("before", "after"), [("a", " a"), ("中 ", "b"), ("", "a"), ("ab", "👍 a")])
def test_text_that_continues_other_text_keeps_its_space(fallback_side, before, after):
    context, ids = ids_of(fallback_side, before), ids_of(fallback_side, before + after)
    continued = TextStream(fallback_side, context=context)
    assert ids[: len(context)] == context
    pieces = [continued.push(token) for token in ids[len(context) :]]
    assert "".join([*pieces, continued.finish()]) == continued.text == after


@given(ids=st.lists(st.integers(0, 2) | st.integers(180, FALLBACK_VOCABULARY - 1), max_size=10))
def test_byte_fallback_any_tokens_are_their_text(fallback_side, ids):
    pieces, joined, _ = stream(fallback_side, ids)
    assert "".join(pieces) == joined
    whole = fallback_side.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in whole:  # else the decoder may have taken back what was handed out
        assert joined == whole


# ── stop texts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def stop_at(side: TextSide, text: str, stop: Sequence[str]) -> tuple[list[str], str, bool]:
    return stream(side, byte_ids(side, text), stop)


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("ab###cd", ["###"], ["a", "b", "", "", "", ""], True),  # split over tokens
        ("a##b", ["###"], ["a", "", "", "##b", ""], False),  # what only began like one comes after all
        ("ababac", ["abac"], ["", "", "", "ab", "", "", ""], True),  # a beginning inside a beginning
        ("ab##", ["###"], ["a", "b", "", "", "##"], False),  # held back until the end
        ("a。b", ["。"], ["a", "", "", "", ""], True),  # of several bytes
    ],
)
def test_stop_texts(side, text, stop, pieces, stopped):
    assert stop_at(side, text, stop) == (pieces, "".join(pieces), stopped)


def test_a_stop_text_inside_one_token(side):
    token = ids_of(side, "he")
    assert len(token) == 1
    assert stream(side, token, ["e"]) == (["h", ""], "h", True)
    assert stream(side, token, ["e", "he"])[1:] == ("", True)  # of two complete ones the earlier start


def test_after_a_stop_text_nothing_comes(side):
    texts = TextStream(side, ["b"])
    pieces = [texts.push(token) for token in byte_ids(side, "abcb")] + [texts.finish()]
    assert (pieces, texts.text, texts.stopped) == (["a", "", "", "", ""], "a", True)


def test_stop_texts_beside_broken_bytes_and_special_tokens(side):
    pieces, text, stopped = stream(side, byte_ids(side, "ab中")[:-1], ["b\ufffd"])  # complete at the end
    assert ("".join(pieces), text, stopped) == ("a", "a", True)
    ids = byte_ids(side, "a##")
    assert stream(side, [*ids[:2], USER, ids[2]], ["##"])[1:] == ("a", True)


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        (["<eos>"], "ab", True),  # the token's id ends the answer, as its text is never shown
        (["b<eos>"], "a", True),
        (["b<eos>c"], "a", True),
        (["<eos>cx"], "abc", False),  # withheld until it cannot be a stop text any more
        (["<bos>", "c"], "ab", True),
        (["eos>c"], "abc", False),  # part of a special token is not text
        (["bc"], "a", True),  # only special tokens that a stop text contains are looked at
    ],
)
def test_stop_texts_with_special_tokens(side, stop, text, stopped):
    ids = [*byte_ids(side, "ab"), EOS, *byte_ids(side, "c")]
    pieces, joined, ended = stream(side, ids, stop)
    assert ("".join(pieces), joined, ended) == (text, text, stopped)


letters = st.text(alphabet="ab#", max_size=14)
stops = st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=letters, stop=stops)
def test_stop_texts_against_a_search_in_the_growing_text(side, text, stop):
    # A token a character: the answer ends where the first stop text is complete, the earliest start among them.
    expected, ends = text, False
    for length in range(1, len(text) + 1):
        starts = [text[:length].index(s) for s in stop if s in text[:length]]
        if starts:
            expected, ends = text[: min(starts)], True
            break
    pieces, joined, stopped = stop_at(side, text, stop)
    assert ("".join(pieces), joined, stopped) == (expected, expected, ends)


@given(text=letters, stop=stops)
def test_what_is_given_never_becomes_part_of_a_stop_text(side, text, stop):
    texts = TextStream(side, stop)
    given_so_far = ""
    for index, token in enumerate(byte_ids(side, text)):
        given_so_far += texts.push(token)
        held = text[len(given_so_far) : index + 1]
        assert text.startswith(given_so_far)
        if texts.stopped:
            break
        # No more is held back than the longest beginning of a stop text needs.
        assert held == "" or any(s.startswith(held) for s in stop)


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_has_one_bos(side):
    assert side.encode_raw("hello") == [BOS, *ids_of(side, "hello")]
    assert side.encode_chat(HELLO) == [BOS, USER, *ids_of(side, "hello"), ASSISTANT]


def test_padding_and_truncation_of_the_file_do_not_affect_prompts(tmp_path, side):
    tokenizer = tiny_tokenizers.byte_level_tokenizer()
    tokenizer.enable_truncation(max_length=4)
    tokenizer.enable_padding(pad_id=EOS, pad_token="<eos>", length=64)
    assert len(tokenizer.encode("hello hello").ids) == 64  # the trap is set
    trapped = side_of(tmp_path, tokenizer, tiny_tokenizers.CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "hello hello"}]
    assert trapped.encode_raw("hello hello") == side.encode_raw("hello hello")
    assert trapped.encode_chat(messages) == side.encode_chat(messages)


HELLO = [{"role": "user", "content": "hello"}]
SURROGATES = ("\ud800", "caf\udce9")
"""What Python makes of an argument of the command line in Latin-1."""


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "empty"),
        ([{"role": "user"}], "empty"),
        *(([{"role": "user", "content": content}], "empty") for content in ("", "  \n", None)),
        ([*HELLO, {"role": "user", "content": ""}], "empty"),
        *(([message], "role") for message in ("hello", None)),
        *(([{"role": "user", "content": text}], "Unicode") for text in SURROGATES),
    ],
    ids=ascii,
)
def test_a_conversation_that_cannot_be_encoded_is_refused(side, messages, named):
    with pytest.raises(PromptError, match=named):
        side.encode_chat(messages)


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "empty"), *((text, "Unicode") for text in SURROGATES), ("x" * 10**6, "1,000,000 characters.* 32 tokens")],
    ids=lambda text: ascii(text[:20]),
)
def test_raw_text_that_cannot_be_encoded_is_refused(side, text, named):
    with pytest.raises(PromptError, match=named):
        side.encode_raw(text)


def test_a_bundle_without_a_template_has_no_conversations(fallback_side):
    assert not fallback_side.has_template
    with pytest.raises(PromptError, match="--raw"):
        fallback_side.encode_chat(HELLO)


# ── damaged files ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(BundleError, match="--input-ids"):
        TextSide(Bundle.open(helpers.make_bundle(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "error", "named"),
    [
        *(("tokenizer.json", content, BundleError, r"tokenizer\.json") for content in (b"", b"{}", b"\xff", None)),
        ("chat_template.jinja", b"caf\xe9", BundleError, r"chat_template\.jinja.*--raw"),
        ("chat_template.jinja", None, BundleError, r"chat_template\.jinja.*--raw"),
        ("chat_template.jinja", b"{% if %}", PromptError, "--raw"),
    ],
    ids=str,
)
def test_a_damaged_or_missing_file_is_named(tmp_path, name, content, error, named):
    helpers.make_bundle(tmp_path, tokenizer=tiny_tokenizers.byte_level_tokenizer(), chat_template="x")
    if content is None:  # and its checksum was not verified
        (tmp_path / name).unlink()
    else:
        helpers.add_file(tmp_path, name, content)
    with pytest.raises(error, match=named):
        TextSide(Bundle.open(tmp_path, verify=False)).encode_chat(HELLO)
