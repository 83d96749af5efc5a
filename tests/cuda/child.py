"""Runs on the stand-ins of the CUDA libraries, in a process of its own: `python -m tests.cuda.child passes BUNDLE`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort_cuda import CudaEngine
from tests.cuda.fake import MARK

RUNS = 3
"""Of every pass: the first allocates memory or captures a CUDA graph, the others are what a pass costs."""
ROWS = (1, 2, 4, 40)
PROMPTS = (20, 256)
MOST_ROWS = 65
"""Of the widths that are all tried: one more than bindings are kept for."""


def mark(name: str) -> None:
    """The calls from here on belong to the pass `name`."""
    with Path(os.environ["FAKE_CUDA_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{MARK}{name}\n")


def candidates(count: int, position: int, slot: int | None = None) -> Pass:
    """Rows that compete for a position, all judged. slot: of the first; by default that of the position."""
    return Pass.siblings(
        range(1, count + 1),
        (),
        position,
        position if slot is None else slot,
        priorities=[-float(i) for i in range(count)],
        margin_weight=0.0,
        threshold=0.0,
        fallback=0,
    )


def works() -> Iterator[tuple[str, Pass]]:
    """Every pass, by name, in an order that needs no entry before it is there."""
    for rows in PROMPTS:
        yield f"prompt of {rows}", Pass.prefill(range(rows), 0, last=True)
    for rows in ROWS:
        yield f"{rows} candidates", candidates(rows, 20)
    yield "draft", Pass.sequence(range(1, 9), 20, judge_draft=True)
    yield "full", Pass.full_outputs([1, 2, 3], [20, 21, 22], 20)


def run_all(engine: CudaEngine, label: str) -> None:
    """Every pass, an entry that moves, a cache that grows to its full size, and every pass in that."""
    mark(f"{label}: room")
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


def run_works(engine: CudaEngine, label: str) -> None:
    """Every pass several times, and once more after whatever came in between."""
    for name, work in works():
        for run in range(RUNS):
            mark(f"{label}: {name}, run {run}")
            engine.run(work)
    for name, work in works():
        mark(f"{label}: {name}, later")
        engine.run(work)


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


def passes(bundle: Bundle) -> Any:
    """All passes, without and with CUDA graphs, and where the nodes run."""
    engines = {"eager": CudaEngine(bundle), "graphs": CudaEngine(bundle, graphs=True)}
    for label, engine in engines.items():
        run_all(engine, label)
    mark("profile")
    profiled = Profiled(bundle)
    for _, work in works():
        profiled.run(work)
    return {
        "graphs": engines["graphs"].describe()["cuda_graphs"],
        "nodes": profiled.nodes(),
        "entries": engines["eager"].memory.values[0].tensor_size_in_bytes(),
    }


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
    does = {"passes": passes, "answer": answer, "opening": opening}[what]
    print(json.dumps(does(Bundle.open(Path(folder)))))
