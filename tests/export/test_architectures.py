"""Which configurations are exported, and which are refused by name: the trace would keep half of what they ask for."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    FalconH1Config,
    Gemma3Config,
    GPT2Config,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from mara_export.errors import ModelError
from mara_export.hf.families import FAMILIES, model_shape
from mara_export.hf.supported import check_supported, check_traceable
from mara_runtime.errors import OptionError
from mara_runtime.tensors import CacheGroup, ModelShape
from tests import checkpoints, families

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
MIXED = ["full_attention", "sliding_attention"]
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


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
        # windows, of all layers and of some
        (config(MistralConfig, sliding_window=128), None, 512),
        (config(Qwen2Config, **WINDOW, layer_types=MIXED), None, 512),
        # what is switched off
        (config(LlamaConfig, attn_logit_softcapping=None), None, 512),
        (config(LlamaConfig, {"rope_type": "default"}), None, 512),
        (config(LlamaConfig, {"type": "linear", "factor": 2.0}), None, 512),
        # angles that change beyond a length: up to it
        (config(LlamaConfig, {"type": "dynamic", "factor": 2.0}), None, 512),
        (config(Phi3Config, LONGROPE, original_max_position_embeddings=64, pad_token_id=0), None, 64),
        # a family that nobody has listed
        (config(StableLmConfig), None, 512),
    ],
)
def test_a_supported_configuration_has_its_context(model, asked, context) -> None:
    assert check_supported(model, "my/model", asked) == context


@pytest.mark.parametrize(
    ("model", "asked", "named"),
    [
        (PretrainedConfig(), None, ("model_type = ''",)),
        (GPT2Config(), None, ("hidden_size = None",)),
        (Gemma3Config(), None, ("'gemma3'", "more than text")),
        (config(Lfm2Config, layer_types=["conv", "full_attention"]), None, ("layers of kind 'conv'",)),
        (config(FalconH1Config), None, ("a recurrent state (mamba_",)),
        (config(Llama4TextConfig), None, ("layers of kind 'chunked_attention'",)),
        # settings that Llama's implementation passes over
        *(
            (config(LlamaConfig, **{key: 30}), None, (f"has {key} = 30", "does not read for 'llama'"))
            for key in ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "sliding_window")
        ),
        (config(MistralConfig, sliding_window=0), None, ("sliding_window = 0",)),
        (config(MistralConfig, sliding_window=-1), None, ("sliding_window = -1",)),
        *(
            (config(LlamaConfig, {key: kind, "factor": 2.0}), None, (repr(kind), "default, linear, dynamic, llama3"))
            for key in ("rope_type", "type")
            for kind in ("proportional", "mrope")
        ),
        (config(LlamaConfig), 513, ("--max-context is 513", "at most 512")),
        (
            config(Phi3Config, LONGROPE, original_max_position_embeddings=64, pad_token_id=0),
            65,
            ("--max-context is 65", "LongRoPE", "beyond 64 tokens"),
        ),
    ],
)
def test_a_configuration_that_the_trace_would_not_keep_is_refused(model, asked, named) -> None:
    with pytest.raises(ModelError) as caught:
        check_supported(model, "my/model", asked)
    assert [text for text in ("my/model", *named) if text not in str(caught.value)] == []


def test_a_mixture_of_experts_is_refused_where_it_would_be_traced_wrongly() -> None:
    experts = config(MixtralConfig)
    for tracer in ("optimum", *([] if "mixtral" in families.NAMES else ["torch"])):
        with pytest.raises(OptionError, match=r"num_(local_)?experts = 8.*transformers 5 and --tracer torch"):
            check_traceable(experts, "my/model", tracer)
    if "mixtral" in families.NAMES:
        check_traceable(experts, "my/model", "torch")
    check_traceable(config(LlamaConfig), "my/model", "optimum")


def test_every_listed_family_has_a_tiny_configuration() -> None:
    assert {*families.LISTED, *checkpoints.ARCHITECTURES} == {*FAMILIES}


def test_the_sizes_come_from_the_configuration() -> None:
    assert model_shape(config(LlamaConfig)) == ModelShape(64, 300, 2, 4, (CacheGroup(2, 2, 16),))
    assert model_shape(config(Qwen3Config, head_dim=24)).caches[0].head_dim == 24
    assert model_shape(config(LlamaConfig, num_key_value_heads=None)).caches[0].kv_heads == 4
    bare = config(Qwen2Config)
    assert getattr(bare, "head_dim", None) is None  # else the next line shows nothing
    assert model_shape(bare).caches[0].head_dim == 16
