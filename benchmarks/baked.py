"""The cost of agents as graph inputs: aligned decoding against the same graph with its agent built in.

    python benchmarks/baked.py BUNDLE [--sittings 6] [--tokens 64]

In the second graph, the first agent's weights are constants and its layers are Gemm nodes, which is how PyTorch
exports them; ONNX Runtime packs such weights when it loads the graph. It has no agent mix. One process opens both
graphs and decodes texts with synthetic acceptance. Each pass of the decode loop runs on both graphs back to back, in
alternating order, so that changes in machine speed affect both. Each sitting starts a new process, because a
session's speed depends on where its memory lies. Prints inputs ÷ constants for the total time of a text's passes, and
for single passes by the number of rows that the agent judges.

Two sessions of the very same graph differ by more than an agent costs. So as many sittings follow in which ONNX
Runtime's profiler times every kernel. The LLM's kernels are the same in both graphs: "by kernels" is the ratio with
the mean of theirs on both sides, so that only the agent's differ. The last line is JSON.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mara_deploy.bench.machine import machine
from mara_deploy.bench.measure import PROFILES, WARM_UP, WAYS, spread
from mara_deploy.bench.worker import Subject
from mara_export.folder import entry_of, write_manifest
from mara_runtime.agents import AgentStack
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Engine, Pass, StepOutput
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.tensors import PREFILL_ROWS

PREFIX = "agents/"
"""In the names of all nodes of the agents, fused ones too."""

Times = tuple[int, float, float]
"""Of a pass: rows that the agent judged, ms on one engine, ms on the other."""
Kernels = tuple[float, float]
"""Of a pass on one engine: ms of the agent's kernels, ms of all others."""


def bake(graph: onnx.GraphProto, weights: list[NDArray[np.float32]]) -> None:
    """Replace the agents' nodes of a step graph. weights: one agent's, as `tensors.agent_weights` has them, A = 1."""
    nodes = [node for node in graph.node if node.name.startswith(PREFIX)]
    (margins,), place = nodes[-1].output, [*graph.node].index(nodes[0])
    normalised = next(node for node in nodes if node.op_type == "LayerNormalization")
    made, x = [normalised], normalised.output[0]
    for i in range(3):
        layer = f"{PREFIX}baked.{i}"
        matrix, bias = weights[2 * i][0], weights[2 * i + 1][0].reshape(-1)
        parameters = f"{layer}.weight", f"{layer}.bias"
        graph.initializer.extend(map(numpy_helper.from_array, (matrix, bias), parameters))
        made.append(helper.make_node("Gemm", [x, *parameters], [layer], layer, transB=1))
        if i < 2:
            made.append(helper.make_node("Relu", [layer], [f"{layer}.relu"], f"{layer}.relu"))
        x = made[-1].output[0]
    graph.initializer.append(numpy_helper.from_array(np.array([1]), f"{PREFIX}axis"))
    made.append(helper.make_node("Squeeze", [x, f"{PREFIX}axis"], [margins], f"{PREFIX}baked"))
    others = [node for node in graph.node if not node.name.startswith(PREFIX)]
    del graph.node[:]
    graph.node.extend([*others[:place], *made, *others[place:]])


def write_baked(bundle: Bundle, folder: Path) -> None:
    """Write the bundle with its first agent built in. The inputs for agents stay, and nothing reads them."""
    weights: list[NDArray[np.float32]] = []
    AgentStack(bundle).use([bundle.manifest.agents[0].name], weights.extend)
    step = bundle.manifest.step.file
    model = onnx.load(bundle.path(step), load_external_data=False)
    bake(model.graph, weights)
    for name in bundle.manifest.files:
        if name != step:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)
    onnx.save(model, folder / step)
    onnx.checker.check_model(str(folder / step))
    write_manifest(folder, replace(bundle.manifest, files={**bundle.manifest.files, step: entry_of(folder / step)}))


