"""A bundle's tokenizer and chat template give the token ids of transformers, or the model is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, __version__

from mara_export.errors import ModelError
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import check_chat_template, end_of_turn, end_tokens, load_tokenizer, write_tokenizer
from mara_runtime.errors import OptionError
from mara_runtime.text import TextSide
from tests import checkpoints
from tests.export.conftest import edit_json

TEXTS = [
    "How do I cook rice?",
    "a",
    " ",
    "\n\n  two lines\n",
    "naïve café — “quotes” …",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 and \U0001f1e9\U0001f1ea",
    "a <s> b </s><|end|> c<pad>",  # special tokens written out
    "the then thee " * 40,
    "tab\tand\r\nreturn \x00 nul",
    "e\u0301 against \u00e9",
]

CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS if text.strip()] + [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "  indented\nlines  "},
    ]
]


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoints.add_tokenizer(tmp_path / "model", 320)
    return tmp_path / "model"


def load(folder: Path, name: str = "my/model") -> Any:
    return load_tokenizer(ModelSource(folder, name, None))


def configure(folder: Path, **values: Any) -> None:
    edit_json(folder / "tokenizer_config.json", **values)


@pytest.fixture
def written(folder, tmp_path) -> Callable[[], SimpleNamespace]:
    """Write the tokenizer → its facts, the names of the files, the template's text, and the text side on them."""

    def write() -> SimpleNamespace:
        out = tmp_path / "out"
        out.mkdir()
        facts = write_tokenizer(load(folder), out)
        assert facts.file == "tokenizer.json"
        template = None if facts.chat_template is None else (out / facts.chat_template).read_bytes().decode("utf-8")
        manifest = SimpleNamespace(tokenizer=facts, max_context=4096)
        side = TextSide(SimpleNamespace(manifest=manifest, path=lambda name: out / name))
        return SimpleNamespace(facts=facts, files={p.name for p in out.iterdir()}, template=template, side=side)

    return write


# --- token ids -------------------------------------------------------------------------------------------------------


def test_plain_text_has_the_token_ids_of_transformers(folder, written) -> None:
    side, tokenizer = written().side, AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = side.encode_raw(text)
        assert ids == tokenizer(text)["input_ids"]
        assert (ids[0] == checkpoints.BOS_ID) != (ids[1] == checkpoints.BOS_ID)
        assert side.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_conversations_have_the_token_ids_of_transformers(folder, written) -> None:
    side, tokenizer = written().side, AutoTokenizer.from_pretrained(folder)
    for messages in CONVERSATIONS:
        ids = side.encode_chat(messages)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        contents = sum(str(message["content"]).count("<s>") for message in messages)
        assert ids.count(checkpoints.BOS_ID) == 1 + contents  # not twice: the template has it already


def test_padding_and_truncation_of_a_training_batch_do_not_reach_a_prompt(folder, written) -> None:
    tokenizer = load(folder)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=12, pad_id=checkpoints.PAD_ID, pad_token="<pad>")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = "quite a number of tokens, more than five"
    ids = written().side.encode_raw(text)
    assert ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(ids) > 12


def test_a_tokenizer_that_transformers_makes_from_its_sentencepiece_model(folder, written, tmp_path) -> None:
    """As version 4 does for a Llama tokenizer with add_prefix_space, and some of 5; there tokenizer.json counts."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("How do I cook rice, and keep bread fresh for a week?\nThe quick brown fox.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    configure(folder, tokenizer_class="LlamaTokenizer", add_prefix_space=True, legacy=False, unk_token="<unk>")
    kind = AutoTokenizer if __version__ < "5" else PreTrainedTokenizerFast
    theirs, written = kind.from_pretrained(folder), written()
    ours = Tokenizer.from_file(str(tmp_path / "out" / written.facts.file))
    for text in ("How do I cook rice?", "bread", "naïve 日本"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert theirs.decode(theirs("How do I", add_special_tokens=False)["input_ids"]) == "How do I"


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_a_tokenizer_json_splits_as_it_says_whatever_class_is_named(folder, written, kind, model_type) -> None:
    """transformers 5 would put Qwen2's splitting and normalisation in place of those of this file."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    configure(folder, tokenizer_class=kind)
    side = written().side
    for text in TEXTS:
        assert side.encode_raw(text) == load(folder)(text)["input_ids"] == tokenizer.encode(text).ids


