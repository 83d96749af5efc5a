"""The double of `cuda.bindings.runtime`: memory, one GPU, streams that work when they are waited for, graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.double import Broken

POISON = 0xFF
"""Fills memory that nobody wrote: as float32 it is a NaN whose bits no arithmetic makes."""
Bytes = NDArray[np.uint8]
Work = Callable[[], None]
Enqueue = Callable[[], Work]
"""What happens when work is put in a stream; it returns what happens when the stream comes to it."""


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


Status = tuple[cudaError_t]
OK = cudaError_t.cudaSuccess


class CudaDouble:
    """Stands for the module. Public names that begin with `cuda` are the module's, the others the double's."""

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = cudaError_t, cudaMemcpyKind, cudaDeviceAttr
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(self) -> None:
        self.devices = 1
        self.capability = (8, 7)
        self.total_bytes = 1 << 30
        self.refuse_capture = False
        """captures are lost, as they are when something in them cannot be captured"""
        self.launched = 0
        """graphs"""
        self._device: dict[int, Bytes] = {}
        self._host: dict[int, Bytes] = {}
        self._freed: list[Bytes] = []  # kept, so that a late access is an error of the double's and not of the process
        self._next = 0x7F00_0000_0000
        self._streams: dict[int, list[Work]] = {}
        self._captured: dict[int, list[Enqueue]] = {}
        self._graphs: dict[int, list[Enqueue]] = {}
        self._executables: dict[int, list[Enqueue]] = {}

    # ── for the double of TensorRT, and for tests ────────────────────────────────────────────────────────────────────

    def in_use(self) -> dict[str, int]:
        return {
            "device bytes": sum(len(memory) for memory in self._device.values()),
            "device blocks": len(self._device),
            "host blocks": len(self._host),
            "streams": len(self._streams),
            "graphs": len(self._graphs) + len(self._executables),
        }

    def memory(self, address: int, size: int) -> Bytes:
        """The bytes of the device that an address means."""
        for base, memory in self._device.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base : address - base + size]
        raise Broken("device memory", f"{size} bytes at {address:#x} lie in no allocation")

    def submit(self, stream: Any, enqueue: Enqueue) -> None:
        handle = int(stream)
        if handle not in self._streams:
            raise Broken("stream", f"{handle} is no stream")
        if handle in self._captured:
            self._captured[handle].append(enqueue)
        else:
            self._streams[handle].append(enqueue())

    def is_captured(self, stream: Any) -> bool:
        return int(stream) in self._captured

    def _outside_capture(self, what: str) -> None:
        if self._captured:
            raise Broken("nothing else in capture", what)

    def _pinned(self, address: int, size: int) -> Bytes:
        for base, memory in self._host.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base : address - base + size]
        raise Broken("pinned", f"{size} bytes at {address:#x} are no page-locked memory")

    def _number(self) -> int:
        self._next += 1 << 12
        return self._next

    # ── the device ───────────────────────────────────────────────────────────────────────────────────────────────────

    def cudaGetDeviceCount(self) -> tuple[cudaError_t, int]:
        return (OK, self.devices) if self.devices else (cudaError_t.cudaErrorNoDevice, 0)

    def cudaSetDevice(self, device: int) -> Status:
        return (OK if device < self.devices else cudaError_t.cudaErrorNoDevice,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[cudaError_t, Any]:
        major, minor = self.capability
        return OK, SimpleNamespace(name=b"Double" + b"\0" * 250, major=major, minor=minor)

    def cudaDeviceGetAttribute(self, attr: cudaDeviceAttr, device: int) -> tuple[cudaError_t, int]:
        return OK, self.capability[attr - cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor]

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return OK, 13020

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        return OK, self.total_bytes - self.in_use()["device bytes"], self.total_bytes

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[cudaError_t, bytes]:
        return OK, error.name.encode()

    def cudaGetLastError(self) -> Status:
        return (OK,)

    # ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int]:
        self._outside_capture("cudaMalloc")
        if size > self.cudaMemGetInfo()[1]:
            return cudaError_t.cudaErrorMemoryAllocation, 0
        address = self._number()
        self._next += size
        self._next = -(-self._next // 512) * 512
        self._device[address] = np.full(size, POISON, np.uint8)
        return OK, address

    def cudaFree(self, devPtr: int) -> Status:
        self._outside_capture("cudaFree")
        if devPtr not in self._device:
            raise Broken("device memory", f"{devPtr:#x} was not allocated, or was freed before")
        del self._device[devPtr]
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[cudaError_t, int]:
        self._outside_capture("cudaMallocHost")
        memory = np.full(size, POISON, np.uint8)
        self._host[memory.ctypes.data] = memory
        return OK, memory.ctypes.data

    def cudaFreeHost(self, ptr: int) -> Status:
        self._outside_capture("cudaFreeHost")
        if ptr not in self._host:
            raise Broken("pinned", f"{ptr:#x} was not allocated, or was freed before")
        self._freed.append(self._host.pop(ptr))
        return (OK,)

    # ── what a stream does ───────────────────────────────────────────────────────────────────────────────────────────

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Status:
        def enqueue() -> Work:
            self.memory(devPtr, count)
            return lambda: self.memory(devPtr, count).fill(value)

        self.submit(stream, enqueue)
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: Any) -> Status:
        def up() -> Work:
            before = bytes(self._pinned(src, count))
            self.memory(dst, count)

            def work() -> None:
                if bytes(self._pinned(src, count)) != before:
                    raise Broken("untouched", "the source of a copy was written before the stream had passed")
                self.memory(dst, count)[:] = np.frombuffer(before, np.uint8)

            return work

        def down() -> Work:
            self._pinned(dst, count).fill(POISON)  # what is read too early is not there yet
            self.memory(src, count)

            def work() -> None:
                if (self._pinned(dst, count) != POISON).any():
                    raise Broken("untouched", "the target of a copy was written before the stream had passed")
                self._pinned(dst, count)[:] = self.memory(src, count)

            return work

        self.submit(stream, up if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else down)
        return (OK,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: cudaMemcpyKind, stream: Any
    ) -> Status:
        if kind != cudaMemcpyKind.cudaMemcpyDeviceToDevice or width > min(dpitch, spitch):
            return (cudaError_t.cudaErrorInvalidValue,)

        def enqueue() -> Work:
            def work() -> None:
                for row in range(height):
                    self.memory(dst + row * dpitch, width)[:] = self.memory(src + row * spitch, width)

            return work

        self.submit(stream, enqueue)
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, Any]:
        handle = self._number()
        self._streams[handle] = []
        return OK, ctypes.c_uint64(handle) if flags == 0 else _Handle(handle)

    def cudaStreamDestroy(self, stream: Any) -> Status:
        self._outside_capture("cudaStreamDestroy")
        if self._streams.pop(int(stream)):
            raise Broken("stream", "it was destroyed with work in it")
        return (OK,)

    def cudaStreamSynchronize(self, stream: Any) -> Status:
        self._outside_capture("cudaStreamSynchronize")
        works, self._streams[int(stream)] = self._streams[int(stream)], []
        for work in works:
            work()
        return (OK,)

    # ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> Status:
        self._outside_capture("cudaStreamBeginCapture")
        self._captured[int(stream)] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[cudaError_t, Any]:
        calls = self._captured.pop(int(stream), None)
        if calls is None or self.refuse_capture:
            return cudaError_t.cudaErrorStreamCaptureInvalidated, None
        handle = self._number()
        self._graphs[handle] = calls
        return OK, _Handle(handle)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[cudaError_t, Any]:
        handle = self._number()
        self._executables[handle] = self._graphs[int(graph)]
        return OK, _Handle(handle)

    def cudaGraphDestroy(self, graph: Any) -> Status:
        del self._graphs[int(graph)]
        return (OK,)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Status:
        self.launched += 1
        for enqueue in self._executables[int(graphExec)]:
            self.submit(stream, enqueue)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> Status:
        del self._executables[int(graphExec)]
        return (OK,)


class _Handle:
    """Opaque, but for its number, as the bindings' are."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number
