"""Recognising, on random numbers, what a model's own functions and modules compute."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mara_export.errors import ModelError
from mara_runtime.tensors import CacheGroup

Attributes = dict[str, Any]
"""Of a node of the trace."""


class Make(Protocol):
    """Makes a node in the trace."""

    def __call__(
        self, op: str, inputs: Sequence[Tensor | None], attributes: Attributes, shapes: Sequence[Sequence[Any]]
    ) -> tuple[Tensor, ...]:
        """Its outputs, float32, of these shapes."""


_UNREAD = {
    "cache_position", "deterministic", "dropout", "is_causal", "output_attentions", "position_embeddings",
    "position_ids", "use_cache",
}  # fmt: skip
"""Arguments of transformers' attention functions that change nothing where there is neither training nor its cache."""
_FAR = 1 << 17
"""A row at which every window has ended: windows are read off the mask there."""
LAYOUTS = ("halves", "pairs", "once")
"""Of a table of angles: a b a b, a a b b, or a b alone."""


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, layout: str) -> Tensor:
    """x (…, H) turned in its first W by cos, sin (…, W), or (…, W / 2) where each is there once."""
    half = cos.shape[-1] // (1 if layout == "once" else 2)
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    c, s = (t[..., ::2] if layout == "pairs" else t[..., :half] for t in (cos, sin))
    low, high = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    first, second = low * c - high * s, high * c + low * s
    both = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((both, rest), -1)


def said_once(table: Any, layout: str) -> Any:
    """The angles (positions, W / 2) of a table (positions, W) of that layout, without repetitions."""
    return {"halves": table[:, : table.shape[1] // 2], "pairs": table[:, ::2], "once": table}[layout]


def probe_rotary(function: Callable[..., Any], width: int, head: int) -> Attributes | None:
    """How a function turns x (1, heads, S, head) by cos, sin (1, S, width); None: in no way that is known here."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 2, 3, head, generator=generator)
    pair = "q" in inspect.signature(function).parameters
    for layout, interleaved in itertools.product(LAYOUTS, (False, True)):
        angles = torch.randn(1, 3, width if layout == "once" else width // 2, generator=generator)
        if layout != "once":
            angles = angles.repeat_interleave(2, -1) if layout == "pairs" else torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        try:
            wanted = [_turned(t, cos[:, None], sin[:, None], interleaved, layout) for t in (x, y)]
            found = function(x, y, cos, sin) if pair else [function(t, cos, sin) for t in (x, y)]
            same = all(
                a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True)
            )
        except (RuntimeError, IndexError, ValueError, TypeError):  # sizes that it does not take
            continue
        if same:
            return {"interleaved": int(interleaved), "layout": layout}
    return None


class Window:
    """What a mask lets a row see, in place of the mask: its last `size` rows, itself among them, or all (0)."""

    ndim, shape = 4, (1, 1, 1, 1)

    def __init__(self, size: int) -> None:
        self.size = size


def probe_window(mask_function: Callable[..., Tensor], name: str) -> Window:
    """Of transformers' predicate for a mask, (batch, head, row, column) → visible.

    name: of the model, for messages. Raises ModelError for what is neither causal nor a window.
    """
    sizes = set()
    for row in (_FAR, _FAR + 1, _FAR + 777):
        zero, columns = torch.tensor(0), torch.arange(row + 2)
        seen = mask_function(zero, zero, torch.tensor(row), columns).nonzero()[:, 0]
        first, last = int(seen[0]), int(seen[-1])
        if last != row or len(seen) != last - first + 1:
            raise ModelError(f"{name}: a mask that is neither causal nor a window is not supported")
        sizes.add(0 if first == 0 else row - first + 1)
    if len(sizes) != 1:
        raise ModelError(f"{name}: a window that changes from row to row, as in chunks, is not supported")
    return Window(sizes.pop())


def check_attention(mask: Any, arguments: Attributes, layer: int, name: str) -> Window:
    """What the mask of a layer's attention lets a row see.

    arguments: those of transformers' attention function that its caller does not read. name: of the model, for
    messages. Raises ModelError for another mask, and for arguments that may change what is computed.
    """
    if not isinstance(mask, Window):
        raise ModelError(f"{name}: layer {layer} has a mask of its own, which is not supported")
    if odd := [n for n, value in arguments.items() if value is not None and value is not False and n not in _UNREAD]:
        raise ModelError(f"{name}: the attention of layer {layer} takes {odd[0]}, which is not supported")
    return mask


def group_caches(attended: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[tuple[CacheGroup, ...], dict[int, int]]:
    """The KV caches of a model, and the number of each layer's: layers that attend to the same memory have one cache.

    attended: keys and values (1, kv_heads, S, head_dim) of each layer in one pass, all still in memory.
    """
    sharing: dict[Any, list[int]] = {}
    for layer, parts in attended.items():
        where = tuple((part.data_ptr(), part.shape, part.stride()) for part in parts)
        sharing.setdefault(where, []).append(layer)
    by_size: dict[tuple[int, int], list[list[int]]] = {}
    for layers in sharing.values():
        keys, _ = attended[layers[0]]
        by_size.setdefault((keys.shape[1], keys.shape[3]), []).append(layers)
    number, cache_of = itertools.count(), {}
    for each in by_size.values():
        for layers in each:
            cache_of.update(dict.fromkeys(layers, next(number)))
    return tuple(CacheGroup(len(each), *size) for size, each in by_size.items()), cache_of


@torch.no_grad()
def probe_norm(module: Any) -> Attributes | None:
    """Epsilon and offset of a root mean square norm, y = x / rms · (offset + weight); None for anything else.

    One without a weight has offset 1.
    """
    epsilon = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    sizes = {name: weight.dim() for name, weight in module.named_parameters()}
    if [*module.children()] or sizes not in ({"weight": 1}, {}) or not isinstance(epsilon, float):
        return None
    generator = torch.Generator().manual_seed(0)
    twin = copy.copy(module)
    values = torch.randn(16, generator=generator) if sizes else torch.zeros(16)
    twin._parameters = {"weight": torch.nn.Parameter(values)} if sizes else {}
    fits = {0, 1}
    for scale in (1.0, 0.1 * epsilon**0.5):  # the second shows the epsilon
        x = scale * torch.randn(3, 16, generator=generator)
        unit = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        try:
            y = type(module).forward(twin, x)
        except (RuntimeError, TypeError, AttributeError):
            return None
        fits = {offset for offset in fits if torch.allclose(y, unit * (offset + values), rtol=1e-4, atol=1e-6)}
    return {"epsilon": epsilon, "offset": fits.pop()} if len(fits) == 1 else None
