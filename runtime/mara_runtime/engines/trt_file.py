"""An engine file: TensorRT's Python module, and a file deserialised and checked against the manifest.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Engine.html
"""

from __future__ import annotations

import contextlib
import mmap
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mara_runtime import tensors
from mara_runtime.engines.cuda import Cuda
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

IO = tuple[Sequence[tensors.Tensor], Sequence[tensors.Tensor]]
"""Inputs and outputs of the step graph."""
TYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
"""TensorRT's names of types."""


def load(target: str) -> Any:
    """The Python module of a target. Raises ImportError."""
    if target == "tensorrt":
        import tensorrt as trt
    else:
        try:
            import tensorrt_rtx as trt
        except ImportError:  # NVIDIA's meta package of that name is not needed to run engines
            import tensorrt_rtx_bindings as trt
    return trt


class EngineFile:
    """A deserialised engine, with the tensors that the manifest promises."""

    def __init__(self, trt: Any, cuda: Cuda, path: Path, facts: EngineFacts, io: IO) -> None:
        """Raises EngineError."""
        self._trt, self._cuda, self._path, self._facts = trt, cuda, path, facts
        self.streamed_bytes = 0
        """of weights in host memory"""
        self._runtime = self._start()
        if facts.options.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True  # the file contains the runtime of the version that built it
        self.engine = self._deserialise()
        self._check_io(*io)
        self._stream_weights()

    def _start(self) -> Any:
        try:
            return self._trt.Runtime(logger(self._trt))
        except TypeError as error:  # how the bindings report that the library returned null
            why = logger(self._trt).last or error
            raise EngineError(f"TensorRT {self._trt.__version__} does not start on this GPU: {why}") from None

    def _deserialise(self) -> Any:
        size = self._path.stat().st_size
        # mapped, not read: on a Jetson a copy would use memory that the engine needs
        with self._path.open("rb") as file, contextlib.ExitStack() as stack:
            data: Any = b""
            if size:
                data = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            free = self._cuda.free_bytes()
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            why = logger(self._trt).last or "no reason given"
            memory = (
                f"; it takes about {size / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free" if size > free else ""
            )
            raise EngineError(
                f"TensorRT {self._trt.__version__} cannot open {self._path} ({why}){memory}: {rebuild(self._path)}"
            )
        return engine

    def _check_io(self, inputs: Sequence[tensors.Tensor], outputs: Sequence[tensors.Tensor]) -> None:
        """Check that the engine has the tensors that the manifest's sizes imply; else it would write out of bounds."""
        engine, modes, (first, second) = self.engine, self._trt.TensorIOMode, self._facts.agent_widths
        fixed: dict[int | str, int] = {"C": self._facts.slots, "W1": first, "W2": second}
        there = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        for tensor, mode in [*((t, modes.INPUT) for t in inputs), *((t, modes.OUTPUT) for t in outputs)]:
            if tensor.name not in there or engine.get_tensor_mode(tensor.name) != mode:
                raise self._unfit(f"it has no {mode.name.lower()} {tensor.name}")
            shape = tuple(engine.get_tensor_shape(tensor.name))
            wanted = tuple(fixed.get(size, size) for size in tensor.shape)
            dtype = engine.get_tensor_dtype(tensor.name)
            agree = len(shape) == len(wanted) and all(
                isinstance(want, str) or size == want for want, size in zip(wanted, shape, strict=True)
            )
            if not agree or dtype != getattr(self._trt.DataType, TYPES[tensor.dtype]):
                raise self._unfit(
                    f"{tensor.name} should be {tensor.dtype} {wanted} and is {dtype.name.lower()} {shape}"
                )
        if len(there) != len(inputs) + len(outputs):
            raise self._unfit(f"it has {len(there)} inputs and outputs, not {len(inputs) + len(outputs)}")
        if hasattr(engine, "get_aliased_input_tensor"):  # TensorRT ≥ 10.15; before, no engine is in place
            pasts = [t.name for t in inputs if "C" in t.shape]
            for past, present in zip(pasts, (t.name for t in outputs if "C" in t.shape), strict=True):
                alias = engine.get_aliased_input_tensor(present) or None
                if alias != (past if self._facts.in_place else None):
                    raise self._unfit(f"{present} is written over {alias or 'no input'}")

    def _unfit(self, what: str) -> EngineError:
        return EngineError(f"{self._path} does not fit its manifest: {what}; {rebuild(self._path)}")

    def _stream_weights(self) -> None:
        """Leave weights in host memory that do not fit the device, if the engine was built for that."""
        engine = self.engine
        streamable = int(engine.streamable_weights_size)
        if not streamable:
            return
        fits = streamable + int(engine.device_memory_size_v2) < self._cuda.free_bytes()
        budget = streamable if fits else int(engine.get_weight_streaming_automatic_budget())
        for wanted in (budget, 0):  # 0: all are streamed
            engine.weight_streaming_budget_v2 = wanted
            kept = int(engine.weight_streaming_budget_v2)  # the bindings do not report a refusal
            if kept == wanted:
                break
        else:
            why = logger(self._trt).last or "no reason given"
            raise EngineError(
                f"TensorRT streams the weights of {self._path} neither with {budget:,} bytes on the GPU nor with none "
                f"({why}): {rebuild(self._path)}"
            )
        self.streamed_bytes = max(streamable - kept, 0)


def rebuild(path: Path) -> str:
    """The command that rebuilds a bundle's engine; `path` is BUNDLE/engines/TARGET/FILE."""
    bundle = shlex.quote(str(path.parents[2]))
    return f"build it again on this machine with mara-build {bundle} --target {path.parent.name}"


@cache
def logger(trt: Any) -> Any:
    """The process's first logger serves all its builders and runtimes, and must outlive them."""

    class Last(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error; prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.last = " ".join(message.split())[:300]

    return Last()
