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
    *--loop-ms=*) while echo "50.0, 1200"; do sleep 0.01; done ;;
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
    command = [SCRIPT, "--smoke", "--targets", "cpu", "--precisions", "int8", "--out", out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads((out / "results" / "results.json").read_text())
    stages = {record["stage"]: record for record in found["stages"]}
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    assert found["ended"]
    assert [name for name, record in stages.items() if "failed" in record] == []
    # no test of tests/gpu is for a CPU
    assert {name for name, record in stages.items() if "skipped" in record} == {
        *("conformance", "captures", "real-model", "hugging-face")
    }
    assert stages["machine"]["result"]["board"]["name"] == "Stand-in"
    assert stages["answers"]["result"]["cpu"] == {"equal": 40, "close": 0, "other": []}
    assert {one["difference"] for one in stages["passes"]["result"]["cpu"].values()} == {0.0}
    bench, soak = stages["bench"]["result"], stages["soak"]["result"]
    assert bench["width"]["widths"][-1] == 40
    assert {"plain", "aligned"} <= bench["profiles"][0]["ways"].keys()
    assert bench["profiles"][0]["profile"] == {"accept": 0.9}
    for way in ("plain", "aligned"):
        assert soak[way]["steps"] >= 200
        assert soak["grown"][way] == []
        assert soak[way]["joules_per_token"] > 0
