"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from mara_runtime.versions import installed, processor

CPUS = Path("/sys/devices/system/cpu")


def cores() -> int:
    """Physical cores available to this process; logical ones where the topology is unknown."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    try:
        return len({(CPUS / f"cpu{n}/topology/thread_siblings_list").read_text(encoding="ascii") for n in logical})
    except OSError:
        return len(logical)


def machine() -> dict[str, Any]:
    """Processor, memory and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": installed("mara-deploy", "onnxruntime", "numpy"),
    }


def _memory_gib() -> float | None:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal"):
                return round(int(line.split()[1]) / 2**20, 1)
    return None