# --- what is written -------------------------------------------------------------------------------------------------

ROLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
OBJECT = {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


@pytest.mark.parametrize(
    ("config", "special_tokens"),
    [
        ({}, ROLES),
        ({"tokenizer_class": "TokenizersBackend"}, ROLES),  # as transformers 5 saves it
        ({"extra_special_tokens": ["<|end|>"]}, {**ROLES, "additional_special_tokens": ["<|end|>"]}),  # too
        ({"eos_token": {"__type": "AddedToken", **OBJECT}}, {**ROLES, "eos_token": "<|end|>"}),
    ],
)
def test_special_tokens_are_recorded_by_role(folder, written, config, special_tokens) -> None:
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS[7])["input_ids"]
    configure(folder, **config)
    found = written()
    assert found.facts.special_tokens == special_tokens
    assert found.side.encode_raw(TEXTS[7]) == expected


NAMED = [{"name": "tool_use", "template": "the other one"}, {"name": "default", "template": "the default one"}]


@pytest.mark.parametrize(
    ("given", "template"),
    [
        ("{{ bos_token }}\r\nä日\n\n{% for m in messages %}{{ m.content }}{% endfor %}\n", ...),
        (NAMED, "the default one"),
        (NAMED[:1], None),  # which is the default is not guessed
        ("", None),
        (None, None),
    ],
)
def test_the_default_chat_template_is_written_as_it_is(folder, written, given, template) -> None:
    configure(folder, chat_template=given)
    found = written()
    assert found.template == (given if template is ... else template)
    assert found.files == {"tokenizer.json"} | ({"chat_template.jinja"} if found.template else set())


def test_a_processor_s_template_stands_in_for_one_that_the_tokenizer_lacks(folder, written) -> None:
    """ProcessorMixin writes it there; the tokenizer's own comes first."""
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "the processor's"}))
    configure(folder, chat_template=None)
    assert written().template == "the processor's"
    configure(folder, chat_template="the tokenizer's")
    assert load(folder).chat_template == "the tokenizer's"


