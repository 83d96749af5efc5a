"""What the stages of first_gpu.py run and compare: passes, answers, times."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mara_deploy.demo.prompts import demo_prompts
from mara_export import parity
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Engine, Pass, StepOutput
from mara_runtime.engines.ort_cuda import OWN_ATTENTION, CudaEngine
from mara_runtime.stats import Stats

E = TypeVar("E", bound=Engine)
PROMPTS, TOKENS = 20, 48
"""Answers of each kind that are compared, and their length at most."""
PROMPT_ROWS, WIDTHS = (20, 256), (1, 2, 4, 40)
"""Of the passes that are compared."""
MIX = (1.0,)
"""Of the agent in use."""
CUDNN_ATTENTION = 8
"""In ONNX Runtime's numbers."""
WARM_UP = 3
"""Runs that are not timed: they allocate, build and capture."""


def candidates(count: int, position: int, slot: int | None = None, first: int = 1) -> Pass:
    """Rows that compete for a position, all judged. slot: of the first; by default that of the position."""
    return Pass.siblings(
        range(first, first + count),
        (),
        position,
        position if slot is None else slot,
        mix=MIX,
        priorities=[-float(i) for i in range(count)],
        margin_weight=0.0,
        threshold=0.0,
        fallback=0,
    )


def works() -> Iterator[tuple[str, Pass]]:
    """Passes by name, in an order that needs no entry before it is there; the widest has 256 rows."""
    for rows in PROMPT_ROWS:
        yield f"prompt of {rows}", Pass.prefill(range(rows), 0, last=True)
    for rows in WIDTHS:
        yield f"{rows} candidates", candidates(rows, 20)
    yield "draft", Pass.sequence(range(1, 9), 20, mix=MIX)


def numbers(out: StepOutput) -> dict[str, list[Any]]:
    """Of a pass, as JSON."""
    return {"logits": out.top_logits.tolist(), "margins": out.margins.tolist(), "best": out.top_ids[:, 0].tolist()}


def difference(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> float:
    """Greatest difference of logits and margins, relative to the largest value; 1 where they cannot be compared."""
    greatest = 0.0
    for name in ("logits", "margins"):
        a, b = np.array(found[name], np.float64), np.array(expected[name], np.float64)
        if a.shape != b.shape:
            return 1.0
        if b.size:
            apart = float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0))
            greatest = max(greatest, apart if math.isfinite(apart) else 1.0)
    return greatest


def gate(bundle: Bundle) -> parity.Gate:
    """What two engines of a bundle may differ by: the weights are the same, but a CPU rounds activations to 8 bits."""
    precision = bundle.manifest.step.precision
    return parity.GATES["int8" if precision == "int4" else precision]


def does_nothing(engine: Engine) -> str | None:
    """Why no figure of this engine means anything, or None: the answer to two tokens is the same, to the last bit."""
    first, second = (engine.run(Pass.prefill([token], 0, last=True)).top_logits.copy() for token in (1, 2))
    if np.array_equal(first, second):
        return f"the kernels do nothing: every token has the same logits, {first[0, 0]} the best: no figure counts"
    return None


class Profiled(CudaEngine):
    """Notes which provider runs each node."""

    def _open(self, path: Path, options: Any) -> Any:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
        return super()._open(path, options)

    def nodes(self) -> list[tuple[str, str, str]]:
        """(provider, operator, name) of every node that has run."""
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        nodes = {
            (event["args"]["provider"], event["args"]["op_name"], event["name"].removesuffix("_kernel_time"))
            for event in events
            if event.get("cat") == "Node" and "provider" in event["args"]
        }
        return sorted(nodes)


def engine_name(bundle: Bundle) -> str:
    """The engine to measure: of the bundle's last target on a GPU, the one it was built for, else the CPU's."""
    return ["cpu", *(target for target in bundle.manifest.targets if target != "cpu")][-1]


class WithCudnn(CudaEngine):
    """With cuDNN's attention where it has one: from compute capability 9.0 on."""

    def _open_session(self, path: Path, options: Any, provider_options: dict[str, str]) -> Any:
        kernels = str(OWN_ATTENTION | CUDNN_ATTENTION)
        return super()._open_session(path, options, {**provider_options, "sdpa_kernel": kernels})


def judging(engine: E, bundle: Bundle) -> E:
    """The engine, with the bundle's first agent in use."""
    engine.use([agent.name for agent in bundle.manifest.agents[:1]])
    return engine


def engines(bundle: Bundle) -> dict[str, Callable[[], Engine]]:
    """What opens the bundle's engine, by label, its first agent in use; for CUDA also with graphs."""
    name = engine_name(bundle)
    if name != "cuda":
        return {name: lambda: judging(open_engine(bundle, name)[0], bundle)}
    return {
        "cuda": lambda: judging(CudaEngine(bundle), bundle),
        "cuda, graphs": lambda: judging(CudaEngine(bundle, graphs=True), bundle),
    }


def trials(bundle: Bundle) -> dict[str, Callable[[], Engine]]:
    """What opens an engine that is not in use yet, to see whether it should be."""
    if engine_name(bundle) != "cuda":
        return {}
    return {"cuda, cuDNN's attention": lambda: judging(WithCudnn(bundle), bundle)}


def answered(decoder: AlignedDecoder) -> list[dict[str, Any]]:
    """Answers of the demo's prompts: tokens, whether each was within the noise, and how close its choice was."""
    found = []
    for align in (False, True):
        config = DecodeConfig(max_new_tokens=TOKENS, align=align)
        noise = decoder.bundle.manifest.mixed_noise(decoder.resolve(config).agents or {})
        prompts = demo_prompts("demo-dev")
        for prompt in prompts[:: len(prompts) // PROMPTS][:PROMPTS]:
            ids, near, gaps, stats = [], [], [], Stats()
            for piece in decoder.stream(prompt.text, config):
                before, step = stats.within_noise, piece.step
                stats.record(step, config, noise)
                ids.append(step.token)
                near.append(stats.within_noise > before)
                gaps.append(min([step.candidates.gap, *(abs(m - config.threshold) for m in step.margins.values())]))
            found.append({"prompt": prompt.text, "align": align, "ids": ids, "near": near, "gaps": gaps})
    return found


def timed(run: Callable[[], Any], count: int) -> Iterator[float]:
    """Milliseconds of each of so many runs."""
    for number in range(WARM_UP + count):
        before = time.perf_counter()
        run()
        if number >= WARM_UP:
            yield (time.perf_counter() - before) * 1e3
