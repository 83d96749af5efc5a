"""How likely the LLM alone finds a text. Agents have no part in it.

The rows that the KV cache lacks run in few passes, which return the logits of the rows before the text's tokens: so
each log-probability is over the whole vocabulary. Texts that begin alike, asked for in turn, share the cached entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines.base import Pass, is_finite
from mara_runtime.errors import NumericsError, PromptError
from mara_runtime.tensors import PREFILL_ROWS

LOGITS_ROWS = 64
"""Rows of a pass that return logits: 39 MB with a vocabulary of 152,000."""


@dataclass(frozen=True)
class Likelihood:
    """What the LLM says of N tokens."""

    log_probabilities: NDArray[np.float32]
    """(N,) in nats"""
    best: NDArray[np.bool_]
    """(N,) whether the token is the most probable one: the one that plain greedy decoding would emit"""


def likelihood(decoder: AlignedDecoder, tokens: Sequence[int], start: int) -> Likelihood:
    """How likely `tokens[start:]` are after `tokens[:start]`, 1 ≤ start < len(tokens).

    Raises PromptError for more tokens than the bundle holds, NumericsError for logits that are not finite.
    """
    most = decoder.bundle.manifest.max_context
    if not 1 <= start < len(tokens) or len(tokens) > most + 1:
        raise PromptError(
            f"{len(tokens) - start} tokens after {start} cannot be scored: this takes one token before and one "
            f"to score at least, and {most + 1} together at most (--max-context at export)"
        )
    probabilities: list[NDArray[np.float32]] = []
    best: list[NDArray[np.bool_]] = []
    places = decoder.engine.places
    with places.lock:
        places.owner = object()  # whose answers are in the making cannot go on
        cache = places[0]
        cache.reuse(tokens[:start])
        while (first := len(cache.tokens)) < len(tokens) - 1:
            unscored = max(0, start - 1 - first)
            chunk = tokens[first : min(first + PREFILL_ROWS, first + unscored + LOGITS_ROWS, len(tokens) - 1)]
            rows = range(min(unscored, len(chunk)), len(chunk))
            out = decoder.engine.run(Pass(chunk, range(first, first + len(chunk)), first, rows, logits=bool(rows)))
            if not is_finite(out):
                cache.clear()
                raise NumericsError(
                    f"logits behind position {first} are not finite: export the model again, with a higher precision "
                    "if it is quantised"
                )
            cache.extend(chunk)
            if out.logits is not None:
                targets = np.array(tokens[first + rows.start + 1 : first + rows.stop + 1])
                probabilities.append(out.logits[np.arange(len(rows)), targets] - out.log_normaliser)
                best.append(out.logits.argmax(axis=1) == targets)
    return Likelihood(np.concatenate(probabilities), np.concatenate(best))
