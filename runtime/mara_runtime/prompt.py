"""What a caller gives as a prompt, and the token ids that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.chat import Message
from mara_runtime.errors import OptionError, PromptError
from mara_runtime.text import TextSide

Prompt = str | Sequence[Message] | Sequence[int] | NDArray[np.integer[Any]]


def encode(
    bundle: Bundle,
    side: TextSide | None,
    prompt: Prompt,
    *,
    raw: bool,
    template: Mapping[str, Any] | None,
    variables: Callable[[], Mapping[str, Any]],
    continue_final_message: bool,
) -> list[int]:
    """Token ids of a prompt; see `AlignedDecoder.encode`.

    side: None where the bundle has no tokenizer. variables: all that the chat template is given, with `template`.
    """
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptError(
            f"the prompt is of type {type(prompt).__name__}; it must be a text, a list of messages, or a list or "
            "NumPy array of token ids"
        )
    is_ids = not isinstance(prompt, str) and all(isinstance(item, Integral) for item in prompt)
    if continue_final_message and (is_ids or isinstance(prompt, str)):
        raise PromptError("continue_final_message needs a conversation, whose last message the answer continues")
    if is_ids:
        if template:
            raise OptionError("variables of the chat template are given, which token ids leave out")
        ids = [int(item) for item in prompt]  # type: ignore[arg-type]
    else:
        side = side or TextSide(bundle)  # the second raises, saying what to do
        if raw or not side.has_template:
            where = "raw text leaves out" if raw else f"{bundle.folder} does not have"
            if template:
                raise OptionError(f"variables of the chat template are given, which {where}")
            if not isinstance(prompt, str):
                raise PromptError(f"a conversation needs the chat template, which {where}")
            ids = side.encode_raw(prompt)
        else:
            messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            ids = side.encode_chat(messages, variables(), continue_final_message)
    _check(bundle, ids)
    return ids


def _check(bundle: Bundle, ids: Sequence[int]) -> None:
    """Raise PromptError for what the bundle cannot decode."""
    manifest = bundle.manifest
    if not ids:
        raise PromptError("the prompt is empty: give at least one token")
    for index, token in enumerate(ids):
        if not 0 <= token < manifest.model.shape.vocab_size:
            raise PromptError(
                f"token id {token} at index {index} of the prompt is outside the vocabulary, "
                f"0 to {manifest.model.shape.vocab_size - 1}"
            )
    if len(ids) >= manifest.max_context:
        raise PromptError(
            f"the prompt has {len(ids)} tokens; this bundle holds {manifest.max_context} for prompt and answer: "
            "shorten it, or export with a larger --max-context"
        )
