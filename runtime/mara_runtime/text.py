"""Between text and token ids: prompts in, streamed text and stop texts out."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from mara_runtime.bundle import Bundle
from mara_runtime.chat import ChatTemplate, Message
from mara_runtime.errors import BundleError, PromptError


class TextSide:
    """Tokenizer and chat template of a bundle."""

    def __init__(self, bundle: Bundle) -> None:
        facts = bundle.manifest.tokenizer
        if facts is None:
            raise BundleError(f"{bundle.folder} holds no tokenizer: give the prompt as --input-ids")
        try:
            self.tokenizer = Tokenizer.from_file(str(bundle.path(facts.file)))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{bundle.path(facts.file)} is not a tokenizer file: {error}") from None
        # A tokenizer.json may carry the settings of its last training batch; a prompt wants neither.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.template: ChatTemplate | None = None
        if facts.chat_template is not None:
            source = bundle.path(facts.chat_template).read_text(encoding="utf-8")
            self.template = ChatTemplate(source, facts.special_tokens)

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the tokenizer itself adds."""
        if not text:
            raise PromptError("the prompt is empty: give at least one character")
        return list(self.tokenizer.encode(text).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. The template alone adds special tokens."""
        if self.template is None:
            raise PromptError("this bundle has no chat template: use --raw")
        if not messages or not str(messages[-1].get("content") or "").strip():
            raise PromptError("the prompt is empty: give at least one character")
        return list(self.tokenizer.encode(self.template.render(messages), add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class TextStream:
    """Token ids to text, piece by piece, ending at the first stop text.

    Bytes of an unfinished character and any tail that may yet become a stop text are held back, so the pieces
    together are exactly the text of the answer.
    """

    def __init__(self, side: TextSide, stop: Sequence[str] = ()) -> None:
        self._side = side
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._streamed = ""  # what the incremental decoder has given
        self._sent = 0  # characters of it handed out
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain after one more token; `stopped` is set when a stop text has come."""
        self._token_ids.append(token_id)
        self._streamed += self._decoder.step(self._side.tokenizer, token_id) or ""
        return self._release(held=max((_overlap(self._streamed, s) for s in self._stop), default=0))

    def finish(self) -> str:
        """Whatever was held back, once no token will follow."""
        if not self.stopped:
            whole = self._side.decode(self._token_ids)
            if whole.startswith(self._streamed):  # the bytes of a character that never came to its end
                self._streamed = whole
        return self._release(held=0)

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return self._streamed[: self._sent]

    def _release(self, held: int) -> str:
        if self.stopped:
            return ""
        found = [at for at in (self._streamed.find(s) for s in self._stop) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._streamed) - held
        piece = self._streamed[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)
