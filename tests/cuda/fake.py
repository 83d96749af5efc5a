"""ONNX Runtime's own CUDA build, unmodified, without a GPU: on stand-ins of the CUDA libraries (fakes/).

Their device memory is host memory, copies copy, and kernels do nothing. So ONNX Runtime opens a graph, assigns its
nodes, checks shapes, chooses kernels and captures CUDA graphs as on a device, and every call that it makes is noted:
what is launched, copied and waited for in a pass, and what a capture does not permit. It shows neither numbers nor
times.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "fakes"
WHEEL = Path(sys.prefix) / "onnxruntime-gpu"
HEADERS = Path(sys.prefix) / "cuda-headers" / "nvidia" / "cu13" / "include"
"""Both installed by `make test-long`."""
VERSIONS = {"cudart": 13, "cublas": 13, "cublasLt": 13, "cuda": 1, "cudnn": 9, "curand": 10}
"""The number behind each library's name."""
MARK = "pass "
"""Begins the line of the log before the calls of a pass."""


def why_not() -> str | None:
    """Why it cannot be done here, or None."""
    here = sys.platform, platform.machine()
    if here != ("linux", "x86_64"):
        return f"ONNX Runtime's CUDA build comes from a wheel for Linux on x86-64; this is {' on '.join(here)}"
    if shutil.which("g++") is None:
        return "there is no g++ to build the stand-ins of the CUDA libraries with"
    absent = [str(path) for path in (WHEEL, HEADERS) if not path.is_dir()]
    return f"`make test-long` has not installed {' and '.join(absent)}" if absent else None


def build(folder: Path) -> None:
    """Compile the stand-ins."""
    for name, version in VERSIONS.items():
        file = f"lib{name}.so.{version}"
        # ONNX Runtime asks for symbols of a version that is called like the library
        linked = ["-shared", "-fPIC", f"-Wl,-soname,{file},--default-symver", "-o", str(folder / file)]
        command = ["g++", "-std=c++17", "-Wall", "-I", str(HEADERS), *linked, str(SOURCES / f"{name}.cpp")]
        subprocess.run(command, check=True)


@dataclass
class Calls:
    """What one pass asked of CUDA, from outside to outside: with its uploads and downloads."""

    kernels: list[str] = field(default_factory=list)
    """launched, by name; captured ones are not"""
    products: int = 0
    """calls of cuBLAS"""
    copies: dict[str, list[int]] = field(default_factory=dict)
    """bytes of each, by direction, as "host-to-device"; captured ones are not"""
    waits: int = 0
    """for a stream, an event or the device"""
    allocations: list[int] = field(default_factory=list)
    """bytes of each"""
    captured: int = 0
    """kernels and copies that became part of a graph"""
    replays: int = 0
    """of graphs"""
    wrong: list[str] = field(default_factory=list)
    """what a capture forbids, and copies of a graph whose source somebody has used again"""

    def copied(self, direction: str) -> list[int]:
        """Bytes of each copy."""
        return self.copies.get(direction, [])

    def add(self, line: str) -> None:
        """Count a line of the log."""
        what, _, rest = line.partition(" ")
        if what == "captured":
            self.captured += 1
        elif what == "kernel":
            self.kernels.append(rest)
        elif what == "copy":
            direction, size = rest.split()
            self.copies.setdefault(direction, []).append(int(size))
        elif what == "wait":
            self.waits += 1
        elif what in ("cudaMalloc", "cudaHostAlloc"):
            self.allocations.append(int(rest))
        elif what == "replay":
            self.replays += 1
        elif what in ("forbidden", "overwritten"):
            self.wrong.append(line)
        elif what.startswith("cublas"):
            self.products += 1


def read(lines: Iterable[str]) -> dict[str, Calls]:
    """The calls of each pass of a log, by its name."""
    passes: dict[str, Calls] = {}
    calls = Calls()
    for line in lines:
        if line.startswith(MARK):
            calls = passes[line.removeprefix(MARK)] = Calls()
        else:
            calls.add(line)
    return passes


@dataclass(frozen=True)
class Result:
    """Of a process on the stand-ins."""

    said: Any
    """what it printed, as JSON"""
    passes: dict[str, Calls]


class FakeCuda:
    """The stand-ins, compiled into a folder, and a folder that onnxruntime-gpu is installed in."""

    def __init__(self, folder: Path, wheel: Path = WHEEL) -> None:
        self._folder, self._wheel = folder, wheel
        build(folder)

    def environment(self, capability: int, no_kernels: bool = False) -> dict[str, str]:
        """Variables of a process whose ONNX Runtime is the CUDA build.

        capability: compute capability of the GPU, times ten. no_kernels: the CUDA build has none for this GPU.
        """
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._folder),
            "PYTHONPATH": os.pathsep.join(map(str, (self._wheel, ROOT, ROOT / "export", ROOT / "runtime"))),
            "FAKE_CUDA_CAPABILITY": str(capability),
            **({"FAKE_CUDA_NO_KERNELS": "1"} if no_kernels else {}),
        }

    def _copy(self, places: dict[str, Path]) -> None:
        """Copy stand-ins, by name."""
        for name, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._folder / f"lib{name}.so.{VERSIONS[name]}", place)

    def run(
        self,
        capability: int,
        *command: str,
        without: str | None = None,
        no_kernels: bool = False,
        packages: bool = False,
    ) -> Result:
        """Run a module of tests/cuda; see `environment`.

        without: a library that is not there. packages: they lie where NVIDIA's packages would be installed.
        """
        environment = self.environment(capability, no_kernels)
        if without is not None:
            folder = self._folder / f"without-{without}"
            self._copy({name: folder for name in VERSIONS if name != without})
            environment["LD_LIBRARY_PATH"] = str(folder)
        if packages:
            site, driver = self._folder / "site", self._folder / "driver"
            libraries = dict.fromkeys(VERSIONS, site / "nvidia" / "cu13" / "lib")
            self._copy({**libraries, "cudnn": site / "nvidia" / "cudnn" / "lib", "cuda": driver})
            (site / "onnxruntime").symlink_to(self._wheel / "onnxruntime")
            environment["PYTHONPATH"] = os.pathsep.join((str(site), environment["PYTHONPATH"]))
            environment["LD_LIBRARY_PATH"] = str(driver)
        log = self._folder / "calls.log"
        log.write_text("", encoding="utf-8")
        environment["FAKE_CUDA_LOG"] = str(log)
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
        return Result(json.loads(done.stdout), read(log.read_text().splitlines()))
