"""Packed passes compute what Hugging Face eager computes, one sequence at a time."""

from __future__ import annotations

import pytest
import torch

from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_export.hf.checkpoint import load_model
from mara_export.hf.sources import resolve_model
from tests import checkpoints

TOLERANCE = 2e-5
"""For states of magnitude 1 to 10 in float32; measured 5e-6."""


@pytest.fixture(params=checkpoints.ARCHITECTURES)
def pair(request, checkpoint, reference):
    """(PackedLM, the same model in Hugging Face eager)."""
    folder = checkpoint(request.param)
    return PackedLM(load_model(resolve_model(str(folder)), ATTENTION)), reference(request.param)


@torch.no_grad()
def state(reference, tokens):
    return reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, -1]


@torch.no_grad()
def test_prefill_head_candidates_and_the_next_position(pair) -> None:
    lm, reference = pair
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(reference.config.vocab_size, (n,), generator=generator).tolist() for n in (5, 9, 1)]
    cache, states = lm.prefill(texts, room=2)
    for text, actual, logits in zip(texts, states, lm.head(states), strict=True):
        expected = reference(torch.tensor([text]), output_hidden_states=True)
        assert torch.allclose(actual, expected.hidden_states[-1][0, -1], atol=TOLERANCE)
        assert torch.allclose(logits, expected.logits[0, -1], atol=5 * TOLERANCE)

    # siblings: each sees its prompt and itself, not the others
    tokens, owner = [11, 12, 13, 14, 15, 16], [0, 0, 0, 1, 2, 2]
    states, siblings = lm.candidates(cache, torch.tensor(tokens), torch.tensor([3, 1, 2]))
    for token, sequence, actual in zip(tokens, owner, states, strict=True):
        assert torch.allclose(actual, state(reference, [*texts[sequence], token]), atol=TOLERANCE)

    # commit the second candidate of the first, the only one of the second, the first of the third; drop the second:
    # rejected candidates leave no trace
    lm.commit(siblings, torch.tensor([1, 3, 4]))
    cache.keep(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [6, 2]
    texts = [[*texts[0], 12], [*texts[2], 15]]
    states, _ = lm.candidates(cache, torch.tensor([17, 18, 19]), torch.tensor([1, 2]))
    for token, sequence, actual in zip([17, 18, 19], [0, 1, 1], states, strict=True):
        assert torch.allclose(actual, state(reference, [*texts[sequence], token]), atol=TOLERANCE)
