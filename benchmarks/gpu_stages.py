"""The stages of first_gpu.py that open a bundle, each in a process of its own:

    python -m benchmarks.gpu_stages STAGE BUNDLE [--reference FILE] [--smoke]

prints what it knows so far as a line of JSON, again and again; the last line is the result. "failed" in it says what is
wrong, "skipped" what is absent. `reference` needs no GPU: it computes on a CPU what the others compare with, for
`passes` and, where the bundle is small, for `answers`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.board import NoBoard, find
from benchmarks.gpu_work import (
    MIX,
    Profiled,
    answered,
    candidates,
    difference,
    does_nothing,
    engine_name,
    engines,
    gate,
    judging,
    numbers,
    timed,
    trials,
    works,
)
from mara_deploy.demo import MODEL_FOLDER, NAME
from mara_runtime.bundle import Bundle
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.engines.ort_cuda import CudaEngine
from mara_runtime.errors import EngineError, MaraError
from mara_runtime.schedule.calibrate import measure
from mara_runtime.versions import installed

PACKAGES = (
    *("mara-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    *("tensorrt-rtx", "cuda-bindings", "torch", "transformers", "nvidia-cublas", "nvidia-cudnn-cu13"),
)
SMALL_BYTES = 64 << 20
"""Of weights: answers of a larger bundle would take a CPU too long."""
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 64)
CONTEXT = 256
"""Tokens in the cache while passes are timed."""
REPLAYS = 200
"""Of each captured pass."""

Found = Iterator[dict[str, Any]]


class Absent(Exception):
    """A stage cannot be run here; the message says why."""


# ── the stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def machine(*_: Any) -> Found:
    """The board, and the versions that results depend on."""
    found: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "system": platform.platform(), **installed(*PACKAGES)},
        "revision": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
    }
    try:
        yield {**found, "board": find().facts()}
    except NoBoard as error:
        yield {**found, "skipped": f"no facts about the board: {error}"}


def reference(bundle: Bundle, *_: Any) -> Found:
    """What a CPU computes."""
    engine = judging(CpuEngine(bundle), bundle)
    found: dict[str, Any] = {
        "engine": engine.describe(),
        "passes": {name: numbers(engine.run(work)) for name, work in works()},
    }
    yield found
    if sum(entry.size_bytes for entry in bundle.manifest.files.values()) <= SMALL_BYTES:
        yield {**found, "answers": answered(AlignedDecoder(bundle, engine=engine))}


def opening(bundle: Bundle, *_: Any) -> Found:
    """Does the engine open, which nodes does it leave to the CPU, and does it compute at all?"""
    started = time.perf_counter()
    name = engine_name(bundle)
    engine = Profiled(bundle) if name == "cuda" else open_engine(bundle, name)[0]
    found: dict[str, Any] = {"seconds": time.perf_counter() - started, "engine": engine.describe()}
    yield found
    nothing = does_nothing(engine)
    if isinstance(engine, Profiled):
        nodes = engine.nodes()
        found["nodes"] = len(nodes)
        found["on_cpu"] = [node for provider, *node in nodes if provider != "CUDAExecutionProvider"]
    yield {**found, **({"failed": nothing, "does_nothing": True} if nothing else {})}


def passes(bundle: Bundle, expected: dict[str, Any], *_: Any) -> Found:
    """Each pass against the CPU's; the time of its first run, which builds what it needs, and of the second."""
    found: dict[str, Any] = {}
    for label, opened in (engines(bundle) | trials(bundle)).items():
        found[label] = {}
        try:
            engine = opened()
            for name, work in works():
                theirs, before = expected["passes"][name], time.perf_counter()
                ours = numbers(engine.run(work))
                between = time.perf_counter()
                engine.run(work)
                found[label][name] = {
                    "first_ms": (between - before) * 1e3,
                    "ms": (time.perf_counter() - between) * 1e3,
                    "difference": difference(ours, theirs),
                    "same_best": ours["best"] == theirs["best"],
                }
                yield found
        except EngineError as error:
            if label not in trials(bundle):
                raise
            found[label]["refused"] = str(error)
    wrong = {
        name
        for label in engines(bundle)
        for name, one in found[label].items()
        if one["difference"] > gate(bundle).greatest_difference
    }
    yield {**found, "failed": f"other numbers than on the CPU: {', '.join(sorted(wrong))}"} if wrong else found


