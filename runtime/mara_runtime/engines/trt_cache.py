"""The KV entries of the TensorRT engine on the device: those of all places, for one engine file.

A cache's keys, or values, are one tensor (places, NKV, C, H), so a pass over the places from `low` on begins at an
offset. Present is written over past, or, in engines of TensorRT before 10.15, into a second copy that swaps roles with
the first after each pass: then each place has a *side*, the copy that its next pass reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mara_runtime import tensors
from mara_runtime.engines.cuda import ALIGNMENT, Cuda, aligned
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts


@dataclass(frozen=True)
class _Part:
    """Where the entries of a group of caches lie, in bytes from the beginning of a side."""

    start: int
    tensors: int
    heads: int
    entry_bytes: int
    """of one head and slot"""
    slots: int
    places: int

    @property
    def row_bytes(self) -> int:
        """Of one head."""
        return self.slots * self.entry_bytes

    @property
    def place_bytes(self) -> int:
        """Of a place's entries in one tensor."""
        return self.heads * self.row_bytes

    @property
    def tensor_bytes(self) -> int:
        """From one tensor to the next."""
        return aligned(self.places * self.place_bytes)

    @property
    def end(self) -> int:
        """Behind the last tensor."""
        return self.start + self.tensors * self.tensor_bytes

    def offsets(self, place: int) -> Iterator[int]:
        """Of a place's entries in each tensor."""
        begin = self.start + place * self.place_bytes
        return (begin + i * self.tensor_bytes for i in range(self.tensors))


def _laid_out(shape: tensors.ModelShape, dtype: str, slots: int, places: int) -> list[_Part]:
    parts: list[_Part] = []
    for group in shape.caches:
        start, entry_bytes = parts[-1].end if parts else 0, group.head_dim * tensors.CACHE_BYTES[dtype]
        parts.append(_Part(start, 2 * group.count, group.kv_heads, entry_bytes, slots, places))
    return parts


class DeviceCache:
    """Zero at first."""

    def __init__(
        self, cuda: Cuda, shape: tensors.ModelShape, dtype: str, index: int, facts: EngineFacts, places: int
    ) -> None:
        """index: of the engine file. Raises EngineError."""
        self.index, self.places = index, places
        self._cuda, self._names = cuda, tensors.kv_names(shape.num_caches)
        self._copies = 1 if facts.in_place else 2
        self._sides = [0] * places
        self._parts = _laid_out(shape, dtype, facts.slots, places)
        if places > 1 and any(part.place_bytes % ALIGNMENT for part in self._parts):  # heads of fewer than 8 numbers
            raise EngineError(
                f"the engine's entries of {facts.slots} slots take one conversation: they are not aligned"
            )
        self._side_bytes = self._parts[-1].end
        self.size_bytes = self._copies * self._side_bytes
        what = f"the KV cache of {facts.slots} slots" + (f" for {places} conversations" if places > 1 else "")
        self._base = cuda.allocate(self.size_bytes, what)
        try:
            cuda.zero(self._base, self.size_bytes)
            cuda.wait()
        except BaseException:
            self.close()
            raise

    def addresses(self, side: int, low: int) -> dict[str, int]:
        """Where passes over the places from `low` on read pasts and write presents. side: the copy that is read."""
        source, target = self._at(side), self._at((side + 1) % self._copies)
        offsets = (offset for part in self._parts for offset in part.offsets(low))
        addresses: dict[str, int] = {}
        for (past, present), offset in zip(self._names, offsets, strict=True):
            addresses |= {past: source + offset, present: target + offset}
        return addresses

    def _at(self, side: int) -> int:
        """Address of a copy."""
        return self._base + side * self._side_bytes

    def settle(self, low: int, high: int) -> int:
        """Bring these places to one side for a pass, which they do by copying; returns the side."""
        sides = self._sides[low:high]
        side = max(set(sides), key=sides.count)
        for place in range(low, high):
            if self._sides[place] != side:
                for part in self._parts:
                    target, source = (self._at(each) + next(part.offsets(place)) for each in (side, 1 - side))
                    pitch = part.tensor_bytes
                    self._cuda.copy_rows(target, pitch, source, pitch, part.place_bytes, part.tensors)
                self._sides[place] = side
        return side

    def turn(self, low: int, high: int) -> None:
        """A pass over these places has run."""
        if self._copies > 1:
            self._sides[low:high] = [1 - side for side in self._sides[low:high]]

    def take_over(self, other: DeviceCache) -> None:
        """Copy what another cache has, as far as there are slots for it."""
        for place in range(min(self.places, other.places)):
            self._copy(place, other, place, min(self._parts[0].slots, other._parts[0].slots))
        self._cuda.wait()

    def copy(self, target: int, source: int, count: int) -> None:
        """Make the first `count` entries of a place those of another."""
        self._copy(target, self, source, count)

    def _copy(self, target: int, other: DeviceCache, source: int, count: int) -> None:
        """Copy the first `count` entries of each head."""
        begin, end = other._at(other._sides[source]), self._at(self._sides[target])
        for old, new in zip(other._parts, self._parts, strict=True):
            for from_, to in zip(old.offsets(source), new.offsets(target), strict=True):
                width = count * new.entry_bytes
                self._cuda.copy_rows(end + to, new.row_bytes, begin + from_, old.row_bytes, width, new.heads)

    def zero(self, place: int) -> None:
        """Zero all slots of a place."""
        for side in range(self._copies):
            for part in self._parts:
                for offset in part.offsets(place):
                    self._cuda.zero(self._at(side) + offset, part.place_bytes)
        self._cuda.wait()

    def close(self) -> None:
        """Free the memory."""
        try:
            self._cuda.wait()  # an interrupt may have left work in the stream
        finally:
            self._cuda.free(self._base)
