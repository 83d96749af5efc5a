"""Answers as OpenAI's objects: chat completions and completions. /v1/responses is in responses.py.

A format makes the object of a whole answer, or the events of a stream: `begin`, `piece` for each piece, `end`.
Log-probabilities are the LLM's over its whole vocabulary, before any agent is asked. Alternatives are known of the
candidates of a position, so that there may be fewer than were asked for: in plain greedy decoding, the token alone.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from mara_deploy.serve.errors import ApiError
from mara_deploy.serve.requests import Ask
from mara_deploy.trace import record
from mara_runtime.answer import Generation, Piece
from mara_runtime.stats import Stats, Step
from mara_runtime.text import TextSide

Event = tuple[str | None, dict[str, Any]]
"""Name and data of a server-sent event; None: it has no name."""


class Format(Protocol):
    """The object of one answer."""

    closing: bytes
    """sent after the last event, unless that is an error"""

    def __init__(self, ask: Ask, side: TextSide) -> None: ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The object of an answer that is complete."""

    def begin(self) -> Iterable[Event]:
        """Before the first piece."""

    def piece(self, piece: Piece) -> Iterable[Event]:
        """What one token adds."""

    def end(self, result: Generation) -> Iterable[Event]:
        """After the last piece."""

    def error(self, error: ApiError) -> Event:
        """In place of what would come."""


class Choices(ABC):
    """What chat completions and completions share: an object with one choice."""

    closing = b"data: [DONE]\n\n"
    prefix, kind, chunk_kind = "", "", ""

    def __init__(self, ask: Ask, side: TextSide) -> None:
        self.ask, self.side = ask, side
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See `Format`."""
        result = pieces[-1].result
        assert result is not None
        steps = [piece.step for piece in pieces]
        choice = {**self.message(result.text or ""), "logprobs": self.logprobs(steps), "index": 0}
        found = self._object(self.kind, [{**choice, "finish_reason": result.finish_reason}])
        return {**found, "usage": usage(result.stats), **extension(self.ask, self.side, steps, result)}

    def begin(self) -> Iterable[Event]:
        """See `Format`."""
        return ()

    def piece(self, piece: Piece) -> Iterable[Event]:
        """See `Format`."""
        ask = self.ask
        if piece.text or ask.decisions or ask.top_logprobs is not None:
            yield self._chunk(self.delta(piece.text), self.logprobs([piece.step]), [piece.step])

    def end(self, result: Generation) -> Iterable[Event]:
        """See `Format`."""
        name, chunk = self._chunk(self.delta(""), None, [], result.finish_reason)
        yield name, {**chunk, **extension(self.ask, self.side, None, result)}
        if self.ask.include_usage:
            yield None, {**self._object(self.chunk_kind, []), "usage": usage(result.stats)}

    def error(self, error: ApiError) -> Event:
        """See `Format`."""
        return None, error.body()

    def _chunk(self, delta: dict[str, Any], logprobs: Any, steps: Sequence[Step], reason: str | None = None) -> Event:
        choice = {"index": 0, **delta, "logprobs": logprobs, "finish_reason": reason}
        no_usage = {"usage": None} if self.ask.include_usage else {}
        return None, {
            **self._object(self.chunk_kind, [choice]), **no_usage, **extension(self.ask, self.side, steps or None, None)
        }  # fmt: skip

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.ask.model.id, "choices": choices
        }  # fmt: skip

    @abstractmethod
    def message(self, text: str) -> dict[str, Any]:
        """The part of a choice that has the text."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The part of a streamed choice that has more text."""

    @abstractmethod
    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        """Log-probabilities of these tokens, where they were asked for."""


class ChatFormat(Choices):
    """/v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def message(self, text: str) -> dict[str, Any]:
        """See `Choices`."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def begin(self) -> Iterable[Event]:
        """See `Format`."""
        yield self._chunk({"delta": {"role": "assistant", "content": "", "refusal": None}}, None, [])

    def delta(self, text: str) -> dict[str, Any]:
        """See `Choices`."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        """See `Choices`."""
        if self.ask.top_logprobs is None:
            return None
        content = [token_logprobs(step, self.side, self.ask.top_logprobs) for step in steps]
        return {"content": content, "refusal": None}


class CompletionFormat(Choices):
    """/v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, ask: Ask, side: TextSide) -> None:
        super().__init__(ask, side)
        self._offset = 0

    def message(self, text: str) -> dict[str, Any]:
        """See `Choices`."""
        return {"text": text}

    def delta(self, text: str) -> dict[str, Any]:
        """See `Choices`."""
        return {"text": text}

    def logprobs(self, steps: Sequence[Step]) -> dict[str, Any] | None:
        """See `Choices`."""
        if self.ask.top_logprobs is None:
            return None
        found = [token_logprobs(step, self.side, self.ask.top_logprobs) for step in steps]
        offsets = []
        for each in found:
            offsets.append(self._offset)
            self._offset += len(each["token"])
        return {
            "tokens": [each["token"] for each in found],
            "token_logprobs": [each["logprob"] for each in found],
            "top_logprobs": [{one["token"]: one["logprob"] for one in each["top_logprobs"]} for each in found],
            "text_offset": offsets,
        }


def usage(stats: Stats) -> dict[str, Any]:
    """Token counts, as chat completions and completions have them."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": stats.prompt_tokens + stats.tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
    }


def token_logprobs(step: Step, side: TextSide, alternatives: int) -> dict[str, Any]:
    """A token's log-probability, and those of the best candidates of its position."""
    found = step.candidates
    logs = found.log_probabilities.tolist()

    def named(token: int, log: float) -> dict[str, Any]:
        text = side.tokenizer.decode([token], skip_special_tokens=False)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it may be a part of a character
        return {"token": text, "logprob": log, "bytes": list(text.encode()) if whole else None}

    best = zip(found.ids.tolist()[:alternatives], logs, strict=False)
    return {**named(step.token, logs[step.rank - 1]), "top_logprobs": [named(token, log) for token, log in best]}


def extension(ask: Ask, side: TextSide, steps: Sequence[Step] | None, result: Generation | None) -> dict[str, Any]:
    """The field `mara`, where it was asked for: decisions of these tokens; counters and configuration of the answer."""
    if not ask.decisions or (steps is None and result is None):
        return {}
    found: dict[str, Any] = {}
    if steps is not None:
        found["decisions"] = [record(step, side) for step in steps]
    if result is not None:
        found |= {"stats": result.stats.to_json(), "config": result.config.to_json(), "engine": result.engine}
    return {"mara": found}
