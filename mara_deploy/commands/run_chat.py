"""The chat of `mara-run` on a terminal: a conversation, and what happens at Ctrl-C.

Standard output gets the answers and nothing else; everything else is written to standard error.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.explain import Marker, explanation, kind, namer
from mara_deploy.commands.run_answer import Stream, answered, counters
from mara_deploy.commands.terminal import columns, has_colour, printable
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import MaraError

if TYPE_CHECKING:
    from mara_runtime.answer import Generation, Piece
    from mara_runtime.decoder import AlignedDecoder

INTERRUPTED = "interrupted"
"""In place of a finish reason: the user stopped the answer."""


def say(*lines: str) -> None:
    """Write lines for the user, beside the answers."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


class Interrupts:
    """Ctrl-C: raises KeyboardInterrupt where that is awaited, once, and does nothing elsewhere."""

    def __init__(self) -> None:
        self._awaited = False

    def handle(self, *_: object) -> None:
        """The handler of SIGINT."""
        if self._awaited:
            self._awaited = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this, Ctrl-C raises."""
        self._awaited = True
        try:
            yield
        finally:
            self._awaited = False


@dataclass(frozen=True)
class Turn:
    """A question and what was written in answer to it."""

    asked: list[dict[str, str]]
    """the conversation up to the question"""
    answer: str
    finish_reason: str
    """of the `Generation`, or INTERRUPTED"""
    config: DecodeConfig
    """as used"""

    def to_json(self) -> dict[str, Any]:
        """An entry of a prompt file, with the answer beside the prompt."""
        return {
            "messages": self.asked,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "config": self.config.to_json(),
        }


class Chat:
    """A conversation with a bundle; what commands of the chat change of it.

    stream: the decoder's, or one that also writes a trace. config: of the answers, where `plain` is not set. variables:
    of the chat template. explain: after each answer.
    """

    def __init__(
        self,
        decoder: AlignedDecoder,
        stream: Stream,
        config: DecodeConfig,
        system: str | None,
        variables: Mapping[str, Any],
        explain: bool,
    ) -> None:
        self.decoder, self.stream, self.system, self.variables = decoder, stream, system, variables
        self.plain = not config.align
        self.aligned = replace(config, align=True, sample=False, temperature=1.0)
        self._alone = replace(config, align=False)
        self.turns: list[Turn] = []
        self.pieces: list[Piece] = []
        """of the last turn's answer"""
        self.result: Generation | None = None
        """of the last turn; None: it was interrupted"""
        self.answers, self.counts = 0, Counter[str]()
        """of the whole chat: answers, and their tokens by kind"""
        self.name = namer(decoder.text_side)
        self.interrupts = Interrupts()
        self.saved: set[Path] = set()
        """files that this chat has written"""
        self._explain = explain

    @property
    def config(self) -> DecodeConfig:
        """What the next answer is decoded with."""
        return self.alone if self.plain else self.aligned

    @property
    def alone(self) -> DecodeConfig:
        """Plain decoding of the prompt that the agents' template variables give."""
        return replace(self._alone, agents=self.aligned.agents)

    def conversation(self, question: str, turns: list[Turn]) -> list[dict[str, str]]:
        """The messages up to a question that follows on these turns."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            messages += [turn.asked[-1], {"role": "assistant", "content": turn.answer}]
        return [*messages, {"role": "user", "content": question}]

    def ask(self, question: str) -> None:
        """Answer a message; the conversation goes on with what is written of the answer."""
        asked, config = self.conversation(question, self.turns), self.config
        pieces, result, failed = self._answer(asked, config)
        text = "".join(piece.text for piece in pieces)
        if failed:
            return
        if result is None and not text:
            say("(stopped; your message was discarded)")
            return
        self.pieces, self.result = pieces, result
        reason = INTERRUPTED if result is None else result.finish_reason
        self.turns.append(Turn(asked, text, reason, self.decoder.resolve(config)))
        if result is None:
            say("(stopped; the conversation goes on with what is written)")
        elif self._explain and config.align:
            say(*explanation(pieces, self.name, config.threshold, columns(), has_colour(sys.stderr)))

    def compare(self) -> None:
        """Answer the last question once more, by the LLM alone; the conversation keeps the answer that it has."""
        say("plain:")
        _, result, failed = self._answer(self.turns[-1].asked, self.alone)
        if result is None and not failed:
            say("(stopped)")

    def _answer(self, asked: list[dict[str, str]], config: DecodeConfig) -> tuple[list[Piece], Generation | None, bool]:
        """Print an answer: its pieces, the result if it was not interrupted, and whether there was an error."""
        pieces: list[Piece] = []
        result = None
        try:
            with self.interrupts.awaited():
                stream = self.stream(asked, config, template=self.variables)
                result = answered(stream, self._show(config), pieces)
        except MaraError as error:
            say(f"error: {error}")
            return pieces, None, True
        except KeyboardInterrupt:
            result = pieces[-1].result if pieces else None  # it came after the last token
        self.answers += 1
        self.counts.update(kind(piece.step) for piece in pieces)
        if result is not None:
            print(flush=True)
            say(counters(result))
        return pieces, result, False

    def _show(self, config: DecodeConfig) -> Any:
        if not sys.stdout.isatty():
            return lambda piece: piece.text
        if self._explain and config.align:
            return Marker(self.name, has_colour(sys.stdout))
        return lambda piece: printable(piece.text)
