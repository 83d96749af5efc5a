"""Low precision: the fast path against one candidate a pass and nothing drafted, on the same bundle."""

from __future__ import annotations

import numpy as np
import pytest

from mara_deploy.demo.prompts import prompts
from mara_runtime import AlignedDecoder, DecodeConfig

SEQUENTIAL = DecodeConfig(max_new_tokens=64, schedule="one-by-one", draft=0)
WAYS = ({}, {"schedule": "together"}, {"schedule": "together", "draft": 16})


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_low_precision_follows_its_own_sequential_path(precision, bundle):
    """Answers part only at positions within the noise that the bundle records."""
    slow, fast = (AlignedDecoder(bundle("demo", "ort", precision), threads=1) for _ in range(2))
    noise = fast.bundle.manifest.mixed_noise({"demo": 1.0})
    positions = parted = 0
    for prompt in prompts(12, 11, True):
        steps = [piece.step for piece in slow.stream(prompt.text, SEQUENTIAL)]
        for way in WAYS:
            answer = fast.stream(prompt.text, DecodeConfig(max_new_tokens=64, **way))
            for expected, piece in zip(steps, answer, strict=False):
                step, positions = piece.step, positions + 1
                if (step.token, step.rank, step.forced) != (expected.token, expected.rank, expected.forced) or (
                    step.candidates.ids.tolist() != expected.candidates.ids.tolist()
                ):
                    nearest = min((abs(margin) for margin in expected.margins.values()), default=np.inf)
                    assert expected.candidates.gap < noise.logits or nearest < noise.margins, expected
                    parted += 1
                    break
    print(f"\n{precision}: {positions} positions, {parted} answers parted within the noise")
    assert positions > 1000
