"""What this process may use of the machine: cores and memory.

A container may have fewer cores than the machine, by affinity (docker --cpuset-cpus, taskset) or by quota (docker
--cpus), and less memory (docker --memory). ONNX Runtime counts the machine's cores, and more threads than cores wait
for each other; when memory runs out, the system ends a process.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

if sys.platform == "linux":
    import resource

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use: as many threads as a CPU engine should start. root: for tests."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else _processors()
    quota = min(map(_core_limit, _groups(root, "cpu")), default=math.inf)
    return max(1, round(min(_physical(root, usable), quota)))


def default_threads(root: Path = ROOT) -> int | None:
    """Threads for a process with fewer cores than the machine; None where it has them all."""
    allowed = cores(root)
    return allowed if allowed < _physical(root, _processors()) else None


def most_threads() -> int:
    """Logical processors that this process may use: more threads wait for each other, up to minutes for a token."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process can take before the machine or a control group has none left; None: it cannot be told.

    What files occupy counts as free, as the system gives it up.
    """
    try:
        meminfo = root / "proc/meminfo"
        machine = (_figure(meminfo, "MemAvailable") + _figure(meminfo, "SwapFree")) * 1024
    except (OSError, ValueError):  # other systems than Linux
        return None
    return round(max(0, min(machine, *map(_free_in, _groups(root, "memory")), math.inf)))


def allocated_memory(root: Path = ROOT) -> int:
    """Bytes of this process's private memory, touched or not, which RLIMIT_DATA limits. Raises OSError, ValueError."""
    return _figure(root / "proc/self/status", "VmData") * 1024


def allocatable_memory() -> int | None:
    """Bytes that this process may allocate until its limit (RLIMIT_DATA); None: it has none."""
    if sys.platform != "linux":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if limit == resource.RLIM_INFINITY else max(0, limit - allocated_memory())


def _processors() -> set[int]:
    return set(range(os.cpu_count() or 1))


def _physical(root: Path, cpus: set[int]) -> int:
    """Physical cores among logical ones."""
    found = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            found.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            found.add(str(cpu))
    return len(found)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, version 2 or 1, and of those around them: each may limit it."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = base / path.lstrip("/")
            for folder in (group, *group.parents):
                yield folder
                if folder == base:
                    break


def _core_limit(group: Path) -> float:
    """Cores that a control group allows; infinite without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" and -1: none
            quota, period = map(int, " ".join((group / name).read_text(encoding="ascii") for name in names).split())
            if quota > 0 and period > 0:
                return quota / period
    return math.inf


def _free_in(group: Path) -> float:
    """Bytes that a control group has left; infinite without a limit."""
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError, ValueError):  # "max": none
            most, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
            files = (_figure(group / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
            return most - used + sum(files)
    return math.inf


def _figure(file: Path, name: str) -> int:
    """The number after a name, in a file with one on each line. Raises OSError, ValueError."""
    found = re.search(rf"^{name}:?\s+(\d+)", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{file} has no {name}")
    return int(found[1])
