"""Packed passes compute what Hugging Face eager computes, one sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PretrainedConfig,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_export.errors import ModelError
from mara_export.hf.checkpoint import load_model
from mara_export.hf.sources import resolve_model
from tests import checkpoints
from tests.families import SIZES

TOLERANCE = 2e-5
"""For states of magnitude 1 to 10 in float32; measured 5e-6."""
LENGTHS = (3, 70, 1)
"""Tokens of the texts. A window of 4 tokens ends behind the first, and within the second; that takes two blocks of
capped scores."""
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
FAMILIES: list[tuple[type[PretrainedConfig], dict[str, Any]]] = [
    (MistralConfig, {"sliding_window": 4}),
    (Gemma2Config, {**MIXED, **CAPS, "head_dim": 12, "query_pre_attn_scalar": 20}),
    (Gemma3TextConfig, {**MIXED, "head_dim": 12, "query_pre_attn_scalar": 20}),  # a rotary table for each kind of layer
    (Cohere2Config, {**MIXED, "logit_scale": 0.3}),  # interleaved; no rotary embedding in full layers
    (GraniteConfig, {"logits_scaling": 3.0, "attention_multiplier": 0.1, "residual_multiplier": 0.7}),
    (GptOssConfig, {**MIXED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),  # sinks
]
OF_5: dict[str, dict[str, Any]] = {
    "Gemma4TextConfig": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "head_dim": 8,
        "global_head_dim": 12,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
    },
    "GraniteSWAConfig": {**MIXED, "layer_rope_theta": [1e4, 0]},
}
"""Of families that transformers 5 brought: shared caches of two sizes; sinks."""
FAMILIES += [(getattr(transformers, name), values) for name, values in OF_5.items() if hasattr(transformers, name)]
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
MORE_FAMILIES: list[tuple[type[PretrainedConfig], dict[str, Any]]] = [
    (Gemma2Config, {**CAPS, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2, "head_dim": 8}),
    (CohereConfig, {"logit_scale": 0.3}),
    (DeepseekV3Config, {**MLA, "num_key_value_heads": 4, "first_k_dense_replace": 2}),  # values smaller than keys
    (Exaone4Config, MIXED),
    (GemmaConfig, {"head_dim": 12}),
    (Glm4Config, {"head_dim": 8, "partial_rotary_factor": 0.5}),
    (HunYuanDenseV1Config, {"head_dim": 8}),
    (Olmo2Config, {}),
    (Olmo3Config, MIXED),
    (Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": 4}),
    (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    (SeedOssConfig, {"head_dim": 8}),
    (SmolLM3Config, {"no_rope_layers": [1, 0]}),
    (Starcoder2Config, {"sliding_window": 4}),
]


def model_of(config: type[PretrainedConfig], values: dict[str, Any], attention: str) -> Any:
    """A tiny model whose attention looks at few tokens; the same weights at each call."""
    made = config(**{**SIZES, **values})
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if name.endswith(("sinks", "bias")):
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
            elif weight.ndim > 1:
                weight.copy_(1.5 * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    return model


def both(config: type[PretrainedConfig], values: dict[str, Any]) -> tuple[PackedLM, Any]:
    return PackedLM(model_of(config, values, ATTENTION)), model_of(config, values, "eager")


@torch.no_grad()
def expect(states: torch.Tensor, logits: torch.Tensor, reference: Any, texts: list[list[int]]) -> None:
    """Of the last token of each text."""
    for text, state, row in zip(texts, states, logits, strict=True):
        expected = reference(torch.tensor([text]), output_hidden_states=True)
        assert torch.allclose(state, expected.hidden_states[-1][0, -1], atol=TOLERANCE)
        assert torch.allclose(row, expected.logits[0, -1], atol=5 * TOLERANCE)


def compare(lm: PackedLM, reference: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(reference.config.vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    cache, states = lm.prefill(texts, room=2)
    expect(states, lm.head(states), reference, texts)

    # siblings: each sees its prompt and itself, not the others
    tokens, owner = [11, 12, 13, 14, 15, 16], [0, 0, 0, 1, 2, 2]
    states, siblings = lm.candidates(cache, torch.tensor(tokens), torch.tensor([3, 1, 2]))
    expect(states, lm.head(states), reference, [[*texts[o], t] for t, o in zip(tokens, owner, strict=True)])

    # commit the second candidate of the first, the only one of the second, the first of the third; drop the second:
    # rejected candidates leave no trace
    lm.commit(siblings, torch.tensor([1, 3, 4]))
    cache.keep(torch.tensor([0, 2]))
    assert cache.lengths.tolist() == [LENGTHS[0] + 1, LENGTHS[2] + 1]
    texts = [[*texts[0], 12], [*texts[2], 15]]
    tokens, owner = [17, 18, 19], [0, 1, 1]
    states, _ = lm.candidates(cache, torch.tensor(tokens), torch.tensor([1, 2]))
    expect(states, lm.head(states), reference, [[*texts[o], t] for t, o in zip(tokens, owner, strict=True)])


@pytest.mark.parametrize("architecture", checkpoints.ARCHITECTURES)
def test_prefill_head_candidates_and_the_next_position(architecture, checkpoint, reference) -> None:
    model = load_model(resolve_model(str(checkpoint(architecture))), ATTENTION)
    compare(PackedLM(model), reference(architecture))


@pytest.mark.parametrize(
    ("config", "values"),
    [
        *(pytest.param(*family, id=family[0].model_type) for family in FAMILIES),
        *(pytest.param(*family, id=family[0].model_type, marks=pytest.mark.long) for family in MORE_FAMILIES),
    ],
)
def test_windows_caps_and_scales_of_other_families(config, values) -> None:
    compare(*both(config, values))


def test_other_attention_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="a window that changes from row to row"):
        PackedLM(model_of(Llama4TextConfig, {"head_dim": 8, "attention_chunk_size": 16}, ATTENTION))


def test_the_model_is_as_it_was_after_its_head_was_used() -> None:
    lm, _ = both(LlamaConfig, {})
    decoder = lm._model.get_decoder()
    before = decoder.forward
    lm.head(torch.zeros(1, 32))
    assert decoder.forward == before


def test_a_sequence_takes_what_its_sizes_say() -> None:
    lm, _ = both(LlamaConfig, {})
    tokens, candidates = 50, 10
    entry = 2 * 2 * 2 * 8  # keys and values, layers, heads, numbers
    numbers = tokens * entry + 4 * tokens * 4 * (8 + candidates) + candidates * (4 * 32 + 3 * 48 + entry)
    assert lm.sequence_bytes(tokens, candidates) == 4 * numbers + 8 * 96
    capped, _ = both(Gemma2Config, {**CAPS, "head_dim": 8})
    assert capped.sequence_bytes(tokens, candidates) > lm.sequence_bytes(tokens, candidates)
