"""Bodies of OpenAI's requests, checked field by field, as what the decoder takes.

Some fields have no effect. `temperature` acts on plain decoding alone (`"mara": {"align": false}`), where a value above
0 samples: an agent chooses by rank and margin, not by chance, and the candidates are the same at every temperature
(docs/internals/method.md). Fields about accounts and storage (`user`, `store`, …) say nothing about the answer. What
would change the answer and is not there, such as tools or penalties, is refused by name, as are unknown fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mara_deploy.serve.errors import ApiError
from mara_deploy.serve.fields import Fields, Spec, Table, object_schema, shown
from mara_runtime.config import DecodeConfig
from mara_runtime.options import Option, options_of
from mara_runtime.prompt import Prompt

_OPTIONS: dict[str, Option] = {each.name: each for each in options_of(DecodeConfig)}
_MOST_STOPS = 4
_COMPLETION_TOKENS = 16
"""Of /v1/completions, where the request does not say: OpenAI's default."""
_LOGPROBS = "message.output_text.logprobs"
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_STOPS = {"minLength": 1, "items": {"type": "string", "minLength": 1}, "maxItems": _MOST_STOPS}
_BOOL, _TEXT, _ANY = Spec((bool,)), Spec((str,)), Spec()
_TOKENS = Spec(option=_OPTIONS["max_new_tokens"])
_ALTERNATIVES = Spec((int,), least=0, most=20)

PART: Table = {
    "type": Spec(required=True, only=("text", "input_text", "output_text")),
    "text": Spec((str,), required=True),
}
"""Of a message's content; others of its fields do not count."""
MESSAGE: Table = {
    "role": Spec((str,), required=True),
    "content": Spec((str, list), more={"items": {"type": "object", **object_schema(PART, others=True)}}),
    "type": Spec(only=("message",)),
    **dict.fromkeys(("id", "status", "name"), _ANY),
}
"""Others of its fields may be empty, as clients repeat them from answers of ours."""
_MESSAGES = {
    "minLength": 1,
    "minItems": 1,
    "items": {"type": "object", **object_schema(MESSAGE, others={"enum": [*_EMPTY]})},
}
_OF_AGENTS = ("strategy", "order", "fallback", "threshold")
_ALIGNED = "align", (True, None)
_AGENTS = {"items": _TEXT.schema(), "uniqueItems": True, "minProperties": 1, "additionalProperties": {"type": "number"}}
MARA: Table = {
    "agents": Spec((str, list, dict), needs=_ALIGNED, more=_AGENTS),
    **{name: Spec(option=_OPTIONS[name], needs=_ALIGNED) for name in _OF_AGENTS},
    "top_k": Spec(option=_OPTIONS["top_k"]),
    "align": _BOOL,
    "template": Spec((dict,)),
    "decisions": _BOOL,
}
COMMON: Table = {
    "model": Spec((str,), required=True),
    "stream": _BOOL,
    "stop": Spec(
        (str, list), more={"minLength": 1, "items": {"type": "string", "minLength": 1}, "maxItems": _MOST_STOPS}
    ),
    "seed": Spec(option=_OPTIONS["seed"]),
    "top_p": Spec(option=_OPTIONS["top_p"]),
    "temperature": Spec((int, float), least=0, most=2),
    "mara": Spec((dict,), table=MARA),
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier"), _ANY),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"), _ANY),
}
"""Fields of every request; the last two lines have no effect."""
_NO_TOOLS: Table = {
    **dict.fromkeys(("tools", "functions"), Spec(only=([],))),
    **dict.fromkeys(("tool_choice", "function_call"), Spec(only=("none", "auto"))),
}
_NO_PENALTIES: Table = {
    "n": Spec(only=(1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), Spec(only=(0,))),
    "logit_bias": Spec(only=({},)),
}
_STREAM_OPTIONS = Spec((dict,), needs=("stream", (True,)), table={"include_usage": _BOOL, "include_obfuscation": _BOOL})
"""Obfuscation: padding against eavesdroppers, of which there is none."""
CHAT: Table = {
    **COMMON,
    "messages": Spec((list,), required=True, more=_MESSAGES),
    **dict.fromkeys(("max_completion_tokens", "max_tokens"), _TOKENS),
    "logprobs": _BOOL,
    "top_logprobs": replace(_ALTERNATIVES, needs=("logprobs", (True,))),
    "stream_options": _STREAM_OPTIONS,
    **_NO_TOOLS,
    **_NO_PENALTIES,
    "response_format": Spec(only=({"type": "text"},)),
    "modalities": Spec(only=(["text"],)),
}
_IDS = {"minItems": 1, "items": {"type": "integer", "minimum": 0}}
_ONE = {"minItems": 1, "maxItems": 1, "items": {"type": ["string", "array"], "minLength": 1, **_IDS}}
_ONE_PROMPT = {"minLength": 1, "anyOf": [{"type": "string"}, _IDS, _ONE]}
COMPLETION: Table = {
    **COMMON,
    "prompt": Spec((str, list), required=True, more=_ONE_PROMPT),
    "max_tokens": _TOKENS,
    "logprobs": Spec((int,), least=0, most=5),
    "stream_options": _STREAM_OPTIONS,
    **_NO_PENALTIES,
    "best_of": Spec(only=(1,)),
    "echo": Spec(only=(False,)),
    "suffix": Spec(only=("",)),
}
RESPONSE: Table = {
    **COMMON,
    "input": Spec((str, list), required=True, more=_MESSAGES),
    "instructions": _TEXT,
    "max_output_tokens": _TOKENS,
    "include": Spec((list,), more={"items": {"enum": [_LOGPROBS]}}),
    "top_logprobs": _ALTERNATIVES,
    "metadata": Spec((dict,)),
    **_NO_TOOLS,
    "text": Spec(only=({}, {"format": {"type": "text"}})),
    "truncation": Spec(only=("disabled",)),
    "background": Spec(only=(False,)),
    "stream_options": Spec(only=({}, {"include_obfuscation": False})),
}


