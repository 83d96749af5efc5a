"""One open TensorRT engine: passes of any shape are put into the stream, repeated ones as CUDA graphs.

A graph contains everything that a pass does on the device: inputs in, the pass, outputs out. It is bound to one shape,
one set of addresses and one execution context (TensorRT's developer guide: one context per captured graph, the contexts
sharing their activation memory). So a shape that repeats gets a context of its own, runs in it once, and is captured
the next time. All others run in one context per optimisation profile.

TensorRT for RTX compiles kernels for the shapes that it encounters. A shape with a graph waits for its specialised
kernels, as the graph would repeat the generic ones forever; compiled kernels are kept in the user's cache folder. Not
yet run on hardware.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

import contextlib
import mmap
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mara_runtime import files, tensors
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.io_block import Block, Sizes
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

KEPT_SHAPES = 32
"""Most shapes of passes with a context and a graph of their own."""
_FADING = 4096
"""Counts are halved after so many passes."""
_TYPES = {"int64": "INT64", "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
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


@dataclass
class _Kept:
    """A shape that repeats, on one side of the cache."""

    context: Any
    ran: bool = False
    """once, as TensorRT requires before capture"""
    graph: Any = None


class Plan:
    """An open engine, its contexts, their activation memory, and its graphs."""

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        path: Path,
        facts: EngineFacts,
        io: tuple[Sequence[tensors.Tensor], Sequence[tensors.Tensor]],
        blocks: tuple[Block, Block],
        sides: Sequence[Mapping[str, int]],
        graphs: bool,
        kernels: str,
    ) -> None:
        """io: the graph's inputs and outputs. blocks: copied before and after a pass.

        sides: for each side of the cache, the addresses of all tensors by name. kernels: name in the user's cache of
        the kernels that TensorRT for RTX compiles. Raises EngineError.
        """
        self._trt, self._cuda, self._path, self._facts = trt, cuda, path, facts
        self._inputs, self._blocks, self._sides = io[0], blocks, sides
        self.no_graphs: str | None = None if graphs else "switched off"
        """why passes do not run as CUDA graphs; None: they do"""
        self.streamed_bytes = 0
        """of weights in host memory"""
        self.activation_bytes = 0
        self._kept: dict[tuple[Sizes, int], _Kept] = {}
        self._seen: dict[tuple[Sizes, int], int] = {}  # counts, decaying
        self._passes = 0
        self._shared: dict[int, tuple[Any, Sizes, int]] = {}  # by profile: a context and its current shape and side
        self._activations = 0
        self._kernels_name = kernels
        self._kernels: Any = None
        self._engine: Any = None
        self._runtime: Any = None
        try:
            self._runtime = self._start()
            if facts.options.get("version_compatible"):
                self._runtime.engine_host_code_allowed = (
                    True  # the file contains the runtime of the version that built it
                )
            self._engine = self._deserialise()
            self._check_io(*io)
            self._stream_weights()
            if facts.target == "tensorrt-rtx":
                self._kernels = self._known_kernels()
            self.activation_bytes = max(int(self._engine.device_memory_size_v2), 1)
            self._activations = cuda.allocate(self.activation_bytes, f"the activations of {path.name}")
        except BaseException:
            self.close()
            raise

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────

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
        engine, modes = self._engine, self._trt.TensorIOMode
        there = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        for tensor, mode in [*((t, modes.INPUT) for t in inputs), *((t, modes.OUTPUT) for t in outputs)]:
            if tensor.name not in there or engine.get_tensor_mode(tensor.name) != mode:
                raise self._unfit(f"it has no {mode.name.lower()} {tensor.name}")
            shape = tuple(engine.get_tensor_shape(tensor.name))
            wanted = tuple(self._facts.slots if size == "C" else size for size in tensor.shape)
            dtype = engine.get_tensor_dtype(tensor.name)
            agree = len(shape) == len(wanted) and all(
                isinstance(want, str) or size == want for want, size in zip(wanted, shape, strict=True)
            )
            if not agree or dtype != getattr(self._trt.DataType, _TYPES[tensor.dtype]):
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
        engine = self._engine
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
        if self.streamed_bytes:
            self.no_graphs = self.no_graphs or "weights are streamed from host memory, which CUDA graphs do not support"

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, sizes: Sizes, side: int) -> None:
        """Copy the inputs in, run the pass, copy the outputs out, and wait."""
        if sizes.rows > self._facts.decode_rows:
            self._put(self._context(1, sizes, side))
        else:
            kept = self._keep(sizes, side) if self.no_graphs is None else None
            if kept is None or not self._repeat(kept):
                self._put(self._context(0, sizes, side))
        self._cuda.wait()

    def _keep(self, sizes: Sizes, side: int) -> _Kept | None:
        """The context of a shape of its own, if it has repeated often enough."""
        key = sizes, side
        self._passes += 1
        if self._passes % _FADING == 0:
            self._seen = {shape: count // 2 for shape, count in self._seen.items() if count > 1}
        count = self._seen[key] = self._seen.get(key, 0) + 1
        kept = self._kept.get(key)
        if kept is None and count > 1:
            if len(self._kept) >= KEPT_SHAPES:
                rarest = min(self._kept, key=lambda shape: self._seen.get(shape, 0))
                # twice as often, or alternating shapes would evict each other
                if count <= 2 * self._seen.get(rarest, 0):
                    return None
                self._drop(rarest)
            try:
                context = self._new_context(0, sizes, side, repeated=True)
            except EngineError as error:
                self._give_up_graphs(error)
                return None
            kept = self._kept[key] = _Kept(context)
        return kept

    def _repeat(self, kept: _Kept) -> bool:
        """Run a repeated shape; False: it cannot be captured, and graphs are off from now on."""
        if not kept.ran:
            self._put(kept.context)
            kept.ran = True
            return True
        if kept.graph is None:
            try:
                kept.graph = self._capture(kept.context)
            except EngineError as error:
                self._give_up_graphs(error)
                return False
        self._cuda.launch(kept.graph)
        return True

    def _give_up_graphs(self, error: EngineError) -> None:
        """From now on, run all passes in the shared contexts."""
        self.no_graphs = str(error)
        for shape in list(self._kept):
            self._drop(shape)

    def _capture(self, context: Any) -> Any:
        capturable = getattr(context, "is_stream_capturable", None)  # TensorRT for RTX
        if capturable is not None and not capturable(self._cuda.stream):
            raise EngineError("TensorRT reports that its work cannot be captured")
        try:
            self._cuda.begin_capture()  # inside `try`: an interrupt must not leave the stream capturing
            self._put(context)
            return self._cuda.end_capture()
        except BaseException:
            self._cuda.abandon_capture()
            raise

    def _put(self, context: Any) -> None:
        before, after = self._blocks
        self._cuda.upload(before.device, before.host)
        if not context.execute_async_v3(self._cuda.stream):
            raise EngineError(f"TensorRT cannot run a pass: {logger(self._trt).last or 'no reason given'}")
        self._cuda.download(after.host, after.device)

    # ── contexts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _context(self, profile: int, sizes: Sizes, side: int) -> Any:
        """The shared context of a profile, set to a shape."""
        if profile in self._shared:
            context, sizes_now, side_now = self._shared.pop(profile)  # removed, in case setting it fails half-way
            if sizes != sizes_now:
                self._set_shapes(context, sizes)
            if side != side_now:
                self._set_addresses(context, side)
        else:
            context = self._new_context(profile, sizes, side)
        self._shared[profile] = (context, sizes, side)
        return context

    def _new_context(self, profile: int, sizes: Sizes, side: int, repeated: bool = False) -> Any:
        """repeated: the shape will not change."""
        # Contexts share their activation memory, as one stream never runs two of them at once.
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._kernels is None:
            context = self._engine.create_execution_context(strategy)
        else:
            config, kinds = self._engine.create_runtime_config(), self._trt.DynamicShapesKernelSpecializationStrategy
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self._kernels)
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if repeated else kinds.LAZY
            context = self._engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"TensorRT creates no execution context: {logger(self._trt).last or 'no reason given'}")
        try:
            context.set_optimization_profile_async(profile, self._cuda.stream)
        except RuntimeError as error:  # how the bindings report a refusal
            why = logger(self._trt).last or error
            raise EngineError(f"TensorRT refuses the optimisation profile {profile}: {why}") from None
        self._set_shapes(context, sizes)
        self._set_addresses(context, side)
        context.set_device_memory(self._activations, self.activation_bytes)
        return context

    def _known_kernels(self) -> Any:
        """Kernels compiled before on this machine; TensorRT rejects those of another GPU, driver or version."""
        config = self._engine.create_runtime_config()
        kernels = config.create_runtime_cache()
        known = files.read_cached(self._kernels_name)
        if known:
            kernels.deserialize(known)
        return kernels

    def _save_kernels(self) -> None:
        kernels, self._kernels = self._kernels, None
        if kernels is not None:
            content = memoryview(kernels.serialize())
            if content != files.read_cached(self._kernels_name):
                files.write_cached(self._kernels_name, content)

    def _set_shapes(self, context: Any, sizes: Sizes) -> None:
        for tensor in self._inputs:
            if "C" not in tensor.shape and not context.set_input_shape(tensor.name, sizes.of(tensor.shape)):
                raise EngineError(
                    f"TensorRT refuses the shape {sizes.of(tensor.shape)} of {tensor.name}: {logger(self._trt).last}"
                )

    def _set_addresses(self, context: Any, side: int) -> None:
        for name, address in self._sides[side].items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the address of {name}: {logger(self._trt).last}")

    # ── closing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _drop(self, shape: tuple[Sizes, int]) -> None:
        try:
            self._cuda.wait()  # an interrupted pass may still be running
        finally:
            kept = self._kept.pop(shape)
            if kept.graph is not None:
                self._cuda.destroy(kept.graph)

    def close(self) -> None:
        """Free everything, in the order that TensorRT requires: graphs, contexts, engine, runtime."""
        with contextlib.ExitStack() as stack:  # in reverse order, and all of it, whatever fails
            if self._activations:
                stack.callback(self._cuda.free, self._activations)
                self._activations = 0
            stack.callback(self._forget_engine)
            stack.callback(self._save_kernels)
            for shape in list(self._kept):
                stack.callback(self._drop, shape)
            stack.callback(self._cuda.wait)

    def _forget_engine(self) -> None:
        self._shared.clear()
        self._kept.clear()
        self._engine = self._runtime = None


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
