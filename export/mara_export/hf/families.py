"""The model families that are exported and the models that have a short name: one table each.

Supported means: in FAMILIES, and proved by the parity gate at every export. A new family is one row, plus whatever its
mathematics needs. The trace keeps what it is shown: one attention mask for all layers, no soft cap on scores, rotary
frequencies fixed in advance. A configuration that asks for more is rejected by name rather than exported wrongly.

Imports neither torch nor onnx: help texts and the memory model read these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mara_export.errors import ModelError
from mara_export.hf.rope import rope_settings
from mara_runtime.tensors import ModelShape


@dataclass(frozen=True)
class Family:
    """How an architecture differs from Llama."""

    qkv_bias: bool = False
    """queries, keys and values have biases, whatever the configuration says"""
    qk_norm: bool = False
    """queries and keys are normalised head by head"""
    window_per_layer: bool = True
    """a sliding window is switched on by use_sliding_window or layer_types; False: by its size alone"""


FAMILIES = {
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "llama": Family(),
    "mistral": Family(window_per_layer=False),
}
"""By `model_type` of Hugging Face configurations."""


@dataclass(frozen=True)
class Decoder(ModelShape):
    """All sizes of a decoder, ≥ 1 but `biases`."""

    intermediate_size: int
    tied: bool
    """the LM head is the embedding's table"""
    biases: int = 0
    """parameters that the linear maps of one layer add"""
    qk_norm: bool = False

    @property
    def shape(self) -> ModelShape:
        """Those that the graph's inputs and outputs depend on."""
        return ModelShape(*(getattr(self, each.name) for each in fields(ModelShape)))

    @property
    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(name, inputs K, outputs N) of one layer."""
        d, i, h = self.hidden_size, self.intermediate_size, self.head_dim
        return (
            ("q", d, self.num_heads * h),
            ("k", d, self.num_kv_heads * h),
            ("v", d, self.num_kv_heads * h),
            ("o", self.num_heads * h, d),
            ("gate", d, i),
            ("up", d, i),
            ("down", i, d),
        )

    @property
    def table(self) -> int:
        """Parameters of the embedding's table, and of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def small(self) -> int:
        """Parameters outside the matrices: norms and biases."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.num_layers * (norms + self.biases) + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them, as a checkpoint counts them."""
        matrices = sum(k * n for _, k, n in self.matrices)
        return self.num_layers * matrices + self.small + self.table * (1 if self.tied else 2)


@dataclass(frozen=True)
class KnownModel:
    """A model on the Hub with a short name, its sizes from its config.json."""

    hub_id: str
    context: int
    """tokens: max_position_embeddings"""
    decoder: Decoder


def family_of(model_type: object, name: str) -> Family:
    """The family of an architecture. name: of the model, for the ModelError that there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(f"{name} has architecture {model_type!r}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def decoder_of(shape: ModelShape, model_type: str, intermediate_size: int, tied: bool, **config: Any) -> Decoder:
    """A decoder of a family. config: `attention_bias` and `mlp_bias` of its configuration, where they are set."""
    family = family_of(model_type, "the model")
    width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    biases = 0
    if family.qkv_bias or config.get("attention_bias"):
        biases += width + 2 * kv_width + (0 if family.qkv_bias else shape.hidden_size)
    if config.get("mlp_bias"):
        biases += 2 * intermediate_size + shape.hidden_size
    return Decoder(
        **asdict(shape), intermediate_size=intermediate_size, tied=tied, biases=biases, qk_norm=family.qk_norm
    )


def _row(
    model_type: str, hub_id: str, context: int, layers: int, hidden: int, mlp: int, heads: str, vocab: int, tied: bool
) -> KnownModel:
    """heads: "queries/keys×size", as 14/2×64."""
    counts, _, size = heads.partition("×")
    num_heads, num_kv_heads = map(int, counts.split("/"))
    shape = ModelShape(hidden, vocab, layers, num_heads, num_kv_heads, int(size))
    return KnownModel(hub_id, context, decoder_of(shape, model_type, mlp, tied))


ALIASES = {
    "qwen2": _row("qwen2", "Qwen/Qwen2-0.5B-Instruct", 32768, 24, 896, 4864, "14/2×64", 151936, True),
    "qwen2-1.5b": _row("qwen2", "Qwen/Qwen2-1.5B-Instruct", 32768, 28, 1536, 8960, "12/2×128", 151936, True),
    "qwen2.5-0.5b": _row("qwen2", "Qwen/Qwen2.5-0.5B-Instruct", 32768, 24, 896, 4864, "14/2×64", 151936, True),
    "qwen2.5-1.5b": _row("qwen2", "Qwen/Qwen2.5-1.5B-Instruct", 32768, 28, 1536, 8960, "12/2×128", 151936, True),
    "qwen3": _row("qwen3", "Qwen/Qwen3-0.6B", 40960, 28, 1024, 3072, "16/8×128", 151936, True),
    "qwen3-1.7b": _row("qwen3", "Qwen/Qwen3-1.7B", 40960, 28, 2048, 6144, "16/8×128", 151936, True),
    "llama3": _row("llama", "meta-llama/Meta-Llama-3-8B-Instruct", 8192, 32, 4096, 14336, "32/8×128", 128256, False),
    "llama3.1": _row("llama", "meta-llama/Llama-3.1-8B-Instruct", 131072, 32, 4096, 14336, "32/8×128", 128256, False),
    "llama3.2-1b": _row("llama", "meta-llama/Llama-3.2-1B-Instruct", 131072, 16, 2048, 8192, "32/8×64", 128256, True),
    "llama3.2-3b": _row("llama", "meta-llama/Llama-3.2-3B-Instruct", 131072, 28, 3072, 8192, "24/8×128", 128256, True),
    "mistral": _row("mistral", "mistralai/Mistral-7B-Instruct-v0.3", 32768, 32, 4096, 14336, "32/8×128", 32768, False),
}
"""By short name. tests/unit/test_memory.py has the parameter counts that the Hub gives for these checkpoints."""
KNOWN_MODELS = {model.hub_id: model for model in ALIASES.values()}
"""By Hub id."""


def hub_id_of(name: str) -> str:
    """The Hub id of an alias; any other name as it is."""
    return ALIASES[name].hub_id if name in ALIASES else name


_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping")
_FIXED_ROPE = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate",
}
"""rope types whose frequencies do not depend on the length of the text, and what transformers reads for them"""


def decoder_sizes(config: Mapping[str, Any], name: str) -> Decoder:
    """The sizes in a Hugging Face config.json. Raises ModelError, naming the key, for a missing or wrong one.

    name: of the model, for messages.
    """
    model_type = config.get("model_type")
    family_of(model_type, name)

    def size(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{name}: its config.json has {key} = {value!r}; expected a positive integer")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else size("num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"{name}: its config.json has num_key_value_heads = {kv_heads}, which does not divide {heads}")
    head_dim = size("head_dim") if config.get("head_dim") is not None else hidden // heads
    shape = ModelShape(hidden, size("vocab_size"), size("num_hidden_layers"), heads, kv_heads, head_dim)
    biases = {key: config.get(key) for key in ("attention_bias", "mlp_bias")}
    tied = bool(config.get("tie_word_embeddings", False))
    return decoder_of(shape, str(model_type), size("intermediate_size"), tied, **biases)


def model_shape(config: Any) -> ModelShape:
    """The sizes that the graph's inputs and outputs depend on, from a Hugging Face configuration object."""
    return decoder_sizes(config.to_dict(), "the model").shape


