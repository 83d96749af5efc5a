"""The double of `tensorrt`: runtime, engine and execution context, the passes run by ONNX Runtime."""

from __future__ import annotations

import json
import weakref
from collections.abc import Container, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

from tests.double import Broken
from tests.double.cuda import CudaDouble
from tests.double.trt_context import (
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    IExecutionContext,
    ILogger,
    TensorIOMode,
)


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
        first, second = facts["agent_widths"]
        self._fixed = {"C": facts["slots"], "W1": first, "W2": second}
        self._io = {t.name: (mode, self._shape(t.shape), *_TYPES[t.type]) for t, mode in nodes}
        self.device_memory_size_v2 = facts.get("activation_bytes", 4096)
        self.streamable_weights_size = facts.get("streamable_weights_bytes", 0)
        self._budget = self.streamable_weights_size
        trt.engines.add(self)

    def _shape(self, sizes: Sequence[Any]) -> tuple[int, ...]:
        return tuple(self._fixed.get(size, -1) if isinstance(size, str) else size for size in sizes)

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
        return int(self._facts.get("profiles", 3 if self._facts["places"] > 1 else 2))

    def bounds(self, profile: int, name: str) -> list[tuple[int, int] | None]:
        """The least and the most of each size of an input in a profile; None: it is fixed."""
        facts, one = self._facts, (1, 1)
        if profile < 2:
            rows = 1, facts["prefill_rows" if profile else "decode_rows"]
            sizes = {"B": one, "M": rows, "S": rows, "N": rows, "Q": rows, "H0": (1, facts["head_rows"])}
        else:
            places, width = facts["places"], facts["shared_rows"]
            rows = width + facts["decode_rows"]
            sizes = {"B": (2, places), "M": (1, width), "S": (2, rows), "N": (1, rows), "Q": one}
            sizes["H0"] = 1, places * facts["head_rows"]
        sizes["A"] = 1, facts["agents"]
        shapes = {tensor.name: tensor.shape for tensor in self.session.get_inputs()}
        return [sizes.get(size) for size in shapes[name]]

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


@lru_cache(maxsize=4)
def _session(graph: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
