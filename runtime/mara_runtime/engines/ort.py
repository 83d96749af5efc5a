"""The ONNX Runtime engine: a bundle's step graph in one session, the KV cache in place.

Past and present of a layer are bound to the same memory, so a pass writes its rows' entries where they stay. Inputs
and outputs are NumPy arrays that ONNX Runtime reads and writes in place, bound once for each shape of pass: a new
binding costs more than the rest of the host's work in a step.

Proved on the CPU provider. On CUDA the same class keeps the cache on the device, where NumPy cannot reach it: an entry
that moves is computed again, as a row of the next pass (recompute.py). That has not run on hardware yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import FullOutput, Pass, StepOutput, fill, outcome
from mara_runtime.engines.huge_pages import huge_pages
from mara_runtime.engines.recompute import Recompute
from mara_runtime.errors import EngineError, OptionError, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of each engine name."""
DEVICES = {"cpu": "cpu", "cuda": "cuda"}
"""Where each engine's inputs, outputs and KV cache lie, as ONNX Runtime names it."""
MAX_THREADS = 1024
FIRST_SLOTS = 32
"""The cache begins with so many slots, and has a multiple of them until it is largest."""
_KEPT_ROWS = 64
"""Bindings of passes wider than this, parts of prompts and the widest decisions, are not kept."""


def why_not(bundle: Bundle, name: str) -> str | None:
    """Why engine `name` cannot run the bundle here, or None when it can."""
    if name not in bundle.manifest.targets:
        return f"the bundle was not exported for it (targets: {', '.join(bundle.manifest.targets)})"
    try:
        import onnxruntime
    except ImportError:
        extra = "gpu" if name == "cuda" else "cpu"
        return f"ONNX Runtime is not installed: pip install 'mara-deploy[{extra}]'"
    available = onnxruntime.get_available_providers()
    if PROVIDERS[name] not in available:
        return f"this ONNX Runtime has no {PROVIDERS[name]} (it has {', '.join(available)})"
    return None


