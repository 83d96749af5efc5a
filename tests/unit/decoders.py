"""Decoders over tables that answer with a given text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.tensors import spare_slots
from tests.unit import helpers, tiny_tokenizers
from tests.unit.tiny_tokenizers import ASSISTANT, EOS

TOKENIZER = tiny_tokenizers.byte_level_tokenizer()
VOCAB = TOKENIZER.get_vocab_size()
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}
GREEDY = DecodeConfig(align=False)
PAIRS = DecodeConfig(top_k=2, max_new_tokens=4)


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def make_decoder(
    folder: Path, lookup: helpers.Lookup, judges: Mapping[str, helpers.Judge] | None = None, **options: Any
) -> tuple[AlignedDecoder, helpers.CountingEngine]:
    """A decoder of a bundle with tokenizer and template, unless the options say otherwise.

    judges: its agents by name; default one.
    """
    defaults = {
        "tokenizer": TOKENIZER,
        "chat_template": tiny_tokenizers.CHAT_TEMPLATE,
        "special_tokens": SPECIAL,
        "vocab_size": VOCAB,
        "eos_token_ids": [EOS],
        "max_context": 48,
        "max_candidates": 40,
    }
    options = {**defaults, **options}
    candidates = options["max_candidates"]
    slots = options["max_context"] + spare_slots(candidates)
    engine = helpers.CountingEngine(lookup, judges, slots=slots, max_candidates=candidates)
    if judges is not None:
        options["agents"] = {name: helpers.agent_file([1.0, 1.0]) for name in judges}
    return AlignedDecoder(helpers.make_bundle(folder, **options), engine=engine, cost=helpers.COST), engine


def saying(text: str, then: int = EOS) -> helpers.Lookup:
    """A language model that answers <assistant>, or else the whole prompt 'q', with a text, and then with one token."""
    answer = [*ids_of(text), then]

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        start = prefix.index(ASSISTANT) + 1 if ASSISTANT in prefix else 1
        row = np.full(VOCAB, -100.0, np.float32)
        at = len(prefix) - start
        row[answer[at] if 0 <= at < len(answer) else ids_of("x")[0]] = 100.0
        return row, np.zeros(2, np.float32)

    return lookup


def reciting(text: str = "abc", margin: float = 1.0) -> helpers.Lookup:
    """A language model that repeats a text for ever, '!' in second place, and the agent's margin of every token."""
    ids = ids_of(text)

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row = np.full(VOCAB, -100.0, np.float32)
        row[ids[len(prefix) % len(ids)]], row[ids_of("!")[0]] = 1.0, 0.5
        return row, np.array([margin, 0.0], np.float32)

    return lookup


REJECTING = reciting("#", -1.0)
"""'#' before '!' at every position; the agent rejects both."""
