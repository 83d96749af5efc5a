"""ONNX Runtime on CUDA: the KV cache stays on the device.

NumPy cannot reach the entries there, so an entry that moves is recomputed as a row of the next pass (recompute.py).
Not yet run on hardware; tests/cuda count what a pass asks of CUDA.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort import OrtEngine
from mara_runtime.engines.ort_memory import Binding, BindingKey, CpuMemory, rounded
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


class CudaMemory(CpuMemory):
    """KV entries on the device; see `CacheMemory`."""

    name, device = "cuda", "cuda"

    def __init__(self, shape: ModelShape, dtype: str, capacity: int, *, fixed: bool) -> None:
        """fixed: the memory has its full size and stays where it is, for CUDA graphs refer to it; ONNX Runtime frees no
        graph before its session."""
        super().__init__(shape, dtype, capacity)
        self._fixed = fixed
        self.recompute = Recompute()
        if fixed:
            self._allocate(capacity)

    def _allocate(self, slots: int, entries: Iterable[NDArray[Any]] = ()) -> None:
        try:
            super()._allocate(slots, entries)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(
                f"the GPU has no memory for a KV cache of {slots} slots: {first_line(error)}; ask for fewer tokens, or "
                "decode with --engine cpu"
            ) from error
        self._slab = np.broadcast_to(self._slab.dtype.type(0), self._slab.shape)  # a shape; the host holds no entries

    def resize(self, slots: int, kept: int) -> None:
        """See `CacheMemory`; growing copies the entries to the host and back, so it never shrinks."""
        self.grow(slots)

    def _kept(self) -> Iterable[NDArray[Any]]:
        return [value.numpy() for value in self.values]

    def move(self, token: int, source: int, target: int) -> None:
        """See `CacheMemory`."""
        self.recompute.schedule(token, target)

    def zero(self) -> None:
        """See `CacheMemory`."""
        if self._fixed:
            for value, entries in zip(self.values, self._slab, strict=True):
                value.update_inplace(np.zeros_like(entries))
        else:
            super().zero()
        self.recompute.cancel()


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
        self._stacks: dict[tuple[tuple[int, ...], ...], tuple[list[Any], dict[BindingKey, Binding]]] = {}
        """of agents, by size: their memory, and the bindings whose graphs refer to it"""
        super().__init__(bundle, threads)
        self._try_a_row()

    def _try_a_row(self) -> None:
        """Run one row: without cuDNN, or without kernels for this GPU, a provider opens and fails in its first pass."""
        try:
            self._run(Pass([0], [0], 0, head_rows=[0], agent_rows=[0], priorities=[0.0]))
        except EngineError as error:
            raise EngineError(
                f"{error}; CUDA needs cuDNN (pip install 'onnxruntime-gpu[cuda,cudnn]') and an onnxruntime-gpu with "
                "kernels for this GPU; else take --engine cpu"
            ) from error
        self._memory.zero()

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
        before = self._stacked, self._memory.bindings
        if self._graphs is True:
            sizes = tuple(weights.shape for weights in stacked)
            self._stacked, self._memory.bindings = self._stacks.setdefault(sizes, ([], {}))
        try:
            super()._load_agents(stacked)
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            self._stacked, self._memory.bindings = before
            raise EngineError(f"the GPU has no memory for the agents ({first_line(error)}): use fewer") from error

    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`."""
        self._cache.reserve(work.slot, len(work.tokens))
        first, merged, row_offset = self._memory.recompute.passes(work)
        if first is not None:
            self._run(first)
        out = self._run(self._padded(merged), row_offset)
        self._memory.recompute.cancel()
        return out

    def _padded(self, work: Pass) -> Pass:
        """A wide pass with as many rows as fused attention takes; where it takes none, kernels are more by a tenth.

        Nothing attends to the rows at the end, which are written behind all others.
        """
        rows = len(work.tokens)
        more = -rows % (MASK_ALIGNMENT // math.gcd(MASK_ALIGNMENT, self._shape.num_heads // self._shape.num_kv_heads))
        if rows <= NARROW or work.full or work.slot + rows + more > self._memory.slots:
            return work
        last = work.positions[-1]
        return replace(work, tokens=[*work.tokens, *[0] * more], positions=[*work.positions, *[last] * more])

    def _run_options(self, cached: bool) -> Any:
        options = super()._run_options(cached)
        if self._graphs is True:  # a graph is bound to shapes and addresses: one per cached binding, -1 for none
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids) if cached else -1))
        return options

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return {**super().describe(), "cuda_graphs": self._graphs}
