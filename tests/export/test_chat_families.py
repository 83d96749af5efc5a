"""Templates with what each family's released ones use, in words of our own, render as transformers renders them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from mara_export.hf.tokenizer import write_tokenizer
from mara_runtime.chat import ChatTemplate
from mara_runtime.errors import PromptError
from tests import checkpoints

FAMILIES = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).with_name("templates").iterdir()}

FIELDS = {
    "city": {"type": "string", "description": 'Its "name" <b>', "enum": ["Köln", "Ny"]},
    "days": {"type": ["integer", "null"], "default": 3},
    "where": {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "number"}}}, "required": ["x"]},
    "either": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
}
FUNCTION = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": FIELDS}, "return": {}}
TOOLS = [
    {"type": "function", "function": FUNCTION},
    {"type": "function", "function": {"name": "none", "description": "", "parameters": {"properties": {}}}},
]
VARIABLES: tuple[dict[str, Any], ...] = (
    {},
    {"tools": TOOLS},
    {"enable_thinking": False, "thinking": True, "date_string": "today", "builtin_tools": ["browser", "python"]},
    {
        "enable_thinking": True,
        "reasoning_effort": "high",
        "model_identity": "I.",
        "python_tools": ["f(é)", {"a": None}],
    },
    {"tools": TOOLS, "documents": [{"doc_id": 1, "title": "é", "text": "t"}, {"doc_id": "b", "text": "u"}]},
    {
        "documents": [{"doc_id": 1, "text": "t"}],
        "controls": {"citations": True},
        "safety_mode": "",
        "custom_tools": TOOLS,
    },
)
"""Of these, a template gets those that it reads."""

ASK, SYSTEM = {"role": "user", "content": " Is it <hot>?\n"}, {"role": "system", "content": "Be brief. /no_think\n"}
ARGUMENTS = {"city": "Köln", "days": 2, "where": {"x": [1, 2.5]}, "either": True, "none": None}


def call(arguments: Any, name: str = "abcdefghi") -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def answer(content: Any = ..., **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if content is ... else {"content": content}), **fields}


def result(content: Any = '{"t": 20}') -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [SYSTEM, ASK, answer("<think>\nhm\n</think>\n\nYes.\n"), {"role": "user", "content": "é日👍 {{ x }}{% y"}],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ],
    "calls": [SYSTEM, ASK, answer("", tool_calls=[call(ARGUMENTS)]), result(), answer("20°"), ASK],
    "two calls": [ASK, answer("a", tool_calls=[call({}), call(ARGUMENTS, "abcdefgh2")]), result(), result("2")],
    "arguments as text": [ASK, answer("", tool_calls=[call('{"city": "Köln"}')]), result({"t": 20})],
    "calls without content": [ASK, answer(tool_calls=[call(ARGUMENTS)]), result()],
    "null": [ASK, answer(None, tool_calls=[call(ARGUMENTS)], reasoning_content=None), result()],
    "reasoning": [ASK, answer("A", reasoning_content="R\n"), ASK, answer("B", reasoning_content="Q")],
    "reasoning by another name": [ASK, answer("A", thinking="R"), ASK, answer("B", reasoning="Q"), ASK],
    "unanswered": [ASK, ASK],
    "begun": [ASK, answer("<think>\nhm\n</think>\n\nI begin ")],
    "functions": [{**SYSTEM, "functions": "f(x)", "tools": "[g]"}, ASK],
    "odd roles": [{"role": "developer", "content": "D"}, ASK, {"role": "critic", "content": "No."}],
}


def fresh(messages: Any) -> Any:
    """Objects of their own: version 4.57 marks the last message, and so each that is the same object."""
    return json.loads(json.dumps(messages))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    checkpoints.add_tokenizer(folder, 320)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_text_or_a_refusal_in_both(tokenizer, family, tmp_path):
    """For each conversation and the variables that the template reads: to be answered, as it is, to be continued."""
    tokenizer.chat_template = FAMILIES[family]
    facts = write_tokenizer(tokenizer, tmp_path)
    ours = ChatTemplate(FAMILIES[family], facts.special_tokens, facts.message_rules)
    accepted = set()
    for variables in VARIABLES:
        given = {name: value for name, value in variables.items() if name in ours.variables}
        if variables and not given:
            continue
        for name, messages in CONVERSATIONS.items():
            for prompted, continued in ((True, False), (False, False), (False, True)):
                options: Any = {"add_generation_prompt": prompted, "continue_final_message": continued}
                try:
                    expected = tokenizer.apply_chat_template(fresh(messages), tokenize=False, **given, **options)
                except jinja2.TemplateError as error:
                    with pytest.raises(PromptError, match=re.escape(" ".join(str(error).split()))):
                        ours.render(messages, given, **options)
                except Exception:  # Python's, in the words of its version
                    with pytest.raises(PromptError):
                        ours.render(messages, given, **options)
                else:
                    assert ours.render(messages, given, **options) == expected, (name, given, options)
                    accepted.add(name)
    assert accepted >= {"one", "begun"}
    assert len(accepted) >= 6


def test_every_conversation_is_one_that_some_family_takes(tokenizer):
    for messages in CONVERSATIONS.values():
        assert any(renders(source, messages) for source in FAMILIES.values())


def renders(source: str, messages: list[dict[str, Any]]) -> bool:
    try:
        return bool(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages))
    except PromptError:
        return False
