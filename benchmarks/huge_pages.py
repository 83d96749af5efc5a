"""What huge pages for the weights gain on a CPU: a bundle opened with and without them, in turns.

    python benchmarks/huge_pages.py BUNDLE [--context 256] [--threads 2] [--sittings 6]

In each sitting two processes open the bundle anew, another one first. Medians in ms by the rows of a pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from mara_runtime.bundle import Bundle
from mara_runtime.engines import huge_pages
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort import why_not
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.errors import MaraError

ROWS = (1, 2, 4, 8)
TURNS, PASSES = 4, 12
"""of a sitting; of a turn"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    for flag, value in (("--context", 256), ("--threads", 2), ("--sittings", 6)):
        parser.add_argument(flag, type=int, default=value)
    args = parser.parse_args()
    if not huge_pages.page_size():
        raise SystemExit(f"{huge_pages.SETTINGS} says that this system gives no huge pages")
    try:
        bundle = Bundle.open(args.bundle)
    except MaraError as error:
        raise SystemExit(str(error)) from None
    if reason := why_not(bundle, "cpu"):
        raise SystemExit(f"{args.bundle} does not run on a CPU: {reason}")
    spawn = multiprocessing.get_context("spawn")
    times: dict[bool, list[list[float]]] = {True: [], False: []}
    opened: dict[bool, list[tuple[float, int]]] = {True: [], False: []}
    for sitting in range(args.sittings):
        pipes: dict[bool, Connection] = {}
        for huge in (True, False) if sitting % 2 else (False, True):
            pipes[huge], end = spawn.Pipe()
            spawn.Process(target=_serve, args=(end, args.bundle, args.context, args.threads, huge), daemon=True).start()
            end.close()  # so that a process that fails is noticed
            opened[huge].append(pipes[huge].recv())
        for turn in range(TURNS):
            for huge in (True, False) if turn % 2 else (False, True):
                pipes[huge].send(True)
                times[huge].append(pipes[huge].recv())
                time.sleep(0.05)  # threads of the one before still spin
        for pipe in pipes.values():
            pipe.send(False)
    for huge, name in ((False, "without"), (True, "with")):
        seconds, held = (float(np.median(column)) for column in np.array(opened[huge]).T)
        print(f"{name:>8} huge pages: opened in {seconds:.2f} s, {held / 1e6:.0f} MB in huge pages")
    print(f"{'rows':>8} {'without':>9} {'with':>9}  ms")
    for column, rows in enumerate(ROWS):
        without, with_them = (np.array(times[huge])[:, column] for huge in (False, True))
        ratios = with_them / without
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"{rows:8} {np.median(without):9.2f} {np.median(with_them):9.2f}  × {middle:.3f} [{low:.3f}–{high:.3f}]")


def _serve(pipe: Connection, folder: str, context: int, threads: int, huge: bool) -> None:
    """A process with the bundle open: times passes when it is told to."""
    if not huge:
        huge_pages.SETTINGS = Path("/nowhere")
    bundle = Bundle.open(folder, verify=False)
    started = time.perf_counter()
    engine = CpuEngine(bundle, threads)
    seconds = time.perf_counter() - started
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    pipe.send((seconds, int(found[1]) * 1024 if found else 0))
    engine.memory.resize(context + max(ROWS), kept=0)
    works = [Pass([0] * rows, [context] * rows, context, [0], range(rows), [-np.inf] * rows) for rows in ROWS]
    for work in works:
        engine.run(work)
    while pipe.recv():
        times: list[list[float]] = [[] for _ in works]
        for _ in range(PASSES):
            for work, ms in zip(works, times, strict=True):
                before = time.perf_counter()
                engine.run(work)
                ms.append((time.perf_counter() - before) * 1e3)
        pipe.send([float(np.median(ms)) for ms in times])


if __name__ == "__main__":
    main()
