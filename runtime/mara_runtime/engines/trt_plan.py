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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_runtime import files
from mara_runtime.engines.cuda import Cuda
from mara_runtime.engines.io_block import Block, Sizes
from mara_runtime.engines.trt_file import IO, EngineFile, logger
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

KEPT_SHAPES = 32
"""Most shapes of passes with a context and a graph of their own."""
FADING = 4096
"""Counts are halved after so many passes."""
DECODE, PREFILL, SHARED = range(3)
"""Optimisation profiles: narrow and wide passes of one conversation, passes of several."""


Form = tuple[Sizes, int, int]
"""What contexts and graphs are bound to: the sizes of a pass, the side of the cache that it reads, its first place."""


@dataclass
class _Kept:
    """A form that repeats."""

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
        io: IO,
        blocks: tuple[Block, Block],
        addresses: Callable[[int, int], Mapping[str, int]],
        graphs: bool,
        kernels: str,
    ) -> None:
        """io: the graph's inputs and outputs. blocks: copied before and after a pass.

        addresses: of all tensors by name, by side of the cache and first place. kernels: name in the user's cache of
        the kernels that TensorRT for RTX compiles. Raises EngineError.
        """
        self._trt, self._cuda, self._path, self._facts = trt, cuda, path, facts
        self._inputs, self._blocks, self._addresses = io[0], blocks, addresses
        self.no_graphs: str | None = None if graphs else "switched off"
        """why passes do not run as CUDA graphs; None: they do"""
        self.activation_bytes = 0
        self._kept: dict[Form, _Kept] = {}
        self._seen: dict[Form, int] = {}  # counts, decaying
        self._passes = 0
        self._shared: dict[int, tuple[Any, Form]] = {}  # by profile: a context and its current form
        self._activations = 0
        self._kernels_name = kernels
        self._kernels: Any = None
        self._engine: Any = None
        self._file: EngineFile | None = None
        try:
            self._file = EngineFile(trt, cuda, path, facts, io)
            self._engine = self._file.engine
            if self.streamed_bytes:
                self.no_graphs = (
                    self.no_graphs or "weights are streamed from host memory, which CUDA graphs do not support"
                )
            if facts.target == "tensorrt-rtx":
                self._kernels = self._known_kernels()
            self.activation_bytes = max(int(self._engine.device_memory_size_v2), 1)
            self._activations = cuda.allocate(self.activation_bytes, f"the activations of {path.name}")
        except BaseException:
            self.close()
            raise

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def streamed_bytes(self) -> int:
        """Of weights in host memory."""
        return 0 if self._file is None else self._file.streamed_bytes

    def run(self, sizes: Sizes, side: int, low: int) -> None:
        """Copy the inputs in, run the pass over the places from `low` on, copy the outputs out, and wait."""
        form, profile = (sizes, side, low), self._profile(sizes)
        if profile == PREFILL:
            self._put(self._context(profile, form))
        else:
            kept = self._keep(profile, form) if self.no_graphs is None else None
            if kept is None or not self._repeat(kept):
                self._put(self._context(profile, form))
        self._cuda.wait()

    def _profile(self, sizes: Sizes) -> int:
        """The optimisation profile of a pass."""
        if sizes.conversations > 1:
            return SHARED
        return PREFILL if max(sizes.rows, sizes.asked, sizes.shown) > self._facts.decode_rows else DECODE

    def _keep(self, profile: int, key: Form) -> _Kept | None:
        """The context of a form of its own, if it has repeated often enough."""
        self._passes += 1
        if self._passes % FADING == 0:
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
                context = self._new_context(profile, key, repeated=True)
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
        for form in list(self._kept):
            self._drop(form)

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

    def _context(self, profile: int, form: Form) -> Any:
        """The shared context of a profile, set to a form."""
        if profile in self._shared:
            context, now = self._shared.pop(profile)  # removed, in case setting it fails half-way
            if form[0] != now[0]:
                self._set_shapes(context, form)
            if form[1:] != now[1:]:
                self._set_addresses(context, form)
        else:
            context = self._new_context(profile, form)
        self._shared[profile] = context, form
        return context

    def _new_context(self, profile: int, form: Form, repeated: bool = False) -> Any:
        """repeated: the form will not change."""
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
        self._set_shapes(context, form)
        self._set_addresses(context, form)
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

    def _set_shapes(self, context: Any, form: Form) -> None:
        for tensor in self._inputs:
            shape = form[0].of([self._facts.slots if size == "C" else size for size in tensor.shape])
            if not context.set_input_shape(tensor.name, shape):
                raise EngineError(f"TensorRT refuses the shape {shape} of {tensor.name}: {logger(self._trt).last}")

    def _set_addresses(self, context: Any, form: Form) -> None:
        for name, address in self._addresses(*form[1:]).items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the address of {name}: {logger(self._trt).last}")

    # ── closing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def forget(self) -> None:
        """Drop contexts and graphs, as before the addresses change."""
        for form in list(self._kept):
            self._drop(form)
        self._shared.clear()

    def _drop(self, shape: Form) -> None:
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
        self._engine = self._file = None
