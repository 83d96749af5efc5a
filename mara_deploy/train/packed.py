"""A frozen Hugging Face LLM that runs rows of many sequences, and all candidates of each, in one pass.

Rows are *packed*: a pass is a single sequence of R rows, each with an owner (the sequence whose KV cache it continues)
and a position. The linear layers run without padding; only attention unpacks the rows. It is a registered attention
implementation of transformers, so every supported architecture runs its own modelling code, while the KV cache belongs
to this module: siblings see their owner's cache and themselves, and only the chosen sibling is written to the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "mara-packed"
"""`attn_implementation` to load the model with."""


class _Attention(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (R, heads, H), k and v (R, kv_heads, H) of the pass's rows → (R, heads, H)."""


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, *, scaling: float, packed: _Attention, **_: Any
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, heads, R, H) → (R, heads, H)
    out = packed.attend(module.layer_idx, q, k, v, scaling)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


@dataclass
class PackedCache:
    """KV cache of B sequences in progress."""

    keys: list[Tensor]
    """per layer: (B, kv_heads, C, H)"""
    values: list[Tensor]
    """like `keys`"""
    lengths: Tensor
    """(B,) int64 entries in use"""

    def keep(self, active: Tensor) -> None:
        """Drop all sequences but `active` (int64 indices)."""
        self.keys = [x[active] for x in self.keys]
        self.values = [x[active] for x in self.values]
        self.lengths = self.lengths[active]


@dataclass
class _Prefill:
    """Causal attention over whole prompts, which also fills the cache."""

    cache: PackedCache
    owner: Tensor  # (R,)
    position: Tensor  # (R,)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        longest = int(self.cache.lengths.max())
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.owner, :, self.position] = k
        values[self.owner, :, self.position] = v
        wide = q.new_zeros(len(keys), longest, *q.shape[1:])
        wide[self.owner, self.position] = q
        groups = q.shape[1] // k.shape[1]
        out = F.scaled_dot_product_attention(  # the causal mask hides the padding on the right
            wide.transpose(1, 2),
            keys[:, :, :longest].repeat_interleave(groups, 1),
            values[:, :, :longest].repeat_interleave(groups, 1),
            is_causal=True,
            scale=scale,
        )
        return out.transpose(1, 2)[self.owner, self.position]


@dataclass
class _Siblings:
    """Attention of sibling candidates: each row sees its owner's cache and itself."""

    cache: PackedCache
    owner: Tensor  # (R,)
    rank: Tensor  # (R,) among the rows of its owner
    keys: list[Tensor] = field(default_factory=list)  # per layer: (R, kv_heads, H) of these rows
    values: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        owner, rank, lengths = self.owner, self.rank, self.cache.lengths
        longest, most = int(lengths.max()), int(rank.max()) + 1
        past_k, past_v = self.cache.keys[layer][:, :, :longest], self.cache.values[layer][:, :, :longest]
        B, (R, heads, H), kv_heads = len(lengths), q.shape, k.shape[1]
        groups = heads // kv_heads
        rows = (q * scale).view(R, kv_heads, groups, H)

        def unpack(x: Tensor) -> Tensor:  # (R, kv_heads, groups, ·) → (B, kv_heads, most * groups, ·)
            wide = x.new_zeros(B, most, *x.shape[1:])
            wide[owner, rank] = x
            return wide.transpose(1, 2).reshape(B, kv_heads, most * groups, x.shape[-1])

        def pack(x: Tensor) -> Tensor:  # the inverse of unpack
            return x.view(B, kv_heads, most, groups, x.shape[-1]).transpose(1, 2)[owner, rank]

        masked = (torch.arange(longest, device=q.device) >= lengths[:, None])[owner]  # (R, longest)
        scores = pack(unpack(rows) @ past_k.transpose(-1, -2)).masked_fill(masked[:, None, None], float("-inf"))
        own = (rows * k[:, :, None]).sum(-1, keepdim=True)
        weights = torch.cat([scores, own], -1).float().softmax(-1).to(q.dtype)
        out = pack(unpack(weights[..., :longest]) @ past_v) + weights[..., longest:] * v[:, :, None]
        return out.reshape(R, heads, H)


class PackedLM:
    """The passes of a rollout. model: a causal LM loaded with `attn_implementation=ATTENTION`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size: int = model.config.hidden_size
        config = model.config
        self._kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def sequence_bytes(self, tokens: int, candidates: int) -> int:
        """Memory that a sequence of so many tokens and its candidates take in a pass, roughly."""
        config, item = self._model.config, self.dtype.itemsize
        entry = self._kv_heads * self._head_dim
        cache = 2 * config.num_hidden_layers * tokens * entry
        attention = 4 * tokens * config.num_attention_heads * (self._head_dim + candidates)
        rows = candidates * (
            4 * config.hidden_size + 3 * config.intermediate_size + 2 * config.num_hidden_layers * entry
        )
        return int(item * (cache + attention + rows) + 8 * config.vocab_size)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[PackedCache, Tensor]:
        """Run B prompts. room: new tokens to reserve. Returns the cache and the last hidden states (B, D)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        owner = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        ends = lengths.cumsum(0)
        position = torch.arange(len(owner)) - (ends - lengths)[owner]
        shape = (len(prompts), self._kv_heads, int(lengths.max()) + room, self._head_dim)
        layers = range(self._model.config.num_hidden_layers)
        keys, values = ([torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in layers] for _ in "kv")
        cache = PackedCache(keys, values, lengths.to(self.device))
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        position = position.to(self.device)
        states = self._run(tokens, position, _Prefill(cache, owner.to(self.device), position))
        return cache, states[(ends - 1).to(self.device)]

    @torch.no_grad()
    def candidates(self, cache: PackedCache, tokens: Tensor, counts: Tensor) -> tuple[Tensor, _Siblings]:
        """Run the candidates of each of the B sequences.

        tokens: (R,) candidates of all sequences in order; counts: (B,) candidates per sequence, ≥ 1. Returns the last
        hidden states (R, D), after the final norm, and the rows for `commit`.
        """
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        rank = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        siblings = _Siblings(cache, owner.to(self.device), rank.to(self.device))
        return self._run(tokens, cache.lengths[siblings.owner], siblings), siblings

    def commit(self, siblings: _Siblings, chosen: Tensor) -> None:
        """Append one row of each sequence to its cache. chosen: (B,) row indices."""
        cache, sequences = siblings.cache, torch.arange(len(chosen), device=self.device)
        chosen = chosen.to(self.device)
        for layer, (k, v) in enumerate(zip(siblings.keys, siblings.values, strict=True)):
            cache.keys[layer][sequences, :, cache.lengths] = k[chosen]
            cache.values[layer][sequences, :, cache.lengths] = v[chosen]
        cache.lengths += 1

    @torch.no_grad()
    def head(self, states: Tensor) -> Tensor:
        """(N, D) → (N, V) logits."""
        logits: Tensor = self._model.lm_head(states)
        return logits

    def _run(self, tokens: Tensor, position: Tensor, attention: _Attention) -> Tensor:
        states: Tensor = self._model.model(
            input_ids=tokens[None].to(self.device),
            position_ids=position[None],
            use_cache=False,
            packed=attention,
        ).last_hidden_state[0]
        return states
