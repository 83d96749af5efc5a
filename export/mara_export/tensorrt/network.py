"""A step graph through NVIDIA's parser and builder: TensorRT ≥ 10.3 or 11, or TensorRT for RTX.

Uses only names that all of these have, except where noted. Nothing is printed: errors are collected into one line.
The graph is edited as protobuf: a device that builds engines needs onnx and TensorRT only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from mara_runtime import tensors
from mara_runtime.engines.trt_file import logger
from mara_runtime.errors import EngineError

if TYPE_CHECKING:  # why_cannot_build says how to install it
    import onnx

Profile = Mapping[str, tuple[int, int, int]]
"""(least, best, most) of each size that the graph leaves open, by its symbol in `mara_runtime.tensors`."""
_NO_FUSED_KERNEL = re.compile("attention|decompos", re.IGNORECASE)
"""Matches the error of a builder that has no fused kernel for an attention."""


def name(trt: Any) -> str:
    """Name and version of a TensorRT module, for messages."""
    return f"TensorRT{' for RTX' if 'rtx' in trt.__name__ else ''} {trt.__version__}"


def version(trt: Any) -> tuple[int, ...]:
    """(major, minor) of a TensorRT module."""
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:2])


class Network:
    """A parsed step graph that can be built."""

    def __init__(self, trt: Any, path: Path, fixed: Mapping[str, int]) -> None:
        """Parse the graph in `path`. fixed: its sizes C, W1 and W2. Raises EngineError, naming the node."""
        self.trt = trt
        try:
            self._builder = trt.Builder(logger(trt))
        except TypeError as null:  # raised by the bindings if the library returns null
            raise EngineError(f"{name(trt)} does not start here: {logger(trt).last or null}") from None
        typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only mode of TensorRT 11
        self.network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        self._parser = trt.OnnxParser(self.network, logger(trt))  # owns weights: must outlive the build
        model = _read(path)
        self.weight_bytes, self.wide_weight_bytes = _weight_bytes(model)
        self._inputs = model.graph.input
        self._operators = Counter(node.op_type for node in model.graph.node)
        for value in (*model.graph.input, *model.graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in fixed:
                    dim.dim_value = fixed[dim.dim_param]  # of the two, protobuf keeps the one set last
        if not self._parser.parse(model.SerializeToString(), str(path)):
            error = self._parser.get_error(0)
            node = f"node {error.node_name()} ({error.node_operator()})"
            raise EngineError(f"{name(trt)} cannot read {path.name}: {node}: {one_line(error.desc())}")

    def _layers(self) -> Iterator[tuple[str, Any]]:
        """(kind, layer) of each layer."""
        for i in range(self.network.num_layers):
            layer = self.network.get_layer(i)
            yield layer.type.name, layer

    def kinds(self) -> dict[str, int]:
        """How many layers of each kind the network has."""
        return dict(sorted(Counter(kind for kind, _ in self._layers()).items()))

    def check_in_place(self, num_caches: int) -> None:
        """Raise EngineError if the parser did not turn the graph's operators into the layers made for them.

        Otherwise the KV cache would not be updated in place, or attention would not be fused.
        """
        kinds = self.kinds()
        wanted = {
            "ATTENTION_INPUT": self._operators["Attention"],  # layers of some models have none
            "KV_CACHE_UPDATE": 2 * num_caches,
            "ROTARY_EMBEDDING": self._operators["RotaryEmbedding"],
        }
        for kind, count in wanted.items():
            if kinds.get(kind, 0) != count:
                raise EngineError(
                    f"{name(self.trt)} read {kinds.get(kind, 0)} {kind} layers from the graph, which "
                    f"should have {count}: export the bundle again, with --lowering decomposed if that does not help"
                )
        updates = {
            layer.get_input(0).name: layer.get_output(0).name
            for kind, layer in self._layers()
            if kind == "KV_CACHE_UPDATE"
        }
        for past, present in tensors.kv_names(num_caches):
            if updates.get(past) != present:
                raise EngineError(f"the graph's {present} is not an update of {past} in place: export the bundle again")

    def attentions(self) -> dict[str, Any]:
        """Attention layers by name."""
        attentions: dict[str, Any] = {}
        for kind, layer in self._layers():
            if kind == "ATTENTION_INPUT":
                layer.__class__ = self.trt.IAttentionInputLayer  # the binding returns the base class
                attentions[layer.attention.name] = layer.attention
        return attentions

    def config(self, profiles: Sequence[Profile]) -> Any:
        """A builder configuration with these optimisation profiles."""
        config = self._builder.create_builder_config()
        config.clear_flag(self.trt.BuilderFlag.TF32)  # on by default; it rounds float32 to 11 bits
        for sizes in profiles:
            profile = self._builder.create_optimization_profile()
            for value in self._inputs:
                dims = value.type.tensor_type.shape.dim
                if any(dim.dim_param for dim in dims):
                    shapes = (
                        [sizes[dim.dim_param][i] if dim.dim_param else dim.dim_value for dim in dims] for i in range(3)
                    )
                    profile.set_shape(value.name, *shapes)
            config.add_optimization_profile(profile)
        return config

    def build(self, config: Any, tell: Callable[[str, int, int], None], note: Callable[[str], None]) -> tuple[Any, Any]:
        """The engine as a buffer, and the names of the attentions that are not fused: a list, or "all".

        First requires one fused kernel for every attention. Where there is none, calls `note` and allows several; some
        versions of TensorRT cannot build a masked attention that way either. Raises EngineError. KeyboardInterrupt
        stops the builder.
        """
        attentions = self.attentions()
        unfused: list[str] = []
        plan, errors = self._run(config, tell)
        while plan is None and len(unfused) < len(attentions) and _NO_FUSED_KERNEL.search(errors):
            named = [layer for layer in attentions if layer in errors]
            unfused = list(attentions) if unfused or not named else named  # one name at a time would need a build each
            which = "any layer" if len(unfused) == len(attentions) else ", ".join(unfused)
            note(
                f"no fused attention kernel for {which} here: using several kernels, which is slower and takes more "
                "memory"
            )
            for layer in unfused:
                attentions[layer].decomposable = True
            plan, errors = self._run(config, tell)
        if plan is None:
            remedy = ": export the bundle again with --lowering decomposed" if unfused else ""
            raise EngineError(f"{name(self.trt)} cannot build the engine: {one_line(errors)}{remedy}")
        return plan, "all" if unfused and len(unfused) == len(attentions) else unfused

    def _run(self, config: Any, tell: Callable[[str, int, int], None]) -> tuple[Any, str]:
        """The engine, or None and the errors."""
        stop, errors = Event(), _recorder(self.trt)
        config.progress_monitor = _monitor(self.trt, tell, stop)
        self._builder.error_recorder = errors  # set late: freed after parsing, it crashes (RTX 1.7)
        try:
            # In another thread: Python handles Ctrl-C in this one only.
            with ThreadPoolExecutor(1) as pool:
                future = pool.submit(self._builder.build_serialized_network, self.network, config)
                try:
                    while not wait([future], timeout=0.2).done:
                        pass
                except BaseException:
                    stop.set()
                    raise
            return future.result(), errors.text()
        finally:
            self._builder.error_recorder = None


def _read(path: Path) -> onnx.ModelProto:
    """A graph without its weights. Raises EngineError."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:  # the bundle was not verified
        raise EngineError(f"{path} cannot be read: {error}; copy the bundle again or export it again") from None


