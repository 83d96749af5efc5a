"""The TensorRT engine: a bundle's engine files on TensorRT's Python API, without PyTorch.

KV caches (trt_memory.py) and agents (trt_agents.py) lie on the device. An entry that moves is recomputed as a row of
the next pass (recompute.py). Conversations share passes where the engine was built for it (trt_shared.py). Tested
against a double of TensorRT and CUDA (tests/double); not yet run on hardware.
"""

from __future__ import annotations

import platform
import shlex
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda, trt_file
from mara_runtime.engines.base import Pass, Seating, StepOutput, Works
from mara_runtime.engines.io_block import Sizes
from mara_runtime.engines.kv_cache import KVCache, Places
from mara_runtime.engines.recompute import Merged
from mara_runtime.engines.trt_memory import TrtMemory
from mara_runtime.engines.trt_plan import KEPT_SHAPES
from mara_runtime.engines.trt_shared import Bounds, Layout, Table
from mara_runtime.errors import EngineError
from mara_runtime.manifest import EngineFacts

INSTALL = {
    "tensorrt": f"pip install 'mara-deploy[tensorrt]', but on a Jetson it comes with JetPack; {cuda.FOR_CUDA_12}",
    "tensorrt-rtx": "pip install 'mara-deploy[tensorrt-rtx]'",
}


def why_not(bundle: Bundle, name: str) -> str | None:
    """Why engine `name`, "tensorrt" or "tensorrt-rtx", cannot run the bundle here, or None when it can."""
    engines = _engines(bundle, name)
    command = f"mara-build {shlex.quote(str(bundle.folder))} --target {name}"
    if name not in bundle.manifest.targets and not engines:
        return f"the bundle was not exported for it (targets: {', '.join(bundle.manifest.targets)})"
    if not engines:
        return f"the bundle has no engine for it yet: build one on this machine with {command}"
    try:
        trt = trt_file.load(name)
    except (ImportError, OSError) as error:  # OSError: a native library that it loads is missing
        return f"its Python package cannot be imported ({error}): {INSTALL[name]}"
    reason = cuda.why_not()
    if reason is not None:
        return reason
    try:
        capability = cuda.compute_capability()
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


