"""A frozen Hugging Face LLM that runs rows of many sequences, and all candidates of each, in one pass.

Rows are *packed*: a pass is one sequence of R rows, each with an owner (whose KV cache it continues) and a position, so
the linear layers run on rows that exist, and nothing is padded. Attention alone unpacks them. It is put into the model
by a public door of transformers, a registered attention implementation, so every architecture that this project
exports trains through its own code, and the KV cache belongs to us: siblings see their owner's cache and themselves,
and only the chosen one's entry is ever written.
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
"""Name under which the attention is registered with transformers: load the model with it."""


class _Attention(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (R, heads, H), k, v (R, kv_heads, H) of the pass's rows → (R, heads, H)."""


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, *, scaling: float, packed: _Attention, **_: Any
) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, heads, R, H) → (R, heads, H)
    out = packed.attend(module.layer_idx, q, k, v, scaling)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


@dataclass
class Sequences:
    """KV cache of B sequences in progress."""

    keys: list[Tensor]
    """a layer: (B, kv_heads, C, H)"""
    values: list[Tensor]
    lengths: Tensor
    """(B,) int64 entries in use"""

    def keep(self, alive: Tensor) -> None:
        """Go on with the sequences `alive` (int64 indices) alone."""
        self.keys = [x[alive] for x in self.keys]
        self.values = [x[alive] for x in self.values]
        self.lengths = self.lengths[alive]


@dataclass
class _Prefill:
    """Causal attention of whole prompts, which also fills their cache."""

    cache: Sequences
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
        out = F.scaled_dot_product_attention(  # what lies right of a prompt's end is not seen: the mask is causal
            wide.transpose(1, 2),
            keys[:, :, :longest].repeat_interleave(groups, 1),
            values[:, :, :longest].repeat_interleave(groups, 1),
            is_causal=True,
            scale=scale,
        )
        return out.transpose(1, 2)[self.owner, self.position]


@dataclass
class _Siblings:
    """Attention of candidates: each row sees its owner's cache and itself."""

    cache: Sequences
    owner: Tensor  # (R,)
    place: Tensor  # (R,) among the rows of its owner
    keys: list[Tensor] = field(default_factory=list)  # a layer: (R, kv_heads, H) of these rows
    values: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.keys.append(k)
        self.values.append(v)
        owner, place, lengths = self.owner, self.place, self.cache.lengths
        longest, most = int(lengths.max()), int(place.max()) + 1
        past_k, past_v = self.cache.keys[layer][:, :, :longest], self.cache.values[layer][:, :, :longest]
        B, (R, heads, H), kv_heads = len(lengths), q.shape, k.shape[1]
        groups = heads // kv_heads
        rows = (q * scale).view(R, kv_heads, groups, H)

        def unpack(x: Tensor) -> Tensor:  # (R, kv_heads, groups, ·) → (B, kv_heads, most * groups, ·)
            wide = x.new_zeros(B, most, *x.shape[1:])
            wide[owner, place] = x
            return wide.transpose(1, 2).reshape(B, kv_heads, most * groups, x.shape[-1])

        def pack(x: Tensor) -> Tensor:  # and back
            return x.view(B, kv_heads, most, groups, x.shape[-1]).transpose(1, 2)[owner, place]

        unseen = (torch.arange(longest, device=q.device) >= lengths[:, None])[owner]  # (R, longest)
        scores = pack(unpack(rows) @ past_k.transpose(-1, -2)).masked_fill(unseen[:, None, None], float("-inf"))
        own = (rows * k[:, :, None]).sum(-1, keepdim=True)
        weights = torch.cat([scores, own], -1).float().softmax(-1).to(q.dtype)
        out = pack(unpack(weights[..., :longest]) @ past_v) + weights[..., longest:] * v[:, :, None]
        return out.reshape(R, heads, H)


class PackedLM:
    """The passes that a rollout needs. model: a causal LM loaded with `attn_implementation=ATTENTION`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.hidden_size: int = model.config.hidden_size
        config = model.config
        self._kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Sequences, Tensor]:
        """Run B prompts. room: tokens that may follow. Returns their cache and the last states (B, D)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        owner = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        ends = lengths.cumsum(0)
        position = torch.arange(len(owner)) - (ends - lengths)[owner]
        shape = (len(prompts), self._kv_heads, int(lengths.max()) + room, self._head_dim)
        layers = range(self._model.config.num_hidden_layers)
        keys, values = ([torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in layers] for _ in "kv")
        cache = Sequences(keys, values, lengths.to(self.device))
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        position = position.to(self.device)
        states = self._run(tokens, position, _Prefill(cache, owner.to(self.device), position))
        return cache, states[(ends - 1).to(self.device)]

    @torch.no_grad()
    def candidates(self, cache: Sequences, tokens: Tensor, counts: Tensor) -> tuple[Tensor, _Siblings]:
        """Run, after each of the B sequences, its candidates.

        tokens: (R,) of all of them, by owner; counts: (B,) how many each has, ≥ 1. Returns the last hidden states
        (R, D), after the final norm, and what `settle` needs.
        """
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        siblings = _Siblings(cache, owner.to(self.device), place.to(self.device))
        return self._run(tokens, cache.lengths[siblings.owner], siblings), siblings

    def settle(self, siblings: _Siblings, chosen: Tensor) -> None:
        """Write the entry of one row of each sequence, (B,) indices of rows, into the cache."""
        cache, everyone = siblings.cache, torch.arange(len(chosen), device=self.device)
        chosen = chosen.to(self.device)
        for layer, (k, v) in enumerate(zip(siblings.keys, siblings.values, strict=True)):
            cache.keys[layer][everyone, :, cache.lengths] = k[chosen]
            cache.values[layer][everyone, :, cache.lengths] = v[chosen]
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