def test_of_several_template_files_the_default_is_written(folder, written) -> None:
    (folder / "chat_template.jinja").write_text("the default one")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("the other one")
    assert isinstance(AutoTokenizer.from_pretrained(folder).chat_template, dict)  # else nothing is shown
    assert written().template == "the default one"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_has_none(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load(tmp_path) is None


@pytest.mark.parametrize(
    ("tokenizer", "config", "message"),
    [
        *((text, {}, "the tokenizer of my/model cannot be loaded") for text in ("", "{", "[]", '{"model": 3}')),
        (None, {"tokenizer_class": "ByT5Tokenizer"}, r"my/model has no fast tokenizer.* add its tokenizer\.json"),
        (None, {"tokenizer_class": "Qwen2Tokenizer"}, r"tokenizer\.json is missing.*\(tokenizer_config\.json"),
        (..., {"split_special_tokens": True}, "has split_special_tokens, which is not supported"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused(folder, tokenizer, config, message) -> None:
    path = folder / "tokenizer.json"
    if tokenizer is None:
        path.unlink()
    elif tokenizer is not ...:
        path.write_text(tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    configure(folder, **config)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_in_another_format_is_refused_not_left_out(tmp_path) -> None:
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is in tekken\.json, which is not read: add its tokenizer\.json$"):
        load(tmp_path)


BOS_AND_TEXT = "{{ bos_token }}{{ messages[0].content }}"
PLEASE = "raise_exception('A system message, please.')"
EXTRA = {"additional_special_tokens": ["<pad>", "<|end|>"]}


def refusal(folder: Path, template: str | list[dict[str, str]] | None) -> str:
    """Why an export with this template is refused; empty if it is not."""
    configure(folder, chat_template=template, **EXTRA)
    try:
        check_chat_template(load(folder), "my/model")
    except ModelError as error:
        line = str(error)
    else:
        return ""
    assert line.startswith("the chat template of my/model ")
    assert "correct or remove it" in line
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (BOS_AND_TEXT, None),
        (None, None),
        ("", None),
        ("{{ strftime_now('%d %b %Y') }}{{ messages | tojson }}{% if add_generation_prompt %}!{% endif %}", None),
        ("{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}a", None),
        ([{"name": "default", "template": BOS_AND_TEXT}, {"name": "tool_use", "template": "{{ broken"}], None),
        ("{% for m in messages %}{{ m.content }}", "cannot render a user message, with or without .*endfor"),
        ("{{ raise_exception('a poem\nplease') }}", "cannot render .*: a poem please"),
        ("{{ messages[0].nothing.at_all }}", "cannot render"),
        ("{{ additional_special_tokens[1] }}{{ additional_special_tokens }}", None),
        (f"{{% if messages[0].role == 'user' %}}{{{{ {PLEASE} }}}}{{% endif %}}a", None),
        (f"{{% if messages[0].role == 'system' %}}{{{{ {PLEASE} }}}}{{% endif %}}a", None),
        ("{{ '%0999999d' % 1 }}", "fails where the bundle runs, though not in transformers: "),
        (
            "{% if messages[0].role == 'system' %}{{ '%0999999d' % 1 }}{% endif %}a",
            "fails where the bundle runs, though not in transformers: ",
        ),
    ],
)
def test_a_template_that_renders_differently_is_refused_with_the_reason(folder, template, why) -> None:
    line = refusal(folder, template)
    assert re.search(why, line) if why else line == "", line


def test_a_template_that_gives_another_text_is_refused(folder, monkeypatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", lambda *_, **__: "<s>How do I bake")
    line = refusal(folder, BOS_AND_TEXT)
    assert (
        "gives another text where the bundle runs than in transformers, from character 12 on: 'cook rice?', no" in line
    )


def test_a_system_message_that_the_template_wants_is_said(folder) -> None:
    text = (
        "{% if messages[0].role != 'system' %}{{ %s }}{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    configure(folder, chat_template=text.replace("%s", PLEASE))
    assert check_chat_template(load(folder), "m") == "A system message, please."
    assert end_of_turn(load(folder)) == (checkpoints.EOS_ID, "</s>")
    configure(folder, chat_template=BOS_AND_TEXT)
    assert check_chat_template(load(folder), "m") is None


def test_a_template_that_fails_only_in_transformers_is_refused(folder, monkeypatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", lambda *_, **__: 1 / 0)
    assert "fails in transformers: division by zero" in refusal(folder, BOS_AND_TEXT)


def test_a_template_that_prints_the_time_is_compared_again_when_the_second_changes(folder, monkeypatch) -> None:
    real, seconds = PreTrainedTokenizerFast.apply_chat_template, iter(["the second before", None, None])
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "apply_chat_template", lambda *args, **more: next(seconds) or real(*args, **more)
    )
    assert refusal(folder, BOS_AND_TEXT) == ""


def test_the_token_that_ends_a_turn_is_read_from_the_template(folder) -> None:
    assert end_of_turn(load(folder)) == (checkpoints.EOS_ID, "</s>")
    turns = "{% for m in messages %}{{ m.content }}#{% if m.role == 'assistant' %} @{% endif %}{% endfor %}"
    for after, expected in (("<pad>", checkpoints.SPECIAL_TOKENS["<pad>"]), ("", None), ("e", None)):
        configure(folder, chat_template=turns.replace("#", "").replace("@", after))
        assert end_of_turn(load(folder)) == (expected and (expected, "<pad>"))
    configure(folder, chat_template="{{ raise_exception('user messages only') }}")
    assert end_of_turn(load(folder)) is None


def test_end_tokens_are_those_of_the_vocabulary(folder) -> None:
    tokenizer = load(folder)
    assert end_tokens(tokenizer, ["<pad>", "</s>"], 320, "m") == [
        checkpoints.SPECIAL_TOKENS["<pad>"],
        checkpoints.EOS_ID,
    ]
    assert end_tokens(None, [], 320, "m") == []
    for missing, given, named in ((tokenizer, "<x>", "m has no such token"), (None, "</s>", "m has no tokenizer")):
        with pytest.raises(OptionError, match=f"--eos is '{given}'; {named}"):
            end_tokens(missing, [given], 320, "m")
    with pytest.raises(OptionError, match="no such token"):
        end_tokens(tokenizer, ["<pad>"], 3, "m")  # an id that the model does not have
