"""An answer as the caller sees it: a piece of text per token, and the whole with the last."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mara_runtime.config import DecodeConfig
from mara_runtime.stats import Stats, Step
from mara_runtime.text import TextSide, TextStream


@dataclass(frozen=True)
class Generation:
    """One answer."""

    token_ids: list[int]
    """emitted ids, end-of-sequence included"""
    text: str | None
    """without special tokens and stop text; None when the bundle has no tokenizer"""
    finish_reason: str
    """"stop": an end-of-sequence id or a stop text; "length": max_new_tokens or the bundle's capacity"""
    stats: Stats
    engine: dict[str, Any]
    """what ran, and why preferred engines declined"""
    config: DecodeConfig
    """as used: the fallback is the one that was in force"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `mara-run --json` prints them."""
        return {
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": {**self.stats.to_json(), "engine": self.engine},
            "config": self.config.to_json(),
        }


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer."""

    text: str
    """may be empty: a token can be part of a character, or of a possible stop text"""
    step: Step
    result: Generation | None = None
    """the whole answer, on the last piece"""


class Assembler:
    """Makes the pieces of one answer: `ends` hears each token as it is emitted, `piece` takes its step."""

    def __init__(
        self,
        config: DecodeConfig,
        limit: int,
        eos_token_ids: frozenset[int],
        side: TextSide | None,
        context: Sequence[int],
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        """limit: tokens at most. context: tokens whose text the answer continues. describe: what runs, for the result.

        side: None where the bundle has no tokenizer.
        """
        self.stats = Stats()
        self._config, self._limit, self._eos, self._describe = config, limit, eos_token_ids, describe
        self._stream = None if side is None else TextStream(side, config.stop, context)
        self._tokens: list[int] = []
        self._texts = deque[str]()  # of the tokens that were emitted, and not yet taken
        self._finish_reason: str | None = None

    def ends(self, token: int) -> bool:
        """Whether the answer ends with this token; see `Request.ends`."""
        stream = self._stream
        self._tokens.append(token)
        text = stream.push(token) if stream else ""
        ended = token in self._eos or (stream is not None and stream.stopped)
        if ended or len(self._tokens) == self._limit:
            text += stream.finish() if stream else ""
            # text held back may contain a stop text that the last token's bytes completed
            ended = ended or (stream is not None and stream.stopped)
            self._finish_reason = "stop" if ended else "length"
        self._texts.append(text)
        return self._finish_reason is not None

    def piece(self, step: Step) -> Piece:
        """The piece of the next token."""
        text = self._texts.popleft()
        if self._finish_reason is None or self._texts:
            return Piece(text, step)
        return Piece(text, step, self._result(self._finish_reason))

    def _result(self, finish_reason: str) -> Generation:
        return Generation(
            token_ids=self._tokens,
            text=self._stream.text if self._stream else None,
            finish_reason=finish_reason,
            stats=self.stats,
            engine=self._describe(),
            config=self._config,
        )
