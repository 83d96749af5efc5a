"""Which configurations are exported, and which are refused by name: the trace would keep half of what they ask for."""

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
WINDOW = {"use_sliding_window": True, "sliding_window": 128}
NO_WINDOW = {"use_sliding_window": False, "sliding_window": 128}
FULL, MIXED = ["full_attention"] * 2, ["full_attention", "sliding_attention"]


def config(kind: Any, rope: dict[str, Any] | None = None, **values: Any) -> PretrainedConfig:
    made: PretrainedConfig = kind(**{**SIZES, **values})
    if rope is not None:  # unchecked by transformers
        made.rope_scaling = rope
    return made


@pytest.mark.parametrize(
    ("model", "asked", "context"),
    [
        *(
            (config(kind), asked, asked or 512)
            for kind in (Qwen2Config, Qwen3Config, LlamaConfig)
            for asked in (None, 9)
        ),
        (config(LlamaConfig), 512, 512),
        # the default is 4096 or the model's own
        (config(LlamaConfig, max_position_embeddings=131_072), None, 4096),
        (config(LlamaConfig, max_position_embeddings=131_072), 100_000, 100_000),
        (config(LlamaConfig, max_position_embeddings=4095), None, 4095),
        # a window as large as the context, or of no layer
        (config(MistralConfig, sliding_window=128), 128, 128),
        (config(MistralConfig, sliding_window=512), None, 512),
        (config(MistralConfig, sliding_window=None), None, 512),
        (config(Qwen2Config, **NO_WINDOW), None, 512),
        (config(Qwen3Config, **NO_WINDOW), None, 512),
        (config(Qwen2Config, **WINDOW, layer_types=FULL), None, 512),
        (config(Qwen2Config, **WINDOW, max_window_layers=2), None, 512),
        # what is switched off
        (config(LlamaConfig, attn_logit_softcapping=None), None, 512),
        (config(LlamaConfig, partial_rotary_factor=1.0), None, 512),
        (config(LlamaConfig, {"rope_type": "default"}), None, 512),
        (config(LlamaConfig, {"type": "linear", "factor": 2.0}), None, 512),
    ],
)
def test_a_supported_configuration_has_its_context(model, asked, context) -> None:
    assert model.model_type in FAMILIES
    assert check_supported(model, "my/model", asked) == context


@pytest.mark.parametrize(
    ("model", "asked", "named"),
    [
        *(
            (kind(), None, (f"architecture {kind.model_type!r}", "qwen2, qwen3, llama, mistral"))
            for kind in (Gemma2Config, Phi3Config, GPT2Config, Qwen2MoeConfig, PretrainedConfig)
        ),
        *(
            (config(LlamaConfig, **{cap: 30.0}), None, (f"({cap} = 30.0)",))
            for cap in ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping")
        ),
        *(
            (config(MistralConfig, sliding_window=128), asked, ("128 tokens", f"of {size}", "--max-context 128"))
            for asked, size in ((None, 512), (129, 129))
        ),
        # Mistral's attention looks at the number alone (transformers' modeling_mistral.py)
        (config(MistralConfig, **NO_WINDOW), None, ("sliding window of 128 tokens",)),
        (config(MistralConfig, sliding_window=128, layer_types=FULL), None, ("sliding window of 128 tokens",)),
        (config(Qwen2Config, **WINDOW, layer_types=MIXED), None, ("sliding window of 128 tokens",)),
        (config(Qwen3Config, **WINDOW, max_window_layers=0), None, ("sliding window of 128 tokens",)),
        (config(LlamaConfig, partial_rotary_factor=0.5), None, ("partial_rotary_factor = 0.5",)),
        *(
            (config(LlamaConfig, {key: kind, "factor": 2.0}), None, (repr(kind), "default, linear, llama3, yarn"))
            for key in ("rope_type", "type")
            for kind in ("dynamic", "longrope", "su", "mrope")
        ),
        (
            config(LlamaConfig, quantization_config={"quant_method": "gptq", "bits": 4}),
            None,
            ("quantised already (gptq)",),
        ),
        (config(LlamaConfig), 513, ("--max-context is 513", "at most 512")),
    ],
)
def test_a_configuration_that_the_trace_would_not_keep_is_refused(model, asked, named) -> None:
    with pytest.raises(ModelError) as caught:
        check_supported(model, "my/model", asked)
    assert [text for text in ("my/model", *named) if text not in str(caught.value)] == []


def test_the_sizes_come_from_the_configuration() -> None:
    assert model_shape(config(LlamaConfig)) == ModelShape(64, 300, 2, 4, 2, 16)
    assert model_shape(config(Qwen3Config, head_dim=24)).head_dim == 24
    assert model_shape(config(LlamaConfig, num_key_value_heads=None)).num_kv_heads == 4
    bare = config(Qwen2Config)
    assert getattr(bare, "head_dim", None) is None  # else the next line shows nothing
    assert model_shape(bare).head_dim == 16
