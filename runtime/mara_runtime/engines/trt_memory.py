"""The KV cache of the TensorRT engine, and the engine file that fits its size.

The number of slots is fixed in an engine file, so a bundle may have several: decoding starts with the smallest, and
when a conversation outgrows it, the next one is opened and takes over the entries. Present is written over past, or, in
engines of TensorRT before 10.15, into a second copy that swaps roles with the first after each pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.cuda import Cuda, aligned
from mara_runtime.engines.io_block import Block, Sizes
from mara_runtime.engines.recompute import Recompute
from mara_runtime.engines.trt_agents import DeviceAgents
from mara_runtime.engines.trt_file import IO
from mara_runtime.engines.trt_plan import Plan
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

_DIAGNOSTIC = (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)
"""Outputs that stay on the device unless a pass is full."""


class DeviceCache:
    """The entries for one engine file, in two copies where passes cannot write in place; zero at first."""

    def __init__(self, cuda: Cuda, shape: tensors.ModelShape, dtype: str, index: int, facts: EngineFacts) -> None:
        self.index, self.side = index, 0
        """of its engine file; which copy the next pass reads"""
        copies = 1 if facts.in_place else 2
        self._cuda, self._names = cuda, tensors.kv_names(shape.num_layers)
        self._heads = shape.num_kv_heads
        self._row_bytes = facts.slots * shape.head_dim * tensors.CACHE_BYTES[dtype]  # of one head
        self._layer_bytes = aligned(self._heads * self._row_bytes)
        self.size_bytes = copies * len(self._names) * self._layer_bytes
        self._base = cuda.allocate(self.size_bytes, f"the KV cache of {facts.slots} slots")
        self._sides = [self._base + side * self.size_bytes // copies for side in range(copies)]
        try:
            self.zero()
        except BaseException:
            self.close()
            raise

    def addresses(self) -> list[dict[str, int]]:
        """By side: where pasts are read and presents written."""
        addresses: list[dict[str, int]] = []
        for side, source in enumerate(self._sides):
            target = self._sides[(side + 1) % len(self._sides)]
            addresses.append({})
            for i, (past, present) in enumerate(self._names):
                offset = i * self._layer_bytes
                addresses[-1] |= {past: source + offset, present: target + offset}
        return addresses

    def take_over(self, other: DeviceCache) -> None:
        """Copy what another cache has, as far as there are slots for it."""
        width = min(self._row_bytes, other._row_bytes)
        for i in range(len(self._names)):
            target, source = self._base + i * self._layer_bytes, other._sides[other.side] + i * other._layer_bytes
            self._cuda.copy_rows(target, self._row_bytes, source, other._row_bytes, width, self._heads)
        self._cuda.wait()

    def zero(self) -> None:
        """Zero all slots."""
        self._cuda.zero(self._base, self.size_bytes)
        self._cuda.wait()

    def close(self) -> None:
        """Free the memory."""
        try:
            self._cuda.wait()  # an interrupt may have left work in the stream
        finally:
            self._cuda.free(self._base)


class TrtMemory:
    """All that is open on the device: blocks for inputs and outputs, agents, entries, the engine file.

    See `CacheMemory`.
    """

    def __init__(
        self, trt: Any, bundle: Bundle, engines: Sequence[EngineFacts], io: IO, largest: Sizes, *, graphs: bool
    ) -> None:
        """engines: of one target, by ascending slots. largest: sizes of the largest pass. Raises EngineError."""
        self._trt, self._bundle, self._engines, self._io, self._graphs = trt, bundle, engines, io, graphs
        self.recompute = Recompute()
        self._cache: DeviceCache | None = None
        self._plan: Plan | None = None
        self._stack = contextlib.ExitStack()  # whatever fails while closing, the rest is closed, too
        try:
            self.cuda = self._opened(Cuda())
            outputs = [t for t in io[1] if "C" not in t.shape]
            self.inputs = self._opened(Block(self.cuda, tensors.pass_inputs(), largest))
            self.outputs = self._opened(Block(self.cuda, [t for t in outputs if t.name not in _DIAGNOSTIC], largest))
            self.diagnostic = self._opened(Block(self.cuda, [t for t in outputs if t.name in _DIAGNOSTIC], largest))
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

    # ── CacheMemory ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def capacity(self) -> int:
        """See `CacheMemory`."""
        return self._engines[-1].slots

    @property
    def slots(self) -> int:
        """Allocated now."""
        return self.facts.slots

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`; it shrinks in `zero` alone, as opening an engine file takes seconds."""
        self.grow(slots)

    def grow(self, slots: int) -> None:
        """See `CacheMemory`."""
        before, index = self._index, self._index_for(slots)
        if index == before and self._plan is not None:
            return
        try:
            self._open_engine(index)
        except EngineError:
            if self._index > before:  # there may not be memory for it: the entries fit the smaller one, which goes on
                self._lay_out(before)
            raise

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        self.recompute.schedule(token, target)

    def zero(self) -> None:
        """See `CacheMemory`; the engine file is the smallest again."""
        self.recompute.cancel()
        if self._index:
            self._close_plan()
            self._close_cache()
        self.grow(0)
        self.cache.zero()

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
            self._lay_out(index)
        parts = self.inputs, self.agents, self.outputs, self.diagnostic
        fixed = {name: address for part in parts for name, address in part.addresses().items()}
        sides = [{**fixed, **entries} for entries in self.cache.addresses()]
        kernels = f"kernels-{self._bundle.manifest.files[facts.file].sha256[:24]}"
        copied = self.inputs, self.outputs
        path = self._bundle.path(facts.file)
        self._plan = Plan(self._trt, self.cuda, path, facts, self._io, copied, sides, self._graphs, kernels)

    def _lay_out(self, index: int) -> None:
        """Lay out the entries for an engine file."""
        manifest, before = self._bundle.manifest, self._cache
        cache = DeviceCache(self.cuda, manifest.model.shape, manifest.step.cache, index, self._engines[index])
        if before is not None:
            try:
                cache.take_over(before)
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
