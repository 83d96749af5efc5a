"""ONNX Runtime: the memory of KV entries, and the bindings that refer to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.errors import EngineError

FIRST_SLOTS = 32
"""Initial size of the KV cache; until it has its full size, it is a multiple of this."""


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


BindingKey = tuple[int, int, int]
"""S, H0, N"""


class CpuMemory:
    """KV entries in host memory; see `CacheMemory`."""

    name, device = "cpu", "cpu"

    def __init__(self, shape: tensors.ModelShape, dtype: str, capacity: int) -> None:
        self._shape, self._dtype, self._capacity = shape, dtype, capacity
        self.bindings: dict[BindingKey, Binding]
        """they refer to the entries, and go with them"""
        self._allocate(min(FIRST_SLOTS, capacity))

    def _allocate(self, slots: int, entries: Iterable[NDArray[Any]] = ()) -> None:
        """Allocate memory of that size; entries: what it begins with, by layer and part."""
        import onnxruntime as ort

        shape = self._shape
        # zeroed: masked slots take part in attention with weight 0, and 0 × NaN is NaN
        slab = np.zeros((2 * shape.num_layers, 1, shape.num_kv_heads, slots, shape.head_dim), self._dtype)
        for layer, kept in zip(slab, entries, strict=False):
            layer[:, :, : kept.shape[2]] = kept
        values = [ort.OrtValue.ortvalue_from_numpy(layer, self.device, 0) for layer in slab]
        self._slab, self.values, self.bindings = slab, values, {}  # all or nothing: it may be interrupted

    @property
    def entries(self) -> NDArray[Any]:
        """(2L, 1, KV heads, slots, head dim) keys and values of each layer in turn: the memory itself."""
        return self._slab

    @property
    def capacity(self) -> int:
        """See `CacheMemory`."""
        return self._capacity

    @property
    def slots(self) -> int:
        """Allocated now."""
        return int(self._slab.shape[3])

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`."""
        size = min(rounded(slots), self._capacity)
        if not size <= self.slots < 2 * size:
            self._allocate(size, self._slab[:, :, :, :kept])

    def grow(self, slots: int) -> None:
        """See `CacheMemory`."""
        if slots > self._capacity:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self._capacity}")
        if slots > self.slots:
            self._allocate(min(grown(self.name, self.slots, slots), self._capacity), self._kept())

    def _kept(self) -> Iterable[NDArray[Any]]:
        return self._slab

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        self._slab[:, :, :, target] = self._slab[:, :, :, source]

    def zero(self) -> None:
        """See `CacheMemory`; the cache has its initial size again."""
        self._allocate(min(FIRST_SLOTS, self._capacity))