def _weight_bytes(model: onnx.ModelProto) -> tuple[int, int]:
    """Bytes of the graph's matrices, as stored and with quantised ones as float16; shared bytes count once."""
    from onnx import TensorProto

    wider = {TensorProto.INT8: 2, TensorProto.INT4: 4}
    sizes: dict[str, tuple[int, int]] = {}
    for weight in model.graph.initializer:
        where = {entry.key: entry.value for entry in weight.external_data}
        if where:
            size = int(where["length"])
            sizes[where["offset"]] = size, size * wider.get(weight.data_type, 1)
    return sum(size for size, _ in sizes.values()), sum(wide for _, wide in sizes.values())


def one_line(text: str) -> str:
    """The message of a TensorRT error, without source locations."""
    lines = [line for line in text.splitlines() if line.strip()]
    # without a GPU, each error is followed by another about the missing driver
    informative = (line for line in lines if "Error Code" in line and "Cuda Runtime" not in line)
    text = next(informative, lines[0] if lines else "no reason given")
    text = re.sub(r"^.*?Error Code \d+: ", "", " ".join(text.split()))
    text = re.sub(r"\[[\w.]+:\d+: \w+\] |\s*\bIn \w+ at /\S+?(?=\)|$|\s)", "", text)
    text = re.sub(r"^(?:API Usage Error|Internal Error|Myelin) \((.*)\)$", r"\1", text)
    return text if len(text) <= 400 else text[:397] + "..."


def _recorder(trt: Any) -> Any:
    class ErrorRecorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Collects the errors of one builder, whichever logger the process has."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self._errors: list[tuple[Any, str]] = []

        def text(self) -> str:
            """All errors, one per line."""
            return "\n".join(text for _, text in self._errors)

        def report_error(self, code: Any, description: str) -> bool:
            self._errors.append((code, description))
            return False

        def clear(self) -> None:
            pass

        def num_errors(self) -> int:
            return len(self._errors)

        def get_error_code(self, index: int) -> Any:
            return self._errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._errors[index][1]

        def has_overflowed(self) -> bool:
            return False

    return ErrorRecorder()


def _monitor(trt: Any, tell: Callable[[str, int, int], None], stop: Event) -> Any:
    class BuildMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the builder's phases, and ends the build when `stop` is set."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            tell(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            tell(phase, step + 1, self._steps.get(phase, step + 1))
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return BuildMonitor()