def answers(bundle: Bundle, expected: dict[str, Any], *_: Any) -> Found:
    """Whole answers against the CPU's, plain and aligned, without and with CUDA graphs.

    Where two part, the CPU's choice there may have been close: by less than the noise of the bundle, or than the gate's
    gap. All that follows has another prefix.
    """
    if "answers" not in expected:
        raise Absent("the bundle is too large for answers on a CPU to compare with")
    found: dict[str, Any] = {}
    for label, opened in engines(bundle).items():
        engine = opened()
        parts: dict[str, Any] = {"equal": 0, "close": 0, "other": []}
        for theirs, ours in zip(expected["answers"], answered(AlignedDecoder(bundle, engine=engine)), strict=True):
            place = next((i for i, (a, b) in enumerate(zip(theirs["ids"], ours["ids"], strict=False)) if a != b), None)
            if place is None:
                parts["equal"] += 1
            elif theirs["near"][place] or theirs["gaps"][place] < gate(bundle).min_gap:
                parts["close"] += 1
            else:
                parts["other"].append({"prompt": theirs["prompt"], "align": theirs["align"], "token": place})
        found[label] = parts
        yield found
    wrong = sum(len(parts["other"]) for parts in found.values())
    if wrong:
        yield {**found, "failed": f"{wrong} answers part from the CPU's where that had a clear choice"}


def captures(bundle: Bundle, _: Any, smoke: bool) -> Found:
    """Passes in turns, replayed as CUDA graphs, against the same ones without: each has to read its own inputs."""
    if engine_name(bundle) != "cuda":
        raise Absent("CUDA graphs of ONNX Runtime are for bundles of the target cuda")
    eager, captured = (judging(CudaEngine(bundle, graphs=graphs), bundle) for graphs in (False, True))
    graphs = captured.describe()["cuda_graphs"]
    if graphs is not True:
        raise Absent(f"no CUDA graphs: {graphs}")
    shapes = [lambda first, rows=rows: candidates(rows, 20, first=first) for rows in (1, 2, 3, 4, 8, 16)]
    shapes.append(lambda first: Pass.sequence(range(first, first + 5), 20, mix=MIX))
    prompt, long = Pass.prefill(range(20), 0, last=True), Pass.prefill(range(200, 456), 0, last=True)
    eager.memory.grow(captured.memory.slots)  # kernels depend on the size
    eager.run(prompt)
    turns = [(i, first, make(first)) for first in (1, 60, 120) for i, make in enumerate(shapes)]
    wanted = {(i, first): numbers(eager.run(work)) for i, first, work in turns}
    found: dict[str, Any] = {"runs": 0, "unequal": 0, "difference": 0.0}
    for turn in range(6 if smoke else REPLAYS):
        if turn % 10 == 0:
            captured.run(long)
            captured.run(prompt)
        for i, first, work in turns:
            ours = numbers(captured.run(work))
            found["runs"] += 1
            found["unequal"] += ours != wanted[i, first]
            found["difference"] = max(found["difference"], difference(ours, wanted[i, first]))
        yield found
    if found["difference"] > gate(bundle).greatest_difference:
        yield {**found, "failed": "replays give other numbers"}


