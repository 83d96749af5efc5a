"""The KV caches of the TensorRT engine, and the engine file that fits their size.

The number of slots is fixed in an engine file, so a bundle may have several: decoding starts with the smallest, and
when a conversation outgrows it, the next one is opened and takes over the entries of all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.io_block import Block, Sizes
from mara_runtime.engines.recompute import Recompute
from mara_runtime.engines.trt_agents import DeviceAgents
from mara_runtime.engines.trt_cache import DeviceCache
from mara_runtime.engines.trt_file import IO
from mara_runtime.engines.trt_plan import Plan
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

_DIAGNOSTIC = (tensors.LAST_HIDDEN_STATE, tensors.LOGITS)
"""Outputs that stay on the device unless a pass asks for them, which then runs alone."""


class TrtPlace:
    """One place; see `CacheMemory`."""

    def __init__(self, memory: TrtMemory, index: int) -> None:
        self._memory, self._index = memory, index
        self.recompute = Recompute()
        self.end = 0
        """slots from this one on hold nothing that is needed"""

    @property
    def capacity(self) -> int:
        """See `CacheMemory`."""
        return self._memory.capacity

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`; it shrinks in `zero` alone, as opening an engine file takes seconds."""
        self.end = kept
        self._memory.grow(slots)

    def grow(self, slots: int) -> None:
        """See `CacheMemory`."""
        self._memory.grow(slots)

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        self.recompute.schedule(token, target)

    def copy(self, place: int, count: int) -> bool:
        """See `CacheMemory`."""
        self._memory.cache.copy(self._index, place, count)
        self.recompute.take_over(self._memory.places[place].recompute, count)
        self.end = count
        return True

    def zero(self) -> None:
        """See `CacheMemory`; the engine file is the smallest again where no other place needs a larger one."""
        self.recompute.cancel()
        self.end = 0
        self._memory.zero(self._index)


class TrtMemory:
    """All that is open on the device: blocks for inputs and outputs, agents, entries, the engine file.

    See `EngineMemory`.
    """

    def __init__(
        self, trt: Any, bundle: Bundle, engines: Sequence[EngineFacts], io: IO, largest: Sizes, *, graphs: bool
    ) -> None:
        """engines: of one target, by ascending slots. largest: sizes of the largest pass. Raises EngineError."""
        self._trt, self._bundle, self._engines, self._io, self._graphs = trt, bundle, engines, io, graphs
        self.places: list[TrtPlace] = []
        self._cache: DeviceCache | None = None
        self._plan: Plan | None = None
        self._stack = contextlib.ExitStack()  # whatever fails while closing, the rest is closed, too
        try:
            self.cuda = self._opened(Cuda())
            outputs = {t.name: t for t in io[1] if "C" not in t.shape}
            diagnostic = [outputs.pop(name) for name in _DIAGNOSTIC]
            alone = largest._replace(conversations=1, heads=min(facts.head_rows for facts in engines))
            self.inputs = self._opened(Block(self.cuda, tensors.pass_inputs(), largest))
            self.outputs = self._opened(Block(self.cuda, [*outputs.values()], largest))
            self.diagnostic = self._opened(Block(self.cuda, diagnostic, largest, read=alone))
            self.agents = self._opened(DeviceAgents(self.cuda, bundle, engines[0].target, largest))
            self._stack.callback(self._close_cache)
            self._stack.callback(self._close_plan)
            self._open_engine(0)
        except BaseException:
            self.close()
            raise

    def _opened(self, part: Any) -> Any:
        self._stack.callback(part.close)
        return part

    @property
    def cache(self) -> DeviceCache:
        """The entries."""
        assert self._cache is not None, "closed"
        return self._cache

    @property
    def plan(self) -> Plan:
        """The open engine file."""
        assert self._plan is not None, "closed"
        return self._plan

    @property
    def facts(self) -> EngineFacts:
        """Of the engine file that the entries are laid out for."""
        return self._engines[self._index]

    @property
    def _index(self) -> int:
        return 0 if self._cache is None else self._cache.index

    # ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def most_places(self) -> int:
        """See `EngineMemory`."""
        return min(facts.places for facts in self._engines)

    def place(self, index: int) -> TrtPlace:
        """See `EngineMemory`."""
        if index >= self.cache.places:
            self._lay_out(self._index, index + 1)
        self.places.append(TrtPlace(self, index))
        return self.places[index]

    @property
    def capacity(self) -> int:
        """Slots of a place at most."""
        return self._engines[-1].slots

    @property
    def slots(self) -> int:
        """Of a place, allocated now."""
        return self.facts.slots

    def grow(self, slots: int) -> None:
        """Make room for so many slots in each place. Raises EngineError."""
        before, index = self._index, self._index_for(slots)
        if index == before and self._plan is not None:
            return
        try:
            self._open_engine(index)
        except EngineError:
            if self._index > before:  # there may not be memory for it: the entries fit the smaller one, which goes on
                self._lay_out(before, self.cache.places)
            raise

    def zero(self, place: int) -> None:
        """Zero a place."""
        if self._index and not any(each.end for each in self.places):
            self._close_plan()
            self._close_cache()
        self.grow(0)
        self.cache.zero(place)

    def rows(self, slots: int) -> int:
        """Rows of a pass at most, in the engine file for so many slots. Raises EngineError."""
        facts = self._engines[self._index_for(slots)]
        return max(facts.decode_rows, facts.prefill_rows)

    def _index_for(self, slots: int) -> int:
        """Of the engine file for so many slots, not smaller than the present one. Raises EngineError."""
        if slots > self.capacity:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self.capacity}")
        return max(self._index, next(i for i, e in enumerate(self._engines) if e.slots >= slots))

    # ── opening and closing ──────────────────────────────────────────────────────────────────────────────────────────

    def _open_engine(self, index: int) -> None:
        """Open an engine file, with the entries there are."""
        facts = self._engines[index]
        self._close_plan()  # first, so that two engines are never in memory at once
        if self._cache is None or index != self._cache.index:  # else an earlier opening was interrupted or failed
            self._lay_out(index, max(len(self.places), 1))
        kernels = f"kernels-{self._bundle.manifest.files[facts.file].sha256[:24]}"
        copied = self.inputs, self.outputs
        path = self._bundle.path(facts.file)
        self._plan = Plan(self._trt, self.cuda, path, facts, self._io, copied, self._addresses, self._graphs, kernels)

    def _addresses(self, side: int, low: int) -> dict[str, int]:
        """Of all tensors, for passes over the places from `low` on; see `DeviceCache.addresses`."""
        parts = self.inputs, self.agents, self.outputs, self.diagnostic
        fixed = {name: address for part in parts for name, address in part.addresses().items()}
        return fixed | self.cache.addresses(side, low)

    def _lay_out(self, index: int, places: int) -> None:
        """Lay out the entries for an engine file and so many places."""
        manifest, before = self._bundle.manifest, self._cache
        cache = DeviceCache(self.cuda, manifest.model.shape, manifest.step.cache, index, self._engines[index], places)
        try:
            if before is not None:
                cache.take_over(before)
            if self._plan is not None:  # before the addresses change
                self._plan.forget()
        except BaseException:
            cache.close()
            raise
        self._cache = cache  # at once: an interrupt must find the entries and the engine file that they are for
        if before is not None:
            before.close()

    def _close_plan(self) -> None:
        if self._plan is not None:
            try:
                self._plan.close()
            finally:
                self._plan = None

    def _close_cache(self) -> None:
        if self._cache is not None:
            try:
                self._cache.close()
            finally:
                self._cache = None

    def close(self) -> None:
        """Free everything."""
        self._stack.close()