@dataclass(frozen=True)
class Model:
    """What a client may name: a bundle, or one agent of it."""

    id: str
    bundle: str
    agents: tuple[str, ...]
    """of the bundle"""
    max_context: int
    agent: str | None = None


@dataclass(frozen=True)
class Ask:
    """A request that has been understood."""

    model: Model
    prompt: Prompt
    config: DecodeConfig
    raw: bool = False
    """the prompt is text as it is, without the chat template"""
    template: Mapping[str, Any] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    """alternatives per token; None: no log-probabilities"""
    decisions: bool = False
    echo: Mapping[str, Any] = field(default_factory=dict)
    """fields that the response repeats"""


def chat(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/chat/completions. Raises ApiError."""
    fields = Fields(body, CHAT)
    model = _model(fields, models)
    prompt = _messages(fields["messages"], "messages")
    alternatives = (fields["top_logprobs"] or 0) if fields["logprobs"] else None
    limit = fields["max_completion_tokens"] or fields["max_tokens"] or model.max_context
    return _ask(fields, model, prompt, limit, top_logprobs=alternatives, **_streamed(fields))


def completion(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/completions. Raises ApiError."""
    fields = Fields(body, COMPLETION)
    model = _model(fields, models)
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, list) and not all(type(each) is int for each in prompt):
            raise fields.error("prompt", "unsupported_value", "must be one text, or the token ids of one")
    limit = fields["max_tokens"] or _COMPLETION_TOKENS
    return _ask(fields, model, prompt, limit, top_logprobs=fields["logprobs"], raw=True, **_streamed(fields))


