"""The OpenAPI document of a server: requests from the tables that check them, answers as the formats make them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mara_deploy.serve import requests
from mara_deploy.serve.fields import Table, object_schema
from mara_runtime.versions import installed

_QUESTION = "How do I keep bread fresh?"
PATHS: dict[str, tuple[str, Table, str, dict[str, Any]]] = {
    "/v1/chat/completions": (
        "A chat's next message",
        requests.CHAT,
        "ChatCompletion",
        {"messages": [{"role": "user", "content": _QUESTION}]},
    ),
    "/v1/completions": ("What follows a text or token ids", requests.COMPLETION, "Completion", {"prompt": "To keep"}),
    "/v1/responses": ("A response of text", requests.RESPONSE, "Response", {"input": _QUESTION}),
}
"""summary, fields of a request, schema of an answer, the least request besides its model"""
_TEXT, _COUNT, _OBJECT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}
_NULLABLE_OBJECT = {"type": ["object", "null"]}
_ERRORS = {
    400: "the request is not valid, or asks for what the server does not have",
    401: "no valid API key",
    404: "no such model",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "the queue is full",
    500: "the server has failed",
    503: "the server is shutting down",
    504: "the answer took too long",
}


def document(models: Iterable[str], *, keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1. models: that there are; keys: requests need one."""
    names = [*models]
    security: dict[str, Any] = {"security": [{"key": []}]} if keys else {}
    posts = {path: {"post": {**_post(names, *facts), **security}} for path, facts in PATHS.items()}
    gets = {
        "/v1/models": _get("The models", _json("Models"), 401),
        "/v1/models/{model}": _get("A model", _json("Model"), 401, 404),
        "/openapi.json": _get("This document", {"application/json": {"schema": _OBJECT}}, 401),
    }
    model = {"name": "model", "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}
    gets["/v1/models/{model}"] |= {"parameters": [{**model, "examples": {name: {"value": name} for name in names}}]}
    probes = {
        "/health": _get("Whether it works", _json("Status"), own=_json("Status")),
        "/ready": _get("Whether it takes requests", _json("Status"), own=_json("Status")),
        "/metrics": _get("Counters for Prometheus", {"text/plain": {"schema": _TEXT}}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "mara-serve", "version": installed("mara-deploy")["mara-deploy"] or "unknown"},
        "paths": {
            **posts,
            **{path: {"get": {**get, **security}} for path, get in gets.items()},
            **{path: {"get": get} for path, get in probes.items()},
        },
        "components": {
            "schemas": _SCHEMAS,
            **({"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if keys else {}),
        },
    }


def _post(models: list[str], summary: str, table: Table, answer: str, example: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", **object_schema(table)}
    schema["properties"]["model"] = {"enum": models}
    whole = {"model": models[0], **example}
    ways: dict[str, dict[str, Any]] = {"whole": {}, "stream": {"stream": True}, "plain": {"mara": {"align": False}}}
    examples = {way: {"value": whole | more} for way, more in ways.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}},
        "responses": _responses({**_json(answer), "text/event-stream": {}}, _ERRORS),
    }


def _get(summary: str, content: Any, *errors: int, own: Any = None) -> dict[str, Any]:
    """own: content of status 503."""
    found = _responses(content, errors)
    if own is not None:
        found["503"] = {"description": "no", "content": own}
    return {"summary": summary, "responses": found}


def _responses(content: Any, errors: Iterable[int]) -> dict[str, Any]:
    found = {"200": {"description": "yes", "content": content}}
    return found | {str(each): {"description": _ERRORS[each], "content": _json("Error")} for each in errors}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _of(properties: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """An object that has these properties and no others."""
    return {
        "type": "object",
        "properties": {**properties, **optional},
        "required": [*properties],
        "additionalProperties": False,
    }


def _list(of: Any, **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": of, **limits}


_CHOICE = {"index": {"const": 0}, "logprobs": _NULLABLE_OBJECT, "finish_reason": {"enum": ["stop", "length"]}}
_MESSAGE = _of({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}})
_USAGE = _of(
    {
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
        "prompt_tokens_details": _of({"cached_tokens": _COUNT}),
    }
)


def _choices(kind: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    """The object of an answer with one choice."""
    choices = _list(_of({**choice, **_CHOICE}), minItems=1, maxItems=1)
    head = {"id": _TEXT, "object": {"const": kind}, "created": _COUNT, "model": _TEXT}
    return _of({**head, "choices": choices, "usage": _USAGE}, mara=_OBJECT)


_MODEL = _of({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
_RESPONSE = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": {"const": "response"},
        "created_at": _COUNT,
        "status": {"enum": ["completed", "incomplete"]},
        "model": _TEXT,
        "output": _list(
            _of(
                {
                    "id": _TEXT,
                    "type": {"const": "message"},
                    "role": {"const": "assistant"},
                    "status": {"enum": ["completed", "incomplete"]},
                    "content": _list(
                        _of(
                            {
                                "type": {"const": "output_text"},
                                "text": _TEXT,
                                "annotations": _list({}, maxItems=0),
                                "logprobs": _list(_OBJECT),
                            }
                        )
                    ),
                }
            )
        ),
        "usage": _of(
            {
                **dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _COUNT),
                "input_tokens_details": _of({"cached_tokens": _COUNT}),
                "output_tokens_details": _of({"reasoning_tokens": _COUNT}),
            }
        ),
        "mara": _OBJECT,
    },
    "required": ["id", "object", "created_at", "status", "model", "output", "usage"],
}
_SCHEMAS = {
    "ChatCompletion": _choices("chat.completion", {"message": _MESSAGE}),
    "Completion": _choices("text_completion", {"text": _TEXT}),
    "Response": _RESPONSE,
    "Model": _MODEL,
    "Models": _of({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Status": _of({"status": _TEXT}),
    "Error": _of(
        {"error": _of({"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": _TEXT})}
    ),
}
