"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from mara_runtime.versions import installed

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
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": installed("mara-deploy", "onnxruntime", "numpy"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
