"""What results were made with: versions of installed packages, and the processor."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path


def installed(*names: str) -> dict[str, str]:
    """{package: version} in this order, without those that are not installed."""
    # not before it is needed: it loads Python's mail parser
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
