"""The sizes of a decoder, from its configuration, and how families differ in them.

FAMILIES lists the tested families. A model of any other family is exported if it passes the parity gate, and its
manifest marks it as untested. The memory model takes the number of parameters from these tables.

Imports neither torch nor onnx: help texts and the memory model read these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mara_export.errors import ModelError
from mara_runtime.tensors import ModelShape


@dataclass(frozen=True)
class Family:
    """In what the parameters of an architecture differ from Llama's."""

    qkv_bias: bool = False
    """queries, keys and values have biases, whatever the configuration says"""
    qk_norm: str = ""
    """queries and keys are normalised: each "head", or their whole "width" """
    norms: int = 2
    """of the hidden size, in each layer"""
    norm_bias: bool = False
    gated: bool = True
    """the MLP multiplies by a gate; False: it has two matrices"""
    tied: bool = False
    """the LM head is the embedding's table, unless the configuration says otherwise"""


FAMILIES = {
    "arcee": Family(gated=False),
    "cohere2": Family(norms=1, tied=True),
    "ernie4_5": Family(),
    "exaone4": Family(qk_norm="head"),
    "gemma": Family(tied=True),
    "gemma2": Family(norms=4, tied=True),
    "gemma3_text": Family(norms=4, qk_norm="head", tied=True),
    "glm": Family(),
    "glm4": Family(norms=4),
    "granite": Family(),
    "granitemoe": Family(),  # of transformers 5, as all with experts
    "helium": Family(),
    "hunyuan_v1_dense": Family(qk_norm="head"),
    "llama": Family(),
    "ministral3": Family(),  # of transformers 5
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(qk_norm="width"),
    "olmo3": Family(qk_norm="width"),
    "phi3": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "qwen3_moe": Family(qk_norm="head"),
    "seed_oss": Family(),
    "smollm3": Family(),
    "starcoder2": Family(norm_bias=True, gated=False, tied=True),
}
"""Tested families, by `model_type` of Hugging Face configurations."""


@dataclass(frozen=True)
class Decoder(ModelShape):
    """All sizes of a decoder, ≥ 1 but `biases` and `experts`."""

    intermediate_size: int
    """of one MLP, or one expert"""
    tied: bool
    """the LM head is the embedding's table"""
    biases: int = 0
    """parameters that the linear maps of one layer add"""
    experts: int = 0
    """in each layer; 0: one MLP"""
    family: Family = Family()

    @property
    def shape(self) -> ModelShape:
        """Those that the graph's inputs and outputs depend on."""
        return ModelShape(*(getattr(self, each.name) for each in fields(ModelShape)))

    @property
    def width(self) -> int:
        """Of the MLP of a layer, or of all its experts together."""
        return self.intermediate_size * max(1, self.experts)

    @property
    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(name, inputs K, outputs N) of one layer, those of all experts as one."""
        d, i, h = self.hidden_size, self.width, self.head_dim
        return (
            ("q", d, self.num_heads * h),
            ("k", d, self.num_kv_heads * h),
            ("v", d, self.num_kv_heads * h),
            ("o", self.num_heads * h, d),
            *((("gate", d, i),) if self.family.gated else ()),
            ("up", d, i),
            ("down", i, d),
        )

    @property
    def table(self) -> int:
        """Parameters of the embedding's table, and of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def small(self) -> int:
        """Parameters outside the matrices: norms, biases, and what chooses experts."""
        of_heads = {"": 0, "head": 2, "width": self.num_heads + self.num_kv_heads}[self.family.qk_norm]
        a_norm = self.hidden_size * (2 if self.family.norm_bias else 1)
        a_layer = self.family.norms * a_norm + of_heads * self.head_dim + self.biases + self.experts * self.hidden_size
        return self.num_layers * a_layer + a_norm

    @property
    def parameters(self) -> int:
        """All of them, as a checkpoint counts them."""
        matrices = sum(k * n for _, k, n in self.matrices)
        return self.num_layers * matrices + self.small + self.table * (1 if self.tied else 2)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configurations call the number of a layer's experts."""


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a layer, by a configuration; 0: it has one MLP."""
    counts = [config.get(key) for key in EXPERTS]
    return next((count for count in counts if type(count) is int and count > 1), 0)


def decoder_of(
    shape: ModelShape, model_type: str, intermediate_size: int, tied: bool, experts: int = 0, **config: Any
) -> Decoder:
    """A decoder of a family. config: `attention_bias`, `mlp_bias` and `use_bias` of its configuration, where set."""
    family = FAMILIES.get(model_type, Family())
    width, kv_width = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    biases = 0
    if family.qkv_bias or config.get("attention_bias") or config.get("use_bias"):
        biases += width + 2 * kv_width + (0 if family.qkv_bias else shape.hidden_size)
    if config.get("mlp_bias") or config.get("use_bias"):
        biases += (2 if family.gated else 1) * intermediate_size + shape.hidden_size
    return Decoder(
        **asdict(shape),
        intermediate_size=intermediate_size,
        tied=tied,
        biases=biases,
        experts=experts,
        family=family,
    )


def decoder_sizes(config: Mapping[str, Any], name: str) -> Decoder:
    """The sizes in a Hugging Face config.json. Raises ModelError, naming the key, for a missing or wrong one.

    name: of the model, for messages.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f"{name}: its config.json has model_type = {model_type!r}; expected an architecture's name")
    if isinstance(config.get("text_config"), Mapping):
        raise ModelError(
            f"{name} has architecture {model_type!r}, which takes more than text: export a checkpoint of the language "
            "model alone"
        )

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
    biases = {key: config.get(key) for key in ("attention_bias", "mlp_bias", "use_bias")}
    said = config.get("tie_word_embeddings")
    tied = FAMILIES.get(model_type, Family()).tied if said is None else bool(said)
    experts = expert_count(config)
    inner = size("moe_intermediate_size" if experts and "moe_intermediate_size" in config else "intermediate_size")
    return decoder_of(shape, model_type, inner, tied, experts, **biases)


def model_shape(config: Any) -> ModelShape:
    """The sizes that the graph's inputs and outputs depend on, from a Hugging Face configuration object."""
    return decoder_sizes(config.to_dict(), "the model").shape
