"""ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mara_runtime.engines.huge_pages import huge_pages
from mara_runtime.engines.machine import allocatable_memory
from mara_runtime.engines.ort import OrtEngine
from mara_runtime.engines.ort_banks import CpuMemory
from mara_runtime.errors import EngineError

_UNMANAGED, _PER_GRAPH_BYTE = 64 << 20, 64
"""Bytes that a limited process keeps for what ONNX Runtime and NumPy allocate outside the arena; for each byte of the
graph's file, a session's objects take about 55."""


class CpuEngine(OrtEngine):
    """On the CPU provider."""

    name = "cpu"
    _memory: CpuMemory

    @property
    def memory(self) -> CpuMemory:
        """Where the KV entries lie."""
        return self._memory

    def _open(self, path: Path, options: Any) -> Any:
        room = allocatable_memory()
        if room is not None:
            kept = _UNMANAGED + _PER_GRAPH_BYTE * path.stat().st_size
            if room <= kept:
                raise EngineError(
                    f"out of memory: {room >> 20} MiB are left to this process, and an engine on a CPU needs "
                    f"{kept >> 20} MiB beside the weights"
                )
            _bound_arena(room - kept)
            options.add_session_config_entry("session.use_env_allocators", "1")
        with huge_pages():
            return self._open_session(path, options, {})

    def _make_memory(self, capacity: int) -> CpuMemory:
        return CpuMemory(self._shape, self._dtype, capacity)


_arena_bound: list[int] = []
"""Of the process's arena, if it has one."""


def _bound_arena(most: int) -> None:
    """Limit what the sessions of this process that share its arena take together; for good, by the first call.

    Where the system refuses memory, ONNX Runtime ends the process if it has no handler at that place. An arena that is
    full raises.
    """
    if not _arena_bound:
        import onnxruntime as ort

        arena, default = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
        ort.create_and_register_allocator(
            ort.OrtMemoryInfo("Cpu", arena, 0, default), ort.OrtArenaCfg({"max_mem": most})
        )
        _arena_bound.append(most)
