"""How likely a text is, against Hugging Face's own logits; and where that cannot be asked."""

from __future__ import annotations

import pytest
import torch

from mara_runtime import AlignedDecoder, DecodeConfig, likelihood
from mara_runtime.errors import NumericsError, PromptError
from tests import checkpoints


@pytest.mark.parametrize(("name", "lowering"), [("llama", "ort"), ("qwen3", "portable")])
def test_the_whole_vocabulary_s_probabilities(name, lowering, reference, decoder, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_ROWS", 5)
    monkeypatch.setattr(likelihood, "PREFILL_ROWS", 8)
    product: AlignedDecoder = decoder(name, lowering)
    model = reference(name)
    (text,) = checkpoints.random_prompts(1, length=40)
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0]
    best = logits.argmax(dim=-1).tolist()
    text[20] = best[19]  # a text has one of the best tokens, too
    with torch.no_grad():
        logs = model(torch.tensor([text])).logits[0].log_softmax(dim=-1)
    for tokens, start in ((text, 1), (text, 33), (text[:38], 20), (text, 39), (text[:2], 1)):
        found = likelihood.likelihood(product, tokens, start)
        rows, targets = torch.arange(start - 1, len(tokens) - 1), torch.tensor(tokens[start:])
        assert found.log_probabilities == pytest.approx(logs[rows, targets].numpy(), abs=1e-4)
        assert found.best.tolist() == (logs[rows].argmax(dim=-1) == targets).tolist()
    assert likelihood.likelihood(product, text, 1).best.any()


def test_texts_that_begin_alike_share_the_cache_and_answers_stay(decoder, monkeypatch):
    product: AlignedDecoder = decoder("llama", "ort")
    (text,) = checkpoints.random_prompts(1, length=40, seed=3)
    before = product.generate(text, DecodeConfig(max_new_tokens=8)).token_ids
    rows, run = [], product.engine.run
    monkeypatch.setattr(product.engine, "run", lambda work, place=0: rows.append(len(work.tokens)) or run(work, place))
    for end in (1, 2, 3):
        likelihood.likelihood(product, [*text[:30], end], 30)
    assert rows[1:] == [1, 1]
    assert product.generate(text, DecodeConfig(max_new_tokens=8)).token_ids == before


def test_what_cannot_be_scored(decoder, monkeypatch):
    product: AlignedDecoder = decoder("llama", "ort")
    most = product.bundle.manifest.max_context
    for tokens, start in (([1, 2], 0), ([1, 2], 2), ([1] * (most + 2), 1)):
        with pytest.raises(PromptError, match="cannot be scored"):
            likelihood.likelihood(product, tokens, start)
    assert len(likelihood.likelihood(product, [1] * (most + 1), 1).best) == most
    run = product.engine.run

    def broken(work, place=0):
        out = run(work, place)
        out.log_normaliser[-1] = float("nan")
        return out

    monkeypatch.setattr(product.engine, "run", broken)
    product.engine.cache.reuse([0])  # nothing is held of this text
    with pytest.raises(NumericsError, match="position 0 "):
        likelihood.likelihood(product, [1, 2, 3], 2)
    assert product.engine.cache.tokens == []
