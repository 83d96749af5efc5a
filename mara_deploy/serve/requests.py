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
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import OptionError
from mara_runtime.options import Option, options_of
from mara_runtime.prompt import Prompt

KNOBS = ("agents", "top_k", "strategy", "order", "fallback", "threshold")
"""Fields of `DecodeConfig` in the extension `mara`, besides `align`; all but `top_k` are about agents."""
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_NO_TOOLS: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
}  # fmt: skip
_NO_PENALTIES: dict[str, tuple[Any, ...]] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
}  # fmt: skip
CHAT_ONLY = {**_NO_TOOLS, **_NO_PENALTIES, "response_format": ({"type": "text"},), "modalities": (["text"],)}
"""Values that a field may have where another one would change the answer in a way that is not there."""
COMPLETION_ONLY = {**_NO_PENALTIES, "best_of": (1,), "echo": (False,), "suffix": ("",)}
RESPONSE_ONLY = {
    **_NO_TOOLS,
    "text": ({}, {"format": {"type": "text"}}),
    "truncation": ("disabled",),
    "background": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
}
_LOGPROBS = "message.output_text.logprobs"
_MOST_LOGPROBS = 20
_MOST_COMPLETION_LOGPROBS = 5
_MOST_STOPS = 4
_COMPLETION_TOKENS = 16
"""Of /v1/completions, where the request does not say: OpenAI's default."""


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


