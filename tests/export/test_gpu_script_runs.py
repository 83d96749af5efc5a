"""benchmarks/gpu.sh from end to end, on the CPU and with a stand-in for nvidia-smi."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMI = """#!/bin/sh
case "$*" in
    *--loop-ms=*) while echo "50.0, 1200"; do sleep 0.1; done ;;
    *power.limit*) echo "Stand-in, 580.65.06, 8.9, 4914, P0, 300.00, Enabled, Off, Disabled, 34, 210, 3105, 405, 405" ;;
    *query-gpu=name*) echo Stand-in ;;
    *) echo "Driver Version: 580.65.06    CUDA Version: 13.0" ;;
esac
"""


@pytest.mark.long
def test_all_steps_and_one_file(tmp_path):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    out = tmp_path / "out"
    result = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--smoke", "--targets", "cpu", "--out", out],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    # Figures without conformance are worth nothing, and the script says so: no test of tests/gpu is for a CPU.
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == "gather: no test of tests/gpu has passed on cpu"
    found = json.loads((out / "results.json").read_text())
    assert found["tests"]["failed"] == []
    assert found["failed"] == {}
    bench, soak = found["targets"]["cpu"]["bench"], found["targets"]["cpu"]["soak"]
    assert bench["width"]["widths"][-1] == 40
    assert {"plain", "aligned"} <= bench["profiles"][0]["ways"].keys()
    assert bench["profiles"][0]["profile"] == {"accept": 0.9}
    for way in ("plain", "aligned"):
        assert soak[way]["steps"] >= 2000
        assert soak["grown"][way] == []
        assert soak[way]["joules_per_token"] > 0
