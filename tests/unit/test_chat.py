"""Chat templates without transformers: what such templates may use, and what a hostile one may not."""

import re
from typing import Any

import pytest

from mara_runtime.chat import ChatTemplate
from mara_runtime.errors import OptionError, PromptError

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


def render(source: str, messages: Any = HELLO, special: dict[str, str] | None = None, **variables: Any) -> str:
    return ChatTemplate(source, special or {}).render(messages, variables)


def refused(source: str, messages: Any = HELLO, **variables: Any) -> str:
    with pytest.raises(PromptError) as caught:
        render(source, messages, **variables)
    message = str(caught.value)
    assert "chat template" in message
    assert "\n" not in message
    return message


def test_a_conversation():
    source = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    expected = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|>"
    assert render(source, TALK) == expected + "<|assistant|>"
    assert ChatTemplate(source, {}).render(TALK, add_generation_prompt=False) == expected


def test_the_lines_of_blocks_leave_nothing_behind():
    # trim_blocks takes the newline after a block, lstrip_blocks the spaces before it; neither touches {{ }}.
    source = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n  U: {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n"
    )
    assert render(source, TALK) == "  U: Hi\n  U: Bye\nend"  # Jinja itself takes one newline off the end


def test_variables_of_the_caller_go_before_the_special_tokens():
    assert render("{{ bos_token }}{{ thinking }}", special={"bos_token": "<s>"}, bos_token="<b>", thinking=1) == "<b>1"


def test_tools_reach_the_template():
    assert render("{{ tools | length }}", tools=[{"name": "f"}]) == "1"


def test_the_content_is_neither_a_template_nor_html():
    content = "{{ 7 * 6 }}{% for %}<b> & 'q'"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


def test_the_messages_of_the_caller_are_not_touched():
    messages = ({"role": "user", "content": "x"},)  # any sequence
    source = "{% set messages = messages + [{'role': 'assistant', 'content': 'y'}] %}{{ messages | length }}"
    assert render(source, messages) == "2"
    assert messages == ({"role": "user", "content": "x"},)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_raise_exception_is_the_template_s_own_refusal_in_one_line():
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('Only\nuser, not ' + messages[0].role) }}{% endif %}ok"
    )
    assert render(source, HELLO) == "ok"
    assert "Only user, not system" in refused(source, TALK)


SYNTAX = ["{% if %}", "{{ messages[0 }}", "{% for m in messages %}", "{% unknown %}", "{{ x | nofilter }}", "{{"]
FILES = ["{% include 'file' %}", "{% import 'file' as f %}", "{% extends '/etc/passwd' %}"]
FAILING = [
    "{{ missing.attribute }}",
    "{{ messages[7].content }}",
    "{{ 1 + 'a' }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.nothing() }}",
    "{{ x | tojson }}",
    "{{ 'a'.encode('nothing') }}",
    "{{ 2.0 ** 5000 }}",
]
HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0].__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__code__.co_code }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
]
TOO_MUCH = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ cycle | tojson }}",
]


@pytest.mark.parametrize("source", [*SYNTAX, *FILES, *FAILING, *HOSTILE, *TOO_MUCH], ids=lambda source: source[:60])
def test_a_template_that_fails_is_refused_in_one_line(source):
    cycle: list[Any] = []
    cycle.append(cycle)
    values = {"x": object(), "cycle": cycle}
    message = refused(source, **{name: values[name] for name in values if re.search(rf"\b{name}\b", source)})
    assert "--raw" in message or source not in SYNTAX


@pytest.mark.parametrize("source", ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}"])
def test_the_sandbox_hides_the_inside_of_objects(source):
    assert render(source) == ""


@pytest.mark.parametrize(
    "source", ["{% do messages.clear() %}", "{% set _ = messages[0].update({'content': 'other'}) %}"]
)
def test_the_sandbox_leaves_the_messages_as_they_are(source):
    messages = [{"role": "user", "content": "x"}]
    refused(source, messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("name", ["messages", "self", "add_generation_prompt"])
def test_the_decoder_s_own_variables_cannot_be_replaced(name):
    source = "{{ messages[0].content }}{{ add_generation_prompt }}"
    with pytest.raises(PromptError, match="chat template"):
        render(source, special={name: "x"})
    with pytest.raises(OptionError, match=f"'{name}'"):
        ChatTemplate(source, {}).render(HELLO, {name: 1})
