"""The TensorRT engine: a bundle's ready-made engines on the plain TensorRT API, without PyTorch.

The KV cache lies on the device. Its size is fixed in an engine, so a bundle may hold several: decoding starts in the
smallest, and when a conversation outgrows it, the next is opened and takes the entries over. Present is written over
past, or, in engines of TensorRT before 10.15, into a second cache that changes places with the first after each pass.
A moved entry is computed again, as a row of the next pass (mara_runtime.engines.recompute).

Proved against a double of TensorRT and CUDA (tests/double); it has not run on hardware yet.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda as cuda_calls
from mara_runtime.engines import trt_plan
from mara_runtime.engines.base import FullOutput, Pass, StepOutput, fill, outcome
from mara_runtime.engines.cuda import Cuda, aligned
from mara_runtime.engines.io_block import Block, Sizes
from mara_runtime.engines.recompute import Recompute
from mara_runtime.engines.trt_plan import Plan
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts
from mara_runtime.tensors import ModelShape

INSTALL = {
    "tensorrt": f"pip install 'mara-deploy[tensorrt]', but on a Jetson it comes with JetPack; {cuda_calls.FOR_CUDA_12}",
    "tensorrt-rtx": "pip install 'mara-deploy[tensorrt-rtx]'",
}
_APART = (tensors.LOGITS, tensors.LAST_HIDDEN_STATE)
"""Outputs that stay on the device unless `evaluate` asks for them."""


def why_not(bundle: Bundle, name: str) -> str | None:
    """Why engine `name`, "tensorrt" or "tensorrt-rtx", cannot run the bundle here, or None when it can."""
    engines = _engines(bundle, name)
    command = f"mara-build {shlex.quote(str(bundle.folder))} --target {name}"
    if name not in bundle.manifest.targets and not engines:
        return f"the bundle was not exported for it (targets: {', '.join(bundle.manifest.targets)})"
    if not engines:
        return f"the bundle has no engine for it yet: build one on this machine with {command}"
    try:
        trt = trt_plan.load(name)
    except (ImportError, OSError) as error:  # OSError: a native library that it loads is missing
        return f"its Python package cannot be imported ({error}): {INSTALL[name]}"
    reason = cuda_calls.why_not()
    if reason is not None:
        return reason
    try:
        capability = cuda_calls.compute_capability()
    except EngineError as error:
        return str(error)
    here = f"{platform.system()}-{platform.machine()}".lower()
    for facts in engines:
        if facts.platform != here:
            found, there = f"for {facts.platform}", here
        elif not _runs(facts, trt.__version__):
            found, there = f"of TensorRT {facts.version}", f"TensorRT {trt.__version__}"
        elif not _made_for(facts.compute_capability, capability):
            found, there = f"for compute capability {facts.compute_capability}", f"a GPU of {capability}"
        else:
            continue
        return f"{facts.file} is {found}, and this machine has {there}: build it again with {command}"
    return None


def _engines(bundle: Bundle, name: str) -> list[EngineFacts]:
    """The bundle's engines of a target, the smallest first."""
    return sorted((e for e in bundle.manifest.engines if e.target == name), key=lambda e: e.slots)


def _rows(facts: EngineFacts) -> int:
    """Rows of a pass at most."""
    return max(facts.decode_rows, facts.prefill_rows)


def _runs(facts: EngineFacts, version: str) -> bool:
    """May this version of TensorRT run the engine?"""
    if facts.options.get("version_compatible"):
        (major, *rest), (built, *before) = _numbers(version), _numbers(facts.version)
        return major == built and rest >= before
    return facts.version == version


def _made_for(wanted: str, found: str) -> bool:
    """Is a GPU among those of an entry like "8.7", "8.0+" or "8.6, 8.9"?"""
    return any(_numbers(found) >= _numbers(one) if one.endswith("+") else found == one for one in wanted.split(", "))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.rstrip("+").split(".") if part.isdecimal()]


