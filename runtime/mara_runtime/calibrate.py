"""What a row of a pass costs on this machine: a short measurement, kept for the next start.

It is kept outside the bundle, in the user's cache folder, under a name made of the graph's checksum and of what the
machine and the engine are: another machine measures anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mara_runtime.bundle import Bundle
from mara_runtime.engine import Engine, Pass
from mara_runtime.schedule import Cost

BUDGET_S = 6.0
"""A measurement goes on for so long, and until everything was measured once."""
ROUNDS = 7
"""Rounds at most."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40)
HEADS = (1, 2, 4, 8)
CONTEXTS = (128, 1024, 4096)


def measured_cost(bundle: Bundle, engine: Engine, report: Callable[[str], None] = lambda _: None) -> Cost:
    """The cost of width on this machine, from the cache, or measured now: then the engine's KV cache is cleared.

    report: told, in words, when something is measured.
    """
    try:
        path = cache_folder() / f"cost-{_fingerprint(bundle, engine)}.json"
    except RuntimeError:  # a user without a home
        path = Path(os.devnull) / "none"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    report("measuring what a wider pass costs here, once for this bundle and machine")
    cost = measure(engine, bundle.manifest.max_candidates)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start a few seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(cost)), encoding="utf-8")
        part.replace(path)
    return cost


def measure(engine: Engine, max_candidates: int, budget_s: float = BUDGET_S) -> Cost:
    """Time passes of several widths at several contexts, in turns, and take the shortest of each."""
    widths = tuple(width for width in WIDTHS if width <= max(2, max_candidates))
    heads = tuple(count for count in HEADS if count <= widths[-1])
    contexts = tuple(c for c in CONTEXTS if c + widths[-1] <= engine.slots) or (1,)

    def bodies(context: int) -> dict[Any, Pass]:
        return {(context, width): _pass(width, context, 0) for width in widths}

    works: dict[Any, Pass] = bodies(contexts[0])
    works |= {("head", count): _pass(heads[-1], contexts[0], count) for count in (0, *heads)}
    for context in contexts[1:]:
        works |= bodies(context)
    times: dict[Any, list[float]] = {key: [] for key in works}
    for work in works.values():  # bindings and memory are made on first use
        engine.run(work)
    started = time.perf_counter()
    for turn in range(ROUNDS):
        for key, work in works.items():
            before = time.perf_counter()
            engine.run(work)
            times[key].append((time.perf_counter() - before) * 1e3)
            if turn and time.perf_counter() - started > budget_s:
                break
        if time.perf_counter() - started > budget_s:
            break
    engine.clear()
    found = {key: min(values) for key, values in times.items()}  # what other programs add is no cost of ours
    return Cost(
        contexts,
        widths,
        tuple(tuple(found[context, width] for width in widths) for context in contexts),
        heads,
        tuple(max(0.0, found["head", count] - found["head", 0]) for count in heads),
    )


def cache_folder() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mara-deploy"


def _pass(width: int, context: int, heads: int) -> Pass:
    """Siblings after a context; what the cache holds there does not change the time."""
    rows = range(width)
    return Pass([0] * width, [context] * width, context, rows[:heads], rows, [float("-inf")] * width)


def _from_json(value: dict[str, Any]) -> Cost:
    return Cost(
        tuple(map(int, value["contexts"])),
        tuple(map(int, value["widths"])),
        tuple(tuple(map(float, row)) for row in value["body_ms"]),
        tuple(map(int, value["heads"])),
        tuple(map(float, value["head_ms"])),
    )


def _fingerprint(bundle: Bundle, engine: Engine) -> str:
    files = bundle.manifest.files
    step = bundle.manifest.step.file
    facts = [
        *(entry.sha256 for name, entry in sorted(files.items()) if name.startswith(step)),
        json.dumps(engine.describe(), sort_keys=True),
        platform.machine(),
        _processor(),
        str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor()
