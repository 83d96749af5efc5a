"""Sizes of the models that have an alias, and of any other by its config.json: arithmetic alone, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mara_export.errors import ModelError
from mara_export.hf.families import SUPPORTED


@dataclass(frozen=True)
class Decoder:
    """What a decoder's size depends on. All sizes ≥ 1 but `biases`."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """the LM head is the embedding's table"""
    biases: int = 0
    """numbers added by the linear maps of one layer"""
    qk_norm: bool = False
    """queries and keys are normalised, head by head"""

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
        """Numbers of the embedding's table, and of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def small(self) -> int:
        """Numbers outside the matrices: norms and biases."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.num_layers * (norms + self.biases) + self.hidden_size

    @property
    def parameters(self) -> int:
        """All of them, as a checkpoint counts them."""
        matrices = sum(k * n for _, k, n in self.matrices)
        return self.num_layers * matrices + self.small + self.table * (1 if self.tied else 2)


def _qwen2(hidden: int, intermediate: int, layers: int, heads: int) -> Decoder:
    return Decoder(
        hidden, intermediate, layers, heads, 2, hidden // heads, 151936, True, biases=(heads + 4) * (hidden // heads)
    )


def _qwen3(hidden: int, intermediate: int) -> Decoder:
    return Decoder(hidden, intermediate, 28, 16, 8, 128, 151936, True, qk_norm=True)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int = 128256, tied: bool = False) -> Decoder:
    return Decoder(hidden, intermediate, layers, heads, 8, hidden // heads, vocab, tied)


DECODERS = {
    "Qwen/Qwen2-0.5B-Instruct": _qwen2(896, 4864, 24, 14),
    "Qwen/Qwen2-1.5B-Instruct": _qwen2(1536, 8960, 28, 12),
    "Qwen/Qwen2.5-0.5B-Instruct": _qwen2(896, 4864, 24, 14),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen2(1536, 8960, 28, 12),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144),
    "meta-llama/Meta-Llama-3-8B-Instruct": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 8192, 16, 32, tied=True),
    "meta-llama/Llama-3.2-3B-Instruct": _llama(3072, 8192, 28, 24, tied=True),
    "mistralai/Mistral-7B-Instruct-v0.3": _llama(4096, 14336, 32, 32, vocab=32768),
}
"""By Hub id, from the config.json of each. The parameters that follow are those that the Hub counts in each checkpoint
(tests/unit/test_memory.py)."""


def from_config(config: Mapping[str, Any], name: str) -> Decoder:
    """The sizes in a Hugging Face config.json. Raises ModelError, naming what is missing.

    name: of the model, for messages.
    """
    family = config.get("model_type")
    if family not in SUPPORTED:
        raise ModelError(f"{name} is of architecture {family!r}; supported are {', '.join(SUPPORTED)}")

    def size(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ModelError(f"{name}: its config.json has {key} = {value!r}, which is no size")
        return value

    hidden, intermediate, heads = size("hidden_size"), size("intermediate_size"), size("num_attention_heads")
    kv_heads = size("num_key_value_heads") if config.get("num_key_value_heads") else heads
    head_dim = size("head_dim") if config.get("head_dim") else hidden // heads
    biases = 0
    if family == "qwen2" or config.get("attention_bias"):
        biases += (heads + 2 * kv_heads) * head_dim + (0 if family == "qwen2" else hidden)
    if config.get("mlp_bias"):
        biases += 2 * intermediate + hidden
    return Decoder(
        hidden,
        intermediate,
        size("num_hidden_layers"),
        heads,
        kv_heads,
        head_dim,
        size("vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
        biases,
        qk_norm=family == "qwen3",
    )
