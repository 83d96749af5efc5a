"""`mara-run --prompts`: the answers to all prompts of a file, several decoded at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.shared import print_json
from mara_deploy.prompts import Asked, PromptSet, messages
from mara_deploy.scores.base import shorten
from mara_runtime.chat import Message
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import MaraError, OptionError, PromptError

if TYPE_CHECKING:
    from mara_runtime.answer import Generation
    from mara_runtime.decoder import AlignedDecoder

REFRESH_S = 0.1


@dataclass
class Tally:
    """How far all answers are: a line on stderr, kept up to date on a terminal."""

    answers: int
    """to be finished"""
    finished: int = 0
    failed: int = 0
    tokens: int = 0
    _live: bool = field(default_factory=lambda: sys.stderr.isatty())
    _started: float = field(default_factory=time.monotonic)
    _shown: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / max(time.monotonic() - self._started, 1e-3)
        failed = f", {self.failed} failed" * (self.failed > 0)
        return f"{self.finished} of {self.answers} answers{failed}; {self.tokens} tokens, {rate:.1f} tokens/s"

    def count(self, done: Generation | MaraError | None) -> None:
        """Count a token, which may complete an answer, or the error that ended one."""
        failed = isinstance(done, MaraError)
        self.tokens += not failed
        self.failed += failed
        self.finished += done is not None and not failed

    def show(self) -> None:
        """Bring the line up to date."""
        if self._live and (now := time.monotonic()) - self._shown > REFRESH_S:
            self._shown = now
            sys.stderr.write(f"\r\x1b[K{self}")
            sys.stderr.flush()

    def clear(self) -> None:
        """Make room for other output."""
        if self._live and self._shown:
            self._shown = 0.0
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def with_messages(prompts: PromptSet, system: str | None, prefill: str | None) -> list[Asked]:
    """The prompts, each between a system message and the beginning of the answer. Raises PromptError."""
    if system is None and prefill is None:
        return [prompt.asked for prompt in prompts.prompts]
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    after: list[Message] = [] if prefill is None else [{"role": "assistant", "content": prefill}]
    asked: list[Asked] = []
    for number, prompt in enumerate(prompts.prompts, 1):
        turns = messages(prompt.asked)
        if before and any(message["role"] == "system" for message in turns):
            raise PromptError(f"prompt {number} of {prompts.name} has a system message of its own: leave out --system")
        asked.append([*before, *turns, *after])
    return asked


def answer_all(
    decoder: AlignedDecoder,
    asked: Sequence[Asked],
    config: DecodeConfig,
    *,
    conversations: int,
    jsonl: bool,
    raw: bool,
    template: Mapping[str, Any],
    begun: bool,
) -> int:
    """Print each answer when it is finished; returns how many failed.

    begun: the last message of each prompt is the beginning of its answer. Raises OptionError for options that fit none.
    """
    tally = Tally(len(asked))
    pieces = decoder.generate_many(
        asked, config, places=conversations, raw=raw, template=template, continue_final_message=begun
    )
    try:
        for index, piece in pieces:
            if isinstance(piece, OptionError):
                raise piece  # it is not about this prompt
            done = piece if isinstance(piece, MaraError) else piece.result
            tally.count(done)
            if done is not None:
                tally.clear()
                _print(index, asked[index], done, len(asked), jsonl)
            tally.show()
    finally:
        tally.clear()
    if not jsonl:
        print(f"[{tally}]", file=sys.stderr)
    return tally.failed


def _print(index: int, prompt: Asked, done: Generation | MaraError, count: int, jsonl: bool) -> None:
    """Print an answer, or why there is none."""
    if jsonl:
        found = {"error": str(done)} if isinstance(done, MaraError) else done.to_json()
        print_json({"index": index, "prompt": prompt, **found})
    elif isinstance(done, MaraError):
        print(f"mara-run: prompt {index + 1}: {done}", file=sys.stderr)
    else:
        print(f"── {index + 1} of {count}: {_title(prompt)}\n{done.text}\n")
    sys.stdout.flush()


def _title(prompt: Asked) -> str:
    """The last message of the user in one line."""
    text = next((m["content"] for m in reversed(messages(prompt)) if m["role"] == "user"), "")
    return shorten(" ".join(text.split()))
