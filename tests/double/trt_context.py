"""The double of TensorRT's execution context: what must be set before a pass, and in which order."""

from __future__ import annotations

import math
import weakref
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from mara_runtime.engines.cuda import ALIGNMENT
from tests.double import Broken
from tests.double.cuda import POISON, Work

if TYPE_CHECKING:
    from tests.double.trt import ICudaEngine, IRuntimeConfig, TrtDouble


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    LAZY = 0
    EAGER = 1


class IExecutionContext:
    def __init__(self, trt: TrtDouble, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        if trt.cuda._captured:
            raise Broken("nothing else in capture", "create_execution_context")
        self._trt, self._cuda, self.engine, self._strategy = trt, trt.cuda, engine, config.strategy
        eager = config.dynamic_shapes_kernel_specialization_strategy == DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels = config.cache
        self._waits = self._kernels is not None and eager
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._warm = False
        self._changes = 0
        trt.contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)
        self._changes += 1

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index >= self.engine.num_optimization_profiles:
            self.engine.logger.log(ILogger.Severity.ERROR, f"there is no profile {profile_index}")
            raise RuntimeError("Error in set optimization profile async.")
        self._cuda.submit(stream_handle, lambda: lambda: None)
        self._profile = profile_index
        self._shapes.clear()
        self._warm = False
        self._changes += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = self.engine.get_tensor_shape(name)
        if len(shape) != len(fixed) or any(want not in (-1, size) for want, size in zip(fixed, shape, strict=True)):
            raise Broken("static capacity", f"{name} is {fixed} and was set to {shape}")
        bounds = self.engine.bounds(self._profile, name)
        if not all(bound is None or bound[0] <= n <= bound[1] for n, bound in zip(shape, bounds, strict=True)):
            raise Broken("profile", f"{name} {shape} is not within {bounds} of profile {self._profile}")
        if self._shapes.get(name) != shape:
            self._shapes[name] = shape
            self._warm = False
            self._changes += 1
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if memory % ALIGNMENT:
            raise Broken("aligned", f"{name} at {memory:#x}")
        if self._addresses.get(name) != memory:
            self._addresses[name] = memory
            self._changes += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not stream_handle:
            raise Broken("stream", "the default stream")
        captured = self._cuda.is_captured(stream_handle)
        if captured and not self._warm:
            raise Broken("one before capture", "the context has not run with these shapes")
        if captured and self.engine.is_streaming:
            return False
        shapes = self._check()
        if self._waits and not captured:
            self._compile(str(sorted(self._shapes.items())))
        self._warm = True
        me, changes, addresses = weakref.ref(self), self._changes, dict(self._addresses)

        def enqueue() -> Work:
            context = me()
            if context is None or context._changes != changes:
                raise Broken(
                    "unchanged graph", "its context is gone" if context is None else "its context was set anew"
                )
            context._check()
            return lambda: _run(context, shapes, addresses)

        self._cuda.submit(stream_handle, enqueue)
        return True

    def _compile(self, kernel: str) -> None:
        assert self._kernels is not None
        if kernel not in self._kernels.kernels:
            self._kernels.kernels.append(kernel)
            self._trt.compiled += 1

    def is_stream_capturable(self, stream: int) -> bool:
        return int(stream) in self._cuda._streams

    def _check(self) -> dict[str, tuple[int, ...]]:
        """Is everything set? Returns the shapes of all inputs and outputs."""
        engine, shapes = self.engine, {}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        symbols: dict[str, int] = {}
        for name in names:
            fixed = engine.get_tensor_shape(name)
            if engine.get_tensor_mode(name) == TensorIOMode.INPUT:
                if -1 in fixed and name not in self._shapes:
                    raise Broken("profile first", f"{name} has no shape in profile {self._profile}")
                shapes[name] = self._shapes.get(name, fixed)
        for tensor in engine.session.get_inputs():
            symbols.update({d: n for d, n in zip(tensor.shape, shapes[tensor.name], strict=True) if isinstance(d, str)})
        symbols["P"] = symbols["R"] = symbols["H0"] + symbols["B"]
        for tensor in engine.session.get_outputs():
            shapes[tensor.name] = tuple(symbols[d] if isinstance(d, str) else d for d in tensor.shape)
        for name in names:
            if name not in self._addresses:
                raise Broken("addresses", f"{name} has none")
            self._cuda.memory(self._addresses[name], _bytes(engine, name, shapes[name]))
        pasts = {self._addresses[name]: name for name in names if name.startswith("past_key_values.")}
        for name in names:
            if name.startswith("present."):
                past = pasts.get(self._addresses[name])
                if past != (name.replace("present.", "past_key_values.") if engine.in_place else None):
                    raise Broken("in place", f"{name} lies at the address of {past}")
        memory, size = self._memory
        if self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED:
            if size < engine.device_memory_size_v2:
                raise Broken("activations", f"{size} bytes of {engine.device_memory_size_v2}")
            self._cuda.memory(memory, size)
        return shapes


def _run(context: IExecutionContext, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    engine, cuda = context.engine, context._cuda
    cuda.memory(*context._memory).fill(POISON)  # whoever keeps something there loses it

    def of(name: str) -> Any:
        memory = cuda.memory(addresses[name], _bytes(engine, name, shapes[name]))
        return memory.view(engine.numpy_type(name)).reshape(shapes[name])

    feeds = {tensor.name: of(tensor.name) for tensor in engine.session.get_inputs()}
    for name, array in feeds.items():
        if array.dtype.kind == "f" and (array.view(f"u{array.itemsize}") == 2 ** (8 * array.itemsize) - 1).any():
            raise Broken("written", f"{name} holds what nobody wrote")
    outputs = [tensor.name for tensor in engine.session.get_outputs()]
    for name, array in zip(outputs, engine.session.run(outputs, feeds), strict=True):
        of(name)[...] = array


def _bytes(engine: ICudaEngine, name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(engine.numpy_type(name)).itemsize
