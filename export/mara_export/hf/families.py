"""The sizes of a decoder, from its configuration, and how families differ in them.

FAMILIES lists the tested families. A model of any other family is exported if it passes the parity gate, and its
manifest marks it as untested. The memory model takes the number of parameters from these tables.

Imports neither torch nor onnx: help texts and the memory model read these tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mara_export.errors import ModelError
from mara_export.hf.multimodal import TEXT_PARTS
from mara_runtime.tensors import CacheGroup, ModelShape


@dataclass(frozen=True)
class Family:
    """In what the parameters of an architecture differ from Llama's."""

    qkv_bias: bool = False
    """queries, keys and values have biases, whatever the configuration says"""
    qk_norm: str = ""
    """queries and keys are normalised: each "head", or their whole "width" """
    sinks: bool = False
    """each head has one, a score that takes its part of the softmax"""
    softcap: bool = False
    """scores are capped"""
    norms: int = 2
    """of the hidden size, in each layer"""
    norm_bias: bool = False
    gated: bool = True
    """the MLP multiplies by a gate; False: it has two matrices"""
    output_bias: bool = True
    """biases of attention are those of its output, too"""
    expert_bias: bool = False
    """experts and what chooses them have biases"""
    tied: bool = False
    """the LM head is the embedding's table, unless the configuration says otherwise"""

    @property
    def written_out(self) -> bool:
        """Whether attention is more than TensorRT's does in one kernel."""
        return self.sinks or self.softcap


FAMILIES = {
    "arcee": Family(gated=False),
    "cohere2": Family(norms=1, tied=True),
    "ernie4_5": Family(),
    "exaone4": Family(qk_norm="head"),
    "gemma": Family(tied=True),
    "gemma2": Family(softcap=True, norms=4, tied=True),
    "gemma3_text": Family(norms=4, qk_norm="head", tied=True),
    "gemma4_text": Family(norms=4, qk_norm="head", tied=True),  # of transformers 5
    "glm": Family(output_bias=False),
    "glm4": Family(norms=4, output_bias=False),
    "gpt_oss": Family(sinks=True, expert_bias=True),  # of transformers 5, as all with experts
    "granite": Family(),
    "granite_swa": Family(sinks=True, tied=True),  # of transformers 5
    "granitemoe": Family(),
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
    "seed_oss": Family(output_bias=False),
    "smollm3": Family(),
    "starcoder2": Family(norm_bias=True, gated=False, tied=True),
}
"""Tested families, by `model_type` of Hugging Face configurations."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one size."""

    count: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    """of one MLP, or one expert"""
    kv_matrices: int = 2
    """that make keys and values; 1: values are made of the keys' numbers; 0: the layer reads another one's cache"""
    biases: int = 0
    """parameters that the linear maps of one layer add"""
    experts: int = 0
    """in each; 0: one MLP"""

    @property
    def width(self) -> int:
        """Of the MLP of a layer, or of all its experts together."""
        return self.intermediate_size * max(1, self.experts)


