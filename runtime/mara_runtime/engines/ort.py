"""ONNX Runtime: a bundle's step graph in one session, the KV cache in place.

Past and present of a layer are bound to the same memory, so a pass writes its entries where they stay. Inputs and
outputs are NumPy arrays in one block each, which ONNX Runtime reads and writes in place or, on a device, with one copy;
they are bound once for each shape of pass: a new binding costs more than the rest of the host's work in a step.

`CpuEngine` is here; ort_cuda.py has the engine for CUDA.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.agents import AgentStack
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput, fill_inputs, read_outputs
from mara_runtime.engines.cores import default_threads, most_threads
from mara_runtime.engines.cuda import aligned
from mara_runtime.engines.huge_pages import huge_pages
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.engines.ort_memory import Binding, BindingKey, CpuMemory
from mara_runtime.errors import EngineError, OptionError, first_line
from mara_runtime.files import mapped

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of each engine."""
_WIDEST_CACHED = 64
"""Bindings of passes with more rows, which are parts of prompts and the widest decisions, are not kept."""


def why_not(bundle: Bundle, name: str) -> str | None:
    """Why engine `name` cannot run the bundle here; None when it can."""
    if name not in bundle.manifest.targets:
        return f"the bundle was not exported for it (targets: {', '.join(bundle.manifest.targets)})"
    try:
        import onnxruntime
    except (ImportError, OSError) as error:  # OSError: a native library that it loads is missing
        extra = "gpu" if name == "cuda" else "cpu"
        absent = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        why = "is not installed" if absent else f"cannot be imported ({first_line(error)})"
        return f"ONNX Runtime {why}: pip install 'mara-deploy[{extra}]'"
    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        return f"this ONNX Runtime has no {PROVIDERS[name]} (it has {', '.join(available)})"
    return None


