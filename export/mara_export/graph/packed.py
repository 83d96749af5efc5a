"""Matrices of small integers that a checkpoint has, on their way to a graph that keeps them.

In a graph such a matrix is a weight of floats, like any other, whose tensor knows the integers. Passes that turn,
rearrange or join matrices do the same to these; `read` gives the floats, for what is kept in floating point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mara_export.graph.nodes import Heads, dims
from mara_export.graph.weights import lazy
from mara_export.hf.packed import PackedMatrix
from mara_export.hf.weights import Weights
from mara_export.targets import BLOCK_SIZES, COLUMN

_META = "mara.packed"


@dataclass(frozen=True)
class Packed:
    """A matrix (N, K) that is read when it is asked for."""

    shape: tuple[int, int]
    block_size: int
    read: Callable[[], PackedMatrix]

    def in_blocks_of(self, size: int) -> Packed:
        """In blocks of `size`, or smaller ones that divide both; COLUMN: as they are."""
        smaller = self.block_size if size == COLUMN else math.gcd(self.block_size, size)
        return replace(self, block_size=smaller, read=lambda: self.read().in_blocks_of(smaller))

    def can_swap(self, heads: Heads) -> bool:
        """Can heads along K change their order? Blocks must lie within heads."""
        return math.gcd(self.block_size, heads.size) >= min(BLOCK_SIZES)

    def with_heads_swapped(self, axis: int, heads: Heads) -> Packed:
        """With the heads along N (0) or K (1) in the order (groups, kv_heads)."""
        within = self.in_blocks_of(heads.size) if axis else self
        return replace(within, read=lambda: within.read().with_heads_swapped(axis, heads.kv, heads.groups))

    @staticmethod
    def joined(parts: Sequence[Packed]) -> Packed:
        """Several with the same K and blocks as one, along N."""
        count, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        read = [part.read for part in parts]
        return replace(parts[0], shape=(count, width), read=lambda: PackedMatrix.joined([each() for each in read]))

    def tensor(self, name: str) -> ir.LazyTensor:
        """A weight (K, N), as MatMul takes it."""
        tensor = lazy(name, self.shape[::-1], lambda: np.ascontiguousarray(self.read().dequantised().T))
        tensor.meta[_META] = self
        return tensor


def keep_integers(graph: ir.Graph, weights: Weights, block_size: int) -> None:
    """Let the graph's weights know their integers, in blocks of `block_size` or smaller ones."""
    assert weights.packing is not None
    for value in graph.initializers.values():
        read = weights.packed(str(value.name))
        if read is not None:
            assert value.const_value is not None
            count, width = dims(value)
            own = width if weights.packing.block_size == COLUMN else weights.packing.block_size
            value.const_value.meta[_META] = Packed((count, width), own, read).in_blocks_of(block_size)


def packed_of(weight: ir.Value | None) -> Packed | None:
    """The integers of a weight; None if it has none."""
    tensor = None if weight is None else weight.const_value
    found: Packed | None = None if tensor is None else tensor.meta.get(_META)
    return found
