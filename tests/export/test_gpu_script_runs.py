"""benchmarks/gpu.sh from end to end, on the CPU and with a stand-in for nvidia-smi."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"
SMI = """#!/bin/sh
case "$*" in
    *--loop-ms=*) while echo "50.0, 1200"; do sleep 0.1; done ;;
    *power.limit*) echo "Stand-in, 580.65.06, 8.9, 4914, P0, 300.00, Enabled, Off, Disabled, 34, 210, 3105, 405, 405" ;;
    *query-gpu=name*) echo Stand-in ;;
    *) echo "Driver Version: 580.65.06    CUDA Version: 13.0" ;;
esac
"""


@pytest.mark.long
def test_all_steps_end_in_one_file_of_results(tmp_path):
    program, out = tmp_path / "nvidia-smi", tmp_path / "out"
    program.write_text(SMI)
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    command = [SCRIPT, "--smoke", "--targets", "cpu", "--out", out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    # Figures without conformance are worth nothing, and the script says so: no test of tests/gpu is for a CPU.
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == "gather: no test of tests/gpu has passed on cpu"
    found = json.loads((out / "results.json").read_text())
    assert (found["tests"]["failed"], found["failed"]) == ([], {})
    bench, soak = found["targets"]["cpu"]["bench"], found["targets"]["cpu"]["soak"]
    assert bench["width"]["widths"][-1] == 40
    assert {"plain", "aligned"} <= bench["profiles"][0]["ways"].keys()
    assert bench["profiles"][0]["profile"] == {"accept": 0.9}
    for way in ("plain", "aligned"):
        assert soak[way]["steps"] >= 2000
        assert soak["grown"][way] == []
        assert soak[way]["joules_per_token"] > 0
