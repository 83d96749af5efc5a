"""Tiny configurations of the tested families, their peculiarities on: windows of 16 tokens, soft caps, odd sizes.

tests/checkpoints.py makes checkpoints of them, as of its own architectures.
"""

from __future__ import annotations

from typing import Any

import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
"""Of models smaller than checkpoints: one trace, one pass."""
WINDOW = 16
_YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_LONG = {
    "type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
}
_MOSTLY_LOCAL = ["sliding_attention"] * 3 + ["full_attention"]

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {"head_dim": 24}),
    "cohere2": ("Cohere2", {"sliding_window": WINDOW, "layer_types": _MOSTLY_LOCAL, "logit_scale": 0.25}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 24, "use_bias": True}),
    "exaone4": (
        "Exaone4",
        {"sliding_window": WINDOW, "sliding_window_pattern": "LLLG", "layer_types": _MOSTLY_LOCAL},
    ),
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 200.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            "head_dim": 24,
            "sliding_window": WINDOW,
            "layer_types": _MOSTLY_LOCAL,
            "query_pre_attn_scalar": 20,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "gemma4_text": (
        "Gemma4Text",
        {
            "head_dim": 24,
            "global_head_dim": 32,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "final_logit_softcapping": 200.0,
        },
    ),
    "glm": ("Glm", {"head_dim": 24, "partial_rotary_factor": 0.5}),
    "glm4": ("Glm4", {"head_dim": 24, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": _MOSTLY_LOCAL,
            "swiglu_limit": 1.5,
            "rope_parameters": {**_YARN, "rope_theta": 1e4, "truncate": False},
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.6,
            "logits_scaling": 8.0,
        },
    ),
    "granite_swa": (
        "GraniteSWA",
        {
            "sliding_window": WINDOW,
            "layer_types": _MOSTLY_LOCAL,
            "layer_rope_theta": [1e4, 5e3, 0, 1e4],
            "attention_multiplier": 0.3,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "logits_scaling": 8.0, "residual_multiplier": 0.6},
    ),
    "helium": ("Helium", {"head_dim": 16}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 24}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 24,
            "sliding_window": None,
            "rope_parameters": {**_YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1},
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": _MOSTLY_LOCAL,
            "rope_theta": 1e4,
            "rope_scaling": {**_YARN, "attention_factor": 1.2},
        },
    ),
    "phi3": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "original_max_position_embeddings": 256,
            "partial_rotary_factor": 0.75,
            "rope_scaling": _LONG,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 24, "attention_bias": True, "attention_out_bias": False}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], "rope_theta": 1e4, "rope_scaling": _YARN}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW, "use_bias": True}),
}
OF_5 = {"gpt_oss", "granitemoe", "mixtral", "qwen3_moe"}
"""Families that version 4 knows, but computes by loops over experts that no trace keeps."""
NAMES = tuple(
    name
    for name, (kind, _) in _CONFIGS.items()
    if hasattr(transformers, f"{kind}Config") and (name not in OF_5 or transformers.__version__ >= "5")
)
"""By model_type, as mara_export.hf.families has them: those that this transformers knows, and a trace of it keeps."""
LISTED = tuple(_CONFIGS)
"""All of them."""


def peculiarities(name: str) -> list[str]:
    """Settings in which a family's tiny configuration differs from the classes' defaults, sizes apart."""
    return (
        [key for key in _CONFIGS[name][1] if key not in ("head_dim", "num_hidden_layers")] if name in _CONFIGS else []
    )


def config(name: str, sizes: dict[str, Any]) -> transformers.PretrainedConfig:
    """The configuration of a family. sizes: of the checkpoint, in the words of Llama's."""
    kind, peculiarities = _CONFIGS[name]
    made: transformers.PretrainedConfig = getattr(transformers, f"{kind}Config")(
        **{**sizes, "pad_token_id": 259, **peculiarities}
    )
    return made
