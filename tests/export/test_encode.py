"""Prompts as token ids for PyTorch models, in training and for baseline checkpoints."""

from __future__ import annotations

import pytest

from mara_deploy.prompts import encode
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
        expected = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, **(template or {}))
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


def test_an_error_of_the_template_names_model_and_prompt(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no, thank you') }}"
    with pytest.raises(PromptError, match=r"the chat template of m rejects the prompt 'How do I cook rice\?': no, th"):
        encode(MESSAGE, tokenizer, "m")


def test_an_empty_encoding_is_refused(tokenizer):
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(PromptError, match=r"the prompt 'How do I cook rice\?' has no tokens"):
        encode(MESSAGE, tokenizer, "m")
