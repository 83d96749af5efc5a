"""The ONNX Runtime engine: both graphs of a bundle in ONNX Runtime sessions, the KV cache in place.

Past and present of a layer are bound to the same memory, so a forward pass writes its rows' entries where they
stay. Proved on the CPU provider. On CUDA the same class keeps the cache on the device, where numpy cannot reach it:
`move` then computes the entry again, in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engine import Forward, attention_mask
from mara_runtime.errors import EngineError, OptionError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of each engine name."""
MAX_THREADS = 1024


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


class OrtEngine:
    """See `Engine`; the manifest's capacity decides the size of the KV cache."""

    def __init__(self, bundle: Bundle, name: str = "cpu", threads: int | None = None) -> None:
        import onnxruntime as ort

        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise OptionError(f"--threads is {threads}; it must lie between 1 and {MAX_THREADS}")
        self._bundle = bundle
        self._name = name
        self._in_reach = name == "cpu"  # of numpy: the cache's memory is the slab's
        self._threads = threads
        manifest = bundle.manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: ONNX Runtime's own choice, one a physical core
        options.log_severity_level = 3

        # The agent is small: a thread pool of its own would only spin beside the LLM's.
        single = ort.SessionOptions()
        single.intra_op_num_threads = 1
        single.log_severity_level = 3

        def session(file: str, options: ort.SessionOptions) -> ort.InferenceSession:
            try:
                return ort.InferenceSession(str(bundle.path(file)), options, providers=[PROVIDERS[name]])
            except Exception as error:  # ONNX Runtime's exceptions share no narrower base
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                raise EngineError(f"ONNX Runtime cannot load {bundle.path(file)}: {first_line}") from error

        self._llm = session(manifest.llm.file, options)
        self._agent = session(manifest.agent_graph.file, single)
        self._binding = self._llm.io_binding()

        shape = manifest.model.shape
        self._check_io(self._llm, manifest.llm.file, tensors.llm_inputs(shape), tensors.llm_outputs(shape))
        self._check_io(
            self._agent, manifest.agent_graph.file, tensors.agent_inputs(shape.hidden_size), tensors.agent_outputs()
        )
        self._slots = manifest.max_context + manifest.max_candidates
        size = (1, shape.num_kv_heads, self._slots, shape.head_dim)
        # Zeroed: an additive mask lets NaN through, so a slot that nobody has written must not hold one.
        self._slab = np.zeros((2 * shape.num_layers, *size), np.float32)
        self._cache: list[ort.OrtValue] = []
        self._tokens: list[int] = [0] * self._slots  # what `move` needs where the cache is out of numpy's reach
        self._positions: list[int] = [0] * self._slots
        for index, (past, present) in enumerate(tensors.kv_names(shape.num_layers)):
            device = {} if self._in_reach else {"device_type": name, "device_id": 0}
            value = ort.OrtValue.ortvalue_from_numpy(self._slab[index], **device)
            self._cache.append(value)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)

    def _check_io(self, session: Any, file: str, *expected: list[tensors.Tensor]) -> None:
        """Does the graph have the tensors that the manifest's sizes ask for?"""
        for wanted, there in zip(expected, (session.get_inputs(), session.get_outputs()), strict=True):
            names = {t.name: tuple(t.shape) for t in there}
            for tensor in wanted:
                if names.get(tensor.name) != tensor.shape:
                    raise EngineError(
                        f"{self._bundle.path(file)} does not fit its manifest: {tensor.name} should have the shape "
                        f"{tensor.shape} and has {names.get(tensor.name)}; export the bundle again"
                    )

    @property
    def slots(self) -> int:
        """Size of the KV cache."""
        return self._slots

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int, logits_rows: Sequence[int]
    ) -> Forward:
        """See `Engine.forward`."""
        rows = len(tokens)
        if slot + rows > self._slots:
            raise EngineError(f"{rows} rows at slot {slot} exceed the KV cache of {self._slots} slots")
        feeds: dict[str, NDArray[Any]] = {
            tensors.INPUT_IDS: np.asarray(tokens, np.int64)[None],
            tensors.POSITION_IDS: np.asarray(positions, np.int64)[None],
            tensors.ATTENTION_MASK: attention_mask(positions, slot, self._slots),
            tensors.WRITE_INDICES: np.array([slot], np.int64),
            tensors.LOGITS_ROWS: np.asarray(logits_rows, np.int64),
        }
        for name, array in feeds.items():
            self._binding.bind_cpu_input(name, array)
        for name in (tensors.LOGITS, tensors.LAST_HIDDEN_STATE):  # anew: their shapes follow S and R
            self._binding.bind_output(name, "cpu")
        self._llm.run_with_iobinding(self._binding)
        *_, logits, hidden = self._binding.get_outputs()  # in the order of binding
        self._tokens[slot : slot + rows] = [int(t) for t in tokens]
        self._positions[slot : slot + rows] = [int(p) for p in positions]
        return Forward(hidden=hidden.numpy()[0], logits=logits.numpy())

    def margins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.margins`."""
        margins: NDArray[np.float32] = self._agent.run([tensors.AGENT_MARGIN], {tensors.AGENT_STATES: hidden})[0]
        return margins

    def move(self, source: int, target: int) -> None:
        """See `Engine.move`."""
        if self._in_reach:
            self._slab[:, :, :, target] = self._slab[:, :, :, source]
        else:
            self.forward([self._tokens[source]], [self._positions[source]], target, [])

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._slab[:] = 0
        if not self._in_reach:
            for value, zeros in zip(self._cache, self._slab, strict=True):
                value.update_inplace(zeros)

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        import onnxruntime

        graph = self._bundle.manifest.llm
        return {
            "name": self._name,
            "version": f"onnxruntime {onnxruntime.__version__}",
            "lowering": graph.lowering,
            "precision": graph.precision,
            "threads": self._threads,
        }
