"""The few calls of the CUDA runtime that an engine needs, over `cuda.bindings` (no PyTorch).

An address is a whole number, and a failure an EngineError of one line.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.errors import EngineError

ALIGNMENT = 256
"""Bytes: of every tensor's address. cudaMalloc gives no less, and kernels may count on it."""

FOR_CUDA_12 = (
    "on a driver of CUDA 12, instead of the extra, which is for CUDA 13: pip install tensorrt-cu12 'cuda-bindings<13' "
    "onnx; on JetPack 6, the extra and 'cuda-bindings==12.8.*'"
)
"""What to install there, for messages."""
_TOO_OLD = 35
"""cudaErrorInsufficientDriver: also where there is no driver at all."""


def load() -> Any:
    """The bindings of the CUDA runtime. Raises ImportError when they are not installed."""
    from cuda.bindings import runtime

    return runtime


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class DeviceFacts:
    """The GPU that engines run on: the process's first."""

    name: str
    compute_capability: str
    """like 8.7"""
    total_bytes: int
    driver: str
    """newest CUDA version that the driver knows, like 13.2"""


def why_not() -> str | None:
    """Why no GPU can be used here, or None when one can."""
    try:
        cuda = load()
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}): pip install cuda-bindings; {FOR_CUDA_12}"
    try:
        status, count = cuda.cudaGetDeviceCount()
    except RuntimeError as error:  # of cuda-bindings 12.8 and before, where there is no driver
        return f"there is no NVIDIA GPU that can be used ({error})"
    if int(status) == _TOO_OLD and not _has_driver():
        return "there is no NVIDIA GPU that can be used: no driver is installed"
    if int(status) == _TOO_OLD:
        return (
            f"there is no NVIDIA GPU that can be used ({_text(cuda, status)}); if there is one, its driver is too old "
            f"for cuda-bindings: {FOR_CUDA_12}"
        )
    if int(status) != 0 or not count:
        return f"there is no NVIDIA GPU that can be used ({_text(cuda, status) if int(status) else 'none was found'})"
    return None


def _has_driver() -> bool:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return True
    return False


def compute_capability() -> str:
    """Of the first GPU, like 8.7."""
    cuda = load()
    attributes = cuda.cudaDeviceAttr
    wanted = attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor
    return ".".join(str(_checked(cuda, "cudaDeviceGetAttribute", attribute, 0)) for attribute in wanted)


class Cuda:
    """Memory, one stream and CUDA graphs on the first GPU. Whatever is asked of the stream happens in order, later."""

    def __init__(self) -> None:
        self._cuda = load()
        self._call("cudaSetDevice", 0)
        # not the default stream, which waits for all others and cannot be captured
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        kinds = self._cuda.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._on_device = kinds.cudaMemcpyDeviceToDevice

    @property
    def stream(self) -> int:
        """Handle of the stream, as TensorRT wants it."""
        return int(self._stream)

    def facts(self) -> DeviceFacts:
        """What the GPU is."""
        name = self._call("cudaGetDeviceProperties", 0).name
        driver = self._call("cudaDriverGetVersion")
        return DeviceFacts(
            name.split(b"\0")[0].decode(),
            compute_capability(),
            self._call("cudaMemGetInfo")[1],
            f"{driver // 1000}.{driver % 1000 // 10}",
        )

    def free_bytes(self) -> int:
        """Device memory that is free. Where CPU and GPU share memory, what the page cache holds is not counted."""
        return int(self._call("cudaMemGetInfo")[0])

    # ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def allocate(self, size: int, what: str) -> int:
        """Device memory, its content undefined. Raises EngineError, naming `what` it is for."""
        status, address = self._cuda.cudaMalloc(size)
        if int(status) == 0:
            return int(address)
        self._cuda.cudaGetLastError()  # it would be reported again by the next call
        raise EngineError(
            f"the GPU has no {size / 2**20:,.0f} MiB for {what} ({self.free_bytes() / 2**20:,.0f} MiB are free; "
            f"{_text(self._cuda, status)}): close other programs, or export with a smaller --max-context or precision"
        )

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Page-locked host memory, the only kind that copies can use while the program goes on; zeroed."""
        address = int(self._call("cudaMallocHost", size))
        array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Give host memory back; arrays that look at it must not be used any more."""
        self._call("cudaFreeHost", array.ctypes.data)

    # ── in the stream ────────────────────────────────────────────────────────────────────────────────────────────────

    def zero(self, address: int, size: int) -> None:
        """Fill device memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def upload(self, target: int, source: NDArray[np.uint8]) -> None:
        """Copy host memory to the device; it must not change before `wait`."""
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, self._to_device, self._stream)

    def download(self, target: NDArray[np.uint8], source: int) -> None:
        """Copy from the device to host memory; it must not be looked at before `wait`."""
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, self._to_host, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes on the device, each so many bytes (`pitch`) after the one before."""
        kind = self._on_device
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream)

    def wait(self) -> None:
        """Until the stream is empty."""
        self._call("cudaStreamSynchronize", self._stream)

    # ── CUDA graphs ──────────────────────────────────────────────────────────────────────────────────────────────────

    def begin_capture(self) -> None:
        """What is asked of the stream from now on is recorded, and does not happen."""
        # of this thread only: another's allocations do not spoil it
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> Any:
        """The recorded calls as a graph that can be launched."""
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """End a capture that failed; nothing of it stays."""
        status, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if int(status) == 0:
            self._call("cudaGraphDestroy", graph)
        self._cuda.cudaGetLastError()

    def launch(self, graph: Any) -> None:
        """Do what a graph recorded."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Give a graph back."""
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Give the stream back."""
        self._call("cudaStreamDestroy", self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return _checked(self._cuda, name, *arguments)


def _checked(cuda: Any, name: str, *arguments: Any) -> Any:
    """The result of a call: None, a value, or several. Raises EngineError when it failed."""
    status, *values = getattr(cuda, name)(*arguments)
    if int(status) != 0:
        raise EngineError(f"the GPU failed: {name} says {_text(cuda, status)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _text(cuda: Any, status: Any) -> str:
    """What a status means, like "out of memory (2)"."""
    _, text = cuda.cudaGetErrorString(status)
    return f"{text.decode() if isinstance(text, bytes) else text} ({int(status)})"
