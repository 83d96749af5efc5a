"""The KV entries of the TensorRT engine on the device: those of all places, for one engine file.

A layer's keys, or values, are one tensor (places, NKV, C, H), so a pass over the places from `low` on begins at an
offset. Present is written over past, or, in engines of TensorRT before 10.15, into a second copy that swaps roles with
the first after each pass: then each place has a *side*, the copy that its next pass reads.
"""

from __future__ import annotations

from mara_runtime import tensors
from mara_runtime.engines.cuda import ALIGNMENT, Cuda, aligned
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts


class DeviceCache:
    """Zero at first."""

    def __init__(
        self, cuda: Cuda, shape: tensors.ModelShape, dtype: str, index: int, facts: EngineFacts, places: int
    ) -> None:
        """index: of the engine file. Raises EngineError."""
        self.index, self.places = index, places
        self._cuda, self._names = cuda, tensors.kv_names(shape.num_layers)
        self._copies = 1 if facts.in_place else 2
        self._sides = [0] * places
        self._heads = shape.num_kv_heads
        self._entry_bytes = shape.head_dim * tensors.CACHE_BYTES[dtype]  # of one head
        self._row_bytes = facts.slots * self._entry_bytes  # likewise
        self._place_bytes = self._heads * self._row_bytes
        if places > 1 and self._place_bytes % ALIGNMENT:  # heads of fewer than 8 numbers
            raise EngineError(
                f"the engine's entries of {facts.slots} slots take one conversation: they are not aligned"
            )
        self._layer_bytes = aligned(places * self._place_bytes)
        self._side_bytes = len(self._names) * self._layer_bytes
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
        source, target = self._at(side, low), self._at((side + 1) % self._copies, low)
        addresses: dict[str, int] = {}
        for i, (past, present) in enumerate(self._names):
            offset = i * self._layer_bytes
            addresses |= {past: source + offset, present: target + offset}
        return addresses

    def _at(self, side: int, place: int) -> int:
        """Address of a place's entries of the first layer."""
        return self._base + side * self._side_bytes + place * self._place_bytes

    def settle(self, low: int, high: int) -> int:
        """Bring these places to one side for a pass, which they do by copying; returns the side."""
        sides = self._sides[low:high]
        side = max(set(sides), key=sides.count)
        for place in range(low, high):
            if self._sides[place] != side:
                pitch, rows = self._layer_bytes, len(self._names)
                target, source = self._at(side, place), self._at(1 - side, place)
                self._cuda.copy_rows(target, pitch, source, pitch, self._place_bytes, rows)
                self._sides[place] = side
        return side

    def turn(self, low: int, high: int) -> None:
        """A pass over these places has run."""
        if self._copies > 1:
            self._sides[low:high] = [1 - side for side in self._sides[low:high]]

    def take_over(self, other: DeviceCache) -> None:
        """Copy what another cache has, as far as there are slots for it."""
        for place in range(min(self.places, other.places)):
            self._copy(place, other, place, min(self._row_bytes, other._row_bytes))
        self._cuda.wait()

    def copy(self, target: int, source: int, count: int) -> None:
        """Make the first `count` entries of a place those of another."""
        self._copy(target, self, source, count * self._entry_bytes)

    def _copy(self, target: int, other: DeviceCache, source: int, width: int) -> None:
        """Copy the first `width` bytes of each head."""
        begin, end = other._at(other._sides[source], source), self._at(self._sides[target], target)
        for i in range(len(self._names)):
            from_, to = begin + i * other._layer_bytes, end + i * self._layer_bytes
            self._cuda.copy_rows(to, self._row_bytes, from_, other._row_bytes, width, self._heads)

    def zero(self, place: int) -> None:
        """Zero all slots of a place."""
        for side in range(self._copies):
            for i in range(len(self._names)):
                self._cuda.zero(self._at(side, place) + i * self._layer_bytes, self._place_bytes)
        self._cuda.wait()

    def close(self) -> None:
        """Free the memory."""
        try:
            self._cuda.wait()  # an interrupt may have left work in the stream
        finally:
            self._cuda.free(self._base)
