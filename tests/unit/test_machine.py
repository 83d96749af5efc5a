"""What a process may use of the machine, in containers too: cores, and memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mara_runtime.engines.machine import default_threads, free_memory

SIBLINGS = {f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}" for i in range(8)}
GROUP = "sys/fs/cgroup/docker/a"
V2 = {"proc/self/cgroup": "0::/docker/a\n", f"{GROUP}/cpu.max": "max 100000"}
V1 = {"proc/self/cgroup": "9:memory:/\n4:cpuacct,cpu:/a\n", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000"}


@pytest.mark.parametrize(
    ("files", "affinity", "expected"),
    [
        ({}, range(8), None),
        ({}, (0, 4), 1),  # two threads of one core
        ({}, (0, 1, 2), 3),
        (V2, range(8), None),
        ({**V2, f"{GROUP}/cpu.max": "200000 100000"}, range(8), 2),
        ({**V2, f"{GROUP}/cpu.max": "10000 100000"}, range(8), 1),
        ({**V2, "sys/fs/cgroup/cpu.max": "100000 100000"}, range(8), 1),  # of a group around it
        ({**V2, f"{GROUP}/cpu.max": "800000 100000"}, (0, 1), 2),
        ({**V1, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1"}, range(8), None),
        ({**V1, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000"}, range(8), 3),
    ],
)
def test_threads_are_those_of_the_least_limit(
    files: dict[str, str], affinity: range, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On four cores of two threads each; None: the engine's own default, one for each core of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(affinity))
    write({**SIBLINGS, **files}, tmp_path)
    assert default_threads(tmp_path) == expected


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:   6000 kB\nSwapTotal: 5000 kB\nSwapFree: 2000 kB\n"}
MEMORY_2 = {
    "proc/self/cgroup": "0::/docker/a\n",
    f"{GROUP}/memory.max": "5000",
    f"{GROUP}/memory.current": "3000",
    f"{GROUP}/memory.stat": "anon 900\nfile 2000\ninactive_file 500\nactive_file 250\n",
}
OUTER = {"sys/fs/cgroup/memory.max": "4000", "sys/fs/cgroup/memory.current": "3500"}
V1_GROUP = "sys/fs/cgroup/memory"
MEMORY_1 = {
    "proc/self/cgroup": "9:memory:/a\n4:cpuacct,cpu:/b\n",
    f"{V1_GROUP}/a/memory.limit_in_bytes": "7000",
    f"{V1_GROUP}/a/memory.usage_in_bytes": "4000",
    f"{V1_GROUP}/memory.limit_in_bytes": "9223372036854771712",
    f"{V1_GROUP}/memory.usage_in_bytes": "70000",
    f"{V1_GROUP}/a/memory.stat": "inactive_file 1\nactive_file 1\ntotal_inactive_file 300\ntotal_active_file 0\n",
}
NO_FILES = "inactive_file 0\nactive_file 0\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemFree: 6000 kB\n"}, None),
        (MEMINFO, 8000 * 1024),
        ({**MEMINFO, **MEMORY_2}, 2750),
        ({**MEMINFO, **MEMORY_2, f"{GROUP}/memory.max": "max"}, 8000 * 1024),
        ({**MEMINFO, **MEMORY_2, **OUTER, "sys/fs/cgroup/memory.stat": NO_FILES}, 500),  # of a group around it
        ({**MEMINFO, **MEMORY_2, f"{GROUP}/memory.current": "9000"}, 0),
        ({**MEMINFO, **MEMORY_2, f"{GROUP}/memory.max": "90000000"}, 8000 * 1024),  # more than the machine has
        ({**MEMINFO, **MEMORY_1}, 3300),
    ],
)
def test_free_memory_is_that_of_the_least_limit(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    """What files occupy is free."""
    write(files, tmp_path)
    assert free_memory(tmp_path) == expected


def write(files: dict[str, str], root: Path) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
