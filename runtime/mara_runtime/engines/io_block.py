"""The small tensors of a pass in one block of memory: one copy moves them all between host and device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.cuda import Cuda, aligned
from mara_runtime.tensors import Tensor


class Sizes(NamedTuple):
    """Sizes that determine the shapes of a pass; all at least 1."""

    conversations: int
    """B"""
    width: int
    """M"""
    rows: int
    """S"""
    heads: int
    """H0"""
    asked: int
    """N"""
    shown: int
    """Q"""
    agents: int
    """A"""
    widths: tuple[int, int]
    """W1, W2: the same in all passes of an engine"""

    def of(self, shape: Sequence[int | str]) -> tuple[int, ...]:
        """A shape with these sizes filled in; it has no C. One row for each conversation is added to `heads`."""
        values = {"B": self.conversations, "M": self.width, "S": self.rows, "H0": self.heads, "N": self.asked}
        values |= {"Q": self.shown, "A": self.agents, "W1": self.widths[0], "W2": self.widths[1]}
        values |= dict.fromkeys("PR", self.heads + self.conversations)
        return tuple(values[size] if isinstance(size, str) else size for size in shape)


def layout(wanted: Sequence[Tensor], most: Sizes) -> tuple[dict[str, int], int]:
    """Offsets at which tensors lie behind each other, each with room for the largest pass, and bytes of them all."""
    offsets, size_bytes = {}, 0
    for tensor in wanted:
        offsets[tensor.name] = size_bytes
        count = math.prod(most.of(tensor.shape))
        size_bytes = aligned(size_bytes + count * np.dtype(tensor.dtype).itemsize)
    return offsets, size_bytes


class Block:
    """Tensors at fixed offsets, each with room for the largest pass.

    Fixed because a CUDA graph records addresses. Every pass copies the whole block: it has some ten kilobytes, and
    copying them takes as long as copying one byte.
    """

    def __init__(self, cuda: Cuda, wanted: Sequence[Tensor], most: Sizes, read: Sizes | None = None) -> None:
        """most: sizes of the largest pass. read: of the largest whose last tensor the host reads, if not that one."""
        self._cuda = cuda
        self._types = {t.name: np.dtype(t.dtype) for t in wanted}
        self._offsets, self.size_bytes = layout(wanted, most)
        last = wanted[-1]
        host_bytes = (
            self._offsets[last.name] + math.prod((read or most).of(last.shape)) * self._types[last.name].itemsize
        )
        self.device = cuda.allocate(self.size_bytes, "inputs and outputs")
        try:
            self.host = cuda.allocate_host(host_bytes)
        except BaseException:
            cuda.free(self.device)
            raise

    def addresses(self) -> dict[str, int]:
        """Address of each tensor on the device."""
        return {name: self.device + offset for name, offset in self._offsets.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def view(self, name: str, shape: Sequence[int]) -> NDArray[Any]:
        """A tensor in host memory."""
        start, dtype = self._offsets[name], self._types[name]
        return self.host[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory."""
        self._cuda.free(self.device)
        self._cuda.free_host(self.host)
