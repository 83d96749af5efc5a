"""Chat templates without transformers: a sandboxed Jinja environment with what templates expect.

The environment follows Hugging Face's documented contract for chat templates (block trimming, loop controls,
`raise_exception`, `strftime_now`, `tojson`), so that a template renders here as `apply_chat_template` renders it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence, Set
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from mara_runtime.errors import OptionError, PromptError
from mara_runtime.sandbox import Sandbox

Message = Mapping[str, Any]
_RESERVED = {"messages", "add_generation_prompt", "self"}
"""Variables that the decoder or Jinja sets."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; for decoding only its content matters."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> Sandbox:
    environment = Sandbox(
        {"tojson": _tojson}, trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning goes by; the first that is given counts."""


def follow(rules: Collection[str], messages: Sequence[Message]) -> list[Message]:
    """The messages as a template sees them. rules: of manifest.MESSAGE_RULES."""
    if "leave_out_null" in rules:
        messages = [{name: value for name, value in m.items() if value is not None} for m in messages]
    if "alias_reasoning" in rules:
        messages = [_aliased(message) for message in messages]
    return list(messages)


def _aliased(message: Message) -> Message:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class ChatTemplate:
    """A bundle's chat template. The rendered text contains the special tokens: tokenise it without adding any."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str | list[str]], message_rules: Collection[str] = ()
    ) -> None:
        """message_rules: of manifest.MESSAGE_RULES, which the messages go through first."""
        self._environment = _environment()
        self._environment.begin()
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # a TemplateError, or Python's error at excessive nesting
            raise PromptError(f"the bundle's chat template is not valid Jinja: {_line(error)}; use --raw") from None
        if taken := sorted(_RESERVED & special_tokens.keys()):
            raise PromptError(f"the chat template's special token {taken[0]!r} has the name of a variable; use --raw")
        self._special_tokens = dict(special_tokens)
        self._message_rules = message_rules
        self.variables = variables_of(source)
        """that a caller may set"""

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Text of a conversation. messages: {"role": …, "content": …}; variables: of the template.

        continue_final_message: the text ends within the last message, for an answer to go on there; then there is no
        generation prompt. As in transformers (`utils/chat_template_utils.py`), which finds the place by a mark.
        Raises PromptError when the template rejects them (an unknown role, a wrong order, …), and OptionError for a
        variable that it does not have.
        """
        values = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        reject_unknown(self.variables, variables or {})
        given, begun = follow(self._message_rules, messages), ""
        if continue_final_message:
            given, begun = _marked(given)
        values |= {"messages": given, "add_generation_prompt": add_generation_prompt and not continue_final_message}
        self._environment.begin()
        try:
            text = self._template.render(values)
        except Exception as error:  # a template is a program and may fail like any program
            raise PromptError(f"the bundle's chat template rejects these messages: {_line(error)}") from None
        return _until_mark(text, begun) if continue_final_message else text


_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def _marked(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages, with a mark at the end of the last one's text, or of its last part that is text; and that text."""
    *before, last = messages
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": content + _MARK}], content
    parts = list(content) if isinstance(content, Sequence) else []
    for at in reversed(range(len(parts))):
        if isinstance(parts[at], Mapping) and isinstance(parts[at].get("text"), str):
            text = parts[at]["text"]
            parts[at] = {**parts[at], "text": text + _MARK}
            return [*before, {**last, "content": parts}], text
    raise PromptError("the last message has no text to continue")


def _until_mark(text: str, begun: str) -> str:
    """The text up to the mark. begun: the last message."""
    at = text.rfind(_MARK.strip())
    if at < 0 or begun.strip() not in text:
        raise PromptError("the chat template changes or drops the last message, so an answer cannot continue it")
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()  # the template strips messages


def variables_of(source: str) -> set[str]:
    """Variables that a valid chat template reads and a caller may set."""
    environment = _environment()
    environment.begin()
    return meta.find_undeclared_variables(environment.parse(source)) - environment.globals.keys() - _RESERVED


def reject_unknown(known: Set[str], variables: Mapping[str, Any]) -> None:
    """Raise OptionError for a variable that the chat template does not read."""
    for name in variables:
        if name not in known:
            has = ", ".join(sorted(known)) or "none"
            raise OptionError(f"--template sets {name!r}, which the chat template does not read; it reads {has}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
