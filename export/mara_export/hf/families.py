"""Which models are exported. Supported means: on this list, and proved by the parity gate at every export.

The trace keeps what it is shown: one attention mask for all layers, no soft cap on scores, rotary frequencies
fixed in advance. A configuration that asks for more is refused by name rather than exported wrongly.
"""

from __future__ import annotations

from typing import Any

from mara_export.errors import ModelError
from mara_runtime.tensors import ModelShape

SUPPORTED = ("qwen2", "qwen3", "llama", "mistral")
"""`model_type` of Hugging Face configurations."""

_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""rope types whose frequencies do not depend on the length of the text"""


def model_shape(config: Any) -> ModelShape:
    """The sizes that the graph's tensors depend on, from a Hugging Face configuration."""
    heads = config.num_attention_heads
    return ModelShape(
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def check_supported(config: Any, name: str, max_context: int | None) -> int:
    """Refuse what cannot be exported faithfully; return the context length to export with.

    name: of the model, for messages; max_context: as asked for, None for 4096 or the model's own if smaller.
    Raises ModelError.
    """
    kind = getattr(config, "model_type", None)
    if kind not in SUPPORTED:
        raise ModelError(f"{name} is of architecture {kind!r}; supported are {', '.join(SUPPORTED)}")
    for size in _SIZES:
        value = getattr(config, size, None)
        if type(value) is not int or value < 1:
            raise ModelError(f"{name}: its config.json has {size} = {value!r}, which is no size")
    if getattr(config, "quantization_config", None) or getattr(config, "quantization", None):  # the second is MLX's
        raise ModelError(f"{name} is quantised already; export its original checkpoint")
    capped = [cap for cap in _SOFT_CAPS if getattr(config, cap, None)]
    if capped:
        raise ModelError(f"{name} caps its logits ({capped[0]} = {getattr(config, capped[0])}); this is not supported")
    turned = getattr(config, "partial_rotary_factor", 1)
    if turned != 1:
        raise ModelError(f"{name}: partial rotary embeddings are not supported (partial_rotary_factor = {turned!r})")
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads is not None and (type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads):
        raise ModelError(f"{name}: its config.json has num_key_value_heads = {kv_heads!r}, which do not divide {heads}")
    rope = getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{name}: its config.json has rope_scaling = {rope!r}, which is no JSON object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _FIXED_ROPE:
        raise ModelError(
            f"{name} has rope scaling {rope_type!r}, whose frequencies change with the length of the text; "
            f"supported are {', '.join(_FIXED_ROPE)}"
        )

    own = int(config.max_position_embeddings)
    if own < 2:
        raise ModelError(f"{name} holds {own} token, which leaves no room for an answer")
    context = min(4096, own) if max_context is None else max_context
    if context > own:
        raise ModelError(f"--max-context is {context}; {name} was made for at most {own} tokens")
    window = _sliding_window(config)
    if window is not None and window < context:
        raise ModelError(
            f"{name} attends to a sliding window of {window} tokens, which is less than the capacity of {context}; "
            f"export it with --max-context {window} or less"
        )
    return context


def longest_context(config: Any) -> int | None:
    """Tokens of prompt and answer that a model can be exported for at most; None if its configuration does not say."""
    known = (getattr(config, "max_position_embeddings", None), _sliding_window(config))
    return min((int(tokens) for tokens in known if tokens is not None), default=None)


def _sliding_window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    if type(window) is not int or window < 1:
        raise ModelError(f"the model's config.json has sliding_window = {window!r}, which is no number of tokens")
    if config.model_type != "mistral":  # whose attention looks at the number alone
        layers = getattr(config, "layer_types", None)
        switched_off = getattr(config, "use_sliding_window", True) is False
        if switched_off or (layers is not None and "sliding_attention" not in layers):
            return None
    return int(window)
