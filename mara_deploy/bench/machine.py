"""The machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
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
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": installed("mara-deploy", "onnxruntime", "numpy"),
    }
