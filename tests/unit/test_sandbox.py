"""Chat templates that ask for too much time or memory end with one line, and honest ones do not notice the budget."""

from __future__ import annotations

import tracemalloc

import pytest

from mara_runtime import sandbox
from mara_runtime.chat import ChatTemplate
from mara_runtime.errors import PromptError

GROW = "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = @ %}{% endfor %}{{ ns.x }}"
NEST = GROW.replace("'aaaa'", "[1]")
LONG = "{% set text = 'a' * 50000 %}{% for i in range(9999) %}{% for j in range(9999) %}@{% endfor %}{% endfor %}"
NUMBERS = "{% set r = range(9999) | list %}{% set q = range(9999) | list %}{% for i in r %}@{% endfor %}"

HOSTILE = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that a condition empties": NUMBERS.replace("@", "{% for j in r if false %}{% endfor %}"),
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "+": GROW.replace("@", "ns.x + ns.x"),
    "~": GROW.replace("@", "ns.x ~ ns.x"),
    "block set": GROW.replace("{% set ns.x = @ %}", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "list of itself": NEST.replace("@", "[ns.x, ns.x]"),
    "dict of itself": NEST.replace("@", "{'a': ns.x, 'b': ns.x}"),
    "dict() of itself": NEST.replace("@", "dict(a=ns.x, b=ns.x)"),
    "* of a text": "{{ 'a' * 10000000000 }}",
    "* of a list": "{% set r = range(9999) | list %}{{ [r] * 9999 }}",
    "**": "{{ 10 ** 9999999 }}",
    "% with a width": '{{ "%01000000000d" % 1 }}',
    "% with a variable width": '{{ "%*d" % (1000000000, 1) }}',
    "format with a width": "{{ '{:1000000000}'.format(1) }}",
    "format with a variable width": "{{ '{:{}}'.format(1, 9999999) }}",
    "format of many": "{{ '{0}{0}{0}{0}{0}{0}{0}{0}'.format('a' * 90000) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "str.ljust": "{{ 'a'.ljust(1000000000) }}",
    "map(center)": "{{ range(9999) | map('center', 9999) | join }}",
    "indent": "{{ ('\n' * 50000) | indent(9999) }}",
    "tojson(indent)": "{{ messages | tojson(indent=1000000000) }}",
    "str.expandtabs": "{{ ('\t' * 50000).expandtabs(9999) }}",
    "str.replace": "{{ ('a' * 50000).replace('', 'b' * 50000) }}",
    "replace": "{{ ('a' * 50000) | replace('a', 'b' * 50000) }}",
    "join": "{{ range(9999) | join('a' * 50000) }}",
    "str.join": "{{ ('a' * 50000).join('b' * 50000) }}",
    "str.translate": "{{ ('a' * 50000).translate({97: 'b' * 50000}) }}",
    "int.to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "sum of lists": "{% set r = range(9999) | list %}{{ ([r] * 99) | sum(start=[]) }}",
    "strftime": "{{ strftime_now('%Y' * 50000) }}",
    "lipsum": "{{ lipsum(1000000) }}",
    "copies": LONG.replace("@", "{% set u = text[::1] %}"),
    "filters": LONG.replace("@", "{% set u = text | upper %}"),
    "searches": LONG.replace("@", "{% if 'b' in text %}{% endif %}"),
    "tests": LONG.replace("@", "{% set u = messages | selectattr('content', 'equalto', text) | list %}"),
    "texts of lists": "{% set texts = ['a' * 50000, 'b' * 50000] %}"
    "{% for i in range(99) %}{% if texts | string %}{% endif %}{% endfor %}",
    "comparisons": NUMBERS.replace("@", "{% if r == q %}{% endif %}"),
    "sorting": NUMBERS.replace("@", "{% set u = r | sort %}"),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_explodes_is_refused_within_its_budget(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", 50_000)
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(PromptError):
            ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


def test_large_numbers_are_values_like_any_other() -> None:
    source = "{% set ns = namespace(limit=131072) %}{{ ns.limit }} {{ x | default(200000) }} {{ 99999 is gt(20000) }}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}]) == "131072 200000 True"


def test_a_template_that_looks_back_from_every_message_renders_long_conversations() -> None:
    """As Gemma 4's and Cohere's do, whose time grows with the square of the conversation."""
    template = ChatTemplate(
        "{% for message in messages %}{% set ns = namespace(user=0) %}"
        "{% for before in messages[: loop.index0] %}{% if before.role == 'user' %}"
        "{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
        "{{ ns.user }}{{ ',' if loop.index0 < messages | length - 1 }}{% endfor %}",
        {},
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "hello world " * 200} for i in range(500)]
    assert template.render(messages).endswith(",496,498")


def test_a_conversation_of_a_thousand_messages_takes_less_than_a_tenth_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "BUDGET", sandbox.BUDGET // 10)
    template = ChatTemplate(
        "{% for message in messages %}{% if message['role'] == 'user' and not loop.first %}{{ '<|user|>' }}{% endif %}"
        "{{ message.content.split('</think>')[-1].strip() ~ '<|end|>' }}{% endfor %}",
        {},
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "hello world " * 20} for i in range(1000)]
    assert template.render(messages).count("<|end|>") == 1000
    assert template.render(messages).count("<|end|>") == 1000, "each rendering has a budget of its own"
