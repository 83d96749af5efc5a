"""The double of `tensorrt`: runtime, engine and execution context, the passes run by ONNX Runtime."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Container, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

from mara_runtime.engines.cuda import ALIGNMENT
from tests.double import Broken
from tests.double.cuda import POISON, CudaDouble, Work


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    INT64 = 9


_TYPES = {
    "tensor(int64)": (DataType.INT64, np.int64),
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
}


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


class TrtDouble:
    """Stands for the module; names of TensorRT for RTX alone are there, too."""

    ExecutionContextAllocationStrategy, TensorIOMode, DataType = (
        ExecutionContextAllocationStrategy,
        TensorIOMode,
        DataType,
    )
    DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
    ILogger = ILogger

    def __init__(self, cuda: CudaDouble) -> None:
        self.__version__ = "10.16.1.11"
        self.automatic_budget = 0
        self.refused_budgets: Container[int] = ()
        self.compiled = 0
        """kernels, by TensorRT for RTX"""
        self.cuda = cuda
        self.runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
        self.engines: weakref.WeakSet[ICudaEngine] = weakref.WeakSet()
        self.contexts: weakref.WeakSet[IExecutionContext] = weakref.WeakSet()

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)

    def in_use(self) -> dict[str, int]:
        return {"runtimes": len(self.runtimes), "engines": len(self.engines), "contexts": len(self.contexts)}


class Runtime:
    def __init__(self, trt: TrtDouble, logger: ILogger) -> None:
        self._trt, self._logger = trt, logger
        self.engine_host_code_allowed = False
        trt.runtimes.add(self)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            facts = json.loads(bytes(memoryview(serialized_engine)))
        except ValueError:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion failed\n(magicTag)")
            return None
        if facts.get("lean_runtime") and not self.engine_host_code_allowed:
            self._logger.log(ILogger.Severity.ERROR, "engine host code is not allowed")
            return None
        return ICudaEngine(self._trt, facts, self._logger)


class ICudaEngine:
    def __init__(self, trt: TrtDouble, facts: dict[str, Any], logger: ILogger) -> None:
        self._trt, self._facts, self.logger = trt, facts, logger
        self.session = _session(facts["graph"])
        nodes = [(t, TensorIOMode.INPUT) for t in self.session.get_inputs()]
        nodes += [(t, TensorIOMode.OUTPUT) for t in self.session.get_outputs()]
        self._io = {t.name: (mode, self._shape(t.shape), *_TYPES[t.type]) for t, mode in nodes}
        self.device_memory_size_v2 = facts.get("activation_bytes", 4096)
        self.streamable_weights_size = facts.get("streamable_weights_bytes", 0)
        self._budget = self.streamable_weights_size
        trt.engines.add(self)

    def _shape(self, sizes: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self._facts["slots"] if size == "C" else -1 if isinstance(size, str) else size for size in sizes)

    @property
    def num_io_tensors(self) -> int:
        return len(self._io)

    def get_tensor_name(self, index: int) -> str:
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._io[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._io[name][1]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._io[name][2]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("present.", "past_key_values.") if self.in_place and name.startswith("present.") else None

    @property
    def in_place(self) -> bool:
        return bool(self._facts["in_place"])

    def numpy_type(self, name: str) -> Any:
        return self._io[name][3]

    @property
    def num_optimization_profiles(self) -> int:
        return int(self._facts.get("profiles", 2))

    def bounds(self, profile: int) -> tuple[int, int]:
        """(S and N at most, H0 at most) in a profile."""
        return self._facts["prefill_rows" if profile else "decode_rows"], self._facts["head_rows"]

    def get_weight_streaming_automatic_budget(self) -> int:
        return self._trt.automatic_budget

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        if any(context.engine is self for context in self._trt.contexts):
            raise Broken("budget first", "the engine has a context")
        if value in self._trt.refused_budgets:  # without a word to the caller, like the bindings
            self.logger.log(ILogger.Severity.ERROR, f"a budget of {value}")
        else:
            self._budget = value

    @property
    def is_streaming(self) -> bool:
        return self._budget < self.streamable_weights_size

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig(self._trt)

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy | IRuntimeConfig = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        config = strategy if isinstance(strategy, IRuntimeConfig) else IRuntimeConfig(None, strategy)
        return IExecutionContext(self._trt, self, config)


class IRuntimeCache:
    """Of kernels; one is the name of a shape."""

    def __init__(self, trt: TrtDouble) -> None:
        self._trt = trt
        self.kernels: list[str] = []

    def serialize(self) -> bytes:
        return json.dumps([self._trt.__version__, *self.kernels]).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            version, *kernels = json.loads(blob)
        except ValueError:
            return False
        if version == self._trt.__version__:
            self.kernels = kernels
        return bool(version == self._trt.__version__)


class IRuntimeConfig:
    def __init__(
        self,
        trt: TrtDouble | None,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> None:
        self.trt, self.strategy, self.cache = trt, strategy, None if trt is None else IRuntimeCache(trt)
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        assert self.trt is not None
        return IRuntimeCache(self.trt)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


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
        rows, heads = self.engine.bounds(self._profile)
        most = heads if name == "head_rows" else rows
        if not all(1 <= size <= most for want, size in zip(fixed, shape, strict=True) if want == -1):
            raise Broken("profile", f"{name} {shape} is not within 1 … {most} of profile {self._profile}")
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
        symbols["P"] = symbols["R"] = symbols["H0"] + 1
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


@lru_cache(maxsize=4)
def _session(graph: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
