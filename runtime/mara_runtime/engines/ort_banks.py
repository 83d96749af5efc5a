"""KV entries in host memory.

Attention over several places costs what the longest of them costs, times their number. So places of like length share
a *bank*: one for texts of up to 512 slots, one for up to 1024, and so on. A pass of the graph covers a range of one
bank's places, which is a view of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.engines import ort_memory
from mara_runtime.engines.ort_memory import MOST_PLACES, Bank, Slab, blank, grown, rounded
from mara_runtime.errors import EngineError

FIRST_LIMIT = 512
"""Slots of the texts in the first bank, at most; each bank after it takes texts twice as long."""
WORTH_CLOSING = 8
"""Places without a pass that passes may cover, each for the price of its attention, before those with one are put side
by side, for the price of three copies each."""


class CpuPlace:
    """KV entries of one place; see `CacheMemory`."""

    def __init__(self, memory: CpuMemory, bank: Bank, index: int) -> None:
        self._memory = memory
        self.seat = bank, index
        """its bank, and where it lies there"""
        self.needed = 0
        """slots that its text needs, as far as was known when it began"""
        self.held = 0
        """slots that may hold entries of its text"""

    @property
    def entries(self) -> list[NDArray[Any]]:
        """Of each group of caches (2 · count, KV heads, slots, head dim): the memory itself."""
        bank, index = self.seat
        return [group[:, index] for group in bank.slab.entries]

    @property
    def capacity(self) -> int:
        """See `CacheMemory`."""
        return self._memory.capacity

    @property
    def slots(self) -> int:
        """Allocated now."""
        return self.seat[0].slab.slots

    @property
    def size(self) -> int:
        """Slots that it should have."""
        return min(rounded(max(self.needed, self.held, 1)), self.capacity)

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`."""
        self.needed, self.held = slots, kept
        self._memory.fit(self)

    def grow(self, slots: int) -> None:
        """See `CacheMemory`."""
        if slots > self.held:
            if slots > self.slots:
                self._memory.lengthen(self, slots)
            self.held = slots

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        for group in self.entries:
            group[:, :, target] = group[:, :, source]

    def copy(self, place: int, count: int) -> bool:
        """See `CacheMemory`."""
        self.held = 0
        self.grow(count)
        for target, source in zip(self.entries, self._memory.places[place].entries, strict=True):
            target[:, :, :count] = source[:, :, :count]
        return True

    def zero(self) -> None:
        """See `CacheMemory`; the place has its initial size again."""
        self.needed = self.held = 0
        self._memory.renew(self)


