"""The bundle's text side gives the token ids of transformers, for plain text and for conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mara_export.errors import ModelError
from mara_export.hf.sources import ModelSource, resolve_model
from mara_export.hf.tokenizer import check_chat_template, load_tokenizer, write_tokenizer
from mara_runtime.bundle import Bundle
from mara_runtime.errors import PromptError
from mara_runtime.text import TextSide
from tests import checkpoints

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
def sides(bundle, checkpoint) -> Callable[[str], tuple[TextSide, Any]]:
    def both(architecture: str) -> tuple[TextSide, Any]:
        side = TextSide(Bundle.open(bundle(architecture, "ort")))
        return side, AutoTokenizer.from_pretrained(checkpoint(architecture))

    return both


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_plain_text(sides, architecture) -> None:
    side, tokenizer = sides(architecture)
    for text in TEXTS:
        ids = side.encode_raw(text)
        assert ids == tokenizer(text)["input_ids"]
        assert ids[0] == checkpoints.BOS_ID
        assert ids[1] != checkpoints.BOS_ID
        assert side.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_conversations(sides, architecture) -> None:
    side, tokenizer = sides(architecture)
    for messages in CONVERSATIONS:
        ids = side.encode_chat(messages)
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        assert ids[:2].count(checkpoints.BOS_ID) == 1  # encoding the text with special tokens would give two
        written = sum(str(message["content"]).count("<s>") for message in messages)
        assert ids.count(checkpoints.BOS_ID) == 1 + written


def test_a_prompt_of_nothing_is_refused(sides) -> None:
    side, _ = sides("qwen2")
    with pytest.raises(PromptError, match="the prompt is empty"):
        side.encode_raw("")
    for content in ("", "  \n\t", None):
        with pytest.raises(PromptError, match="the prompt is empty"):
            side.encode_chat([{"role": "user", "content": content}])
    with pytest.raises(PromptError, match="the prompt is empty"):
        side.encode_chat([])


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoints.add_tokenizer(tmp_path / "model", 320)
    return tmp_path / "model"


def source_of(folder: Path) -> ModelSource:
    return ModelSource(folder, folder.name, None)


def change(folder: Path, file: str = "tokenizer_config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def written(folder: Path, out: Path) -> dict[str, Any]:
    out.mkdir()
    facts = write_tokenizer(load_tokenizer(source_of(folder)), out)
    assert facts.file == "tokenizer.json"
    assert (out / "chat_template.jinja").exists() == (facts.chat_template is not None)
    return {"facts": facts, "files": {p.name for p in out.iterdir()}}


def test_the_files_and_facts(folder, tmp_path) -> None:
    result = written(folder, tmp_path / "out")
    assert result["files"] == {"tokenizer.json", "chat_template.jinja"}
    assert result["facts"].special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == template


@pytest.mark.parametrize("how", ["list in the configuration", "files"])
def test_of_several_templates_the_default_one_is_taken(folder, tmp_path, how) -> None:
    if how == "files":
        (folder / "chat_template.jinja").write_text("the default one")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("the other one")
    else:
        several = [
            {"name": "tool_use", "template": "the other one"},
            {"name": "default", "template": "the default one"},
        ]
        change(folder, chat_template=several)
    assert isinstance(AutoTokenizer.from_pretrained(folder).chat_template, dict)  # else nothing is shown
    written(folder, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the default one"


@pytest.mark.parametrize("template", [None, ""])
def test_a_tokenizer_without_a_template(folder, tmp_path, template) -> None:
    change(folder, chat_template=template)
    result = written(folder, tmp_path / "out")
    assert result["files"] == {"tokenizer.json"}
    assert result["facts"].chat_template is None


def test_several_templates_without_a_default_are_not_guessed_at(folder, tmp_path) -> None:
    change(folder, chat_template=[{"name": "tool_use", "template": "a"}, {"name": "rag", "template": "b"}])
    assert written(folder, tmp_path / "out")["facts"].chat_template is None


def test_a_template_keeps_its_line_ends_and_letters(folder, tmp_path) -> None:
    template = "{{ bos_token }}\r\nä日\n\n{% for m in messages %}{{ m.content }}{% endfor %}\n"
    change(folder, chat_template=template)
    written(folder, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes().decode("utf-8") == template


def test_special_tokens_given_as_objects(folder, tmp_path) -> None:
    token = {"content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    change(folder, eos_token={"__type": "AddedToken", **token})
    assert written(folder, tmp_path / "out")["facts"].special_tokens["eos_token"] == "<|end|>"


def test_settings_of_a_training_batch_do_not_reach_a_prompt(folder, checkpoint, tmp_path) -> None:
    """A tokenizer.json may record padding and truncation; neither belongs in a prompt."""
    tokenizer = load_tokenizer(source_of(folder))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=12, pad_id=checkpoints.PAD_ID, pad_token="<pad>")
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    facts = write_tokenizer(load_tokenizer(source_of(folder)), out)
    from types import SimpleNamespace

    side = TextSide(SimpleNamespace(manifest=SimpleNamespace(tokenizer=facts), path=lambda name: out / name))
    text = "quite a number of tokens, more than five"
    assert side.encode_raw(text) == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(side.encode_raw(text)) > 12


def test_a_model_without_a_tokenizer(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(source_of(tmp_path)) is None


def test_a_slow_tokenizer_is_refused_with_what_to_do(tmp_path) -> None:
    folder = tmp_path / "slow-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(ModelError, match=r"slow-model has no fast tokenizer.* add its tokenizer\.json"):
        load_tokenizer(source_of(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused(folder, text) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="the tokenizer of model cannot be loaded") as caught:
        load_tokenizer(source_of(folder))
    assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_of_the_hub_is_told_by_the_models_name(cached, checkpoint) -> None:
    folder = cached("somebody/model", checkpoint("qwen2"))
    (folder / "tokenizer.json").unlink()  # in the cache it is a link
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer of somebody/model cannot be loaded"):
        load_tokenizer(resolve_model("somebody/model"))


def test_code_of_a_tokenizers_folder_is_not_run_nor_asked_about(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked, with 15 s to answer"))
    proof = tmp_path / "proof"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n")
    change(folder, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError):
        load_tokenizer(source_of(folder))
    assert not proof.exists()


# --- the chat template, before it is shipped -------------------------------------------------------------------------

BOS_AND_TEXT = "{{ bos_token }}{{ messages[0].content }}"


def checked(folder: Path, template: str | list[dict[str, str]], **config: Any) -> str:
    """Why an export of it is refused; empty if it is not."""
    change(folder, chat_template=template, **config)
    try:
        check_chat_template(load_tokenizer(source_of(folder)), "my/model")
    except ModelError as error:
        refusal = str(error)
    else:
        return ""
    assert refusal.startswith("the chat template of my/model ")
    assert "correct or remove it" in refusal
    assert "\n" not in refusal
    assert len(refusal) < 500
    return refusal


@pytest.mark.parametrize(
    "template",
    [
        BOS_AND_TEXT,
        "",
        "{{ strftime_now('%d %b %Y') }}{{ messages | tojson }}{% if add_generation_prompt %}!{% endif %}",
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ messages[0].content }}",
        [{"name": "default", "template": BOS_AND_TEXT}, {"name": "tool_use", "template": "{{ broken"}],
    ],
)
def test_a_template_that_renders_as_in_transformers_passes(folder, template) -> None:
    assert checked(folder, template) == ""


def test_a_model_without_a_template_passes(folder) -> None:
    change(folder, chat_template=None)
    check_chat_template(load_tokenizer(source_of(folder)), "my/model")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}", "cannot render a single user message: .*endfor"),
        ("{{ raise_exception('a system\nmessage, please') }}", "cannot render .*: a system message, please"),
        ("{{ messages[0].nothing.at_all }}", "cannot render"),
        ("{{ additional_special_tokens[1] }}", "fails where the bundle runs, though not in transformers: .*undefined"),
        (
            BOS_AND_TEXT + "{{ additional_special_tokens }}",
            r"gives another text where the bundle runs than in transformers, from character 22 on: '', not \"\['<",
        ),
    ],
)
def test_a_template_that_does_not_is_refused_with_the_reason(folder, template, why) -> None:
    assert re.search(why, checked(folder, template, additional_special_tokens=["<pad>", "<|end|>"]))


def test_a_template_that_only_transformers_refuses_is_refused(folder, monkeypatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", lambda *_, **__: 1 / 0)
    assert "fails in transformers: division by zero" in checked(folder, BOS_AND_TEXT)


def test_a_template_that_prints_the_second_is_not_refused_when_it_changes(folder, monkeypatch) -> None:
    real, seconds = PreTrainedTokenizerFast.apply_chat_template, iter(["the second before", None])
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "apply_chat_template", lambda *args, **more: next(seconds) or real(*args, **more)
    )
    assert checked(folder, BOS_AND_TEXT) == ""


def test_a_tokenizer_that_needs_its_json_is_refused_by_that_name(folder) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    change(folder, tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(
        ModelError, match=r"model cannot be loaded: tokenizer\.json is missing.*\(tokenizer_config\.json"
    ):
        load_tokenizer(source_of(folder))


def test_the_fixture_is_a_fast_tokenizer(folder) -> None:
    assert isinstance(load_tokenizer(source_of(folder)), PreTrainedTokenizerFast)


# --- what is found on the Hub ----------------------------------------------------------------------------------------


def test_a_tokenizer_that_transformers_makes_from_its_sentencepiece_model(folder, tmp_path) -> None:
    """As it does for a Llama tokenizer that sets add_prefix_space, whatever tokenizer.json holds."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("How do I cook rice, and keep bread fresh for a week?\nThe quick brown fox.\n" * 20)
    model = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(model), vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    change(folder, tokenizer_class="LlamaTokenizer", add_prefix_space=True, legacy=False, unk_token="<unk>")
    theirs = AutoTokenizer.from_pretrained(folder)
    written(folder, tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in ("How do I cook rice?", "bread", "naïve 日本"):
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert theirs.decode(theirs("How do I", add_special_tokens=False)["input_ids"]) == "How do I"


@pytest.mark.parametrize("change_to", [{"tokenizer_class": "TokenizersBackend"}, {"extra_special_tokens": ["<|end|>"]}])
def test_a_tokenizer_of_transformers_5(folder, tmp_path, change_to) -> None:
    expected = AutoTokenizer.from_pretrained(folder)(TEXTS[7])["input_ids"]
    change(folder, **change_to)
    found = load_tokenizer(source_of(folder))
    assert found(TEXTS[7])["input_ids"] == expected
    facts = written(folder, tmp_path / "out")["facts"]
    assert facts.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_a_tokenizer_that_splits_special_tokens_is_refused(folder) -> None:
    change(folder, split_special_tokens=True)
    with pytest.raises(ModelError, match="has split_special_tokens, which is not supported"):
        load_tokenizer(source_of(folder))


def test_a_tokenizer_in_another_form_is_refused_not_left_out(folder) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert load_tokenizer(source_of(folder)) is None
    (folder / "tekken.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is in tekken\.json, which is not read: add its tokenizer\.json$"):
        load_tokenizer(source_of(folder))
