"""ONNX Runtime: sizes of the memory of KV entries, and the bindings that refer to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.kv_cache import EngineMemory
from mara_runtime.tensors import ModelShape

FIRST_SLOTS = 32
"""Initial size of a KV cache; until it has its full size, it is a multiple of this."""
MOST_PLACES = 64
_MOST_BINDINGS = 256
"""Kept for each bank."""


def grown(name: str, size: int, slots: int) -> int:
    """Slots that the cache of engine `name` grows to, from `size`, for a pass that needs `slots`.

    On a CPU the cost of attention depends on the cache's size, and growing is a copy: it grows little. On a GPU the
    opposite holds.
    """
    least = size + size // 16 if name == "cpu" else 2 * size
    return rounded(max(slots, least))


def rounded(slots: int) -> int:
    """The next size that a cache may have."""
    return -(-slots // FIRST_SLOTS) * FIRST_SLOTS


@dataclass(frozen=True)
class Binding:
    """A binding for passes of one shape, and the arrays that it reads and writes."""

    binding: Any
    options: Any
    """of the run"""
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    uploads: Sequence[tuple[Any, NDArray[Any]]] = ()
    """memory on a device, and the block of all inputs that is copied to it before a pass"""
    downloads: Sequence[tuple[Any, NDArray[Any]]] = ()
    """memory on a device, and the block of all outputs that it is copied to after a pass"""


BindingKey = tuple[int, int, int, int, int, int, int]
"""First place in the bank and the one behind the last, M, S, H0, N, Q"""


@dataclass(frozen=True)
class Slab:
    """Memory of a bank's places."""

    entries: Sequence[NDArray[Any]]
    """of each group of caches (2 · count, B, KV heads, slots, head dim), keys and values in turn: the memory itself"""
    values: Sequence[Any]
    """(B, KV heads, slots, head dim) of each cache and part, as ONNX Runtime sees them"""
    bindings: dict[BindingKey, Binding] = field(default_factory=dict)
    """they refer to the entries, and go with them; the oldest first"""

    @property
    def slots(self) -> int:
        """Of each place."""
        return int(self.entries[0].shape[3])

    @property
    def room(self) -> int:
        """Places that it has memory for."""
        return int(self.entries[0].shape[1])

    def keep(self, key: BindingKey, binding: Binding) -> None:
        """Keep a binding for further passes, instead of the oldest where there are many."""
        if len(self.bindings) >= _MOST_BINDINGS:
            del self.bindings[next(iter(self.bindings))]
        self.bindings[key] = binding


def blank(shape: ModelShape, dtype: str, places: int, slots: int) -> list[NDArray[Any]]:
    """Entries of a new slab: zeros, as masked slots take part in attention with weight 0, and 0 × NaN is NaN."""
    sizes = [(2 * group.count, places, group.kv_heads, slots, group.head_dim) for group in shape.caches]
    return [np.zeros(size, dtype) for size in sizes]


@dataclass(eq=False)
class Bank:
    """Places whose texts have up to `limit` slots."""

    limit: int
    slab: Slab
    gaps: int = 0
    """places without a pass that passes have covered since they were last put aside"""


class OrtMemory(EngineMemory, Protocol):
    """KV entries where a session's passes read and write them."""

    device: str
    """in ONNX Runtime's words"""

    @property
    def places(self) -> Sequence[Any]:
        """See `CacheMemory`; `seat` is a place's bank, and where it lies there."""

    @property
    def banks(self) -> list[Bank]:
        """Those that hold a place."""

    @property
    def slots(self) -> int:
        """Allocated now for the first place."""

    def put_together(self, bank: Bank, taking: Sequence[Any]) -> list[Any]:
        """The places that take part in passes, in their order in the bank, where that pays side by side."""
