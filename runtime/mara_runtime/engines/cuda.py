"""The CUDA runtime calls that an engine needs, through `cuda.bindings`, without PyTorch.

Addresses are integers; failures are EngineErrors of one line.
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
"""Of every tensor's address, in bytes. cudaMalloc guarantees it, and kernels may rely on it."""

FOR_CUDA_12 = (
    "on a driver of CUDA 12, instead of the extra, which is for CUDA 13: pip install tensorrt-cu12 'cuda-bindings<13' "
    "onnx; on JetPack 6, the extra and 'cuda-bindings==12.8.*'"
)
"""What to install for CUDA 12, for messages."""
_TOO_OLD = 35
"""cudaErrorInsufficientDriver; also returned where no driver is installed."""


def load() -> Any:
    """The bindings of the CUDA runtime. Raises ImportError when they are not installed."""
    from cuda.bindings import runtime

    return runtime


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class DeviceFacts:
    """The GPU that engines run on: the first that the process sees."""

    name: str
    compute_capability: str
    """like 8.7"""
    total_bytes: int
    driver: str
    """newest CUDA version that the driver supports, like 13.2"""


def why_not() -> str | None:
    """Why no GPU can be used here; None when one can."""
    try:
        cuda = load()
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error}): pip install cuda-bindings; {FOR_CUDA_12}"
    try:
        status, count = cuda.cudaGetDeviceCount()
    except RuntimeError as error:  # of cuda-bindings 12.8 and before, where there is no driver
        return f"no NVIDIA GPU can be used ({error})"
    if int(status) == _TOO_OLD and not _has_driver():
        return "no NVIDIA GPU can be used: no driver is installed"
    if int(status) == _TOO_OLD:
        return (
            f"no NVIDIA GPU can be used ({_text(cuda, status)}); if there is one, its driver is too old "
            f"for cuda-bindings: {FOR_CUDA_12}"
        )
    if int(status) != 0 or not count:
        return f"no NVIDIA GPU can be used ({_text(cuda, status) if int(status) else 'none was found'})"
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
    """Memory, one stream and CUDA graphs on the first GPU. Work put into the stream runs asynchronously, in order."""

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
        """Handle of the stream, as TensorRT takes it."""
        return int(self._stream)

    def facts(self) -> DeviceFacts:
        """Name, compute capability, memory and driver of the GPU."""
        name = self._call("cudaGetDeviceProperties", 0).name
        driver = self._call("cudaDriverGetVersion")
        return DeviceFacts(
            name.split(b"\0")[0].decode(),
            compute_capability(),
            self._call("cudaMemGetInfo")[1],
            f"{driver // 1000}.{driver % 1000 // 10}",
        )

    def free_bytes(self) -> int:
        """Free device memory. Where CPU and GPU share memory, the page cache does not count as free."""
        return int(self._call("cudaMemGetInfo")[0])

    # ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def allocate(self, size: int, what: str) -> int:
        """Allocate device memory, its content undefined. Raises EngineError; `what` names its purpose."""
        status, address = self._cuda.cudaMalloc(size)
        if int(status) == 0:
            return int(address)
        self._cuda.cudaGetLastError()  # else the next call reports it again
        raise EngineError(
            f"the GPU has no {size / 2**20:,.0f} MiB for {what} ({self.free_bytes() / 2**20:,.0f} MiB are free; "
            f"{_text(self._cuda, status)}): close other programs, or export with a smaller --max-context or precision"
        )

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Allocate page-locked host memory, which asynchronous copies need; zeroed."""
        address = int(self._call("cudaMallocHost", size))
        array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def free_host(self, array: NDArray[np.uint8]) -> None:
        """Free host memory; views of it must not be used afterwards."""
        self._call("cudaFreeHost", array.ctypes.data)

    # ── in the stream ────────────────────────────────────────────────────────────────────────────────────────────────

    def zero(self, address: int, size: int) -> None:
        """Fill device memory with zeros."""
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def upload(self, target: int, source: NDArray[np.uint8]) -> None:
        """Copy host memory to the device; do not modify it before `wait`."""
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, self._to_device, self._stream)

    def download(self, target: NDArray[np.uint8], source: int) -> None:
        """Copy device memory to the host; do not read it before `wait`."""
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, self._to_host, self._stream)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` rows of `width` bytes on the device; a row starts `pitch` bytes after the previous one."""
        kind = self._on_device
        self._call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self._stream)

    def wait(self) -> None:
        """Wait until the stream is empty."""
        self._call("cudaStreamSynchronize", self._stream)

    # ── CUDA graphs ──────────────────────────────────────────────────────────────────────────────────────────────────

    def begin_capture(self) -> None:
        """Record work put into the stream from now on instead of running it."""
        # of this thread only: allocations of other threads do not invalidate it
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)

    def end_capture(self) -> Any:
        """End the recording; returns a graph that can be launched."""
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def abandon_capture(self) -> None:
        """End a capture that failed, and discard it."""
        status, graph = self._cuda.cudaStreamEndCapture(self._stream)
        if int(status) == 0:
            self._call("cudaGraphDestroy", graph)
        self._cuda.cudaGetLastError()

    def launch(self, graph: Any) -> None:
        """Run a graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def destroy(self, graph: Any) -> None:
        """Destroy a graph."""
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Destroy the stream."""
        self._call("cudaStreamDestroy", self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        return _checked(self._cuda, name, *arguments)


def _checked(cuda: Any, name: str, *arguments: Any) -> Any:
    """Result of a call: None, a value, or several. Raises EngineError."""
    status, *values = getattr(cuda, name)(*arguments)
    if int(status) != 0:
        raise EngineError(f"the GPU failed: {name} returned {_text(cuda, status)}")
    return values[0] if len(values) == 1 else tuple(values) or None


def _text(cuda: Any, status: Any) -> str:
    """Text of a status, like "out of memory (2)"."""
    _, text = cuda.cudaGetErrorString(status)
    return f"{text.decode() if isinstance(text, bytes) else text} ({int(status)})"
