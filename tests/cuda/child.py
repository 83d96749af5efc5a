"""Runs on the stand-ins of the CUDA libraries, in a process of its own: `python -m tests.cuda.child passes BUNDLE`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_work import Profiled, candidates, works
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort_cuda import CudaEngine
from tests.cuda.fake import MARK

RUNS = 3
"""Of every pass: the first allocates memory or captures a CUDA graph, the others are what a pass costs."""
MOST_ROWS = 65
"""Of the widths that are all tried: one more than bindings are kept for."""


def mark(name: str) -> None:
    """The calls from here on belong to the pass `name`."""
    with Path(os.environ["FAKE_CUDA_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{MARK}{name}\n")


def every_work() -> Iterator[tuple[str, Pass]]:
    """Every pass, by name, those of full outputs included."""
    yield from works()
    yield "full", Pass.full_outputs([1, 2, 3], [20, 21, 22], 20)


def run_all(engine: CudaEngine, label: str, agent: str) -> None:
    """Every pass, an entry that moves, a cache that grows to its full size, every pass in that, agents that change."""
    mark(f"{label}: room")
    engine.use([agent])
    engine.run(Pass.prefill(range(256), 0, last=False))
    engine.run(candidates(1, 20, 256))
    run_works(engine, label)
    mark(f"{label}: an entry moves")
    engine.cache.tokens[:] = range(20)
    engine.run(candidates(4, 20))
    engine.cache.commit(3, 22)  # the third: recomputed in front of the next pass
    engine.run(candidates(2, 21))
    while engine.memory.slots < engine.cache.capacity:
        mark(f"{label}: growth from {engine.memory.slots} slots")
        engine.run(candidates(1, 20, engine.memory.slots))
    run_works(engine, f"{label}, full size")
    mark(f"{label}: every width")
    for rows in range(1, MOST_ROWS + 1):
        engine.run(candidates(rows, 20))
        engine.run(Pass.prefill(range(rows), 0, last=True))
    engine.cache.clear()
    mark(f"{label}: cleared")
    for _, work in works():
        engine.run(work)
    for turn in range(RUNS):
        for agents in ([], [agent], [agent, agent]):
            mark(f"{label}: {len(agents)} agents, turn {turn}")
            engine.use(agents)
            for run in range(2):
                mark(f"{label}: {len(agents)} agents, turn {turn}, pass {run}")
                engine.run(candidates(4, 20))


def run_works(engine: CudaEngine, label: str) -> None:
    """Every pass several times, and once more after whatever came in between."""
    for name, work in every_work():
        for run in range(RUNS):
            mark(f"{label}: {name}, run {run}")
            engine.run(work)
    for name, work in every_work():
        mark(f"{label}: {name}, later")
        engine.run(work)


def passes(bundle: Bundle) -> Any:
    """All passes, without and with CUDA graphs, and where the nodes run."""
    engines = {"eager": CudaEngine(bundle), "graphs": CudaEngine(bundle, graphs=True)}
    for label, engine in engines.items():
        run_all(engine, label, bundle.manifest.agents[0].name)
    mark("profile")
    profiled = Profiled(bundle)
    for _, work in every_work():
        profiled.run(work)
    return {
        "graphs": engines["graphs"].describe()["cuda_graphs"],
        "nodes": profiled.nodes(),
        "entries": engines["eager"].memory.bank.slab.values[0].tensor_size_in_bytes(),
    }


def widths(bundle: Bundle) -> Any:
    """Candidates of every width that a binding is kept for, without CUDA graphs."""
    engine = CudaEngine(bundle)
    engine.run(Pass.prefill(range(256), 0, last=False))
    for rows in range(1, MOST_ROWS):
        engine.run(candidates(rows, 256))
    for rows in range(1, MOST_ROWS):
        mark(f"{rows} candidates, later")
        engine.run(candidates(rows, 256))
    return {}


def answer(bundle: Bundle) -> Any:
    """An answer, from calibration to text. It means nothing, as every output is zero."""
    config = DecodeConfig(max_new_tokens=12)
    return AlignedDecoder(bundle, engine="cuda").generate("How do I keep bread fresh?", config).to_json()


def opening(bundle: Bundle) -> Any:
    """Which engine is opened, and why others are not."""
    engine, declined = open_engine(bundle, "auto")
    return {"engine": engine.describe()["name"], "declined": declined}


if __name__ == "__main__":
    what, folder = sys.argv[1:]
    does = {"passes": passes, "widths": widths, "answer": answer, "opening": opening}[what]
    print(json.dumps(does(Bundle.open(Path(folder)))))
