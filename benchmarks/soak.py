"""Two thousand steps in one process: does memory grow, and what does a token cost in energy?

    python -m benchmarks.soak BUNDLE [--engine NAME] [--steps 2000]

Plain and aligned decoding with synthetic acceptance (half of the positions decisions, 90 % accepted), answer
after answer. Memory is read once everything has reached its full size, and after the steps: the last line of the
output is a JSON object, and the exit code is 1 when memory grew. Device memory is what the whole GPU has in use, so
other programs on it count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.board import Board, Jetson, Meter, NoBoard, find
from mara_deploy.bench.worker import Subject
from mara_runtime.errors import MaraError

PROFILE = {"decisions": 0.5, "accept": 0.9}
WAYS: dict[str, dict[str, Any]] = {"plain": {"align": False, "draft": 0}, "aligned": {"draft": 0}}
CONTEXT, ANSWER = 256, 200
"""Tokens before an answer, and steps of one, at most."""
GROWTH_BYTES = {"device": 2 << 20, "shared": 32 << 20, "host": 8 << 20}
"""What may be lost: CUDA gives memory in pieces of 2 MiB; a Jetson shares it with all that runs; Python's own heap."""
WARM_UP = 1000
"""Steps before memory is looked at: every width of a pass takes some once, for a binding or a CUDA graph."""
IDLE_S = 3.0

Memory = dict[str, "int | None"]
"""Bytes by whose they are."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle")
    options.add_argument("--engine", default="auto")
    options.add_argument("--threads", type=int)
    options.add_argument("--steps", type=int, default=2000, help="of each way (default 2000)")
    return options


def main() -> int:
    args = parser().parse_args()
    try:
        board = find()
    except NoBoard as error:
        board = None
        print(f"no power is read: {error}", file=sys.stderr)
    meter = None if board is None else Meter(board)
    try:
        subject = Subject(args.bundle, args.engine, args.threads)
        with meter or nullcontext():
            idle = None if meter is None else _idle(meter)
            subject.width()
            found = {way: soak(subject, way, args.steps, meter) for way in WAYS}
    except MaraError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    about = subject.describe()
    where = whose_memory(about["name"], board)
    grown = {way: too_much(result["memory"], where) for way, result in found.items()}
    print(json.dumps({**about, "idle": idle, **found, "grown": grown}))
    for way, lines in grown.items():
        for line in lines:
            print(f"soak: {way}: {line}", file=sys.stderr)
    return int(any(grown.values()))


def soak(
    subject: Subject, way: str, steps: int, meter: Meter | None = None, memory: Callable[[], Memory] | None = None
) -> dict[str, Any]:
    """Answers one after another until there were `steps`, after WARM_UP that do not count."""
    memory = memory or memory_in_use
    tokens = min(ANSWER, subject.capacity // 2)
    context = min(CONTEXT, subject.capacity - tokens - 1)

    def answer(seed: int) -> None:
        subject.profile({**PROFILE, "seed": seed}, context, tokens, {way: WAYS[way]})

    for seed in range(0, WARM_UP, tokens):
        answer(seed)
    before, started, done = memory(), time.monotonic(), 0
    while done < steps:
        answer(WARM_UP + done)
        done += tokens
    ended = time.monotonic()
    drawn = None if meter is None else meter.between(started, ended)
    energy = None if drawn is None or drawn["joules"] is None else drawn["joules"] / done
    return {
        "context": context,
        "steps": done,
        "seconds": ended - started,
        "joules_per_token": energy,
        "power": drawn,
        "memory": {"before": before, "after": memory()},
    }


def whose_memory(engine: str, board: Board | None) -> str:
    """One of GROWTH_BYTES: what an engine fills beside the host's memory."""
    return "host" if engine == "cpu" else "shared" if isinstance(board, Jetson) else "device"


def too_much(found: dict[str, Memory], where: str) -> list[str]:
    """What grew by more than it may, or cannot be told, in words. where: see `whose_memory`."""
    limits = {"host_bytes": GROWTH_BYTES["host"]}
    if where != "host":
        limits["device_bytes"] = GROWTH_BYTES[where]
    lines = []
    for name, limit in limits.items():
        before, after = found["before"][name], found["after"][name]
        if before is None or after is None:
            lines.append(f"{name} cannot be read, so nobody knows whether it grew")
        elif after - before > limit:
            lines.append(f"{name} grew from {before} to {after}, by more than {limit}")
    return lines


def memory_in_use() -> Memory:
    """Bytes in use: on the GPU by all programs, in host memory by this one. None: cannot be read."""
    device = _device_bytes()  # first: what it imports is in host memory from then on
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    return {"device_bytes": device, "host_bytes": resident and int(resident[1]) * 1024}


def _device_bytes() -> int | None:
    try:
        from cuda.bindings import runtime

        status, free, total = runtime.cudaMemGetInfo()
    except (ImportError, RuntimeError):  # not installed; no driver
        return None
    return int(total - free) if int(status) == 0 else None


def _idle(meter: Meter) -> dict[str, float | None]:
    """What is drawn while nothing runs, with the model in memory."""
    started = time.monotonic()
    time.sleep(IDLE_S)
    return meter.between(started, time.monotonic())


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's numbers
    sys.exit(main())
