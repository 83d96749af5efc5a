"""How many threads a CPU engine should start: one for each physical core that this process may use.

ONNX Runtime counts the machine's cores. A container may have fewer, by affinity (docker --cpuset-cpus, taskset) or by
quota (docker --cpus), and more threads than cores wait for each other.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path


def default_threads(root: Path = Path("/")) -> int | None:
    """Threads for a process with fewer cores than the machine; None where it has them all. root: for tests."""
    machine = _physical(root, set(range(os.cpu_count() or 1)))
    mine = _physical(root, os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    allowed = max(1, round(min(mine, _quota(root))))
    return allowed if allowed < machine else None


def most_threads() -> int:
    """Logical processors that this process may use: more threads wait for each other, up to minutes for a token."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _physical(root: Path, cpus: set[int]) -> int:
    """Physical cores among logical ones."""
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def _quota(root: Path) -> float:
    """Cores that the control groups of this process allow, version 2 or 1; infinite without a limit."""
    least = math.inf
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):  # each may limit those within
                least = min(least, _limit(folder))
                if folder == base:
                    break
    return least


def _limit(folder: Path) -> float:
    """The limit of one control group, in the files of version 2 or 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" and -1: none
            quota, period = map(int, " ".join((folder / name).read_text(encoding="ascii") for name in names).split())
            if quota > 0 and period > 0:
                return quota / period
    return math.inf