class OrtEngine(ABC):
    """See `Engine`. Subclasses say where it runs."""

    name: ClassVar[str]

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """threads: default one per physical core that this process may use. Raises EngineError and OptionError."""
        import onnxruntime as ort

        most = most_threads()
        if threads is not None and not 1 <= threads <= most:
            raise OptionError(
                f"--threads is {threads}; it must lie between 1 and {most}, the processors that may be used"
            )
        self._bundle, self._threads = bundle, threads
        manifest = bundle.manifest
        self._path = path = bundle.path(manifest.step.file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or default_threads() or 0  # 0: one per physical core
        options.log_severity_level = 3
        self._session = self._open(path, options)
        self._shape, self._dtype = manifest.model.shape, manifest.step.cache
        self._top = tensors.top_tokens(manifest.max_candidates, self._shape.vocab_size)
        self._check_io(path)
        self._memory = self._make_memory(manifest.slots)
        self._cache = KVCache(self._memory)
        self._agents = AgentStack(bundle)
        self._stacked: list[Any] = []
        self.use(())

    @abstractmethod
    def _open(self, path: Path, options: Any) -> Any:
        """The session, by `_open_session`."""

    @abstractmethod
    def _make_memory(self, capacity: int) -> CpuMemory:
        """Memory of the KV cache."""

    @abstractmethod
    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`."""

    def _run_options(self, cached: bool) -> Any:
        """Options of the passes of one binding. cached: it will be used again."""
        import onnxruntime as ort

        return ort.RunOptions()

    def _open_session(self, path: Path, options: Any, provider_options: dict[str, str]) -> Any:
        import onnxruntime as ort

        provider = PROVIDERS[self.name]
        in_memory = getattr(options, "add_external_initializers_from_files_in_memory", None)
        names = self._bundle.scattered(self._bundle.manifest.step.file)
        if names and in_memory is not None:  # before 1.24, ONNX Runtime follows every link
            contents = [mapped(path.parent / name) for name in names]
            in_memory(names, contents, [len(content) for content in contents])  # which copies what it needs
        try:
            session = ort.InferenceSession(str(path), options, providers=[(provider, provider_options)])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
        if provider not in session.get_providers():  # it goes on with the CPU's, silently
            raise EngineError(
                f"ONNX Runtime cannot use its {provider}, usually because CUDA or cuDNN is missing, or the driver is "
                "older than 580, for CUDA 13: pip install 'onnxruntime-gpu[cuda,cudnn]', or add the folders of other "
                "libraries to LD_LIBRARY_PATH"
            )
        return session

    def _check_io(self, path: Path) -> None:
        """Check that the graph has the tensors that the manifest's sizes imply."""
        inputs = tensors.step_inputs(self._shape, self._dtype)
        outputs = tensors.step_outputs(self._shape, self._top, self._dtype)
        for expected, actual in ((inputs, self._session.get_inputs()), (outputs, self._session.get_outputs())):
            shapes = {value.name: tuple(value.shape) for value in actual}
            for tensor in expected:
                if shapes.get(tensor.name) != tensor.shape:
                    raise EngineError(
                        f"{path} does not fit its manifest: {tensor.name} should have the shape {tensor.shape} and has "
                        f"{shapes.get(tensor.name)}; export the bundle again"
                    )

    @property
    def cache(self) -> KVCache:
        """See `Engine`."""
        return self._cache

    @property
    def memory(self) -> CpuMemory:
        """Where the KV entries lie."""
        return self._memory

    def use(self, agents: Sequence[str]) -> None:
        """See `Engine.use`."""
        self._agents.use(agents, self._load_agents)

    def _load_agents(self, stacked: list[NDArray[np.float32]]) -> None:
        """Stacks of one size take turns in the same memory, to which bindings refer."""
        import onnxruntime as ort

        if [value.shape() for value in self._stacked] == [list(weights.shape) for weights in stacked]:
            for value, weights in zip(self._stacked, stacked, strict=True):
                value.update_inplace(weights)
        else:
            device = self._memory.device
            self._stacked[:] = [ort.OrtValue.ortvalue_from_numpy(weights, device, 0) for weights in stacked]
            self._memory.bindings.clear()

    def _run(self, work: Pass, row_offset: int = 0) -> StepOutput:
        """row_offset: rows in front that the caller did not ask for."""
        key = len(work.tokens), len(work.head_rows), len(work.agent_rows)
        bound = self._make_binding(key, cached=False) if work.full else self._bind(key)
        fill_inputs(bound.inputs, work)
        if work.full:
            for name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE):
                bound.binding.bind_output(name, "cpu")
        try:
            for memory, block in bound.uploads:
                memory.update_inplace(block)
            self._session.run_with_iobinding(bound.binding, bound.options)
            for memory, block in bound.downloads:
                block[...] = memory.numpy()
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime cannot run {self._path}: {first_line(error)}") from error
        if not work.full:
            return read_outputs(bound.outputs, work, row_offset)
        *_, logits, hidden = bound.binding.get_outputs()  # in the order of binding
        return read_outputs(bound.outputs, work, row_offset, hidden.numpy()[:, row_offset:], logits.numpy())

    def _bind(self, key: BindingKey) -> Binding:
        bound = self._memory.bindings.get(key)
        if bound is None:
            cached = key[0] <= _WIDEST_CACHED
            bound = self._make_binding(key, cached)
            if cached:
                self._memory.bindings[key] = bound
        return bound

    def _make_binding(self, key: BindingKey, cached: bool) -> Binding:
        rows, heads, judged = key
        agents = self._stacked[0].shape()[0]
        sizes: dict[int | str, int] = {"S": rows, "H0": heads, "N": judged, "P": heads + 1, "A": agents}
        binding = self._session.io_binding()
        inputs, uploads = self._bind_block(binding.bind_input, tensors.pass_inputs(), sizes)
        outputs, downloads = self._bind_block(binding.bind_output, tensors.step_outputs(self._shape, self._top), sizes)
        for tensor, value in zip(tensors.agent_weights(self._shape.hidden_size), self._stacked, strict=True):
            binding.bind_ortvalue_input(tensor.name, value)
        for (past, present), value in zip(tensors.kv_names(self._shape.num_layers), self._memory.values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        return Binding(binding, self._run_options(cached), inputs, outputs, uploads, downloads)

    def _bind_block(
        self, bind: Any, wanted: Sequence[tensors.Tensor], sizes: dict[int | str, int]
    ) -> tuple[dict[str, NDArray[Any]], list[tuple[Any, NDArray[Any]]]]:
        """Bind the small tensors of one side to one block of memory, which a single copy moves to or from a device.

        Returns the arrays by name, and (memory on the device, the arrays' block), if it is not that block itself.
        """
        import onnxruntime as ort

        shapes: dict[str, tuple[list[int], np.dtype[Any], int]] = {}
        size = 0
        for tensor in wanted:
            if "C" not in tensor.shape and tensor.name not in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE):
                shape, dtype = [sizes[d] if isinstance(d, str) else d for d in tensor.shape], np.dtype(tensor.dtype)
                shapes[tensor.name] = shape, dtype, size
                size += aligned(math.prod(shape) * dtype.itemsize)
        block, device = np.zeros(size, np.uint8), self._memory.device
        memory = ort.OrtValue.ortvalue_from_numpy(block, device, 0)  # on a CPU it is the block
        arrays = {}
        for name, (shape, dtype, start) in shapes.items():
            bind(name, device, 0, dtype.type, shape, memory.data_ptr() + start)
            arrays[name] = block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        return arrays, [] if self.name == "cpu" else [(memory, block)]

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        import onnxruntime

        graph = self._bundle.manifest.step
        return {
            "name": self.name,
            "version": f"onnxruntime {onnxruntime.__version__}",
            "lowering": graph.lowering,
            "precision": graph.precision,
            "threads": self._threads,
        }


class CpuEngine(OrtEngine):
    """On the CPU provider."""

    name = "cpu"

    def _open(self, path: Path, options: Any) -> Any:
        with huge_pages():
            return self._open_session(path, options, {})

    def _make_memory(self, capacity: int) -> CpuMemory:
        return CpuMemory(self._shape, self._dtype, capacity)

    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`."""
        self._cache.reserve(work.slot, len(work.tokens))
        return self._run(work)