class TrtEngine:
    """See `Engine`; `close` frees the device's memory, as does the end of the object."""

    def __init__(self, bundle: Bundle, name: str, *, graphs: bool = True) -> None:
        """name: "tensorrt" or "tensorrt-rtx". graphs: run repeated passes as CUDA graphs. Raises EngineError."""
        reason = why_not(bundle, name)
        if reason is not None:
            raise EngineError(f"{name} cannot run {bundle.folder} here: {reason}")
        self._bundle, self._name = bundle, name
        self._trt = trt_file.load(name)
        engines, manifest = _engines(bundle, name), bundle.manifest
        self._shape, dtype = manifest.model.shape, manifest.step.cache
        top = tensors.top_tokens(manifest.max_candidates, self._shape.vocab_size)
        self._io = tensors.step_inputs(self._shape, dtype), tensors.step_outputs(self._shape, top, dtype)
        rows = max(max(e.decode_rows + e.shared_rows, e.prefill_rows) for e in engines)
        self._heads = min(e.head_rows for e in engines)
        self._bounds = Bounds(
            places=min(e.places for e in engines),
            width=min(e.shared_rows for e in engines),
            rows=min(e.shared_rows + e.decode_rows for e in engines),
            heads=min(e.places * e.head_rows for e in engines),
            slots=engines[-1].slots,
        )
        self._views: dict[Sizes, tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]] = {}
        self._left_running = False
        """a pass was interrupted, and may still read its inputs"""
        agents, widths = min(e.agents for e in engines), min(e.agent_widths for e in engines)
        self._largest = Sizes(self._bounds.places, rows, rows, self._bounds.heads, rows, rows, agents, widths)
        self._memory = TrtMemory(self._trt, bundle, engines, self._io, self._largest, graphs=graphs)
        self._finalizer = weakref.finalize(self, self._memory.close)
        try:
            self._device = self._memory.cuda.facts()
            self.use(())
            self._places = Places(self._memory)
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> Places:
        """See `Engine`."""
        return self._places

    @property
    def cache(self) -> KVCache:
        """See `Engine`."""
        return self._places[0]

    @property
    def memory(self) -> TrtMemory:
        """What is open on the device."""
        return self._memory

    def use(self, agents: Sequence[str]) -> None:
        """See `Engine.use`."""
        self._memory.agents.use(agents)

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`."""
        return self.run_together([(place, work)])[0]

    def run_together(self, works: Works) -> list[StepOutput]:
        """See `Engine.run_together`."""
        memory = self._memory
        for place, work in works:
            self._check(work)
            self._places[place].reserve(work.slot, len(work.tokens))
            memory.places[place].end = work.slot + len(work.tokens)  # before any idle row is put behind it
        table = Table(self._bounds, [place.end for place in memory.places], self._like())
        asked: dict[int, Merged] = {}
        for place, work in works:
            most = memory.rows(work.slot + len(work.tokens))
            asked[place] = memory.places[place].recompute.merged(work, merge=len(work.tokens) < most)
            if (first := asked[place].first) is not None:
                self._run(table.alone(place, first))
        found: dict[int, StepOutput] = {}
        layouts = table.layouts({place: merged.work for place, merged in asked.items()})
        for layout in layouts:
            for place, out in self._run(layout).items():
                memory.places[place].recompute.cancel()
                read = asked[place].read(out)
                found[place] = read if len(layouts) == 1 else _kept(read)  # the next pass overwrites it
        return [found[place] for place, _ in works]

    def _check(self, work: Pass) -> None:
        """Raise EngineError where a pass is too wide for the engine."""
        count, most = len(work.tokens), self._memory.rows(work.slot + len(work.tokens))
        if max(count, len(work.agent_rows)) > most or len(work.head_rows) > self._heads:
            raise EngineError(
                f"a pass of {count} rows, {len(work.head_rows)} of them for the LM head and {len(work.agent_rows)} "
                f"judged, is wider than the {most} and {self._heads} that the engine was built for: run fewer at once"
            )

    def _like(self) -> Sizes:
        """Sizes with the agents that are in use."""
        return self._largest._replace(agents=self._memory.agents.count)

    def _run(self, layout: Layout) -> dict[int, StepOutput]:
        """Run one pass; returns the outputs of the places that ask."""
        memory, sizes = self._memory, layout.sizes
        if self._left_running:
            memory.cuda.wait()
        memory.grow(layout.slots)
        inputs, outputs = self._view(sizes)
        seating = Seating(layout.passes, range(len(layout.passes)), sizes.conversations, sizes.width)
        seating.fill(inputs)
        self._left_running = True
        memory.plan.run(sizes, memory.cache.settle(layout.low, layout.high), layout.low)
        self._left_running = False
        memory.cache.turn(layout.low, layout.high)
        found = seating.read(outputs, *self._diagnostics(layout))
        return {place: out for place, out in enumerate(found, layout.low) if place in layout.asking}

    def _diagnostics(self, layout: Layout) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Hidden states and logits, where the pass asks for them."""
        work, sizes, block = layout.passes[0], layout.sizes, self._memory.diagnostic
        if not work.logits and not len(work.hidden_rows):
            return None, None
        self._memory.cuda.download(block.host, block.device)
        self._memory.cuda.wait()
        named = {t.name: block.view(t.name, sizes.of(t.shape)) for t in self._io[1] if t.name in block}
        return named[tensors.LAST_HIDDEN_STATE], named[tensors.LOGITS]

    def _view(self, sizes: Sizes) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        views = self._views.get(sizes)
        if views is None:
            if len(self._views) >= 4 * KEPT_SHAPES:
                self._views.clear()
            blocks = self._memory.inputs, self._memory.outputs
            inputs, outputs = (
                {t.name: block.view(t.name, sizes.of(t.shape)) for t in side if t.name in block}
                for side, block in zip(self._io, blocks, strict=True)
            )
            views = self._views[sizes] = inputs, outputs
        return views

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        memory, step = self._memory, self._bundle.manifest.step
        memory.grow(0)
        plan, facts = memory.plan, memory.facts
        return {
            "name": self._name,
            "version": f"tensorrt {self._trt.__version__}",
            "gpu": self._device.name,
            "compute_capability": self._device.compute_capability,
            "driver": self._device.driver,
            "lowering": step.lowering,
            "precision": step.precision,
            "cuda_graphs": plan.no_graphs is None or plan.no_graphs,
            "memory": {
                "slots": facts.slots,
                "places": memory.cache.places,
                "engine_bytes": self._bundle.manifest.files[facts.file].size_bytes,
                "streamed_weight_bytes": plan.streamed_bytes,
                "agent_bytes": memory.agents.size_bytes,
                "kv_cache_bytes": memory.cache.size_bytes,
                "activation_bytes": plan.activation_bytes,
            },
        }

    def close(self) -> None:
        """Free everything; the engine and the arrays that it returned cannot be used any more."""
        self._views.clear()
        self._finalizer()


def _kept(out: StepOutput) -> StepOutput:
    """With arrays of its own."""
    copies: dict[str, Any] = {name: value if value is None else value.copy() for name, value in vars(out).items()}
    return StepOutput(**copies)
