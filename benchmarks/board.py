"""Identity, settings and power draw of an NVIDIA GPU, from nvidia-smi or from the files of a Jetson.

    python benchmarks/board.py      print them as JSON; without an NVIDIA GPU, one line and exit code 2

Needs only Python: benchmarks/gpu.sh runs it before anything is installed. Values that cannot be read are None, with the
reason in "unread". The power monitors of a Jetson: https://docs.kernel.org/hwmon/ina3221.html and ina238.html.
Not run on hardware yet: neither with a real nvidia-smi nor on a Jetson.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

PERIOD_S = 0.1
"""Between two readings of power and clock."""
QUERY = {
    "name": "name",
    "driver": "driver_version",
    "compute_capability": "compute_cap",
    "memory_mib": "memory.total",
    "performance_state": "pstate",
    "power_limit_w": "power.limit",
    "persistence_mode": "persistence_mode",
    "ecc": "ecc.mode.current",
    "mig": "mig.mode.current",
    "temperature_c": "temperature.gpu",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_max_mhz": "clocks.max.mem",
}
"""{fact: field of `nvidia-smi --help-query-gpu`}"""
MONITORS = ("ina3221", "ina238")
"""Drivers of the power monitors on a Jetson."""
WHOLES = (("VDD_IN",), ("VIN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
"""Power rails that add up to the whole module: Orin NX and Nano, Thor, AGX Orin. Others are fed by one of these."""
_NOT_READ = ("[N/A]", "N/A", "[Not Supported]", "[Unknown Error]", "")

Run = Callable[[Sequence[str]], str]


class NoBoard(Exception):
    """No NVIDIA GPU was found; the message says where it was looked for."""


@dataclass(frozen=True)
class Sample:
    """One reading."""

    at_s: float
    """of time.monotonic"""
    watts: float | None
    mhz: float | None
    """clock of the GPU"""


class Board(Protocol):
    """Source of facts and readings."""

    def facts(self) -> dict[str, Any]:
        """Identity and current settings."""

    def samples(self) -> Iterator[Sample]:
        """A reading every PERIOD_S, until the iterator is closed."""


def find(root: Path = Path("/"), run: Run | None = None) -> Board:
    """The board of this machine. Raises NoBoard. root, run: replaced by tests."""
    run = run or output
    model = _text(root / "proc/device-tree/model") or ""
    release = _text(root / "etc/nv_tegra_release")
    if "Jetson" in model or release:
        return Jetson(root, run, model or "a Jetson without a model name", release or "")
    try:
        names = run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    except FileNotFoundError:
        raise NoBoard("there is no nvidia-smi on the PATH, and no /etc/nv_tegra_release of a Jetson") from None
    except subprocess.SubprocessError as error:
        raise NoBoard(f"nvidia-smi says {_reason(error)!r}") from None
    if not names.strip():
        raise NoBoard("nvidia-smi lists no GPU")
    return Smi(run)


def output(command: Sequence[str]) -> str:
    """Standard output of a program. Raises FileNotFoundError and SubprocessError."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


