"""A bundle has the ids and the text of transformers, for each kind of tokenizer that families have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import load_tokenizer, write_tokenizer
from mara_runtime.text import TextSide, TextStream
from tests.export.family_tokenizers import BOS, FAMILIES, LINES

VERSION = int(transformers.__version__.partition(".")[0])
TEXTS = (
    *LINES,
    *("", " ", "  before", "after  ", "a\n\n\n b \t\tc \r\n\n", "   \n  x", "\u00a0\u3000 wide"),
    *("\ufeffmark\u200b \x00\x7f\u0378", "e\u0301 \u00e9 Å ﬁ \u1112\u1161\u11ab", "한국어 中文字 テ", "▁a ▁▁ <image>"),
    *("👩‍👩‍👧‍👦👍🏽🇩🇪🇩 ☺️", "٣٤ ½ １２３ 1234567", "don't DON'T we'LLs ' 's", "camelCaseHTTP's __init__/\\\n"),
)
BY_THE_FILE: dict[str, str | None] = {
    4: {"Ministral 3": "TokenizersBackend does not exist", "Gemma 4": "has no attribute 'keys'"},
    5: {"SmolLM 2, Granite, StarCoder 2": None, "EXAONE 4": None},
}[VERSION]
"""Where AutoTokenizer of this version fails, and its error; or None: it splits as GPT-2 whatever the file says, which
is a mistake (huggingface/transformers issue 45812). There a bundle follows tokenizer.json, as the other version does.
"""


def bundle(folder: Path) -> TextSide:
    """The text side of the bundle of a model."""
    out = folder.with_name("bundle")
    out.mkdir()
    facts = write_tokenizer(load_tokenizer(ModelSource(folder, "my/model", None)), out)
    manifest = SimpleNamespace(tokenizer=facts, max_context=4096)
    return TextSide(SimpleNamespace(manifest=manifest, path=lambda name: out / name))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Any:
    """Its name and folder, the tokenizer of transformers, the text side of the bundle, and texts with its tokens."""
    name, folder = request.param, tmp_path_factory.mktemp("family") / "model"
    FAMILIES[name].save(folder)
    if name in BY_THE_FILE:
        config = {key: FAMILIES[name].config[key] for key in ("bos_token", "chat_template")}
        theirs: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **config)
    else:
        theirs = AutoTokenizer.from_pretrained(folder)
    added = [token.content for token in FAMILIES[name].tokenizer.get_added_tokens_decoder().values()]
    texts = [*TEXTS, *(f"a{token}b  {token} \n{token}{token}\n\nc{token.upper()}" for token in added)]
    return SimpleNamespace(name=name, folder=folder, theirs=theirs, side=bundle(folder), texts=texts)


def test_texts_have_the_ids_of_transformers(family):
    for text in family.texts:
        for special in (True, False):
            expected = family.theirs(text, add_special_tokens=special)["input_ids"]
            assert family.side.tokenizer.encode(text, add_special_tokens=special).ids == expected, (text, special)
        assert not text or family.side.encode_raw(text) == family.theirs(text)["input_ids"]


def test_conversations_have_the_ids_of_transformers(family):
    for text in filter(str.strip, family.texts):
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        assert family.side.encode_chat(messages) == family.theirs.apply_chat_template(messages, return_dict=False)


def test_streamed_text_is_that_of_transformers_and_comes_in_whole_characters(family):
    for text in family.texts:
        ids = family.theirs(text)["input_ids"]
        stream = TextStream(family.side)
        pieces = [stream.push(token) for token in ids]
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        expected = family.theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join([*pieces, stream.finish()]) == expected, text


@pytest.mark.parametrize("name", BY_THE_FILE)
def test_where_auto_tokenizer_fails_or_splits_otherwise_than_the_file(tmp_path, name):
    FAMILIES[name].save(tmp_path / "model")
    if error := BY_THE_FILE[name]:
        with pytest.raises((ValueError, AttributeError), match=error):
            AutoTokenizer.from_pretrained(tmp_path / "model")
    else:
        side, auto = bundle(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
        assert any(auto(text)["input_ids"] != side.encode_raw(text) for text in LINES)


def test_bos_that_a_class_of_version_4_adds_is_added_in_bundles_that_4_exports(tmp_path):
    replace(FAMILIES["Phi 3"], more={}).save(tmp_path / "model")
    side, auto = bundle(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    assert side.encode_raw("a") == auto("a")["input_ids"]
    assert (side.tokenizer.token_to_id(BOS) in side.encode_raw("a")) == (VERSION == 4)


def test_each_family_splits_in_a_way_of_its_own():
    ids = {name: [each.tokenizer.encode(text).ids for text in TEXTS] for name, each in FAMILIES.items()}
    assert len({str(each) for each in ids.values()}) == len(FAMILIES)