def check_supported(config: Any, name: str, max_context: int | None) -> int:
    """Reject what cannot be exported faithfully; return the context length to export with.

    name: of the model, for messages; max_context: as asked for, None for 4096 or the model's own if smaller.
    Raises ModelError.
    """
    decoder_sizes(config.to_dict(), name)
    own = getattr(config, "max_position_embeddings", None)
    if type(own) is not int or own < 1:
        raise ModelError(f"{name}: its config.json has max_position_embeddings = {own!r}; expected a positive integer")
    for key in ("quantization_config", "quantization"):  # the second is MLX's
        if how := getattr(config, key, None):
            method = str(how.get("quant_method", "")) if isinstance(how, dict) else ""
            raise ModelError(
                f"{name} is quantised already ({method or key}): export the checkpoint that it was made from, in "
                "float16, bfloat16 or float32"
            )
    capped = [cap for cap in _SOFT_CAPS if getattr(config, cap, None)]
    if capped:
        raise ModelError(f"{name} caps its logits ({capped[0]} = {getattr(config, capped[0])}); this is not supported")
    rope, part = rope_settings(config)
    if part != 1:
        raise ModelError(f"{name}: partial rotary embeddings are not supported (partial_rotary_factor = {part!r})")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _FIXED_ROPE:
        raise ModelError(
            f"{name} has rope scaling {rope_type!r}, whose frequencies change with the length of the text; "
            f"supported are {', '.join(_FIXED_ROPE)}"
        )
    if unread := [key for key in rope if key not in ("rope_type", "type", *_FIXED_ROPE[rope_type].split())]:
        raise ModelError(
            f"{name}: its config.json has {unread[0]} in rope_scaling, which nothing reads for {rope_type!r}: remove it"
        )
    if own < 2:
        raise ModelError(f"{name} has a context of {own} token, which leaves no room for an answer")
    context = min(4096, own) if max_context is None else max_context
    if context > own:
        raise ModelError(f"--max-context is {context}; {name} was made for at most {own} tokens")
    window = _sliding_window(config)
    if window is not None and window < context:
        raise ModelError(
            f"{name} has a sliding window of {window} tokens, less than the context of {context}; "
            f"export it with --max-context {window} or less"
        )
    return context


def longest_context(config: Any) -> int | None:
    """Tokens of prompt and answer that a model can be exported for at most; None if its configuration has no limit."""
    limits = (getattr(config, "max_position_embeddings", None), _sliding_window(config))
    return min((int(tokens) for tokens in limits if tokens is not None), default=None)


def _sliding_window(config: Any) -> int | None:
    """Tokens that attention looks back at; None: all."""
    window = getattr(config, "sliding_window", None)
    if window is None:
        return None
    if type(window) is not int or window < 1:
        raise ModelError(f"the model's config.json has sliding_window = {window!r}; expected a positive integer")
    if FAMILIES[config.model_type].window_per_layer:
        layers = getattr(config, "layer_types", None)
        switched_off = getattr(config, "use_sliding_window", True) is False
        if switched_off or (layers is not None and "sliding_attention" not in layers):
            return None
    return int(window)
