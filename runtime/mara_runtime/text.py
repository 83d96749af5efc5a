"""Between text and token ids: prompts in, streamed text out, stop strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from mara_runtime.bundle import Bundle
from mara_runtime.chat import ChatTemplate, Message
from mara_runtime.errors import BundleError, PromptError
from mara_runtime.files import read_file
from mara_runtime.tokenizer import one_line, open_tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Decoded from bytes that are not a character, or not yet."""
_MOST_TEMPLATE_BYTES = 1 << 22
_MOST_LETTERS = 256
"""Of a token: more text than this allows is not even tokenised, which takes memory and cannot be interrupted."""


class TextSide:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        facts = bundle.manifest.tokenizer
        if facts is None:
            raise BundleError(f"{bundle.folder} has no tokenizer: give the prompt as --input-ids")
        self._max_context = bundle.manifest.max_context
        self._most = _MOST_LETTERS * self._max_context
        self.tokenizer = open_tokenizer(bundle.path(facts.file))
        self._special_tokens, self._message_rules = facts.special_tokens, facts.message_rules
        self._template: str | BundleError | None = None
        if facts.chat_template is not None:
            path = bundle.path(facts.chat_template)
            try:
                self._template = read_file(path, _MOST_TEMPLATE_BYTES).decode()
            except (OSError, UnicodeDecodeError) as error:
                self._template = BundleError(f"{path} cannot be read: {error}; use --raw")

    @property
    def has_template(self) -> bool:
        """Whether the bundle has a chat template."""
        return self._template is not None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; one that cannot be read or is not valid does not affect raw prompts."""
        if self._template is None:
            raise PromptError("this bundle has no chat template: use --raw")
        if isinstance(self._template, BundleError):
            raise self._template
        return ChatTemplate(self._template, self._special_tokens, self._message_rules)

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Tokens that are not part of the decoded text, by id."""
        added = self.tokenizer.get_added_tokens_decoder()
        return {token_id: token.content for token_id, token in added.items() if token.special}

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer adds. Raises PromptError."""
        if not text:
            raise PromptError("the prompt is empty: give at least one character")
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's answer. Only the template adds special tokens.

        variables: of the template, such as `enable_thinking`; continue_final_message: the last message is the beginning
        of the answer. Raises PromptError.
        """
        template = self.template
        if not all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages):
            raise PromptError(
                'a conversation is a list of messages, each {"role": ..., "content": ...}; token ids are a flat list'
            )
        if not messages or not str(messages[-1].get("content") or "").strip():
            raise PromptError("the prompt is empty or blank: give some text")
        text = template.render(messages, variables, continue_final_message=continue_final_message)
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ascii(text[error.start])
            raise PromptError(
                f"the prompt is not valid Unicode: it contains {code}, which is not a character"
            ) from None
        if len(text) > self._most:
            raise PromptError(
                f"the prompt has {len(text):,} characters, which this bundle's {self._max_context} tokens cannot hold: "
                "shorten it, or export with a larger --max-context"
            )
        with one_line(PromptError, "the bundle's tokenizer cannot encode this prompt"):
            return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        with one_line(BundleError, "the bundle's tokenizer cannot decode this answer"):
            return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TextStream:
    """Token ids to text, incrementally, ending at the first stop string.

    Bytes of an incomplete character and any tail that may become a stop string are withheld: the pieces together are
    what the tokenizer decodes from all ids at once. (Exception: some tokenizers with byte tokens retract a complete
    character when a stray byte follows it; text already returned stays.) Stop strings may contain special tokens, which
    the text itself does not.
    """

    def __init__(self, side: TextSide, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        """context: tokens before, where the text continues theirs."""
        self._side = side
        self._stop = tuple(stop)
        self._token_ids = list(context)
        # ids[_start:] are decoded; the text of ids[_start:_known] is known. Starting before the new ids gives decoders
        # the context that they need, for a leading space for example.
        self._start, self._known = 0, len(self._token_ids)
        self._decoded = ""
        self._sent = 0  # characters of it returned
        self.stopped = False
        named = {i: token for i, token in side.special_tokens.items() if any(token in text for text in stop)}
        self._named, self._hidden = named, dict[int, int]()
        """special tokens of stop strings; where the searched text contains one, and how long it is"""
        self._searched = ""

    def push(self, token_id: int) -> str:
        """Text that is final after one more token; sets `stopped` at a stop string."""
        self._token_ids.append(token_id)
        self._decode(unfinished=False)
        if token_id in self._named:
            self._hidden[len(self._searched)] = len(self._named[token_id])
            self._searched += self._named[token_id]
        return self._release(withheld=max((_overlap(self._searched, s) for s in self._stop), default=0))

    def finish(self) -> str:
        """Text withheld so far; call it after the last token."""
        self._decode(unfinished=True)
        return self._release(withheld=0)

    def _decode(self, unfinished: bool) -> None:
        known = self._side.decode(self._token_ids[self._start : self._known])
        text = self._side.decode(self._token_ids[self._start :])
        if len(text) > len(known) and (unfinished or not text.endswith(_REPLACEMENT)):
            self._decoded += text[len(known) :]
            self._searched += text[len(known) :]
            self._start, self._known = self._known, len(self._token_ids)

    @property
    def text(self) -> str:
        """Text returned so far."""
        return self._decoded[: self._sent]

    def _release(self, withheld: int) -> str:
        if self.stopped:
            return ""
        stops = [at for at in (self._searched.find(s) for s in self._stop) if at >= 0]
        self.stopped = bool(stops)
        end = min(stops) if stops else len(self._searched) - withheld
        end -= sum(min(length, end - at) for at, length in self._hidden.items() if at < end)
        piece = self._decoded[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
