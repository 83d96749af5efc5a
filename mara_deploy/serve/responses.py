"""Answers as objects of OpenAI's Responses API: one message of text. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from mara_deploy.serve.errors import ApiError
from mara_deploy.serve.formats import Event, extension, token_logprobs
from mara_deploy.serve.requests import Ask
from mara_runtime.answer import Generation, Piece
from mara_runtime.stats import Stats, Step
from mara_runtime.text import TextSide


class ResponseFormat:
    """/v1/responses; see `Format`."""

    closing = b""

    def __init__(self, ask: Ask, side: TextSide) -> None:
        self._ask, self._side = ask, side
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sequence = 0
        self._logprobs: list[dict[str, Any]] = []

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Format`."""
        result = pieces[-1].result
        assert result is not None
        steps = [piece.step for piece in pieces]
        self._logprobs = self._of(steps)
        return {**self._finished(result), **extension(self._ask, self._side, steps, result)}

    def begin(self) -> Iterable[Event]:
        """See `Format`."""
        response = self._response("in_progress", [])
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        item = self._message("in_progress", None)
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._at, part=self._part("", []))

    def piece(self, piece: Piece) -> Iterable[Event]:
        """See `Format`."""
        logprobs = self._of([piece.step])
        self._logprobs += logprobs
        if piece.text or logprobs or self._ask.decisions:
            yield self._event(
                "response.output_text.delta",
                **self._at,
                delta=piece.text,
                logprobs=logprobs,
                **extension(self._ask, self._side, [piece.step], None),
            )

    def end(self, result: Generation) -> Iterable[Event]:
        """See `Format`."""
        text, final = result.text or "", self._finished(result)
        yield self._event("response.output_text.done", **self._at, text=text, logprobs=self._logprobs)
        yield self._event("response.content_part.done", **self._at, part=self._part(text, self._logprobs))
        yield self._event("response.output_item.done", output_index=0, item=final["output"][0])
        final |= extension(self._ask, self._side, None, result)
        yield self._event(f"response.{final['status']}", response=final)

    def error(self, error: ApiError) -> Event:
        """See `Format`."""
        return self._event("error", code=error.code, message=str(error), param=error.param)

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> Event:
        self._sequence += 1
        return kind, {"type": kind, "sequence_number": self._sequence - 1, **data}

    def _of(self, steps: Sequence[Step]) -> list[dict[str, Any]]:
        """Log-probabilities, where they were asked for."""
        alternatives = self._ask.top_logprobs
        return [] if alternatives is None else [token_logprobs(step, self._side, alternatives) for step in steps]

    def _finished(self, result: Generation) -> dict[str, Any]:
        status = "completed" if result.finish_reason == "stop" else "incomplete"
        found = self._response(status, [self._message(status, result.text or "")])
        return {**found, "usage": _usage(result.stats)}

    def _message(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text, self._logprobs)]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    @staticmethod
    def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self._ask.model.id,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "usage": None,
            **self._ask.echo,
        }


def _usage(stats: Stats) -> dict[str, Any]:
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens},
        "output_tokens": stats.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.tokens,
    }
