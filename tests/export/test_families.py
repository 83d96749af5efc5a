"""Every tested family in every lowering: token for token the sequential algorithm on Hugging Face eager."""

from __future__ import annotations

from itertools import product

import pytest

from mara_export.targets import LOWERINGS
from mara_runtime import DecodeConfig
from tests import families
from tests.export.following import follow_all

QUICK = {
    ("gemma2", "ort"), ("gemma3_text", "portable"), ("cohere2", "decomposed"), ("ministral3", "ort"),
    ("gemma4_text", "portable"), ("qwen3_moe", "ort"),
}  # fmt: skip
"""Windows, soft caps, two rotary tables, neighbours that turn, layers without; a scale between turn and attention;
caches of two sizes, which layers share; experts."""


@pytest.mark.parametrize(
    ("family", "lowering"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.long)
        for pair in product(families.NAMES, LOWERINGS)
    ],
)
def test_48_tokens_of_eight_prompts_are_the_oracle_s(family, lowering, answers, decoder, tally):
    """Texts that are longer than the windows, of 16 tokens. The bundle has passed its gate."""
    options = {"max_new_tokens": 48, "fallback": "first"}
    follow_all(
        decoder(family, lowering), DecodeConfig(**options), answers(family, 8, **options), tally(family, lowering)
    )
