"""Calibration: what a pass costs on this machine, by its rows; measured once and cached.

The result is cached in the user's cache folder, not in the bundle, under a name that hashes what runs, the engine and
the machine: another machine measures for itself.
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
from typing import Any

from mara_runtime import files
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Engine, Pass
from mara_runtime.engines.huge_pages import page_size
from mara_runtime.schedule.cost import Cost
from mara_runtime.versions import processor

BUDGET_S = 6.0
"""Time budget, without the first pass of each shape; exceeded only until each pass was timed once."""
ROUNDS = 24
"""Rounds at most."""
RAREST = 8
"""A wide pass is timed in at least one of so many rounds."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 40)
HEADS = (1, 2, 4, 8)
CONTEXTS = (128, 1024, 4096)
VERSION = 2
"""Version of the measurement; change it whenever passes are timed differently."""
_MOST_BYTES = 1 << 20


def measured_cost(bundle: Bundle, engine: Engine, report: Callable[[str], None] = lambda _: None) -> Cost:
    """The cost of passes on this machine, cached or measured now; measuring clears the engine's KV cache.

    report: called with a line before a measurement.
    """
    name = f"cost-{_fingerprint(bundle, engine)}.json"
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _from_json(json.loads(files.read_cached(name, _MOST_BYTES)))
    report("calibrating: timing passes of several widths, once per bundle and machine")
    cost = measure(engine, bundle.manifest.max_candidates)
    files.write_cached(name, json.dumps(asdict(cost)).encode())
    return cost


def measure(engine: Engine, max_candidates: int, budget_s: float = BUDGET_S) -> Cost:
    """Time passes of several widths at several contexts; keeps the shortest time of each.

    Contexts are in ascending order: the KV cache grows with the first pass that needs it, so each context is measured
    with the cache that a conversation of its length has.
    """
    widths = tuple(width for width in WIDTHS if width <= max(2, max_candidates))
    heads = tuple(count for count in HEADS if count in widths)
    contexts = tuple(c for c in CONTEXTS if c + widths[-1] <= engine.cache.capacity) or (1,)

    found: dict[_Key, float] = {}
    left_s = budget_s
    for index, context in enumerate(contexts):
        keys = [(context, width, 0) for width in widths]
        if index == 0:
            keys += [(context, count, count) for count in heads]
        works = {(context, width, head): _pass(width, context, head) for context, width, head in keys}
        for work in works.values():  # bindings and memory are created on first use
            engine.run(work)
        started = time.perf_counter()
        found |= _times_ms(engine, works, started + left_s / (len(contexts) - index))
        left_s -= time.perf_counter() - started
    engine.cache.clear()
    first = contexts[0]
    return Cost(
        contexts,
        widths,
        tuple(tuple(found[context, width, 0] for width in widths) for context in contexts),
        heads,
        tuple(max(0.0, found[first, count, count] - found[first, count, 0]) for count in heads),
    )


_Key = tuple[int, int, int]  # context, rows, rows through the LM head


def _times_ms(engine: Engine, works: dict[_Key, Pass], end: float) -> dict[_Key, float]:
    """Shortest time of each, measured in rounds until `end`, at least once.

    A pass of n rows takes part in every n-th round: narrow passes matter most, and a wide one takes the time of many.
    """
    times: dict[_Key, list[float]] = {key: [] for key in works}
    for number in range(ROUNDS):
        for key, work in works.items():
            _, rows, _ = key
            before = time.perf_counter()
            if number and before > end:
                break
            if number % min(rows, RAREST) == 0:
                engine.run(work)
                times[key].append((time.perf_counter() - before) * 1e3)
    return {key: min(values) for key, values in times.items()}  # the rest is other programs' interference


def _pass(width: int, context: int, heads: int) -> Pass:
    """Siblings after a context; the content of the cache does not affect the time."""
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
    engine_facts = {key: value for key, value in engine.describe().items() if key != "memory"}
    runs = (bundle.manifest.step.file, f"engines/{engine_facts['name']}/")
    facts = [
        str((VERSION, WIDTHS, HEADS, CONTEXTS, page_size())),
        *(entry.sha256 for name, entry in sorted(bundle.manifest.files.items()) if name.startswith(runs)),
        json.dumps(engine_facts, sort_keys=True),
        platform.machine(),
        processor(),
        str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:24]
