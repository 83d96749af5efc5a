"""What is refused by name, because the trace would keep only half of what the configuration asks for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from mara_export.errors import ModelError
from mara_export.hf.families import FAMILIES, check_supported, model_shape
from mara_runtime.tensors import ModelShape

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}


def check(config: PretrainedConfig, max_context: int | None = None) -> int:
    return check_supported(config, "my/model", max_context)


def refusal(config: PretrainedConfig, max_context: int | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        check(config, max_context)
    assert "my/model" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_supported_families_pass(kind: Any) -> None:
    assert kind.model_type in FAMILIES
    assert check(kind(**SIZES)) == 512
    assert check(kind(**SIZES), 100) == 100
    assert check(kind(**SIZES), 512) == 512


def test_the_default_capacity_is_4096_or_the_models_own() -> None:
    assert check(LlamaConfig(**{**SIZES, "max_position_embeddings": 131_072})) == 4096
    assert check(LlamaConfig(**{**SIZES, "max_position_embeddings": 131_072}), 100_000) == 100_000
    assert check(LlamaConfig(**{**SIZES, "max_position_embeddings": 4095})) == 4095


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Gemma2Config(), "gemma2"),
        (Phi3Config(), "phi3"),
        (GPT2Config(), "gpt2"),
        (Qwen2MoeConfig(), "qwen2_moe"),
        (PretrainedConfig(), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_architectures_are_named_with_those_that_are_supported(config, kind) -> None:
    message = refusal(config)
    assert f"architecture {kind!r}" in message
    assert "qwen2, qwen3, llama, mistral" in message


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping"])
def test_soft_caps(cap: str) -> None:
    assert f"({cap} = 30.0)" in refusal(LlamaConfig(**SIZES, **{cap: 30.0}))
    assert check(LlamaConfig(**SIZES, **{cap: None})) == 512


def test_a_window_below_the_capacity_is_refused_with_the_number_to_use() -> None:
    config = MistralConfig(**SIZES, sliding_window=128)
    for asked, capacity in ((None, 512), (129, 129)):
        message = refusal(config, asked)
        assert "sliding window of 128 tokens" in message
        assert f"context of {capacity}" in message
        assert "--max-context 128 or less" in message
    assert check(config, 128) == 128
    assert check(MistralConfig(**SIZES, sliding_window=512)) == 512
    assert check(MistralConfig(**SIZES, sliding_window=None)) == 512


def test_a_window_that_is_switched_off_does_not_count() -> None:
    assert check(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=128)) == 512
    assert check(Qwen3Config(**SIZES, use_sliding_window=False, sliding_window=128)) == 512


@pytest.mark.parametrize("switch", [{"use_sliding_window": False}, {"layer_types": ["full_attention"] * 2}], ids=str)
def test_mistral_has_no_switch(switch: dict[str, Any]) -> None:
    """Its attention looks at the number alone (transformers' modeling_mistral.py)."""
    assert "sliding window of 128 tokens" in refusal(MistralConfig(**SIZES, sliding_window=128, **switch))


def test_a_window_of_no_layer_does_not_count() -> None:
    on = {"use_sliding_window": True, "sliding_window": 128}
    assert check(Qwen2Config(**SIZES, **on, layer_types=["full_attention"] * 2)) == 512
    assert check(Qwen2Config(**SIZES, **on, max_window_layers=2)) == 512
    assert "128" in refusal(Qwen2Config(**SIZES, **on, layer_types=["full_attention", "sliding_attention"]))
    assert "128" in refusal(Qwen3Config(**SIZES, **on, max_window_layers=0))


def test_heads_that_turn_in_part_are_refused() -> None:
    for factor, said in ((0.5, "partial_rotary_factor = 0.5"), (1.0, None)):
        config = LlamaConfig(**SIZES, partial_rotary_factor=factor)
        if said is None:
            assert check(config) == 512
        else:
            assert said in refusal(config)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope"])
def test_rope_that_depends_on_the_length_is_refused(key: str, kind: str) -> None:
    config = LlamaConfig(**SIZES)
    config.rope_scaling = {key: kind, "factor": 2.0}
    message = refusal(config)
    assert f"rope scaling {kind!r}" in message
    assert "default, linear, llama3, yarn" in message


@pytest.mark.parametrize("scaling", [None, {"rope_type": "default"}, {"type": "linear", "factor": 2.0}])
def test_fixed_rope_passes(scaling: dict[str, Any] | None) -> None:
    config = LlamaConfig(**SIZES)
    config.rope_scaling = scaling
    assert check(config) == 512


def test_a_quantised_checkpoint_is_refused() -> None:
    config = LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantised" in refusal(config)


def test_a_context_beyond_the_models_own() -> None:
    message = refusal(LlamaConfig(**SIZES), 513)
    assert "--max-context is 513" in message
    assert "at most 512" in message


def test_the_sizes_come_from_the_configuration() -> None:
    assert model_shape(LlamaConfig(**SIZES)) == ModelShape(64, 300, 2, 4, 2, 16)
    assert model_shape(Qwen3Config(**SIZES, head_dim=24)).head_dim == 24
    assert model_shape(LlamaConfig(**{**SIZES, "num_key_value_heads": None})).num_kv_heads == 4
    bare = Qwen2Config(**SIZES)
    assert getattr(bare, "head_dim", None) is None  # else the next line shows nothing
    assert model_shape(bare).head_dim == 16
