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


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (5, 9, 1)]


def test_prefill_candidates_and_the_next_position(pair) -> None:
    lm, reference = pair
    texts = prompts(reference.config.vocab_size)
    cache, states = lm.prefill(texts, room=2)
    for text, actual in zip(texts, states, strict=True):
        assert torch.allclose(actual, state(reference, text), atol=TOLERANCE)

    # siblings: each sees its prompt and itself, not the others
    tokens, owner = [11, 12, 13, 14, 15, 16], [0, 0, 0, 1, 2, 2]
    states, siblings = lm.candidates(cache, torch.tensor(tokens), torch.tensor([3, 1, 2]))
    for token, sequence, actual in zip(tokens, owner, states, strict=True):
        assert torch.allclose(actual, state(reference, [*texts[sequence], token]), atol=TOLERANCE)

    # commit the second candidate of the first, the only one of the second, the first of the third; drop the second
    lm.commit(siblings, torch.tensor([1, 3, 4]))
    cache.keep(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [6, 2]
    texts = [[*texts[0], 12], [*texts[2], 15]]
    states, _ = lm.candidates(cache, torch.tensor([17, 18, 19]), torch.tensor([1, 2]))
    for token, sequence, actual in zip([17, 18, 19], [0, 1, 1], states, strict=True):
        assert torch.allclose(actual, state(reference, [*texts[sequence], token]), atol=TOLERANCE)


def test_the_head_gives_the_models_logits(pair) -> None:
    lm, reference = pair
    texts = prompts(reference.config.vocab_size)
    logits = lm.head(lm.prefill(texts, room=1)[1])
    with torch.no_grad():
        expected = torch.stack([reference(torch.tensor([text])).logits[0, -1] for text in texts])
    assert torch.allclose(logits, expected, atol=5 * TOLERANCE)


def test_a_rejected_candidate_leaves_no_trace(pair) -> None:
    """The trap of a shared cache: states do not depend on which siblings were examined."""
    lm, reference = pair
    text = prompts(reference.config.vocab_size)[:1]
    outcomes = []
    for tokens in ([11], [11, 12, 13], [13, 12, 11]):
        cache, _ = lm.prefill(text, room=2)
        _, siblings = lm.candidates(cache, torch.tensor(tokens), torch.tensor([len(tokens)]))
        lm.commit(siblings, torch.tensor([tokens.index(11)]))
        outcomes.append(lm.candidates(cache, torch.tensor([20]), torch.tensor([1]))[0])
    for other in outcomes[1:]:
        assert torch.allclose(outcomes[0], other, atol=TOLERANCE)
