"""A frozen Hugging Face LLM that runs rows of many sequences, and all candidates of each, in one pass.

Rows are *packed*: a pass is a single sequence of R rows, each with an owner (the sequence whose KV cache it continues)
and a position. The linear layers run without padding; only attention unpacks the rows. It is a registered attention
implementation of transformers, so every supported architecture runs its own modelling code, while the KV cache belongs
to this module: siblings see their owner's cache and themselves, and only the chosen sibling is written to the cache.

No family is named here. What each layer asks of attention (window, scale, soft cap, sinks) is observed once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_export.errors import ModelError
from mara_export.graph.probes import Window, check_attention, probe_window

ATTENTION = "mara-packed"
"""`attn_implementation` to load the model with."""
_BLOCK = 64
"""Rows whose capped scores are in memory at once."""

_attend: ContextVar[Callable[..., Tensor]] = ContextVar("_attend")
"""(layer, q (R, heads, H), k (R, kv_heads, H), v (R, kv_heads, W), mask, settings) → (R, heads, W), in this pass.
Not an argument of the model: some decoders do not hand on what they do not know."""


def _of_layer(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, None]:
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (1, heads, R, H) → (R, heads, H)
    return _attend.get()(int(module.layer_idx), q, k, v, *args, **settings)[None], None


def _mask(*_: Any, mask_function: Callable[..., Tensor], config: Any, **__: Any) -> Window:
    return probe_window(mask_function, config.model_type)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _of_layer)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _mask)


@dataclass(frozen=True)
class _Layer:
    """What a layer asks of attention."""

    scale: float
    softcap: float  # 0: none
    sinks: Tensor | None  # (heads,) scores without a token
    window: int  # tokens that a row sees, itself among them; 0: all
    heads: int
    head_dim: int
    entry: int  # numbers in the KV cache for each token

    @property
    def written_out(self) -> bool:
        """PyTorch's own attention has neither soft cap nor sinks."""
        return bool(self.softcap) or self.sinks is not None

    def capped(self, scores: Tensor) -> Tensor:
        return self.softcap * (scores / self.softcap).tanh() if self.softcap else scores

    def weights(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """Softmax of scores (…, C), float32. heads: the last axes of a tensor that has a number for each head."""
        if self.sinks is None:
            return scores.float().softmax(-1)
        column = self.sinks.view(*heads, 1).to(scores).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], -1).float().softmax(-1)[..., :-1]


class _Attention(Protocol):
    def attend(self, index: int, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, heads, H), k (R, kv_heads, H), v (R, kv_heads, W) of the pass's rows → (R, heads, W)."""


@dataclass
class PackedCache:
    """KV cache of B sequences in progress."""

    lengths: Tensor
    """(B,) int64 entries in use"""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """by layer: (B, kv_heads, C, H)"""
    values: dict[int, Tensor] = field(default_factory=dict)
    """by layer: (B, kv_heads, C, W)"""

    def keep(self, active: Tensor) -> None:
        """Drop all sequences but `active` (int64 indices)."""
        self.keys = {layer: x[active] for layer, x in self.keys.items()}
        self.values = {layer: x[active] for layer, x in self.values.items()}
        self.lengths = self.lengths[active]


