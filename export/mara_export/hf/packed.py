"""The weights in a checkpoint's files by their names in the model, matrices of small integers among them.

Layouts of such a matrix W (N, K), whose blocks along K share a scale, in words of 32 bits that hold n = 32 / bits:

AWQ                 integers (K, N / 8), a word's columns in the order 0 2 4 6 1 3 5 7; so zero points (blocks, N / 8);
                    scales (blocks, N). https://github.com/casper-hansen/AutoAWQ (modules/linear/gemm.py)
GPTQ                integers (K / n, N), zero points (blocks, N / n), scales (blocks, N), in order.
                    https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear)
compressed-tensors  integers (N, K / n), zero points (N / n, blocks), scales (N, blocks), in order.
                    https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mara_export.errors import ModelError
from mara_export.hf.packing import Packing
from mara_export.targets import BLOCK_SIZES, COLUMN

_WORD = 32
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the columns in order are."""
_PARTS = {
    "awq": ("qweight", "scales", "qzeros", "g_idx"),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}
"""Names in place of `weight`: integers, scales, zero points, the block of each column."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix (N, K) of small integers, whose blocks along K have a scale, and maybe a zero point, each."""

    bits: int
    integers: NDArray[np.uint8]
    """(N, K)"""
    scales: NDArray[np.float32]
    """(N, blocks)"""
    zero_points: NDArray[np.uint8] | None
    """(N, blocks); None: all 2^(bits - 1)"""

    @property
    def block_size(self) -> int:
        """Weights along K that share a scale."""
        return int(self.integers.shape[1] // self.scales.shape[1])

    def dequantised(self) -> NDArray[np.float32]:
        """(N, K): what the integers stand for. Exact where scales have at most 16 bits."""
        rows, blocks = self.scales.shape
        numbers = self.integers.reshape(rows, blocks, -1).astype(np.float32)
        numbers -= 2 ** (self.bits - 1) if self.zero_points is None else self.zero_points[:, :, None]
        numbers *= self.scales[:, :, None]
        return numbers.reshape(rows, -1)

    def in_blocks_of(self, size: int) -> PackedMatrix:
        """The same matrix in smaller blocks: of `size`, which divides those that it has."""
        times = self.block_size // size
        zeros = None if self.zero_points is None else np.repeat(self.zero_points, times, axis=1)
        return replace(self, scales=np.repeat(self.scales, times, axis=1), zero_points=zeros)

    def with_heads_swapped(self, axis: int, outer: int, inner: int) -> PackedMatrix:
        """Heads along N (0) or K (1) in the order (inner, outer), not (outer, inner). Blocks lie within heads."""

        def swapped(array: NDArray[Any]) -> NDArray[Any]:
            apart = array.reshape(*array.shape[:axis], outer, inner, -1, *array.shape[axis + 1 :])
            return np.ascontiguousarray(apart.swapaxes(axis, axis + 1)).reshape(array.shape)

        zeros = None if self.zero_points is None else swapped(self.zero_points)
        return replace(self, integers=swapped(self.integers), scales=swapped(self.scales), zero_points=zeros)

    @staticmethod
    def joined(parts: Sequence[PackedMatrix]) -> PackedMatrix:
        """One matrix of several with the same K, blocks and use of zero points, along N."""
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        return replace(
            parts[0],
            integers=np.concatenate([part.integers for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zero_points=np.concatenate(zeros) if zeros else None,
        )


class StoredWeights(Mapping[str, Tensor]):
    """A checkpoint's weights, each read when it is asked for, packed ones as float32.

    Raises SafetensorError and OSError for damaged files.
    """

    def __init__(self, folder: Path, packing: Packing | None, rename: Callable[[str], str | None] = str) -> None:
        """packing: None if all are stored as they are; rename: gives the name in the model of one in the files, None to
        leave it out. Raises ModelError for a packed matrix that is not complete.
        """
        self.packing = packing
        self._files: dict[str, tuple[Path, str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                names = [*file.keys()]
            own = [*map(rename, names)]
            self._files.update({name: (path, stored) for name, stored in zip(own, names, strict=True) if name})
        self._parts = () if packing is None else _PARTS[packing.method]
        ends = tuple(f".{part}" for part in self._parts)
        found = [name.removesuffix(ends[0]) for name in self._files if name.endswith(ends[:1])]
        self._shapes = {f"{module}.weight": self._checked(module) for module in found}
        of_matrices = {f"{module}{end}" for module in found for end in ends}
        self._plain = [name for name in self._files if name not in of_matrices]

    def __iter__(self) -> Iterator[str]:
        yield from self._plain
        yield from self._shapes

    def __len__(self) -> int:
        return len(self._plain) + len(self._shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._shapes:
            return torch.from_numpy(self.packed(name).dequantised())
        with self._open(name) as (file, stored):
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def is_packed(self, name: str) -> bool:
        """Is it a matrix of small integers?"""
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, without reading it."""
        return self._shapes[name] if name in self._shapes else self._shape(name)

    def dtype(self, name: str) -> str:
        """Of one that is not packed, as safetensors names it."""
        with self._open(name) as (file, stored):
            return str(file.get_slice(stored).get_dtype())

    def first(self, name: str, count: int) -> Tensor:
        """The first `count` numbers of a weight, or as many as it has, in float32."""
        rows = -(-count // max(math.prod(self.shape(name)[1:]), 1))
        if name in self._shapes:
            some = torch.from_numpy(self.packed(name, rows).dequantised())
        else:
            with self._open(name) as (file, stored):
                part = file.get_slice(stored)
                some = part[:rows] if part.get_shape() else file.get_tensor(stored)
        return some.flatten()[:count].float()

    def packed(self, name: str, rows: int | None = None) -> PackedMatrix:
        """A matrix (N, K) as it is stored, or its first rows. Raises KeyError for one of floats."""
        packing, (count, _) = self._packing, self._shapes[name]
        taken = count if rows is None else min(rows, count)
        parts = [f"{name.removesuffix('weight')}{part}" for part in self._parts]
        if packing.method == "awq":
            found = self._unpacked(self._read(parts[0], 1, -(-taken // self._in_a_word)))[:, :taken].T
        elif packing.method == "gptq":
            found = self._unpacked(self._read(parts[0], 1, taken).T)
        else:
            found = self._unpacked(self._read(parts[0], 0, taken))
        scales = self._read(parts[1], 0, taken) if self._by_row else self._read(parts[1], 1, taken).T
        zeros = None if packing.symmetric else np.ascontiguousarray(self._zero_points(parts[2], taken))
        return PackedMatrix(packing.bits, np.ascontiguousarray(found), np.ascontiguousarray(scales), zeros)

    def is_idle(self, name: str) -> bool:
        """Is it the bias of a packed matrix, all zeros? AutoGPTQ writes those for models without biases, too."""
        module, _, own = name.rpartition(".")
        return own == "bias" and f"{module}.weight" in self._shapes and not self[name].any()

    @property
    def _packing(self) -> Packing:
        assert self.packing is not None
        return self.packing

    @property
    def _in_a_word(self) -> int:
        return _WORD // self._packing.bits

    @property
    def _by_row(self) -> bool:
        """Are words, scales and zero points of a row of the matrix in a row, too? Else in a column."""
        return self._packing.method == "compressed-tensors"

    def _zero_points(self, name: str, rows: int) -> NDArray[np.uint8]:
        """(N, blocks), of the first N = rows."""
        packing, words = self._packing, -(-rows // self._in_a_word)
        found = self._read(name, 0, words).T if self._by_row else self._read(name, 1, words)
        if packing.zeros_less_one:  # of whole words, as it was taken off: a zero point of 0 has borrowed from the next
            found = found + np.uint32(sum(1 << packing.bits * place for place in range(self._in_a_word)))
        zeros: NDArray[np.uint8] = self._unpacked(found)[:, :rows].T
        return zeros

    def _unpacked(self, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Numbers (R, W · n) of words (R, W) that hold n each."""
        octets = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
        if self._packing.bits == 4:
            octets = np.stack([octets & 15, octets >> 4], axis=-1)
        numbers: NDArray[np.uint8] = octets.reshape(*words.shape, self._in_a_word)
        if self._packing.method == "awq":
            numbers = np.take(numbers, _AWQ_COLUMNS, axis=-1)
        rows: NDArray[np.uint8] = numbers.reshape(len(words), -1)
        return rows

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file that has a weight, and its name there."""
        path, stored = self._files[name]
        with safe_open(path, framework="pt") as file:
            yield file, stored

    def _shape(self, name: str) -> tuple[int, ...]:
        with self._open(name) as (file, stored):
            return tuple(file.get_slice(stored).get_shape())

    def _read(self, name: str, axis: int, count: int) -> NDArray[Any]:
        """The first part of a tensor along an axis: words as uint32, numbers as float32."""
        with self._open(name) as (file, stored):
            part = file.get_slice(stored)
            array: Tensor = part[:count] if axis == 0 else part[:, :count]
        return array.numpy().view(np.uint32) if array.dtype == torch.int32 else array.float().numpy()

    def _checked(self, module: str) -> tuple[int, int]:
        """The shape (N, K) of a packed matrix. Raises ModelError where its parts do not fit each other."""
        packing, in_a_word = self._packing, self._in_a_word
        integers, scales, zeros, order = (f"{module}.{part}" for part in self._parts[:4])
        wanted = [integers, scales, *([] if self._by_row and packing.symmetric else [zeros])]
        if lost := [name for name in wanted if name not in self._files]:
            raise ModelError(f"{packing.model} is not a whole causal LM: it lacks {lost[0]}")
        shapes = {name: self._shape(name)[:: 1 if self._by_row else -1] for name in wanted}  # of W or its parts
        count, width = (*shapes[integers], 0, 0)[:2]
        if packing.method == "awq":
            count *= in_a_word
        else:
            width *= in_a_word
        size = width if packing.block_size == COLUMN else packing.block_size
        if not width or width % size or width % min(BLOCK_SIZES):
            raise ModelError(
                f"{packing.model}: its {integers} has rows of {width} weights, which are not whole blocks of "
                f"{size if width % size else min(BLOCK_SIZES)}: such a checkpoint is not read"
            )
        blocks = width // size
        fit = {integers: shapes[integers][:2], scales: (count, blocks), zeros: (-(-count // in_a_word), blocks)}
        unfit = {name for name in wanted if shapes[name] != fit[name]}
        if odd := sorted(unfit | {name for name in wanted if name != scales and self.dtype(name) != "I32"}):
            raise ModelError(
                f"{packing.model}: its {odd[0]} is not stored as {packing.method} in {packing.bits} bits and blocks of "
                f"{packing.block_size} is: its quantization_config and its weights do not belong together"
            )
        if packing.symmetric and zeros in wanted and (self._zero_points(zeros, count) != 1 << packing.bits - 1).any():
            raise ModelError(f"{packing.model}: its {zeros} has zero points, but its config.json says symmetric")
        if order in self._files and not np.array_equal(self._read(order, 0, width), np.arange(width) // size):
            raise ModelError(
                f"{packing.model} is quantised with weights out of order ({order}), which is not read: take a "
                "checkpoint without act-order"
            )
        return count, width
