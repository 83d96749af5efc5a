"""Between text and token ids: prompts in, streamed text and stop texts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from mara_runtime.bundle import Bundle
from mara_runtime.chat import ChatTemplate, Message
from mara_runtime.errors import BundleError, PromptError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""


class TextSide:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        facts = bundle.manifest.tokenizer
        self._bundle = bundle
        if facts is None:
            raise BundleError(f"{bundle.folder} holds no tokenizer: give the prompt as --input-ids")
        try:
            self.tokenizer = Tokenizer.from_file(str(bundle.path(facts.file)))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{bundle.path(facts.file)} is not a tokenizer file: {error}") from None
        # A tokenizer.json may carry the settings of its last training batch; a prompt wants neither.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.has_template = facts.chat_template is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, read when it is first wanted: a damaged one does not matter to raw prompts."""
        facts = self._bundle.manifest.tokenizer
        if facts is None or facts.chat_template is None:
            raise PromptError("this bundle has no chat template: use --raw")
        path = self._bundle.path(facts.chat_template)
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), facts.special_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path} cannot be read: {error}; use --raw") from None

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer itself adds."""
        if not text:
            raise PromptError("the prompt is empty: give at least one character")
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. The template alone adds special tokens.

        variables: what the template asks for besides the messages, `enable_thinking` say.
        """
        template = self.template
        if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
            raise PromptError(
                'a conversation is a list of messages, each {"role": ..., "content": ...}; token ids are a flat list'
            )
        if not messages or not str(messages[-1].get("content") or "").strip():
            raise PromptError("the prompt is empty, or blank: give some text")
        return self._encode(template.render(messages, variables), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = ascii(text[error.start])
            raise PromptError(f"the prompt is not Unicode text: it holds {found}, which is no character") from None
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class TextStream:
    """Token ids to text, piece by piece, ending at the first stop text.

    Bytes of an unfinished character and any tail that may yet become a stop text are held back, so the pieces
    together are the text of the answer, which is what the tokenizer makes of all ids at once. (The exception: some
    tokenizers that spell characters as byte tokens take back a whole character when a stray byte follows it; what has
    been handed out stays.)
    """

    def __init__(self, side: TextSide, stop: Sequence[str] = ()) -> None:
        self._side = side
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        # Text is decoded from ids[_start:]; that of ids[_start:_settled] is known. Starting a little before what is new
        # gives decoders that look back, at a leading space say, what they look at.
        self._start = self._settled = 0
        self._decoded = ""
        self._sent = 0  # characters of it handed out
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain after one more token; `stopped` is set when a stop text has come."""
        self._token_ids.append(token_id)
        self._decode(unfinished=False)
        return self._release(held=max((_overlap(self._decoded, s) for s in self._stop), default=0))

    def finish(self) -> str:
        """Whatever was held back, once no token will follow."""
        self._decode(unfinished=True)
        return self._release(held=0)

    def _decode(self, unfinished: bool) -> None:
        known = self._side.decode(self._token_ids[self._start : self._settled])
        text = self._side.decode(self._token_ids[self._start :])
        if len(text) > len(known) and (unfinished or not text.endswith(_REPLACEMENT)):
            self._decoded += text[len(known) :]
            self._start, self._settled = self._settled, len(self._token_ids)

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return self._decoded[: self._sent]

    def _release(self, held: int) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._decoded.find(s) for s in self._stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._decoded) - held
        piece = self._decoded[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
