# ruff: noqa: E501 - templates have long lines, and line breaks would change them
"""Chat templates: the runtime's Jinja environment renders what transformers' apply_chat_template renders."""

from __future__ import annotations

import re
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

# Written for these tests; each has a feature of a family of released templates.
TEMPLATES = {
    # ChatML with a default system message, a condition on the first one, and whitespace control everywhere
    "default system": """\
{%- if messages[0]['role'] == 'system' -%}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
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
    "alternation enforced": """\
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{%- for message in messages[start:] %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- message['role'] | upper }}: {{ message['content'] }}
{% endfor %}
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
    "thinking cut out of earlier answers": """\
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
{%- set index = (messages | length - 1) - loop.index0 %}
{%- if message.role == 'user' and message.content is string and not message.content.startswith('<tool>') %}{%- set ns.last_query = index %}{% break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- set content = message.content %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- loop.index0 > ns.last_query }}:{{ content }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
""",
    "content in parts": """\
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content }}
{%- elif message.content is iterable -%}{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
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
def test_the_same_text_or_the_same_refusal(tokenizer, template):
    """For every conversation, with and without the generation prompt."""
    source = TEMPLATES[template]
    refused = set()
    for name, messages in CONVERSATIONS.items():
        for generation_prompt in (True, False):
            options: Any = {"add_generation_prompt": generation_prompt}
            try:
                expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
            except jinja2.TemplateError as error:
                refused.add(name)
                with pytest.raises(PromptError, match=re.escape(str(error))):
                    ChatTemplate(source, SPECIAL).render(messages, **options)
            else:
                assert ChatTemplate(source, SPECIAL).render(messages, **options) == expected
    assert refused == REFUSED.get(template, set())


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


REFUSED = {"alternation enforced": {"only an assistant", "odd role"}}


def test_content_in_parts(tokenizer):
    source = TEMPLATES["content in parts"]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ]
    expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=False) == expected == "ab"


def test_variables_of_the_caller(tokenizer):
    source, messages = TEMPLATES["thinking cut out of earlier answers"], CONVERSATIONS["long"]
    for value in (True, False):
        expected = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, enable_thinking=value)
        text = ChatTemplate(source, SPECIAL).render(messages, {"enable_thinking": value}, add_generation_prompt=False)
        assert text == expected
        assert text.endswith("</think>\n\n") == (not value)


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
