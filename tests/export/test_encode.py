"""Prompts as token ids for PyTorch models, in training and for baseline checkpoints."""

from __future__ import annotations

import json

import pytest

from mara_deploy.prompts import encode, read_prompts
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.task import open_task
from mara_export.hf.sources import resolve_model
from mara_runtime import AlignedDecoder
from mara_runtime.errors import OptionError, PromptError

MESSAGE = "How do I cook rice?"


@pytest.fixture
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    made.chat_template += "{% if brief %}briefly {% endif %}{% if tools %}{{ tools[0] }}{% endif %}"
    return made


def test_token_ids_are_those_of_apply_chat_template(tokenizer):
    chat = [{"role": "user", "content": MESSAGE}]
    for template in (None, {}, {"brief": True}, {"brief": False}, {"tools": [{"name": "hammer"}]}):
        expected = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False, **(template or {})
        )
        assert encode(MESSAGE, tokenizer, "m", template=template) == expected
    assert len({len(encode(MESSAGE, tokenizer, "m", template={"brief": on})) for on in (True, False)}) == 2


def test_without_a_template_prompts_are_plain_text_with_special_tokens(tokenizer):
    plain = tokenizer(MESSAGE)["input_ids"]
    assert encode(MESSAGE, tokenizer, "m", raw=True) == plain
    tokenizer.chat_template = None
    assert encode(MESSAGE, tokenizer, "m") == plain
    assert plain[0] == tokenizer.bos_token_id
    with pytest.raises(OptionError, match="but m gets plain text: omit --template"):
        encode(MESSAGE, tokenizer, "m", template={"brief": True})


@pytest.mark.parametrize(
    "name",
    [
        *("tokenize", "add_generation_prompt", "messages", "conversation", "chat_template", "continue_final_message"),
        *("return_tensors", "return_dict", "padding", "max_length", "self"),
    ],
)
def test_reserved_template_variables_are_refused(tokenizer, name):
    with pytest.raises(OptionError, match=f"the chat template variable '{name}' is reserved"):
        encode(MESSAGE, tokenizer, "m", template={"brief": True, name: False})


def test_variables_that_the_template_does_not_read_are_refused(tokenizer):
    with pytest.raises(OptionError, match=r"--template sets 'breif', .* it reads .*brief"):
        encode(MESSAGE, tokenizer, "m", template={"breif": True})


def test_a_conversation_needs_the_template(tokenizer):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": MESSAGE}]
    assert encode(chat, tokenizer, "m") == tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    with pytest.raises(PromptError, match=r"the prompt '\[\{.* is a conversation, but m gets plain text"):
        encode(chat, tokenizer, "m", raw=True)


def test_training_and_evaluation_ask_what_mara_run_asks(checkpoint, bundle, command, monkeypatch, tmp_path):
    """White space, a system message, earlier turns and an Alpaca input included."""
    rows = [
        "  How do I cook rice?\n",
        {"instruction": "Translate:", "input": "Hund "},
        {"prompt": "Why?", "system": "Be brief."},
        {"prompt": "Why?", "history": [["Hi", " Hello "]]},
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "?"},
        ],
    ]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(rows))
    prompts = read_prompts(file).prompts
    score = Combined([WeightedScore(load_score("demo"))])
    task = open_task(resolve_model(str(checkpoint("qwen2"))), prompts, score, RECIPES["demo"], device="cpu")

    asked, real = [], AlignedDecoder.encode
    monkeypatch.setattr(AlignedDecoder, "encode", lambda *args, **kw: asked.append(real(*args, **kw)) or asked[-1])
    few = ("--max-new-tokens", 1, "--threads", 1)
    ran = [("--prompt", rows[0]), ("--prompt", "Translate:\nHund "), ("--prompt", "Why?", "--system", "Be brief.")]
    for options in ran:
        assert command("run", bundle("qwen2"), *options, *few).code == 0
    assert task.tokens[:3] == asked
    asked.clear()
    done = command("eval", bundle("qwen2"), "--prompts", file, "--score", "demo", "--out", tmp_path / "out", *few)
    assert done.code == 0, done.err
    assert {tuple(ids) for ids in asked} == {tuple(ids) for ids in task.tokens}
    kept = [
        json.loads(line)["key"] for line in (tmp_path / "out" / "answers" / "greedy.jsonl").read_text().splitlines()[1:]
    ]
    assert {rows[0], "Translate:\nHund "} <= {*kept}  # in the order in which answers were finished
    assert rows[4] in [json.loads(key) for key in kept if key.startswith("[")]
    line = command("eval", bundle("qwen2"), "--prompts", file, "--score", "demo", "--raw", *few).refusal("mara-eval")
    assert line.startswith("prompt 3: a conversation needs the chat template, which raw text leaves out; or skip")


def test_an_error_of_the_template_names_model_and_prompt(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no, thank you') }}"
    with pytest.raises(PromptError, match=r"the chat template of m rejects the prompt 'How do I cook rice\?': no, th"):
        encode(MESSAGE, tokenizer, "m")


def test_an_empty_encoding_is_refused(tokenizer):
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(PromptError, match=r"the prompt 'How do I cook rice\?' has no tokens"):
        encode(MESSAGE, tokenizer, "m")