class Fields:
    """A JSON object whose fields are taken one by one. null is as good as absent."""

    def __init__(self, values: Any, within: str = "") -> None:
        if not isinstance(values, dict):
            raise ApiError(400, "invalid_type", f"{within or 'the body'} must be a JSON object", param=within or None)
        self._values = {name: value for name, value in values.items() if value is not None}
        self._known = set[str]()
        self._prefix = f"{within}." if within else ""

    def param(self, name: str) -> str:
        """The field's name as errors give it."""
        return self._prefix + name

    def take(self, name: str, *kinds: type) -> Any:
        """The value, of one of these types, or None."""
        self._known.add(name)
        value = self._values.get(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            names = " or ".join(
                _JSON_NAMES[kind] for kind in dict.fromkeys(kinds) if kind is not float or int not in kinds
            )
            raise self.error(name, "invalid_type", f"is {_shown(value)}; it must be {names}")
        return value

    def require(self, name: str, *kinds: type) -> Any:
        """The value; it must be there."""
        value = self.take(name, *kinds)
        if value is None:
            raise self.error(name, "missing_required_parameter", "is missing")
        return value

    def number(self, name: str, least: float, most: float, kind: type = float) -> Any:
        """A number in a range, or None."""
        value = self.take(name, int, kind)
        if value is not None and not least <= value <= most:
            raise self.error(name, "invalid_value", f"is {_shown(value)}; it must be from {least:g} to {most:g}")
        return value

    def option(self, name: str, of: str = "") -> Any:
        """A value within the range of a field of `DecodeConfig`, default that of the same name; or None."""
        self._known.add(name)
        value = self._values.get(name)
        if value is None:
            return None
        try:
            return replace(_OPTIONS[of or name], name=self.param(name), flag=self.param(name)).check(value)
        except OptionError as error:
            raise ApiError(400, "invalid_value", str(error), param=self.param(name)) from None

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse other values of these fields."""
        for name, values in allowed.items():
            self._known.add(name)
            if name in self._values and not any(_equal(self._values[name], value) for value in values):
                raise self.error(name, "unsupported_value", f"is {_shown(self._values[name])}, which is not supported")

    def finish(self, ignored: set[str] | None = None) -> None:
        """Refuse fields that nobody took."""
        for name in self._values:
            if name not in self._known and name not in (ignored or ()):
                known = f"; known are {', '.join(sorted(self._known))}" if self._prefix else ""
                raise self.error(name, "unknown_parameter", f"is not a parameter that this server has{known}")

    def error(self, name: str, code: str, problem: str) -> ApiError:
        """A refusal that names the field."""
        return ApiError(400, code, f"{self.param(name)} {problem}", param=self.param(name))


_OPTIONS: dict[str, Option] = {each.name: each for each in options_of(DecodeConfig)}
_JSON_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
}


def chat(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/chat/completions. Raises ApiError."""
    fields = Fields(body)
    fields.only(CHAT_ONLY)
    model = _model(fields, models)
    prompt = _messages(fields.require("messages", list), "messages")
    alternatives = fields.number("top_logprobs", 0, _MOST_LOGPROBS, int)
    if fields.take("logprobs", bool):
        alternatives = alternatives or 0
    elif alternatives is not None:
        raise fields.error("top_logprobs", "invalid_value", "is given, but logprobs is not true")
    limits = [fields.option(name, "max_new_tokens") for name in ("max_completion_tokens", "max_tokens")]
    limit = next((each for each in limits if each is not None), model.max_context)
    return _ask(fields, model, prompt, limit, top_logprobs=alternatives, **_streamed(fields))


def completion(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/completions. Raises ApiError."""
    fields = Fields(body)
    fields.only(COMPLETION_ONLY)
    model = _model(fields, models)
    prompt = fields.require("prompt", str, list)
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, list) and not all(type(each) is int for each in prompt):
            raise fields.error("prompt", "unsupported_value", "must be one text, or the token ids of one")
    alternatives = fields.number("logprobs", 0, _MOST_COMPLETION_LOGPROBS, int)
    limit = fields.option("max_tokens", "max_new_tokens") or _COMPLETION_TOKENS
    return _ask(fields, model, prompt, limit, top_logprobs=alternatives, raw=True, **_streamed(fields))


def response(body: Any, models: Mapping[str, Model]) -> Ask:
    """A body of /v1/responses. Raises ApiError."""
    fields = Fields(body)
    fields.only(RESPONSE_ONLY)
    model = _model(fields, models)
    given = fields.require("input", str, list)
    prompt = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given, "input")
    instructions = fields.take("instructions", str)
    if instructions is not None:
        prompt = [{"role": "system", "content": instructions}, *prompt]
    include = fields.take("include", list) or []
    if any(each != _LOGPROBS for each in include):
        raise fields.error("include", "unsupported_value", f"may have {_LOGPROBS} only")
    alternatives = fields.number("top_logprobs", 0, _MOST_LOGPROBS, int)
    limit = fields.option("max_output_tokens", "max_new_tokens")
    echo = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": fields.take("metadata", dict) or {},
        "temperature": fields.take("temperature", int, float),
        "top_p": fields.take("top_p", int, float),
    }
    stream = bool(fields.take("stream", bool))
    top_logprobs = (alternatives or 0) if include else None
    return _ask(fields, model, prompt, limit or model.max_context, top_logprobs=top_logprobs, stream=stream, echo=echo)


def _ask(fields: Fields, model: Model, prompt: Prompt, limit: int, **facts: Any) -> Ask:
    """What all three have in common; refuses what is left over."""
    extension = Fields(fields.take("mara", dict) or {}, "mara")
    decisions, template = extension.take("decisions", bool), extension.take("template", dict)
    config = _config(fields, extension, model, limit)
    extension.finish()
    fields.finish(IGNORED)
    return Ask(model, prompt, config, template=template or {}, decisions=bool(decisions), **facts)


def _config(fields: Fields, extension: Fields, model: Model, limit: int) -> DecodeConfig:
    agents = _agents(extension, model)
    knobs = {name: extension.option(name) for name in KNOBS if name != "agents"} | {"agents": agents}
    align = extension.take("align", bool) is not False
    temperature = fields.number("temperature", 0, 2)
    values = {**knobs, "seed": fields.option("seed"), "top_p": fields.option("top_p"), "stop": _stop(fields)}
    if align:
        if not model.agents:
            raise extension.error("align", "no_agent", f"must be false: {model.bundle} has no agent")
    else:
        for name in KNOBS:
            if name != "top_k" and values[name] is not None:
                about = "the model names an agent" if agents and model.agent else f"{extension.param(name)} is given"
                raise extension.error("align", "invalid_value", f"is false, which runs no agent, but {about}")
        values |= {"sample": True, "temperature": float(temperature)} if temperature else {}
    given = {name: value for name, value in values.items() if value is not None}
    return DecodeConfig(align=align, max_new_tokens=limit, **given)


def _agents(extension: Fields, model: Model) -> dict[str, float] | None:
    """{agent: its part}, as the request has it or the model's name does; None: neither does."""
    given = extension.take("agents", str, list, dict)
    if given is None:
        return None if model.agent is None else {model.agent: 1.0}
    if model.agent is not None:
        raise extension.error("agents", "invalid_value", f"is given, but model is {model.id}, which names an agent")
    names = [given] if isinstance(given, str) else [*given]
    for name in names:
        if name not in model.agents:
            has = ", ".join(model.agents) or "none"
            raise extension.error("agents", "agent_not_found", f"has {_shown(name)}; agents of {model.bundle}: {has}")
    if len(set(names)) < len(names):
        raise extension.error("agents", "invalid_value", "names an agent twice")
    if not isinstance(given, dict):
        return dict.fromkeys(names, 1.0) or None
    parts: dict[str, float] = extension.option("agents")
    return parts


def _stop(fields: Fields) -> tuple[str, ...] | None:
    given = fields.take("stop", str, list)
    texts = [given] if isinstance(given, str) else given or []
    if len(texts) > _MOST_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise fields.error("stop", "invalid_value", f"must be a text, or up to {_MOST_STOPS}, none of them empty")
    return tuple(texts) or None


def _model(fields: Fields, models: Mapping[str, Model]) -> Model:
    name = fields.require("model", str)
    if name not in models:
        message = f"the model {_shown(name)} does not exist; GET /v1/models lists those there are"
        raise ApiError(404, "model_not_found", message, param="model")
    return models[name]


def _streamed(fields: Fields) -> dict[str, bool]:
    """Whether to stream, and with a chunk of usage at the end."""
    stream, given = bool(fields.take("stream", bool)), fields.take("stream_options", dict)
    if given is not None and not stream:
        raise fields.error("stream_options", "invalid_value", "is given, but stream is not true")
    options = Fields(given or {}, "stream_options")
    include_usage = bool(options.take("include_usage", bool))
    options.take("include_obfuscation", bool)  # padding against eavesdroppers, of which there is none
    options.finish()
    return {"stream": stream, "include_usage": include_usage}


_EMPTY: tuple[Any, ...] = (None, "", [], {})
_TEXT_PARTS = ("text", "input_text", "output_text")


def _messages(given: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Messages of roles and texts; what clients repeat from answers of ours, and is empty, is left out."""
    messages = []
    for index, each in enumerate(given):
        fields = Fields(each, f"{where}[{index}]")
        role = fields.require("role", str)
        content = fields.take("content", str, list)
        if not isinstance(content, str):
            parts = [_part(part, fields.param(f"content[{i}]")) for i, part in enumerate(content or [])]
            content = "\n".join(parts)
        fields.only({"type": ("message",)})
        leftover = {name for name in each if each[name] in _EMPTY} | {"id", "status", "name"}
        fields.finish(leftover)
        messages.append({"role": "system" if role == "developer" else role, "content": content})
    return messages


def _part(given: Any, where: str) -> str:
    """The text of a part of a message."""
    fields = Fields(given, where)
    kind = fields.require("type", str)
    if kind not in _TEXT_PARTS:
        raise fields.error("type", "unsupported_value", f"is {_shown(kind)}; this server takes text only")
    text: str = fields.require("text", str)
    return text


def _equal(value: Any, other: Any) -> bool:
    """Whether two JSON values are the same: true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