class Smi:
    """The GPU that CUDA would select first, read by nvidia-smi."""

    def __init__(self, run: Run) -> None:
        self._run = run
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        self._command = ["nvidia-smi", f"--id={first or 0}", "--format=csv,noheader,nounits"]

    def facts(self) -> dict[str, Any]:
        """See `Board`."""
        line = self._run([*self._command, "--query-gpu=" + ",".join(QUERY.values())]).splitlines()[0]
        values = [_value(field) for field in line.split(",")]
        facts = dict(zip(QUERY, values, strict=True))
        version = re.search(r"CUDA Version:\s*([\d.]+)", self._run(["nvidia-smi"]))
        unread = {name: "nvidia-smi does not report it" for name, value in facts.items() if value is None}
        for text in ("name", "driver", "compute_capability"):  # 8.0 and 580.65 are no numbers
            facts[text] = line.split(",")[list(QUERY).index(text)].strip()
        return {"kind": "gpu", **facts, "driver_cuda": version and version[1], "unread": unread}

    def samples(self) -> Iterator[Sample]:
        """See `Board`. One process keeps printing: starting one per reading would load the host."""
        command = [*self._command, "--query-gpu=power.draw,clocks.sm", f"--loop-ms={PERIOD_S * 1e3:.0f}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            try:
                for line in process.stdout or ():
                    watts, mhz = (_number(field) for field in line.split(","))
                    yield Sample(time.monotonic(), watts, mhz)
            finally:
                process.kill()


class Jetson:
    """A Jetson, read from /sys, /proc and nvpmodel."""

    def __init__(self, root: Path, run: Run, model: str, release: str) -> None:
        self._root, self._run = root, run
        self._model, self._release = model, release

    def facts(self) -> dict[str, Any]:
        """See `Board`."""
        unread: dict[str, str] = {}
        gpu, memory = self._gpu(), re.search(r"MemTotal:\s+(\d+) kB", _text(self._root / "proc/meminfo") or "")
        cpu = self._root / "sys/devices/system/cpu/cpu0/cpufreq"
        facts = {
            "name": self._model,
            "l4t": _l4t(self._release),
            "memory_mib": memory and int(memory[1]) // 1024,
            "power_mode": self._power_mode(unread),
            "gpu_mhz": _scaled(gpu and gpu / "cur_freq", 1e6),
            "gpu_min_mhz": _scaled(gpu and gpu / "min_freq", 1e6),
            "gpu_max_mhz": _scaled(gpu and gpu / "max_freq", 1e6),
            "cpu_mhz": _scaled(cpu / "scaling_cur_freq", 1e3),
            "cpu_max_mhz": _scaled(cpu / "scaling_max_freq", 1e3),
            "cpu_governor": _text(cpu / "scaling_governor"),
            "memory_mhz": _scaled(self._root / "sys/kernel/debug/bpmp/debug/clk/emc/rate", 1e6),
            "rails_w": self.rails(),
        }
        for name, value in facts.items():
            if value is None:
                unread.setdefault(name, "its file is not there, or only root may read it")
        return {"kind": "jetson", **facts, "unread": unread}

    def rails(self) -> dict[str, float]:
        """{rail: watts}"""
        watts: dict[str, float] = {}
        for chip in sorted((self._root / "sys/class/hwmon").glob("hwmon*")):
            if _text(chip / "name") not in MONITORS:
                continue
            for current in sorted(chip.glob("curr[0-9]_input")):
                number = current.name[4]
                milliamperes, millivolts = _scaled(current, 1), _scaled(chip / f"in{number}_input", 1)
                label = _text(chip / f"in{number}_label")
                if milliamperes is not None and millivolts is not None and label:
                    watts[label] = milliamperes * millivolts / 1e6
            whole = _scaled(chip / "power1_input", 1e6)  # of an ina238, in microwatts
            if whole is not None:
                watts[_text(chip / "power1_label") or _text(chip / "device/label") or chip.name] = whole
        return watts

    def samples(self) -> Iterator[Sample]:
        """See `Board`."""
        gpu = self._gpu()
        while True:
            yield Sample(time.monotonic(), total(self.rails()), _scaled(gpu and gpu / "cur_freq", 1e6))
            time.sleep(PERIOD_S)

    def _gpu(self) -> Path | None:
        """Folder of the GPU clock. Thor has several; the cores' clock comes first."""
        return next(iter(sorted((self._root / "sys/class/devfreq").glob("*gpu*"))), None)

    def _power_mode(self, unread: dict[str, str]) -> str | None:
        try:
            mode = re.search(r"NV Power Mode:\s*(\S+)\s+(\d+)", self._run(["nvpmodel", "-q"]))
        except FileNotFoundError:
            unread["power_mode"] = "nvpmodel is not on the PATH"
        except subprocess.SubprocessError as error:
            unread["power_mode"] = f"nvpmodel -q says {_reason(error)!r}"
        else:
            if mode:
                return f"{mode[1]} ({mode[2]})"
            unread["power_mode"] = "nvpmodel -q names no mode"
        return None


def total(rails: dict[str, float]) -> float | None:
    """Watts of the module; None for unknown sets of rails."""
    for names in WHOLES:
        if rails.keys() >= set(names):
            return sum(rails[name] for name in names)
    return None


class Meter:
    """Context manager that takes readings in the background."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _read(self) -> None:
        samples = self._board.samples()
        for sample in samples:
            self._samples.append(sample)
            if self._stop.is_set():
                break
        samples.close()  # type: ignore[attr-defined]  # a generator

    def between(self, start_s: float, end_s: float) -> dict[str, float | None]:
        """Energy, power and clock between two times of time.monotonic."""
        inside = [s for s in list(self._samples) if start_s <= s.at_s <= end_s]
        clocks = sorted(s.mhz for s in inside if s.mhz is not None)
        energy = joules([(s.at_s, s.watts) for s in inside if s.watts is not None], start_s, end_s)
        return {
            "seconds": end_s - start_s,
            "samples": len(inside),
            "joules": energy,
            "watts": None if energy is None else energy / (end_s - start_s),
            "median_mhz": clocks[len(clocks) // 2] if clocks else None,
        }


def joules(samples: Sequence[tuple[float, float]], start_s: float, end_s: float) -> float | None:
    """Energy from ordered readings (seconds, watts): trapezoidal rule, constant before the first and after the last.

    None with fewer than two readings, or when they span less than half of the interval.
    """
    if len(samples) < 2 or samples[-1][0] - samples[0][0] < (end_s - start_s) / 2:
        return None
    points = [(start_s, samples[0][1]), *samples, (end_s, samples[-1][1])]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def _l4t(release: str) -> str | None:
    """ "# R36 (release), REVISION: 4.3, …" → 36.4.3"""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    return f"{match[1]}.{match[2]}" if match else None


def _text(path: Path) -> str | None:
    """Stripped text of a file; None when it cannot be read or is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _scaled(path: Path | None, unit: float) -> float | None:
    """The number in a file, divided by `unit`."""
    value = None if path is None else _number(_text(path) or "")
    return None if value is None else value / unit


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None


def _value(field: str) -> float | str | None:
    field = field.strip()
    if field in _NOT_READ:
        return None
    value = _number(field)
    return field if value is None else value


def _reason(error: subprocess.SubprocessError) -> str:
    said = f"{getattr(error, 'stdout', '') or ''}\n{getattr(error, 'stderr', '') or ''}".strip().splitlines()
    return said[0] if said else str(error)


def main() -> int:
    try:
        print(json.dumps(find().facts()))
    except NoBoard as error:
        print(f"no NVIDIA GPU here: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
