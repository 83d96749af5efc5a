"""ONNX Runtime: a bundle's step graph in one session, the KV cache in place.

Past and present of a layer are bound to the same memory, so a pass writes its entries where they stay. Passes of
several places are one, over the range of that memory where they lie. Inputs and outputs are NumPy arrays in one block
each, which ONNX Runtime reads and writes in place or, on a device, with one copy; they are bound once for each shape of
pass: a new binding costs more than the rest of the host's work in a step.

ort_cpu.py and ort_cuda.py have the engines.
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
from mara_runtime.engines.base import Pass, Seating, StepOutput, Works
from mara_runtime.engines.cuda import aligned
from mara_runtime.engines.kv_cache import KVCache, Places
from mara_runtime.engines.machine import default_threads, most_threads
from mara_runtime.engines.ort_memory import Bank, Binding, BindingKey, OrtMemory
from mara_runtime.errors import EngineError, OptionError, first_line
from mara_runtime.files import mapped

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of each engine."""
_FILLS_SEATS = "portable"
"""Lowering whose passes write an entry at every seat, whether or not a row sits there: on a CPU, where places have no
spare slots for it, such a pass takes places side by side, with as many rows each."""
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
        options.log_severity_level = 4  # fatal: its other errors are raised
        self._session = self._open(path, options)
        self._shape, self._dtype = manifest.model.shape, manifest.step.cache
        self._top = tensors.top_tokens(manifest.max_candidates, self._shape.vocab_size)
        self._check_io(path)
        self._memory = self._make_memory(manifest.slots)
        self._places = Places(self._memory)
        self._agents = AgentStack(bundle)
        self._stacked: list[Any] = []
        self.use(())

    @abstractmethod
    def _open(self, path: Path, options: Any) -> Any:
        """The session, by `_open_session`."""

    @abstractmethod
    def _make_memory(self, capacity: int) -> OrtMemory:
        """Memory of the KV caches."""

    def _width(self, rows: int) -> int:
        """M of a pass, of whose conversations none has more rows; a row for each of them or more."""
        return rows

    def _run_options(self, cached: bool) -> Any:
        """Options of the passes of one binding. cached: it will be used again."""
        return None  # quicker than options without an entry, for which ONNX Runtime catches an exception in each pass

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
    def places(self) -> Places:
        """See `Engine`."""
        return self._places

    @property
    def cache(self) -> KVCache:
        """See `Engine`."""
        return self._places[0]

    @property
    def memory(self) -> OrtMemory:
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
            for bank in self._memory.banks:
                bank.slab.bindings.clear()

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`."""
        self._places[place].reserve(work.slot, len(work.tokens))
        bank, index = self._memory.places[place].seat
        return self._run(bank, (index,), (work,))[0]

    def run_together(self, works: Works) -> list[StepOutput]:
        """See `Engine.run_together`."""
        for place, work in works:
            self._places[place].reserve(work.slot, len(work.tokens))
        return self._share(works)

    def _share(self, works: Works) -> list[StepOutput]:
        """Run passes whose slots are reserved, in as few as their banks allow."""
        fills = self._bundle.manifest.step.lowering == _FILLS_SEATS
        shared: dict[tuple[Bank, bool, int], dict[Any, tuple[int, Pass]]] = {}
        for place, work in works:  # whether logits are bound distinguishes passes, too
            lies = self._memory.places[place]
            kind = lies.seat[0], work.logits, len(work.tokens) if fills else 0
            shared.setdefault(kind, {})[lies] = place, work
        found: dict[int, StepOutput] = {}
        for (bank, *_), taking in shared.items():
            order = self._memory.put_together(bank, [*taking])
            for group in _side_by_side(order) if fills else [order]:
                outs = self._run(bank, [lies.seat[1] for lies in group], [taking[lies][1] for lies in group])
                found.update((taking[lies][0], out) for lies, out in zip(group, outs, strict=True))
        return [found[place] for place, _ in works]

    def _run(self, bank: Bank, at: Sequence[int], works: Sequence[Pass]) -> list[StepOutput]:
        """Run passes of some of a bank's places, whose indices ascend, as one; all or none of them with logits."""
        first, full = works[0], works[0].logits
        low, high = at[0], at[-1] + 1
        if len(works) == 1:
            rows = longest = len(first.tokens)
            heads, judged, hidden = len(first.head_rows), len(first.agent_rows), len(first.hidden_rows)
        else:
            counts = [len(work.tokens) for work in works]
            rows, longest = sum(counts), max(counts)
            heads = sum(len(work.head_rows) for work in works)
            judged = sum(len(work.agent_rows) for work in works)
            hidden = sum(len(work.hidden_rows) for work in works)
        width = self._width(longest)
        key = low, high, width, rows, heads, judged, hidden
        bound = self._make_binding(bank, key, cached=False) if full else self._bind(bank, key)
        seating = Seating(works, [index - low for index in at], high - low, width)
        seating.fill(bound.inputs, seated=high - low == 1)
        if full:
            bound.binding.bind_output(tensors.LOGITS, "cpu")
        try:
            for memory, block in bound.uploads:
                memory.update_inplace(block)
            self._session.run_with_iobinding(bound.binding, bound.options)
            for memory, block in bound.downloads:
                block[...] = memory.numpy()
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime cannot run {self._path}: {first_line(error)}") from error
        logits = bound.binding.get_outputs()[-1].numpy() if full else None  # in the order of binding
        return seating.read(bound.outputs, bound.outputs[tensors.LAST_HIDDEN_STATE], logits)

    def _bind(self, bank: Bank, key: BindingKey) -> Binding:
        bound = bank.slab.bindings.get(key)
        if bound is None:
            cached = key[3] <= _WIDEST_CACHED
            bound = self._make_binding(bank, key, cached)
            if cached:
                bank.slab.keep(key, bound)
        return bound

    def _make_binding(self, bank: Bank, key: BindingKey, cached: bool) -> Binding:
        low, high, width, rows, heads, judged, hidden = key
        sizes: dict[int | str, int] = {
            "B": high - low, "M": width, "S": rows, "H0": heads, "N": judged, "Q": hidden,
            "P": heads + high - low, "A": self._stacked[0].shape()[0],
        }  # fmt: skip
        binding, slab, device = self._session.io_binding(), bank.slab, self._memory.device
        inputs, uploads = self._bind_block(binding.bind_input, tensors.pass_inputs(), sizes)
        if high - low == 1:  # the seats are those of every pass of one place
            inputs[tensors.GRID][0, :rows] = inputs[tensors.SEATS][0] = range(rows)
        outputs, downloads = self._bind_block(binding.bind_output, tensors.step_outputs(self._shape, self._top), sizes)
        for tensor, value in zip(tensors.agent_weights(self._shape.hidden_size), self._stacked, strict=True):
            binding.bind_ortvalue_input(tensor.name, value)
        dtype, sizes_of = slab.entries[0].dtype, [part.shape[1:] for group in slab.entries for part in group]
        names = tensors.kv_names(self._shape.num_caches)
        for (past, present), value, size in zip(names, slab.values, sizes_of, strict=True):
            where = value.data_ptr() + low * math.prod(size) * dtype.itemsize
            binding.bind_input(past, device, 0, dtype.type, [high - low, *size], where)
            binding.bind_output(present, device, 0, dtype.type, [high - low, *size], where)
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
            if "C" not in tensor.shape and tensor.name != tensors.LOGITS:
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


def _side_by_side(places: Sequence[Any]) -> list[list[Any]]:
    """Places of a bank in their order there, in groups without a gap."""
    groups: list[list[Any]] = []
    for place in places:
        if groups and groups[-1][-1].seat[1] + 1 == place.seat[1]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