@dataclass
class _Prefill:
    """Causal attention over whole prompts, which also makes and fills the cache."""

    cache: PackedCache
    capacity: int
    owner: Tensor  # (R,)
    position: Tensor  # (R,)

    def attend(self, index: int, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths = self.cache.lengths
        longest = int(lengths.max())
        keys, values = (x.new_zeros(len(lengths), x.shape[1], self.capacity, x.shape[2]) for x in (k, v))
        self.cache.keys[index], self.cache.values[index] = keys, values
        keys[self.owner, :, self.position] = k
        values[self.owner, :, self.position] = v
        wide = q.new_zeros(len(keys), longest, *q.shape[1:])
        wide[self.owner, self.position] = q
        groups = q.shape[1] // k.shape[1]
        grid = (  # the causal mask hides the padding on the right
            wide.transpose(1, 2),
            keys[:, :, :longest].repeat_interleave(groups, 1),
            values[:, :, :longest].repeat_interleave(groups, 1),
        )
        if layer.written_out:
            out = _causal_in_blocks(layer, *grid)
        else:
            seen = None
            if 0 < layer.window < longest:
                seen = q.new_ones(longest, longest, dtype=torch.bool).tril().triu(1 - layer.window)
            out = F.scaled_dot_product_attention(*grid, attn_mask=seen, is_causal=seen is None, scale=layer.scale)
        return out.transpose(1, 2)[self.owner, self.position]


def _causal_in_blocks(layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k (B, heads, L, H), v (B, heads, L, W) → (B, heads, L, W)."""
    length, parts = q.shape[2], []
    for first in range(0, length, _BLOCK):
        last = min(first + _BLOCK, length)
        start = max(0, first + 1 - layer.window) if layer.window else 0
        scores = layer.capped((q[:, :, first:last] * layer.scale) @ k[:, :, start:last].transpose(-1, -2))
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(first - start)
        if layer.window:
            seen = seen.triu(first - start + 1 - layer.window)
        weights = layer.weights(scores.masked_fill(~seen, float("-inf")), (layer.heads, 1)).to(q.dtype)
        parts.append(weights @ v[:, :, start:last])
    return torch.cat(parts, 2)


@dataclass
class _Siblings:
    """Attention of sibling candidates: each row sees its owner's cache and itself."""

    cache: PackedCache
    owner: Tensor  # (R,)
    rank: Tensor  # (R,) among the rows of its owner
    keys: dict[int, Tensor] = field(default_factory=dict)  # by layer: (R, kv_heads, H) of these rows
    values: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, index: int, layer: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys[index], self.values[index] = k, v
        owner, rank, lengths = self.owner, self.rank, self.cache.lengths
        longest, most = int(lengths.max()), int(rank.max()) + 1
        past_k, past_v = self.cache.keys[index][:, :, :longest], self.cache.values[index][:, :, :longest]
        B, (R, heads, H), kv_heads = len(lengths), q.shape, k.shape[1]
        groups = heads // kv_heads
        rows = (q * layer.scale).view(R, kv_heads, groups, H)

        def unpack(x: Tensor) -> Tensor:  # (R, kv_heads, groups, ·) → (B, kv_heads, most * groups, ·)
            wide = x.new_zeros(B, most, *x.shape[1:])
            wide[owner, rank] = x
            return wide.transpose(1, 2).reshape(B, kv_heads, most * groups, x.shape[-1])

        def pack(x: Tensor) -> Tensor:  # the inverse of unpack
            return x.view(B, kv_heads, most, groups, x.shape[-1]).transpose(1, 2)[owner, rank]

        slots = torch.arange(longest, device=q.device)
        masked = slots >= lengths[:, None]  # (B, longest)
        if 0 < layer.window <= longest:
            masked |= slots <= lengths[:, None] - layer.window
        scores = layer.capped(pack(unpack(rows) @ past_k.transpose(-1, -2)))
        scores = scores.masked_fill(masked[owner][:, None, None], float("-inf"))
        own = layer.capped((rows * k[:, :, None]).sum(-1, keepdim=True))
        weights = layer.weights(torch.cat([scores, own], -1), (kv_heads, groups)).to(q.dtype)
        out = pack(unpack(weights[..., :longest]) @ past_v) + weights[..., longest:] * v[:, :, None]
        return out.reshape(R, heads, v.shape[-1])


class PackedLM:
    """The passes of a rollout. model: a causal LM loaded with `attn_implementation=ATTENTION`.

    Raises ModelError for attention that packed passes would not compute as the model does.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._name = model, model.config.model_type
        self._decoder = model.get_decoder()
        # in its last layers, unless told to keep all of them
        self._drops_rows = "logits_to_keep" in inspect.signature(self._decoder.forward).parameters
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self._layers: dict[int, _Layer] = {}
        rows = torch.arange(2, device=self.device)
        with torch.no_grad():  # this mask hides nothing; transformers then looks for no ends of texts in the positions
            out = self._call(self._observe, torch.zeros_like(rows), rows, torch.ones_like(rows)[None])
        if not self._layers:
            raise ModelError(f"{self._name}: its attention does not go through transformers' interface")
        if self._decoder is model:  # transformers knows no better
            raise ModelError(f"{self._name}: its decoder cannot be told from its LM head")
        self.hidden_size: int = out[0].shape[-1]
        self._result = type(out)
        table = model.get_input_embeddings().weight
        self._widest = max(max(x.shape) for x in self._decoder.parameters() if x.ndim == 2 and x is not table)

    def sequence_bytes(self, tokens: int, candidates: int) -> int:
        """Memory that a sequence of so many tokens and its candidates take in a pass, roughly."""
        layers = self._layers.values()
        entry = sum(layer.entry for layer in layers)
        attention = max(
            layer.heads * (layer.head_dim + max(candidates, _BLOCK if layer.written_out else 0)) for layer in layers
        )
        rows = candidates * (4 * self.hidden_size + 3 * self._widest + entry)
        numbers = tokens * entry + 4 * tokens * attention + rows
        return int(self.dtype.itemsize * numbers + 8 * self._model.config.vocab_size)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[PackedCache, Tensor]:
        """Run B prompts. room: new tokens to reserve. Returns the cache and the last hidden states (B, D)."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        owner = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
        ends = lengths.cumsum(0)
        position = (torch.arange(len(owner)) - (ends - lengths)[owner]).to(self.device)
        cache = PackedCache(lengths.to(self.device))
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        attention = _Prefill(cache, int(lengths.max()) + room, owner.to(self.device), position)
        return cache, self._run(tokens, position, attention)[(ends - 1).to(self.device)]

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
        for layer, k in siblings.keys.items():
            cache.keys[layer][sequences, :, cache.lengths] = k[chosen]
            cache.values[layer][sequences, :, cache.lengths] = siblings.values[layer][chosen]
        cache.lengths += 1

    @torch.no_grad()
    def head(self, states: Tensor) -> Tensor:
        """(N, D) → (N, V) logits, by the model's own forward: whatever it does after its LM head is done."""
        given = self._result(last_hidden_state=states[None])
        self._decoder.forward = lambda *_, **__: given
        try:
            logits: Tensor = self._model(inputs_embeds=states[None], use_cache=False, return_dict=True).logits[0]
        finally:
            del self._decoder.forward  # that of its class again
        return logits

    def _run(self, tokens: Tensor, position: Tensor, attention: _Attention) -> Tensor:
        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
            return attention.attend(index, self._layers[index], q, k, v)

        # transformers hands on a mask of four axes as it is; nobody reads it
        mask = torch.zeros(1, 1, 1, 1, device=self.device)
        states: Tensor = self._call(attend, tokens.to(self.device), position, mask)[0][0]
        return states

    def _call(self, attend: Callable[..., Tensor], tokens: Tensor, position: Tensor, mask: Tensor) -> Any:
        """What the decoder returns for tokens (R,) at positions (R,), the last hidden states (1, R, D) first."""
        before = _attend.set(attend)
        more = {"logits_to_keep": torch.arange(len(tokens))} if self._drops_rows else {}
        try:
            return self._decoder(
                input_ids=tokens[None], attention_mask=mask, position_ids=position[None], use_cache=False, **more
            )
        finally:
            _attend.reset(before)

    def _observe(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *_: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,  # the mask has it
        **more: Any,
    ) -> Tensor:
        """Note what a layer asks of attention."""
        name = self._name
        window = check_attention(mask, more, index, name)
        if index in self._layers:
            raise ModelError(f"{name}: layer {index} attends more than once in a pass, which is not supported")
        self._layers[index] = _Layer(
            scale=float(q.shape[-1] ** -0.5 if scaling is None else scaling),
            softcap=float(softcap or 0),
            sinks=s_aux,
            window=window.size,
            heads=q.shape[1],
            head_dim=q.shape[-1],
            entry=k.shape[1] * (k.shape[2] + v.shape[2]),
        )
        return q.new_zeros(*q.shape[:2], v.shape[-1])
