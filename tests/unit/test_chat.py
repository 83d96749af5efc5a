"""Chat templates without transformers: what such templates may use, and what a hostile one may not."""

from datetime import datetime
from typing import Any

import pytest

from mara_runtime.chat import ChatTemplate
from mara_runtime.errors import PromptError

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


# ── the contract ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_conversation() -> None:
    source = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message['content'] | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    expected = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>Bye<|end|>"
    assert render(source, TALK) == expected + "<|assistant|>"
    assert ChatTemplate(source, {}).render(TALK, add_generation_prompt=False) == expected


def test_the_lines_of_blocks_leave_nothing_behind() -> None:
    # trim_blocks takes the newline after a block, lstrip_blocks the spaces before it; neither touches {{ }}.
    source = (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n  U: {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n"
    )
    assert render(source, TALK) == "  U: Hi\n  U: Bye\nend"  # Jinja itself takes one newline off the end


def test_an_expression_keeps_the_newline_after_it() -> None:
    assert render("{{ 'a' }}\n{{ 'b' }}\n\n") == "a\nb\n"


def test_loop_controls() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if m.role == 'assistant' %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    )
    assert render(source, TALK) == "Hi"


def test_namespace_and_macros() -> None:
    source = (
        "{% macro turn(role, text='-') %}[{{ role }}:{{ text }}]{% endmacro %}"
        "{% set ns = namespace(last='', n=0) %}"
        "{% for m in messages %}{% set ns.last = m.role %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ turn(ns.last, ns.n) }}{{ turn('x') }}"
    )
    assert render(source, TALK) == "[user:4][x:-]"


def test_slices_and_conditions_as_templates_use_them() -> None:
    source = (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set system = none %}{% set rest = messages %}{% endif %}"
        "{{ system is none }}/{{ rest | length }}/{{ loop is defined }}/{{ rest | map(attribute='role') | join(',') }}"
    )
    assert render(source, TALK) == "False/3/False/user,assistant,user"
    assert render(source, HELLO) == "True/1/False/user"


def test_special_tokens_by_their_role() -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", special=special) == "<s>Hello</s>"
    assert render("{{ bos_token }}|{{ pad_token is defined }}", special={}) == "|False"


def test_variables_of_the_caller_go_before_the_special_tokens() -> None:
    assert render("{{ bos_token }}{{ thinking }}", special={"bos_token": "<s>"}, bos_token="<b>", thinking=1) == "<b>1"


def test_tools_and_documents_are_none_and_not_undefined() -> None:
    # As apply_chat_template has it: templates ask `tools is not none`.
    assert render("{{ tools is none }},{{ documents is none }},{{ tools is not none }}") == "True,True,False"
    assert render("{{ tools | length }}", tools=[{"name": "f"}]) == "1"


def test_strftime_now() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    rendered = render("{{ strftime_now('%Y-%m-%d') }}")
    assert rendered in (before, datetime.now().strftime("%Y-%m-%d"))


def test_tojson_writes_json_and_not_html() -> None:
    tool = {"name": "größe", "b": [1, None, True], "a": "<&'\">"}
    assert render("{{ x | tojson }}", x=tool) == '{"name": "größe", "b": [1, null, true], "a": "<&\'\\">"}'
    assert render("{{ x | tojson(indent=2) }}", x={"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'
    assert render("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'
    assert render("{{ x | tojson(ensure_ascii=true) }}", x="é") == '"\\u00e9"'


def test_nothing_is_escaped_for_html() -> None:
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "<b> & 'q'"}]) == "<b> & 'q'"


def test_the_content_is_not_a_template() -> None:
    assert (
        render("{{ messages[0].content }}", [{"role": "user", "content": "{{ 7 * 6 }}{% for %}"}])
        == "{{ 7 * 6 }}{% for %}"
    )


def test_generation_marks_render_as_their_content() -> None:
    source = (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}<end>"
        "{% endgeneration %}\n{% else %}\n[{{ m.content }}]\n{% endif %}\n{% endfor %}"
    )
    assert render(source, TALK) == "[Be kind.]\n[Hi]\nHello!<end>[Bye]\n"


def test_the_messages_of_the_caller_are_not_touched() -> None:
    messages = ({"role": "user", "content": "x"},)  # any sequence
    assert (
        render(
            "{% set messages = messages + [{'role': 'assistant', 'content': 'y'}] %}{{ messages | length }}", messages
        )
        == "2"
    )
    assert messages == ({"role": "user", "content": "x"},)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_raise_exception_is_the_template_s_own_refusal_in_one_line() -> None:
    source = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('Only\nuser, not ' + messages[0].role) }}{% endif %}ok"
    )
    assert render(source, HELLO) == "ok"
    assert "Only user, not system" in refused(source, TALK)


SYNTAX = [
    "{% if %}",
    "{{ messages[0 }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% unknown %}",
    "{{ x | nofilter }}",
    "{{",
    "{% generation %}x",
    "{% include 'file' %}",
    "{% import 'file' as f %}",
    "{% extends '/etc/passwd' %}",
]
FAILING = [
    "{{ missing.attribute }}",
    "{{ messages[0].nothing.more }}",
    "{{ messages[7].content }}",
    "{{ 1 + 'a' }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.nothing() }}",
    "{{ x | tojson }}",
    "{{ '%d' % 'x' }}",
    "{{ [].pop() }}",
    "{{ 'a'.encode('nothing') }}",
    "{{ 2.0 ** 5000 }}",
]
HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
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


@pytest.mark.parametrize("source", [*SYNTAX, *FAILING, *HOSTILE, *TOO_MUCH], ids=lambda source: source[:60])
def test_a_template_that_fails_is_refused_in_one_line(source: str) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    message = refused(source, x=object(), cycle=cycle)
    assert "--raw" in message or source not in SYNTAX[:8]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__code__ }}",
        "{{ messages | attr('__class__') | attr('__mro__') }}",
        "{{ messages | map(attribute='__class__') | join }}",
    ],
)
def test_the_sandbox_hides_the_inside_of_objects(source: str) -> None:
    assert render(source) == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% set _ = messages.append({}) %}",
        "{% set _ = messages.clear() %}",
        "{% do messages.append({}) %}",
        "{% set _ = messages[0].update({'content': 'other'}) %}",
        "{% set _ = messages[0].pop('content') %}",
        "{% set _ = messages.sort() %}",
    ],
)
def test_the_sandbox_leaves_the_messages_as_they_are(source: str) -> None:
    messages = [{"role": "user", "content": "x"}]
    refused(source, messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("name", ["messages", "self", "add_generation_prompt"])
def test_the_decoder_s_own_variables_cannot_be_replaced(name: str) -> None:
    source = "{{ messages[0].content }}{{ add_generation_prompt }}"
    with pytest.raises(PromptError, match="chat template"):
        render(source, special={name: "x"})
    with pytest.raises(PromptError, match=f"'{name}'"):
        ChatTemplate(source, {}).render(HELLO, {name: 1})
