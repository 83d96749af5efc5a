"""A CPU engine starts no more threads than the process has cores, in containers too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mara_runtime.engines.machine import default_threads

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
    for name, content in {**SIBLINGS, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert default_threads(tmp_path) == expected
