"""ONNX Runtime on CUDA: the KV caches stay on the device.

NumPy cannot reach the entries there, so an entry that moves is recomputed as a row of the next pass (recompute.py).
Not yet run on hardware; tests/cuda count what a pass asks of CUDA.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.engines import ort_memory
from mara_runtime.engines.base import Pass, StepOutput, Works
from mara_runtime.engines.ort import OrtEngine
from mara_runtime.engines.ort_memory import MOST_PLACES, Bank, Slab, blank, grown, rounded
from mara_runtime.engines.recompute import Recompute
from mara_runtime.errors import EngineError, first_line
from mara_runtime.tensors import ModelShape

OWN_ATTENTION = 2 | 16
"""Kernels that attention may take, in ONNX Runtime's numbers: its own, fused and not. From compute capability 9.0 on it
would take cuDNN's, which is built for each shape of pass when that runs, and may be refused then; not yet tried."""

MASK_ALIGNMENT = 8
"""Fused attention takes masks whose number of rows, by heads that share keys, is a multiple of this."""
NARROW = 8
"""Rows up to which a pass is run as it is: matrices of few rows have kernels of their own."""


class CudaPlace:
    """One place; see `CacheMemory`."""

    def __init__(self, memory: CudaMemory, index: int) -> None:
        self._memory, self._index = memory, index
        self.recompute = Recompute()

    @property
    def seat(self) -> tuple[Bank, int]:
        """Its bank, and where it lies there."""
        return self._memory.bank, self._index

    @property
    def capacity(self) -> int:
        """See `CacheMemory`."""
        return self._memory.capacity

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`; growing copies the entries to the host and back, so it never shrinks."""
        self._memory.grow(slots)

    def grow(self, slots: int) -> None:
        """See `CacheMemory`."""
        self._memory.grow(slots)

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        self.recompute.schedule(token, target)

    def copy(self, place: int, count: int) -> bool:
        """See `CacheMemory`; NumPy reaches no entries."""
        return False

    def zero(self) -> None:
        """See `CacheMemory`."""
        self._memory.zero(self._index)
        self.recompute.cancel()


class CudaMemory:
    """KV entries of all places on the device, of one size; see `EngineMemory`."""

    device = "cuda"

    def __init__(self, shape: ModelShape, dtype: str, capacity: int, *, fixed: bool) -> None:
        """fixed: one place, whose memory has its full size and stays where it is, for CUDA graphs refer to it; ONNX
        Runtime frees no graph before its session."""
        self._shape, self._dtype, self._fixed = shape, dtype, fixed
        self.capacity = capacity
        """slots of a place at most"""
        self.most_places = 1 if fixed else MOST_PLACES
        self.places: list[CudaPlace] = []
        self.bank = Bank(capacity, self._allocate(1, capacity if fixed else min(ort_memory.FIRST_SLOTS, capacity)))

    @property
    def banks(self) -> list[Bank]:
        """The one that there is."""
        return [self.bank]

    @property
    def slots(self) -> int:
        """Of a place, allocated now."""
        return self.bank.slab.slots

    def put_together(self, bank: Bank, taking: Sequence[CudaPlace]) -> list[CudaPlace]:
        """The places that take part in passes, in their order; they stay where they are."""
        return sorted(taking, key=lambda place: place.seat[1])

    def place(self, index: int) -> CudaPlace:
        """See `EngineMemory`."""
        if index >= self.bank.slab.room:
            self.bank.slab = self._allocate(index + 1, self.slots, self._kept())
        self.places.append(CudaPlace(self, index))
        return self.places[index]

    def grow(self, slots: int) -> None:
        """Make room for so many slots in each place. Raises EngineError beyond the capacity."""
        if slots > self.capacity:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self.capacity}")
        if slots > self.slots:
            size = min(grown("cuda", self.slots, slots), self.capacity)
            self.bank.slab = self._allocate(self.bank.slab.room, size, self._kept())

    def zero(self, place: int) -> None:
        """Zero a place; a single one has its initial size again."""
        if not self._fixed and len(self.places) == 1:
            self.bank.slab = self._allocate(1, min(ort_memory.FIRST_SLOTS, self.capacity))
            return
        for value in self.bank.slab.values:
            entries = value.numpy()
            entries[place] = 0
            value.update_inplace(entries)

    def _kept(self) -> Iterable[NDArray[Any]]:
        return [value.numpy() for value in self.bank.slab.values]

    def _allocate(self, places: int, slots: int, kept: Iterable[NDArray[Any]] = ()) -> Slab:
        """New memory; kept: what it begins with, by cache and part."""
        import onnxruntime as ort

        entries = blank(self._shape, self._dtype, places, slots)
        parts = [part for group in entries for part in group]
        for part, before in zip(parts, kept, strict=False):
            part[: before.shape[0], :, : before.shape[2]] = before
        try:
            values = [ort.OrtValue.ortvalue_from_numpy(part, self.device, 0) for part in parts]
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(
                f"the GPU has no memory for a KV cache of {slots} slots"
                f"{f' for {places} conversations' if places > 1 else ''}: {first_line(error)}; ask for fewer tokens, "
                "or decode with --engine cpu"
            ) from error
        # shapes; the host holds no entries
        return Slab([np.broadcast_to(group.dtype.type(0), group.shape) for group in entries], values)


class CudaEngine(OrtEngine):
    """On the CUDA provider."""

    name = "cuda"
    _memory: CudaMemory

    def __init__(self, bundle: Bundle, threads: int | None = None, *, graphs: bool = False) -> None:
        """graphs: run repeated passes as CUDA graphs where ONNX Runtime allows it; off until measured on a device.

        threads: of what runs on the CPU beside it. Raises EngineError and OptionError.
        """
        self._graphs: bool | str = graphs
        """whether passes run as CUDA graphs; a text: why not"""
        self._graph_ids = count(1)  # 0 is ONNX Runtime's own
        self._stacks: dict[tuple[tuple[int, ...], ...], tuple[list[Any], Slab]] = {}
        """of agents, by size: their memory, and the entries with the bindings whose graphs refer to it"""
        super().__init__(bundle, threads)
        self._try_a_row()

    def _try_a_row(self) -> None:
        """Run one row: without cuDNN, or without kernels for this GPU, a provider opens and fails in its first pass."""
        try:
            self.run(Pass([0], [0], 0, head_rows=[0], agent_rows=[0], priorities=[0.0]))
        except EngineError as error:
            raise EngineError(
                f"{error}; CUDA needs cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]') and an onnxruntime-gpu with "
                "kernels for this GPU; else take --engine cpu"
            ) from error
        self.cache.clear()

    def _open(self, path: Path, options: Any) -> Any:
        import onnxruntime

        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it lacks, and the session decides what matters
            onnxruntime.preload_dlls()  # of NVIDIA's packages, if they are installed: they are on no search path
        # TF32 would round float32 to 11 bits
        provider_options = {"use_tf32": "0", "sdpa_kernel": str(OWN_ATTENTION)}
        if self._graphs:
            try:
                return self._open_session(path, options, {**provider_options, "enable_cuda_graph": "1"})
            except EngineError as error:
                self._graphs = str(error)
        return self._open_session(path, options, provider_options)

    def _make_memory(self, capacity: int) -> CudaMemory:
        # fused attention takes no mask whose rows are not aligned, so the last size, too, has to be a multiple
        return CudaMemory(self._shape, self._dtype, rounded(capacity), fixed=self._graphs is True)

    def _load_agents(self, stacked: list[NDArray[np.float32]]) -> None:
        """With CUDA graphs, stacks of each size keep their memory, too: see `CudaMemory`."""
        bank = self._memory.bank
        before = self._stacked, bank.slab
        if self._graphs is True:
            sizes = tuple(weights.shape for weights in stacked)
            self._stacked, bank.slab = self._stacks.setdefault(sizes, ([], replace(bank.slab, bindings={})))
        try:
            super()._load_agents(stacked)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            self._stacked, bank.slab = before
            raise EngineError(f"the GPU has no memory for the agents ({first_line(error)}): use fewer") from error

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`."""
        return self.run_together([(place, work)])[0]

    def run_together(self, works: Works) -> list[StepOutput]:
        """See `Engine.run_together`."""
        merged = []
        for place, work in works:
            self._places[place].reserve(work.slot, len(work.tokens))
            merged.append(self._memory.places[place].recompute.merged(work))
        self._share([(place, each.first) for (place, _), each in zip(works, merged, strict=True) if each.first])
        outs = self._share([(place, each.work) for (place, _), each in zip(works, merged, strict=True)])
        for place, _ in works:
            self._memory.places[place].recompute.cancel()
        return [each.read(out) for each, out in zip(merged, outs, strict=True)]

    def _width(self, rows: int) -> int:
        """As many as fused attention takes; where it takes none, kernels are more by a tenth."""
        if rows <= NARROW:
            return rows
        shared = (self._shape.num_heads // group.kv_heads for group in self._shape.caches)
        step = max(MASK_ALIGNMENT // math.gcd(MASK_ALIGNMENT, heads) for heads in shared)
        return -(-rows // step) * step

    def _run_options(self, cached: bool) -> Any:
        import onnxruntime as ort

        if self._graphs is not True:
            return None
        options = ort.RunOptions()  # a graph is bound to shapes and addresses: one per cached binding, -1 for none
        options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids) if cached else -1))
        return options

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {**super().describe(), "cuda_graphs": self._graphs}
