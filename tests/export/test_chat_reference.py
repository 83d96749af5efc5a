# ruff: noqa: E501 - templates have long lines, and line breaks would change them
"""The runtime's Jinja environment renders what transformers' apply_chat_template renders; see test_chat_families."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from mara_runtime.chat import ChatTemplate
from mara_runtime.errors import PromptError
from tests import checkpoints

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES = {
    # without whitespace control: relies on trim_blocks and lstrip_blocks
    "block trimming": """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'user' %}
  [INST] {{ message.content | trim }} [/INST]
    {% else %}
    {{ message.content }}{{ eos_token }}
    {% endif %}
{% endfor %}
  end
{% if add_generation_prompt %}
> {% endif %}
""",
    "tools, asked for in every way": """\
{%- if tools %}{{- 'tools ' ~ tools | length }}{%- endif %}
{%- if tools is defined %}{{- 'defined ' }}{%- endif %}
{%- if tools is not none %}{{- '# Tools\\n' + (tools | tojson) + '\\n' }}{%- endif %}
{%- if documents is defined and documents %}{{- 'documents' }}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{{- 'undefined' }}{%- endif %}
{%- for message in messages %}{{- message.content }}{%- endfor %}
""",
    "tojson": """\
{{ messages | tojson }}
{{ messages | tojson(indent=2) }}
{{ messages[-1] | tojson(ensure_ascii=True) }}
{{ {'b': 1, 'a': [true, none, 2.5, '<&>\\'"']} | tojson(sort_keys=True, separators=(',', ':')) }}
{{ {'b': 1, 'a': 'é'} | tojson(true, 4) }}
{{ 'text' | tojson }}{{ 7 | tojson | length }}
""",
    "generation tag": """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<a>' }}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- else %}
{{- '<u>' + message['content'] }}
{%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{% generation %}
  indented
{% endgeneration %}{% endif %}
""",
    "what is set inside a generation tag stays in it": """\
{%- set mark = 'outside' %}
{%- for message in messages %}{% generation %}{% set mark = 'inside' %}{{ mark }}{% endgeneration %} {{ mark }}
{% endfor %}
""",
    "a loop inside a generation tag": """\
{%- for message in messages %}{% generation %}{% for letter in message['content'][:3] %}{{ letter }}{{ loop.index }}{% endfor %}{% endgeneration %}{{ loop.index }}{% endfor %}
""",
    "filters and tests": """\
{{ messages | map(attribute='role') | join(',') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ (messages | last).content | replace('e', '3') | title }} {{ messages[0].content | default('none', true) | capitalize }}
{{ 'x' in messages[0] }} {{ messages[0].nothing is defined }} {{ messages[0].get('name', 'nobody') }} {{ '%s-%05.2f' | format('a', 1.5) }}
{%- for role, group in messages | groupby('role') %}{{ role }}={{ group | length }} {% endfor %}
{{ messages[0].items() | list | length }} {{ [3, 1, 2] | sort | first }} {{ range(3) | list }} {{ 7 // 2 }} {{ 2 ** 5 }}
{{ "a" ~ none ~ true }} {{ undefined_name }} {{ messages[0].content[:4] }} {{ '<b>' | e }} {{ '<b>' }}
""",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ unk_token is defined }}",
    "two trailing newlines": "{{ messages[0].content }}\n\n",
    "generation prompt": "{{ add_generation_prompt }}{{ add_generation_prompt is defined }}",
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "How do I cook rice?"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "  Hello\nthere  "}],
    "long": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "é日👍 <b> & \"quotes\" 'single' {{ braces }} {% tag %}"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAn answer.\n"},
        {"role": "user", "content": "line\r\n\ttab\\backslash"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "last"},
    ],
    "only an assistant": [{"role": "assistant", "content": "I begin."}],
    "odd role": [{"role": "critic", "content": "No."}],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    checkpoints.add_tokenizer(folder, 320)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_text(tokenizer, template):
    """For every conversation, with and without the generation prompt."""
    source = TEMPLATES[template]
    for messages in CONVERSATIONS.values():
        for generation_prompt in (True, False):
            options: Any = {"add_generation_prompt": generation_prompt}
            expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
            assert ChatTemplate(source, SPECIAL).render(messages, **options) == expected


BEGUN: tuple[Any, ...] = (
    *("I begin", "I begin. ", " \n I begin\n\n", "<think>\nhm\n</think>\n\nSo", "I begin. I begin", "x"),
    [{"type": "text", "text": "a part"}, {"type": "text", "text": "I begin "}, {"type": "image"}],
    [{"type": "image"}],
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_that_is_begun_goes_on_as_in_transformers(tokenizer, template):
    source = TEMPLATES[template]
    for begun in BEGUN:
        messages = [*CONVERSATIONS["one"], {"role": "assistant", "content": begun}]
        try:
            expected = tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, continue_final_message=True
            )
        except Exception as error:  # the template's own, or Python's
            if "accepted field" in str(
                error
            ):  # transformers 5, of a template that does not name the field; 4 renders it
                continue
            with pytest.raises(PromptError):
                ChatTemplate(source, SPECIAL).render(messages, continue_final_message=True)
        else:
            assert ChatTemplate(source, SPECIAL).render(messages, continue_final_message=True) == expected


def test_the_date(tokenizer):
    source = "{{ strftime_now('%d %b %Y') }}|{{ date_string }}{% set d = strftime_now('%Y') %}{{ d | int + 1 }}"
    before = datetime.now()
    expected = tokenizer.apply_chat_template(CONVERSATIONS["one"], chat_template=source, tokenize=False)
    text = ChatTemplate(source, SPECIAL).render(CONVERSATIONS["one"])
    if datetime.now().date() == before.date():
        assert text == expected
        assert text.startswith(before.strftime("%d %b %Y|"))


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ ''.__class__.__base__.__subclasses__() }}"])
def test_the_sandbox_refuses_in_both(tokenizer, source):
    with pytest.raises(jinja2.TemplateError):
        tokenizer.apply_chat_template(CONVERSATIONS["one"], chat_template=source, tokenize=False)
    with pytest.raises(PromptError):
        ChatTemplate(source, SPECIAL).render(CONVERSATIONS["one"])