def response(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/responses. Raises ApiError."""
    fields = Fields(body, RESPONSE)
    model = _model(fields, models)
    given = fields["input"]
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given, "input")
    instructions = fields["instructions"]
    if instructions is not None:
        prompt = [{"role": "system", "content": instructions}, *prompt]
    include = fields["include"] or []
    if any(each != _LOGPROBS for each in include):
        raise fields.error("include", "unsupported_value", f"may have {_LOGPROBS} only")
    limit = fields["max_output_tokens"]
    echo = {name: fields[name] for name in ("instructions", "max_output_tokens", "temperature", "top_p")}
    echo["metadata"] = fields["metadata"] or {}
    facts = {"stream": bool(fields["stream"]), "top_logprobs": (fields["top_logprobs"] or 0) if include else None}
    return _ask(fields, model, prompt, limit or model.max_context, echo=echo, **facts)


def _ask(fields: Fields, model: Model, prompt: Prompt, limit: int, **facts: Any) -> Ask:
    """What all three have in common."""
    extension = fields.inner("mara")
    config = _config(fields, extension, model, limit)
    template, decisions = extension["template"] or {}, bool(extension["decisions"])
    return Ask(model, prompt, config, template=template, decisions=decisions, **facts)


def _config(fields: Fields, extension: Fields, model: Model, limit: int) -> DecodeConfig:
    agents = _agents(extension, model)
    knobs = {name: extension[name] for name in ("top_k", *_OF_AGENTS)} | {"agents": agents}
    align, temperature = extension["align"] is not False, fields["temperature"]
    values = {**knobs, "seed": fields["seed"], "top_p": fields["top_p"], "stop": _stop(fields)}
    if align:
        if not model.agents:
            raise extension.error("align", "no_agent", f"must be false: {model.bundle} has no agent")
    else:
        if model.agent is not None:
            raise extension.error("align", "invalid_value", f"is false, but model is {model.id}, which names an agent")
        values |= {"sample": True, "temperature": float(temperature)} if temperature else {}
    given = {name: value for name, value in values.items() if value is not None}
    return DecodeConfig(align=align, max_new_tokens=limit, **given)


def _agents(extension: Fields, model: Model) -> dict[str, float] | None:
    """{agent: its part}, as the request has it or the model's name does; None: neither does."""
    given = extension["agents"]
    if given is None:
        return None if model.agent is None else {model.agent: 1.0}
    if model.agent is not None:
        raise extension.error("agents", "invalid_value", f"is given, but model is {model.id}, which names an agent")
    names = [given] if isinstance(given, str) else [*given]
    for name in names:
        if name not in model.agents:
            has = ", ".join(model.agents) or "none"
            raise extension.error("agents", "agent_not_found", f"has {shown(name)}; agents of {model.bundle}: {has}")
    if len(set(names)) < len(names):
        raise extension.error("agents", "invalid_value", "names an agent twice")
    if not isinstance(given, dict):
        return dict.fromkeys(names, 1.0) or None
    parts: dict[str, float] = extension.within("agents", _OPTIONS["agents"], given)
    return parts


def _stop(fields: Fields) -> tuple[str, ...] | None:
    given = fields["stop"]
    texts = [given] if isinstance(given, str) else given or []
    if len(texts) > _MOST_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise fields.error("stop", "invalid_value", f"must be a text, or up to {_MOST_STOPS}, none of them empty")
    return tuple(texts) or None


def _model(fields: Fields, models: Mapping[str, Model]) -> Model:
    name = fields["model"]
    if name not in models:
        message = f"the model {shown(name)} does not exist; GET /v1/models lists those there are"
        raise ApiError(404, "model_not_found", message, param="model")
    return models[name]


def _streamed(fields: Fields) -> dict[str, bool]:
    """Whether to stream, and with a chunk of usage at the end."""
    stream = bool(fields["stream"])
    return {"stream": stream, "include_usage": bool(fields.inner("stream_options")["include_usage"])}


def _messages(given: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Messages of roles and texts; what clients repeat from answers of ours, and is empty, is left out."""
    messages = []
    for index, each in enumerate(given):
        fields = Fields(each, MESSAGE, f"{where}[{index}]", others=_EMPTY)
        role, content = fields["role"], fields["content"]
        if not isinstance(content, str):
            parts = [_part(part, fields.param(f"content[{i}]")) for i, part in enumerate(content or [])]
            content = "\n".join(parts)
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


def _part(given: Any, where: str) -> str:
    """The text of a part of a message."""
    text: str = Fields(given, PART, where, others=None)["text"]
    return text