class CpuMemory:
    """KV entries of all places in host memory; see `EngineMemory`.

    An interruption, in whatever line, leaves every place its entries: they are copied first, and then one assignment,
    of a place's seat or a bank's slab, says where they lie.
    """

    name, device = "cpu", "cpu"
    most_places = MOST_PLACES

    def __init__(self, shape: tensors.ModelShape, dtype: str, capacity: int) -> None:
        self._shape, self._dtype = shape, dtype
        self.capacity = capacity
        """slots of a place at most"""
        self.places: list[CpuPlace] = []

    def place(self, index: int) -> CpuPlace:
        """See `EngineMemory`."""
        slots = min(ort_memory.FIRST_SLOTS, self.capacity)
        place = CpuPlace(self, *self._room(self._limit(slots), slots))
        for group in place.entries:
            group[...] = 0
        self.places.append(place)
        return place

    @property
    def slots(self) -> int:
        """Allocated now for the first place."""
        return self.places[0].slots

    @property
    def banks(self) -> list[Bank]:
        """Those that hold a place."""
        return list(dict.fromkeys(place.seat[0] for place in self.places))

    def members(self, bank: Bank) -> list[CpuPlace]:
        """The places of a bank, in their order there."""
        return sorted((place for place in self.places if place.seat[0] is bank), key=lambda place: place.seat[1])

    # ── a place has the slots that it needs ──────────────────────────────────────────────────────────────────────────

    def fit(self, place: CpuPlace) -> None:
        """A text begins: give its place the size that it needs, within a factor of two."""
        if not self._stays(place, place.size):
            self._enter(place, place.size)
            return
        bank = place.seat[0]
        longest = max(member.size for member in self.members(bank))
        if not longest <= bank.slab.slots < 2 * longest:
            bank.slab = self._moved(bank, longest)

    def lengthen(self, place: CpuPlace, slots: int) -> None:
        """Give a place more slots than its bank has. Raises EngineError beyond the capacity."""
        if slots > self.capacity:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self.capacity}")
        bank = place.seat[0]
        if slots <= bank.limit or self._stays(place, slots):
            bank.slab = self._moved(bank, self._longer(bank, slots))
        else:
            self._enter(place, slots)

    def renew(self, place: CpuPlace) -> None:
        """Zero a place and give it its initial size."""
        bank = place.seat[0]
        if not self._stays(place, place.size):
            self._enter(place, place.size)
        elif len(self.members(bank)) == 1:
            bank.slab = self._moved(bank, place.size)
        else:
            for group in place.entries:
                group[...] = 0

    def _stays(self, place: CpuPlace, slots: int) -> bool:
        """Whether a place with a text of `slots` is in the right bank; one that is alone there takes it along."""
        bank, limit = place.seat[0], self._limit(slots)
        if len(self.members(bank)) == 1 and all(other.limit != limit for other in self.banks):
            bank.limit = limit
        return bank.limit == limit

    def _limit(self, slots: int) -> int:
        """Of the bank for texts of so many slots."""
        limit = FIRST_LIMIT
        while limit < slots:
            limit *= 2
        return limit

    def _longer(self, bank: Bank, slots: int) -> int:
        """Slots that a bank grows to: the more places are copied, the more."""
        size, places = bank.slab.slots, len(self.members(bank))
        slots = max(slots, min(size + size // 16 * places, bank.limit))
        return min(grown(self.name, size, slots), self.capacity)

    # ── where places lie ─────────────────────────────────────────────────────────────────────────────────────────────

    def put_together(self, bank: Bank, taking: Sequence[CpuPlace]) -> list[CpuPlace]:
        """Put the places that take part in passes side by side, where gaps between them have cost enough.

        Returns them in their order in the bank.
        """
        taking = sorted(taking, key=lambda place: place.seat[1])
        first, count = taking[0].seat[1], len(taking)
        bank.gaps += taking[-1].seat[1] - first + 1 - count
        if bank.gaps < WORTH_CLOSING:
            return taking
        bank.gaps = 0
        by_index = {place.seat[1]: place for place in self.members(bank)}
        outside = [place for place in taking if place.seat[1] >= first + count]
        for index in range(first, first + count):
            idle = by_index.get(index)
            if idle in taking:
                continue
            place = outside.pop()
            if idle is not None:
                before = place.seat[1]
                self._carry(idle, *self._room(bank.limit, bank.slab.slots))
            self._carry(place, bank, index)
            if idle is not None:
                self._carry(idle, bank, before)
        return sorted(taking, key=lambda place: place.seat[1])

    def _enter(self, place: CpuPlace, slots: int) -> None:
        """Carry a place to the bank for `slots`; the last of those that it leaves takes its index."""
        old, index = place.seat
        self._carry(place, *self._room(self._limit(slots), slots))
        left = self.members(old)
        if left and left[-1].seat[1] > index:
            self._carry(left[-1], old, index)

    def _carry(self, place: CpuPlace, bank: Bank, index: int) -> None:
        for source, group in zip(place.entries, bank.slab.entries, strict=True):
            target = group[:, index]
            target[:, :, : place.held] = source[:, :, : place.held]
            target[:, :, place.held :] = 0  # nothing of whoever was there, which may not be finite
        place.seat = bank, index

    def _room(self, limit: int, slots: int) -> tuple[Bank, int]:
        """A bank of that limit, with so many slots or more, and an index that is free."""
        bank = next((bank for bank in self.banks if bank.limit == limit), None)
        if bank is None:
            return Bank(limit, self._allocate(1, min(rounded(slots), self.capacity))), 0
        taken = {place.seat[1] for place in self.members(bank)}
        index = next(i for i in range(len(taken) + 1) if i not in taken)
        if slots > bank.slab.slots:
            bank.slab = self._moved(bank, self._longer(bank, slots), index + 1)
        elif index == bank.slab.room:
            bank.slab = self._moved(bank, bank.slab.slots, index + 1)
        return bank, index

    def _moved(self, bank: Bank, slots: int, least: int = 1) -> Slab:
        """The bank's entries in new memory of that size, of `least` places or more."""
        places = max(least, *(place.seat[1] + 1 for place in self.members(bank)))
        # room for as many again, as what nobody wrote takes no memory
        return self._allocate(places if places == 1 else 2 * places, slots, self.members(bank))

    def _allocate(self, places: int, slots: int, kept: Iterable[CpuPlace] = ()) -> Slab:
        """New memory; kept: whose entries it begins with, each at its index."""
        import onnxruntime as ort

        entries = blank(self._shape, self._dtype, places, slots)
        for place in kept:
            for target, held in zip(entries, place.entries, strict=True):
                target[:, place.seat[1], :, : place.held] = held[:, :, : place.held]
        parts = (part for group in entries for part in group)
        return Slab(entries, [ort.OrtValue.ortvalue_from_numpy(part, self.device, 0) for part in parts])