def agents(bundle: Bundle, _: Any, smoke: bool) -> Found:
    """No agent, one, and the same one twice, in turns: margins that follow from those of the one; time of a change."""
    if not bundle.manifest.agents:
        raise Absent("the bundle has no agent")
    name = bundle.manifest.agents[0].name
    found: dict[str, Any] = {}
    for label, opened in engines(bundle).items():
        engine = opened()
        engine.run(Pass.prefill(range(20), 0, last=False))
        alone = engine.run(candidates(4, 20)).margins.copy()
        if not np.abs(alone).max() > 0:
            yield {**found, "failed": f"the agent's margins are {alone.tolist()}"}
            return
        times, greatest = [], 0.0
        for _ in range(3 if smoke else 20):
            for names, mix in (((), (1.0,)), ((name,), (1.0,)), ((name, name), (0.5, 0.25))):
                before = time.perf_counter()
                engine.use(names)
                times.append((time.perf_counter() - before) * 1e3)
                expected = alone * (sum(mix) if names else 0)
                for _ in range(3):  # also as a CUDA graph
                    margins = engine.run(replace(candidates(4, 20), mix=mix)).margins
                    greatest = max(greatest, float(np.abs(margins - expected).max() / np.abs(alone).max()))
        found[label] = {"difference": greatest, "ms": median(times), "most_ms": max(times)}
        yield found
    if max(one["difference"] for one in found.values()) > gate(bundle).greatest_difference:
        yield {**found, "failed": "agents that change give other margins"}


def widths(bundle: Bundle, _: Any, smoke: bool) -> Found:
    """Milliseconds of a pass by its rows, and the curve that the schedule would decide by."""
    found: dict[str, Any] = {"rows": ROWS, "context": CONTEXT}
    for label, opened in (engines(bundle) | trials(bundle)).items():
        try:
            engine = opened()
        except EngineError as error:
            if label not in trials(bundle):
                raise
            found[label] = str(error)
            yield found
            continue
        context = min(CONTEXT, bundle.manifest.max_context // 2)
        engine.run(Pass.prefill([0] * context, 0, last=False))
        found[label] = []
        for rows in ROWS:
            work = candidates(min(rows, bundle.manifest.max_candidates), context)
            times = list(timed(lambda work=work, engine=engine: engine.run(work), 5 if smoke else 30))
            found[label].append({"ms": median(times), "least_ms": min(times)})
            yield found
        found[f"{label}, calibrated"] = asdict(measure(engine, bundle.manifest.max_candidates, 0.1 if smoke else 6.0))
        yield found


def hugging_face(bundle: Bundle, *_: Any) -> Found:
    """The demo's checkpoint in Hugging Face on the GPU: a reference that shares nothing with the engine."""
    if bundle.manifest.model.source != NAME:
        raise Absent("only the demo's checkpoint is here")
    try:
        import torch

        if not torch.cuda.is_available():
            raise Absent("this PyTorch sees no GPU")
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise Absent(f"PyTorch or transformers is absent: {error}") from None
    decoder = AlignedDecoder(bundle, engine=engine_name(bundle))
    ids = decoder.encode("How do I keep bread fresh?")
    logits = decoder.engine.run(Pass.full_outputs(ids, range(len(ids)), 0)).logits
    assert logits is not None
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).to("cuda", dtype).eval()
        with torch.no_grad():
            theirs = model(torch.tensor([ids], device="cuda")).logits[0].float().cpu().numpy()
        found[str(dtype)] = float(np.abs(logits - theirs).max() / np.abs(theirs).max())
        yield found
    if not max(found.values()) <= gate(bundle).greatest_difference:
        yield {**found, "failed": "other logits than Hugging Face's"}


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


STAGES: dict[str, Callable[..., Found]] = {
    "machine": machine,
    "reference": reference,
    "open": opening,
    "passes": passes,
    "answers": answers,
    "captures": captures,
    "agents": agents,
    "widths": widths,
    "hugging-face": hugging_face,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--reference", type=Path, help="what `reference` printed")
    parser.add_argument("--smoke", action="store_true", help="few repetitions")
    args = parser.parse_args(arguments)
    try:
        bundle = None if args.bundle is None else Bundle.open(args.bundle)
        expected = None if args.reference is None else json.loads(args.reference.read_text(encoding="utf-8"))
        for found in STAGES[args.stage](bundle, expected, args.smoke):
            print(json.dumps(found), flush=True)
    except Absent as error:
        print(json.dumps({"skipped": str(error)}))
    except MaraError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
