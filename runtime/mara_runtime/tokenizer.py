"""A bundle's tokenizer.json: read with limits, and used with errors of one line.

The file comes with a model. The tokenizers library trusts it: a component may multiply its text without end, and a
damaged one ends the process or raises what is not even an `Exception`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mara_runtime.errors import BundleError, MaraError, first_line
from mara_runtime.files import read_file

MOST_BYTES = 1 << 28
"""Of the file; the largest known has 33 MB."""
MOST_ADDED_TOKENS = 20_000
"""Reading them takes quadratic time; the largest known number is 6,415."""
MOST_GROWTH = 64
"""How many times longer the components may make a text."""
_ESCAPED_LETTER = re.compile(rb"\\u00(?:5f|[46][1-9a-f]|[57][0-9a])", re.IGNORECASE)
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"')


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, without padding and truncation.

    Raises BundleError for a file that is not a tokenizer, or one that could take any time or memory.
    """
    try:
        content = read_file(path, MOST_BYTES)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    reason = _unsafe_content(content)
    if reason is None:
        with one_line(BundleError, f"{path} is not a tokenizer file"):
            tokenizer = Tokenizer.from_buffer(content)
        reason = _unsafe_components(tokenizer)
    if reason is not None:
        raise BundleError(f"{path} is not accepted: {reason}; export the bundle again, with the model's own tokenizer")
    # a tokenizer.json may contain settings of its last training batch, which do not apply to prompts
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextmanager
def one_line(kind: type[MaraError], what: str) -> Iterator[None]:
    """Turn whatever the library raises into an error of one line: a plain `Exception`, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {first_line(error)}") from None
        raise


def _unsafe_content(content: bytes) -> str | None:
    """Why a file must not even be read by the library; None if it may."""
    if content.count(b'"single_word"') > MOST_ADDED_TOKENS:
        return f"it has more than {MOST_ADDED_TOKENS:,} added tokens"
    if _ESCAPED_LETTER.search(content):  # names below could hide behind it; no writer of these files does that
        return "it spells letters as \\u escapes"
    for found in _CHARSMAP.finditer(content):
        try:
            table = base64.b64decode(found[1], validate=True)
        except ValueError:
            return "its precompiled_charsmap is not base64"
        if len(table) < 4 or int.from_bytes(table[:4], "little") > len(table) - 4:
            return "its precompiled_charsmap is damaged"
    return None


def _unsafe_components(tokenizer: Tokenizer) -> str | None:
    """Why a tokenizer must not be used; None if it may."""
    if getattr(tokenizer.model, "dropout", None):
        return "it drops merges at random (dropout), so that a prompt has other tokens each time"
    growth = 1.0
    for component in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.post_processor, tokenizer.decoder):
        if component is None:
            continue
        for part in _parts(json.loads(component.__getstate__())):
            if part.get("type") == "Replace":
                growth *= max(1.0, len(part["content"]) / len(part["pattern"].get("String") or "x"))
            growth += len(part.get("prepend", ""))
            if "single" in part:
                growth *= max(1, sum("Sequence" in piece for piece in part["single"])) + len(part["single"]) / 8
    return f"it makes a text {growth:,.0f} times longer" if growth > MOST_GROWTH else None


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The components within a component, itself first."""
    if isinstance(component, dict):
        yield component
        for value in component.values():
            yield from _parts(value)
    elif isinstance(component, list):
        for value in component:
            yield from _parts(value)