class Pairs:
    """An engine that runs every pass on another one, too, and times both. The other's cache is not kept in order."""

    def __init__(self, engine: Engine, other: Engine) -> None:
        self._engine, self._other = engine, other
        self.times: list[Times] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`."""
        ms, outs = [0.0, 0.0], {}
        for side, engine in [(0, self._engine), (1, self._other)][:: 1 if len(self.times) % 2 else -1]:
            started = time.perf_counter()
            outs[side] = engine.run(work, place)
            ms[side] = (time.perf_counter() - started) * 1e3
        self.times.append((len(work.agent_rows), *ms))
        return outs[0]


def check_margins(one: Engine, other: Engine) -> None:
    """Both judge alike."""
    rows = range(8)
    work = Pass(rows, rows, 0, agent_rows=rows, priorities=[0.0] * len(rows))
    here, there = (engine.run(work).margins for engine in (one, other))
    if not np.allclose(here, there, rtol=1e-4, atol=1e-4 * np.abs(here).max()):
        raise SystemExit(f"the two graphs' margins differ: {here} and {there}")


class Profiled(ort.SessionOptions):
    """Of sessions that note the duration of each kernel."""

    folder = ""

    def __init__(self) -> None:
        super().__init__()
        self.enable_profiling, self.profile_file_prefix = True, f"{self.folder}/ort"


def kernels(engine: CpuEngine) -> list[Kernels]:
    """Those of every pass so far, in order. Ends the profiling."""
    events = json.loads(Path(engine._session.end_profiling()).read_text())
    runs = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    found = [[0.0, 0.0] for _ in runs]
    for event in events:
        run = bisect.bisect(runs, (event["ts"], float("inf"))) - 1
        if event["name"].endswith("_kernel_time") and run >= 0 and event["ts"] <= runs[run][1]:
            found[run][PREFIX not in event["name"]] += event["dur"] / 1e3
    return [(agent, others) for agent, others in found]


def sitting(
    bundle: Path, baked: Path, number: int, args: argparse.Namespace
) -> tuple[dict[str, list[Times]], list[tuple[Kernels, Kernels]]]:
    """Decode the profiles in this process; {profile: the passes after its prompt}, and the kernels of these passes,
    if sessions note them.
    """
    other = CpuEngine(Bundle.open(baked), args.threads) if number % 2 else None
    subject = Subject(str(bundle), "cpu", args.threads)
    other = other or CpuEngine(Bundle.open(baked), args.threads)
    other.use([subject.bundle.manifest.agents[0].name])
    check_margins(engine := subject.engine, other)
    subject.width()
    subject.engine = pairs = Pairs(engine, other)
    spans = {}
    for index, profile in enumerate(PROFILES, 1):
        for turn in range(WARM_UP + 1):
            started = len(pairs.times) + -(-args.context // PREFILL_ROWS)
            subject.engine.cache.tokens.clear()
            seeded = {**profile, "seed": 100 * number + turn}
            subject.profile(seeded, args.context, args.tokens, {"aligned": WAYS["aligned"]})
        spans[f"profile {index}"] = slice(started, len(pairs.times))
    found = {name: pairs.times[span] for name, span in spans.items()}
    if ort.SessionOptions is not Profiled:
        return found, []
    here, there = (kernels(side)[-len(pairs.times) :] for side in (engine, other))
    every = [*zip(here, there, strict=True)]
    return found, [passed for span in spans.values() for passed in every[span]]


def profiled_sitting(bundle: Path, baked: Path, number: int, args: argparse.Namespace) -> dict[str, float]:
    """Inputs ÷ constants by the durations of kernels, and the agent's in ms per pass with rows that it judges."""
    with tempfile.TemporaryDirectory() as folder:
        Profiled.folder, ort.SessionOptions = folder, Profiled
        found, passes = sitting(bundle, baked, number, args)
    judged = sum(rows > 0 for times in found.values() for rows, *_ in times)
    here, there = (sum(agent for agent, _ in side) for side in zip(*passes, strict=True))
    others = sum(others for both in passes for _, others in both) / 2
    return {
        "by kernels": (others + here) / (others + there),
        "agent, inputs": here / judged,
        "agent, constants": there / judged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--sittings", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="of each text")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sums: dict[str, list[float]] = {}
    singles: dict[str, list[float]] = {}
    by_kernels: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_baked(Bundle.open(args.bundle), Path(folder))

        def alone(work: Callable[..., Any], number: int) -> Any:
            """What it returns, in a process of its own."""
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(work, args.bundle, Path(folder), number, args).result()

        for number in range(args.sittings):
            found, _ = alone(sitting, number)
            every = [times for passes in found.values() for times in passes]
            for name, passes in [*found.items(), ("all profiles", every)]:
                _, here, there = map(sum, zip(*passes, strict=True))
                sums.setdefault(name, []).append(here / there)
            for rows in sorted({judged for judged, _, _ in every}):
                ratios = [here / there for judged, here, there in every if judged == rows]
                singles.setdefault(f"{rows} rows judged", []).append(median(ratios))
            for name, value in alone(profiled_sitting, number).items():
                by_kernels.setdefault(name, []).append(value)
    print(f"inputs ÷ constants, {args.sittings} sittings of {args.tokens} tokens at {args.context}: median [quartiles]")
    values = {**sums, **singles, **by_kernels}
    results = {name: spread(values) for name, values in values.items() if len(values) == args.sittings}
    for name, value in results.items():
        unit = " ms a judged pass" * name.startswith("agent")
        print(f"  {name:<18}{value['median']:.3f} [{value['low']:.3f}, {value['high']:.3f}]{unit}")
    print(json.dumps({"machine": machine(), "bundle": args.bundle.name, "results": results}))


if __name__ == "__main__":
    main()