def grown(name: str, size: int, slots: int) -> int:
    """Slots that a cache of `size` slots grows to, in engine `name`, for a pass that needs `slots` of them.

    On a CPU attention costs by the cache's size and a growth is a copy, so it is small; on a device the opposite.
    """
    least = size + size // 16 if name == "cpu" else 2 * size
    return -(-max(slots, least) // FIRST_SLOTS) * FIRST_SLOTS


@dataclass(frozen=True)
class _Bound:
    """A binding for passes of one shape, and the arrays that it reads and writes."""

    binding: Any
    options: Any
    """of the run"""
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    uploads: tuple[tuple[Any, NDArray[Any]], ...] = ()
    """values on a device, and the arrays that they take their content from before a pass"""
    downloads: tuple[tuple[Any, NDArray[Any]], ...] = ()
    """the same, the other way round, after it"""


_Key = tuple[int, int, int]  # S, H0, N


class OrtEngine:
    """See `Engine`; the manifest's capacity decides the greatest size of the KV cache."""

    def __init__(self, bundle: Bundle, name: str = "cpu", threads: int | None = None, *, graphs: bool = False) -> None:
        """graphs: on CUDA, run repeated passes as CUDA graphs where ONNX Runtime allows it; off until a device has
        shown that it holds. Raises EngineError and OptionError.
        """

        import onnxruntime as ort

        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise OptionError(f"--threads is {threads}; it must lie between 1 and {MAX_THREADS}")
        self._bundle = bundle
        self._name = name
        self._threads = threads
        manifest = bundle.manifest
        path = bundle.path(manifest.step.file)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: ONNX Runtime's own choice, one a physical core
        options.log_severity_level = 3
        self._graphs: bool | str = graphs
        """are passes run as CUDA graphs; a text: why not"""
        try:
            self._session = self._open(path, options)
        except EngineError as error:
            if not graphs:
                raise
            self._graphs = str(error)
            self._session = self._open(path, options)
        self._graph_ids = count(1)  # 0 is ONNX Runtime's own

        self._shape = manifest.model.shape
        self._top = tensors.top_tokens(manifest.max_candidates, self._shape.vocab_size)
        self._type = manifest.step.cache
        inputs = tensors.step_inputs(self._shape, self._type)
        self._check_io(path, inputs, tensors.step_outputs(self._shape, self._top, self._type))
        self._slots = manifest.max_context + tensors.spare_slots(manifest.max_candidates)
        # where the cache's memory is the slab's, NumPy moves entries; elsewhere it is out of reach
        self._refeed = None if name == "cpu" else Recompute(self._slots)
        self._bound: dict[_Key, _Bound] = {}
        self._allocate(min(FIRST_SLOTS, self._slots))

    def _open(self, path: Path, options: Any) -> Any:
        import onnxruntime as ort

        how = {"use_tf32": "0"} if self._name == "cuda" else {}  # else float32 is rounded to 11 bits
        if self._graphs is True:
            how["enable_cuda_graph"] = "1"
        try:
            with huge_pages() if self._name == "cpu" else contextlib.nullcontext():
                session = ort.InferenceSession(str(path), options, providers=[(PROVIDERS[self._name], how)])
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise EngineError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
        if PROVIDERS[self._name] not in session.get_providers():  # it goes on with the CPU's, in silence
            raise EngineError(
                f"ONNX Runtime cannot use its {PROVIDERS[self._name]}, as a rule because CUDA or cuDNN is not found: "
                "pip install 'onnxruntime-gpu[cuda,cudnn]', and name the folders of their libraries in LD_LIBRARY_PATH"
            )
        return session

    def _check_io(self, path: Any, *expected: list[tensors.Tensor]) -> None:
        """Does the graph have the tensors that the manifest's sizes ask for?"""
        for wanted, there in zip(expected, (self._session.get_inputs(), self._session.get_outputs()), strict=True):
            names = {t.name: tuple(t.shape) for t in there}
            for tensor in wanted:
                if names.get(tensor.name) != tensor.shape:
                    raise EngineError(
                        f"{path} does not fit its manifest: {tensor.name} should have the shape "
                        f"{tensor.shape} and has {names.get(tensor.name)}; export the bundle again"
                    )

    # ── the KV cache ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def slots(self) -> int:
        """Size of the KV cache when it is largest."""
        return self._slots

    @property
    def allocated_slots(self) -> int:
        """Size of the KV cache now."""
        return int(self._slab.shape[3])

    @property
    def entries(self) -> NDArray[Any]:
        """(2L, 1, KV heads, slots, head dim) of the KV cache, keys and values of each layer in turn: the memory itself.

        On a CPU alone; on a device NumPy cannot reach them.
        """
        return self._slab

    def _allocate(self, slots: int, held: Iterable[NDArray[Any]] = ()) -> None:
        """Make a cache of that size; `held`: the entries that it begins with, by layer and part."""
        import onnxruntime as ort

        shape = self._shape
        # Zeroed: an additive mask lets NaN through, so a slot that nobody has written must not hold one.
        slab = np.zeros((2 * shape.num_layers, 1, shape.num_kv_heads, slots, shape.head_dim), self._type)
        for layer, entries in zip(slab, held, strict=False):
            layer[:, :, : entries.shape[2]] = entries
        cache = [ort.OrtValue.ortvalue_from_numpy(layer, DEVICES[self._name], 0) for layer in slab]
        self._slab, self._cache, self._bound = slab, cache, {}  # all or nothing: it may be interrupted

    def _make_room(self, slots: int) -> None:
        """Grow the cache to hold `slots`, keeping what is in it."""
        if slots > self._slots:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self._slots}")
        if slots > self.allocated_slots:
            held = self._slab if self._refeed is None else [value.numpy() for value in self._cache]
            self._allocate(min(grown(self._name, self.allocated_slots, slots), self._slots), held)

    def begin(self, kept: int, slots: int) -> None:
        """See `Engine.begin`."""
        if self._name != "cpu":
            self._make_room(slots)
            return
        size = min(-(-slots // FIRST_SLOTS) * FIRST_SLOTS, self._slots)
        if not size <= self.allocated_slots < 2 * size:
            self._allocate(size, self._slab[:, :, :, :kept])

    def move(self, source: int, target: int) -> None:
        """See `Engine.move`."""
        if self._refeed is None:
            self._slab[:, :, :, target] = self._slab[:, :, :, source]
        else:
            self._refeed.owe(source, target)

    def clear(self) -> None:
        """See `Engine.clear`; the cache is as small as at first again."""
        self._allocate(min(FIRST_SLOTS, self._slots))
        if self._refeed is not None:
            self._refeed.forget()

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`."""
        if self._refeed is None:
            return self._run(work)
        self._make_room(work.slot + len(work.tokens))
        *before, last = self._refeed.prepare(work)
        for prepared in before:
            self._run(prepared.work)
        found = self._run(last.work, last.extra)
        self._refeed.done()
        return found

    def _run(self, work: Pass, extra: int = 0) -> StepOutput:
        """extra: rows in front that the caller knows nothing of."""
        size = len(work.tokens)
        self._make_room(work.slot + size)
        bound = self._bind((size, len(work.head_rows), len(work.agent_rows)))
        fill(bound.inputs, work)
        self._execute(bound)
        return outcome(bound.outputs, work, extra)

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> FullOutput:
        """See `Engine.evaluate`."""
        rows = range(len(tokens))
        self._make_room(slot + len(rows))
        work = Pass(tokens, positions, slot, rows, rows, [-np.inf] * len(rows))
        if self._refeed is not None:
            for prepared in self._refeed.prepare(work, together=False)[:-1]:
                self._run(prepared.work)
        bound = self._make_binding((len(rows), len(rows), len(rows)), kept=False)
        fill(bound.inputs, work)
        for name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE):
            bound.binding.bind_output(name, "cpu")
        self._execute(bound)
        if self._refeed is not None:
            self._refeed.done()
        *_, logits, hidden = bound.binding.get_outputs()  # in the order of binding
        return FullOutput(hidden.numpy()[0], logits.numpy()[: len(rows)], bound.outputs[tensors.MARGINS])

    def _execute(self, bound: _Bound) -> None:
        for value, array in bound.uploads:
            value.update_inplace(array)
        self._session.run_with_iobinding(bound.binding, bound.options)
        for value, array in bound.downloads:
            array[...] = value.numpy()

    def _bind(self, key: _Key) -> _Bound:
        bound = self._bound.get(key)
        if bound is None:
            kept = key[0] <= _KEPT_ROWS
            bound = self._make_binding(key, kept)
            if kept:
                self._bound[key] = bound
        return bound

    def _make_binding(self, key: _Key, kept: bool) -> _Bound:
        import onnxruntime as ort

        rows, heads, asked = key
        sizes: dict[int | str, int] = {"S": rows, "H0": heads, "N": asked, "P": heads + 1}
        binding = self._session.io_binding()

        def arrays(wanted: list[tensors.Tensor]) -> dict[str, NDArray[Any]]:
            return {
                t.name: np.zeros([sizes[d] if isinstance(d, str) else d for d in t.shape], t.dtype)
                for t in wanted
                if "C" not in t.shape and t.name not in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)
            }

        inputs = arrays(tensors.step_inputs(self._shape))
        outputs = arrays(tensors.step_outputs(self._shape, self._top))
        device = DEVICES[self._name]
        values = {n: ort.OrtValue.ortvalue_from_numpy(a, device, 0) for n, a in (inputs | outputs).items()}
        for name in inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in outputs:
            binding.bind_ortvalue_output(name, values[name])
        for (past, present), value in zip(tensors.kv_names(self._shape.num_layers), self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        options = ort.RunOptions()
        if self._graphs is True:  # a graph is bound to shapes and addresses: one for each binding, -1 for none
            options.add_run_config_entry("gpu_graph_id", str(next(self._graph_ids) if kept else -1))
        if self._refeed is None:  # the values are the arrays
            return _Bound(binding, options, inputs, outputs)
        copies = [tuple((values[n], a) for n, a in side.items() if a.size) for side in (inputs, outputs)]
        return _Bound(binding, options, inputs, outputs, *copies)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        import onnxruntime

        graph = self._bundle.manifest.step
        return {
            "name": self._name,
            "version": f"onnxruntime {onnxruntime.__version__}",
            "lowering": graph.lowering,
            "precision": graph.precision,
            "threads": self._threads,
            **({"cuda_graphs": self._graphs} if self._name == "cuda" else {}),
        }