@dataclass(frozen=True)
class Decoder:
    """All sizes of a decoder."""

    hidden_size: int
    vocab_size: int
    num_heads: int
    layers: tuple[LayerGroup, ...]
    tied: bool
    """the LM head is the embedding's table"""
    family: Family = Family()
    own_input: int = 0
    """numbers of each token that every layer has to itself, from a second table; 0: none"""
    own_vocab: int = 0
    """rows of that table"""

    @property
    def num_layers(self) -> int:
        """Of all sizes."""
        return sum(layer.count for layer in self.layers)

    @property
    def shape(self) -> ModelShape:
        """Those that the graph's inputs and outputs depend on."""
        caches: Counter[tuple[int, int]] = Counter()
        for layer in self.layers:
            if layer.kv_matrices:
                caches[layer.kv_heads, layer.head_dim] += layer.count
        groups = tuple(CacheGroup(count, *size) for size, count in caches.items())
        return ModelShape(self.hidden_size, self.vocab_size, self.num_layers, self.num_heads, groups)

    @property
    def matrices(self) -> tuple[tuple[int, int, int], ...]:
        """(how many, inputs K, outputs N) in all layers together, the experts of a layer as one MLP."""
        d, own, found = self.hidden_size, self.own_input, []
        for layer in self.layers:
            i, width = layer.width, self.num_heads * layer.head_dim
            kv_width, gates = layer.kv_heads * layer.head_dim, 2 if self.family.gated else 1
            of_one = [(1, d, width), (layer.kv_matrices, d, kv_width), (1, width, d), (gates, d, i), (1, i, d)]
            found += [(layer.count * count, k, n) for count, k, n in of_one if count]
        if own:
            found += [(1, d, self.num_layers * own), (self.num_layers, d, own), (self.num_layers, own, d)]
        return tuple(found)

    @property
    def table(self) -> int:
        """Parameters of the embedding's table, and of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def small(self) -> int:
        """Parameters outside matrices and tables: norms, biases, and what chooses experts."""
        a_norm = self.hidden_size * (2 if self.family.norm_bias else 1)
        total = a_norm + self.own_input
        for layer in self.layers:
            keys = min(layer.kv_matrices, 1)
            of_heads = {"": 0, "head": 1 + keys, "width": self.num_heads + keys * layer.kv_heads}[self.family.qk_norm]
            norms = self.family.norms + (1 if self.own_input else 0)
            sinks = self.num_heads if self.family.sinks else 0
            more = layer.biases + sinks + layer.experts * self.hidden_size
            total += layer.count * (norms * a_norm + of_heads * layer.head_dim + more)
        return total

    @property
    def own_table(self) -> int:
        """Parameters of the table of the layers' own inputs."""
        return self.own_vocab * self.num_layers * self.own_input

    @property
    def parameters(self) -> int:
        """All of them, as a checkpoint counts them."""
        matrices = sum(count * k * n for count, k, n in self.matrices)
        return matrices + self.small + self.own_table + self.table * (1 if self.tied else 2)


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""How configurations call the number of a layer's experts."""


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a layer, by a configuration; 0: it has one MLP."""
    counts = [config.get(key) for key in EXPERTS]
    return next((count for count in counts if type(count) is int and count > 1), 0)


def decoder_of(
    shape: ModelShape, model_type: str, intermediate_size: int, tied: bool, experts: int = 0, **config: Any
) -> Decoder:
    """A decoder of a family, whose MLPs or experts are of one size.

    config: `attention_bias`, `mlp_bias` and `use_bias` of its configuration, where set.
    """
    layers = [
        LayerGroup(group.count, group.kv_heads, group.head_dim, intermediate_size, experts=experts)
        for group in shape.caches
    ]
    if shared := shape.num_layers - shape.num_caches:
        layers.append(replace(layers[-1], count=shared, kv_matrices=0))
    plain = Decoder(shape.hidden_size, shape.vocab_size, shape.num_heads, tuple(layers), tied)
    return _of_family(plain, model_type, config)


def _of_family(decoder: Decoder, model_type: str, config: Mapping[str, Any]) -> Decoder:
    family, hidden, layers = FAMILIES.get(model_type, Family()), decoder.hidden_size, []
    for layer in decoder.layers:
        biases = 0
        if family.qkv_bias or config.get("attention_bias") or config.get("use_bias"):
            heads = decoder.num_heads + layer.kv_matrices * layer.kv_heads
            biases += heads * layer.head_dim + (hidden if family.output_bias and not family.qkv_bias else 0)
        if config.get("mlp_bias") or config.get("use_bias"):
            biases += (2 if family.gated else 1) * layer.intermediate_size + hidden
        if family.expert_bias:
            biases += layer.experts * (2 * layer.intermediate_size + hidden + 1)
        layers.append(replace(layer, biases=biases))
    return replace(decoder, layers=tuple(layers), family=family)


def decoder_sizes(config: Mapping[str, Any], name: str) -> Decoder:
    """The sizes in a Hugging Face config.json. Raises ModelError, naming the key, for a missing or wrong one.

    name: of the model, for messages.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f"{name}: its config.json has model_type = {model_type!r}; expected an architecture's name")
    if isinstance(config.get("text_config"), Mapping):
        raise ModelError(
            f"{name} has architecture {model_type!r}, which takes more than text; the text part is exported of "
            f"{', '.join(TEXT_PARTS)}: else name a checkpoint of the language model alone"
        )

    def size(key: str, own: Mapping[str, Any] = config) -> int:
        value = own.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{name}: its config.json has {key} = {value!r}; expected a positive integer")
        return value

    def group(kind: _Kind, count: int) -> LayerGroup:
        own = {**config, **dict(kind.sizes)}
        kv_heads = heads if own.get("num_key_value_heads") is None else size("num_key_value_heads", own)
        if heads % kv_heads:
            raise ModelError(
                f"{name}: its config.json has num_key_value_heads = {kv_heads}, which does not divide {heads}"
            )
        head_dim = size("head_dim", own) if own.get("head_dim") is not None else hidden // heads
        wide = 2 if kind.kv_matrices == 0 and config.get("use_double_wide_mlp") else 1
        return LayerGroup(count, kv_heads, head_dim, wide * size(inner), kind.kv_matrices, experts=experts)

    hidden, heads, depth = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    experts = expert_count(config)
    inner = "moe_intermediate_size" if experts and "moe_intermediate_size" in config else "intermediate_size"
    layers = tuple(group(*each) for each in _kinds(config, depth).items())
    said = config.get("tie_word_embeddings")
    tied = FAMILIES.get(model_type, Family()).tied if said is None else bool(said)
    plain = Decoder(hidden, size("vocab_size"), heads, layers, tied)
    if config.get("hidden_size_per_layer_input"):
        own_input, own_vocab = size("hidden_size_per_layer_input"), size("vocab_size_per_layer_input")
        plain = replace(plain, own_input=own_input, own_vocab=own_vocab)
    return _of_family(plain, model_type, config)


