"""How much a deployment installs and how fast it starts: the wheel with the `cpu` extra in a fresh environment.

    python benchmarks/footprint.py

Prints a line a figure, then one JSON line. Needs a package index for the dependencies.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = 7


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pip("wheel", "--no-deps", "-w", str(folder), str(ROOT))
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        before = size_bytes(folder / "env")
        pip("install", "--no-compile", f"{wheel}[cpu]", python=str(python))
        figures = {
            "wheel_mb": wheel.stat().st_size / 1e6,
            "installed_mb": (size_bytes(folder / "env") - before) / 1e6,
            "import_ms": added_ms(python, "from mara_runtime import AlignedDecoder, DecodeConfig"),
            "import_with_engine_ms": added_ms(python, "import mara_runtime.decoder, onnxruntime"),
            "mara_run_help_ms": median_ms([str(python.parent / "mara-run"), "--help"]),
            "mara_export_help_ms": median_ms([str(python.parent / "mara-export"), "--help"]),
        }
    for name, value in figures.items():
        print(f"{name:<24} {value:8.1f}")
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    print(json.dumps({**{k: round(v, 1) for k, v in figures.items()}, **machine}))


def pip(*arguments: str, python: str = sys.executable) -> None:
    subprocess.run([python, "-m", "pip", "-q", *arguments], check=True, stderr=subprocess.DEVNULL)


def size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def median_ms(command: list[str]) -> float:
    """Wall time of the whole process, the first run (which compiles) left out."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def added_ms(python: Path, statement: str) -> float:
    """What a statement adds to an interpreter that starts and does nothing."""
    return median_ms([str(python), "-c", statement]) - median_ms([str(python), "-c", "pass"])


if __name__ == "__main__":
    main()