class _Cache:
    """The KV cache for the engine of an index, twice where passes cannot write in place; zero at first."""

    def __init__(self, cuda: Cuda, shape: ModelShape, dtype: str, index: int, facts: EngineFacts) -> None:
        self.index, self.side = index, 0
        """its engine, and which of its sides the next pass reads"""
        slots, sides = facts.slots, 1 if facts.in_place else 2
        self._cuda, self._names = cuda, tensors.kv_names(shape.num_layers)
        self._heads = shape.num_kv_heads
        self._row_bytes = slots * shape.head_dim * tensors.CACHE_BYTES[dtype]  # of one head
        self._layer_bytes = aligned(self._heads * self._row_bytes)
        self.size_bytes = sides * len(self._names) * self._layer_bytes
        self._base = cuda.allocate(self.size_bytes, f"the KV cache of {slots} slots")
        self._sides = [self._base + side * self.size_bytes // sides for side in range(sides)]
        try:
            self.clear()
        except BaseException:
            self.close()
            raise

    def addresses(self) -> list[dict[str, int]]:
        """For each side: where the pasts are read and the presents written."""
        found: list[dict[str, int]] = []
        for side, source in enumerate(self._sides):
            target = self._sides[(side + 1) % len(self._sides)]
            found.append({})
            for i, (past, present) in enumerate(self._names):
                found[-1][past], found[-1][present] = source + i * self._layer_bytes, target + i * self._layer_bytes
        return found

    def take_over(self, other: _Cache) -> None:
        """Begin with what another cache holds, as far as there are slots for it."""
        width = min(self._row_bytes, other._row_bytes)
        for i in range(len(self._names)):
            target, source = self._base + i * self._layer_bytes, other._sides[other.side] + i * other._layer_bytes
            self._cuda.copy_rows(target, self._row_bytes, source, other._row_bytes, width, self._heads)
        self._cuda.wait()

    def clear(self) -> None:
        """A masked slot that holds NaN would reach the rows that mask it."""
        self._cuda.zero(self._base, self.size_bytes)
        self._cuda.wait()

    def close(self) -> None:
        try:
            self._cuda.wait()  # an interrupt may have left work in the stream
        finally:
            self._cuda.free(self._base)


class TrtEngine:
    """See `Engine`; `close` gives the device's memory back, as does the end of the object."""

    def __init__(self, bundle: Bundle, name: str, *, graphs: bool = True) -> None:
        """graphs: run repeated passes as CUDA graphs. Raises EngineError."""
        reason = why_not(bundle, name)
        if reason is not None:
            raise EngineError(f"{name} cannot run {bundle.folder} here: {reason}")
        self._bundle, self._name, self._graphs = bundle, name, graphs
        self._trt = trt_plan.load(name)
        self._engines = _engines(bundle, name)
        manifest = bundle.manifest
        self._shape = manifest.model.shape
        top = tensors.top_tokens(manifest.max_candidates, self._shape.vocab_size)
        cache = manifest.step.cache
        self._io = tensors.step_inputs(self._shape, cache), tensors.step_outputs(self._shape, top, cache)
        self._rows = max(_rows(e) for e in self._engines)
        self._heads = min(e.head_rows for e in self._engines)
        self._refeed = Recompute(self.slots)
        self._views: dict[Sizes, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
        self._left_running = False
        """a pass was interrupted, and may still read its inputs"""
        self._open = _Open()
        self._finalizer = weakref.finalize(self, self._open.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        open_ = self._open
        open_.cuda = cuda = Cuda()
        self._device = cuda.facts()
        most = Sizes(self._rows, self._heads, self._rows)
        inputs, outputs = ([t for t in side if "C" not in t.shape] for side in self._io)
        open_.inputs = Block(cuda, inputs, most)
        open_.outputs = Block(cuda, [t for t in outputs if t.name not in _APART], most)
        open_.apart = Block(cuda, [t for t in outputs if t.name in _APART], most)
        self._enter(0)

    @property
    def _index(self) -> int:
        """Of the engine that the cache is made for, which is open but for `_open.plan`."""
        cache = self._open.cache
        return 0 if cache is None else cache.index

    def _enter(self, index: int) -> None:
        """Open the engine of that index, with what the cache holds."""
        open_, facts = self._open, self._engines[index]
        self._close_plan()  # first, so that two engines are never in memory at once
        if open_.cache is None or index != open_.cache.index:  # else it was interrupted, or could not be opened
            self._remake_cache(index)
        small = {**open_.inputs.addresses(), **open_.outputs.addresses(), **open_.apart.addresses()}
        sides = [{**small, **cache} for cache in open_.cache.addresses()]
        path, blocks = self._bundle.path(facts.file), (open_.inputs, open_.outputs)
        kernels = f"kernels-{self._bundle.manifest.files[facts.file].sha256[:24]}"
        open_.plan = Plan(self._trt, open_.cuda, path, facts, self._io, blocks, sides, self._graphs, kernels)

    def _remake_cache(self, index: int) -> None:
        """Make the cache one for the engine of that index, with what it holds."""
        open_, before = self._open, self._open.cache
        cache = _Cache(open_.cuda, self._shape, self._bundle.manifest.step.cache, index, self._engines[index])
        if before is not None:
            try:
                cache.take_over(before)
            except BaseException:
                cache.close()
                raise
        open_.cache = cache  # at once: an interrupt must find a cache and the engine that it is for
        if before is not None:
            before.close()

    def _close_plan(self) -> None:
        if self._open.plan is not None:
            try:
                self._open.plan.close()
            finally:
                self._open.plan = None

    def _close_cache(self) -> None:
        if self._open.cache is not None:
            try:
                self._open.cache.close()
            finally:
                self._open.cache = None

    # ── the KV cache ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def slots(self) -> int:
        """Size of the KV cache when it is largest."""
        return self._engines[-1].slots

    @property
    def allocated_slots(self) -> int:
        """Size of the KV cache now."""
        return self._engines[self._index].slots

    def _room(self, slots: int) -> int:
        """Index of the engine for a pass that needs so many slots, not smaller than now. Raises EngineError."""
        if slots > self.slots:
            raise EngineError(f"{slots} slots are needed; the KV cache has {self.slots}")
        return max(self._index, next(i for i, e in enumerate(self._engines) if e.slots >= slots))

    def _widen(self, slots: int) -> None:
        before, index = self._index, self._room(slots)
        if index == before and self._open.plan is not None:
            return
        try:
            self._enter(index)
        except EngineError:
            if self._index > before:  # there may be no room for it: what is held fits the smaller one, which goes on
                self._remake_cache(before)
            raise

    def begin(self, kept: int, slots: int) -> None:
        """See `Engine.begin`; it goes back to a smaller engine in `clear` alone, as opening one takes seconds."""
        self._widen(slots)

    def move(self, source: int, target: int) -> None:
        """See `Engine.move`."""
        self._refeed.owe(source, target)

    def clear(self) -> None:
        """See `Engine.clear`; the engine is the smallest again."""
        self._refeed.forget()
        if self._index:
            self._close_plan()
            self._close_cache()
        self._widen(0)
        self._open.cache.clear()

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, work: Pass) -> StepOutput:
        """See `Engine.run`."""
        count = len(work.tokens)
        most = _rows(self._engines[self._room(work.slot + count)])
        if count > most or len(work.head_rows) > self._heads:
            raise EngineError(
                f"a pass of {count} rows, {len(work.head_rows)} of them for the LM head, is wider than the {most} and "
                f"{self._heads} that the engine was built for: run fewer at once"
            )
        *before, last = self._refeed.prepare(work, together=count < most)
        for prepared in before:
            self._pass(prepared.work)
        found = self._pass(last.work)
        self._refeed.done()
        return outcome(found, work, last.extra)

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> FullOutput:
        """See `Engine.evaluate`; as many passes as the engine's bounds ask for."""
        count = len(tokens)
        most = _rows(self._engines[self._room(slot + count)])
        for prepared in self._refeed.prepare(Pass(tokens, positions, slot), together=False)[:-1]:
            self._pass(prepared.work)
        hidden = np.empty((count, self._shape.hidden_size), np.float32)
        logits = np.empty((count, self._shape.vocab_size), np.float32)
        margins = np.empty(count, np.float32)
        self._widen(slot + count)
        for start in range(0, count, most):
            end = min(start + most, count)
            rows = range(end - start)
            for first in range(0, len(rows), self._heads):  # the same entries again, and other rows through the head
                heads = rows[first : first + self._heads]
                never = [-np.inf] * len(rows)
                work = Pass(tokens[start:end], positions[start:end], slot + start, heads, rows, never)
                margins[start:end] = self._pass(work)[tensors.MARGINS]
                block = self._open.apart
                self._open.cuda.download(block.host, block.device)
                self._open.cuda.wait()
                shape = (len(heads) + 1, self._shape.vocab_size)
                logits[start + first : start + first + len(heads)] = block.view(tensors.LOGITS, shape)[:-1]
            hidden[start:end] = block.view(tensors.LAST_HIDDEN_STATE, (1, len(rows), self._shape.hidden_size))[0]
        self._refeed.done()
        return FullOutput(hidden, logits, margins)

    def _pass(self, work: Pass) -> dict[str, NDArray[Any]]:
        """Run one pass; returns its outputs, those for padding included."""
        if self._left_running:
            self._open.cuda.wait()
        self._widen(work.slot + len(work.tokens))
        sizes = Sizes(len(work.tokens), max(len(work.head_rows), 1), max(len(work.agent_rows), 1))
        inputs, outputs = self._view(sizes)
        fill(inputs, work)
        self._left_running = True
        cache = self._open.cache
        self._open.plan.run(sizes, cache.side)
        self._left_running = False
        if not self._engines[cache.index].in_place:
            cache.side = 1 - cache.side
        return outputs

    def _view(self, sizes: Sizes) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        found = self._views.get(sizes)
        if found is None:
            if len(self._views) >= 4 * trt_plan.KEPT_SHAPES:
                self._views.clear()
            blocks = (self._open.inputs, self._open.outputs)
            inputs, outputs = (
                {t.name: block.view(t.name, sizes.of(t.shape)) for t in side if t.name in block}
                for side, block in zip(self._io, blocks, strict=True)
            )
            found = self._views[sizes] = inputs, outputs
        return found

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        self._widen(0)
        step, open_, facts = self._bundle.manifest.step, self._open, self._engines[self._index]
        return {
            "name": self._name,
            "version": f"tensorrt {self._trt.__version__}",
            "gpu": self._device.name,
            "compute_capability": self._device.compute_capability,
            "driver": self._device.driver,
            "lowering": step.lowering,
            "precision": step.precision,
            "cuda_graphs": open_.plan.no_graphs is None or open_.plan.no_graphs,
            "memory": {
                "slots": facts.slots,
                "engine_bytes": self._bundle.manifest.files[facts.file].size_bytes,
                "streamed_weight_bytes": open_.plan.streamed_bytes,
                "kv_cache_bytes": open_.cache.size_bytes,
                "activation_bytes": open_.plan.activation_bytes,
            },
        }

    def close(self) -> None:
        """Give everything back; the engine and the arrays that it returned cannot be used any more."""
        self._views.clear()
        self._finalizer()


class _Open:
    """What is open on the device. Apart from the engine, so that it can be closed when that is gone."""

    def __init__(self) -> None:
        self.cuda: Any = None
        self.inputs: Any = None
        self.outputs: Any = None
        self.apart: Any = None
        self.cache: Any = None
        self.plan: Any = None

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # whatever fails, the rest is closed, too
            for name in ("cuda", "inputs", "outputs", "apart", "cache", "plan"):  # the last first
                part = getattr(self, name)
                setattr(self, name, None)
                if part is not None:
                    stack.callback(part.close)