@dataclass(frozen=True)
class _Kind:
    """What layers say of themselves in a config.json."""

    sizes: tuple[tuple[str, Any], ...] = ()
    """instead of the model's"""
    kv_matrices: int = 2


def _kinds(config: Mapping[str, Any], depth: int) -> Mapping[_Kind, int]:
    """How many layers of each kind there are, those with a cache first."""
    types, by_layer = config.get("layer_types"), config.get("per_layer_config")
    if not isinstance(types, list) or len(types) != depth:
        return {_Kind(): depth}
    reading = config.get("num_kv_shared_layers")
    first_reading = depth - (reading if type(reading) is int else 0)
    one_for_both = bool(config.get("attention_k_eq_v"))
    kinds: Counter[_Kind] = Counter()
    for index, kind in enumerate(types):
        full = kind == "full_attention"
        own: Mapping[Any, Any] = {}
        if isinstance(by_layer, Mapping):
            own = by_layer.get(index) or by_layer.get(str(index)) or {}
        elif full:  # as checkpoints have it
            kv_heads = config.get("num_global_key_value_heads") if one_for_both else None
            own = {"head_dim": config.get("global_head_dim"), "num_key_value_heads": kv_heads}
        sizes = tuple((key, own[key]) for key in ("num_key_value_heads", "head_dim") if own.get(key) is not None)
        kinds[_Kind(sizes, 0 if index >= first_reading else 1 if full and one_for_both else 2)] += 1
    return dict(sorted(kinds.items(), key=lambda kind: kind[0].kv_matrices == 0))


def model_shape(config: Any) -> ModelShape:
    """The sizes that the graph's inputs and outputs depend on, from a Hugging Face configuration object."""
    return decoder_sizes(config.to_dict(), "the model").shape
