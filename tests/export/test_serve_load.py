"""benchmarks/serve_load.py: under load, no answer of a server differs from that of one alone, and none is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mara_deploy.commands.export import main as export

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--requests", "40", "--connections", "8", "--rounds", "1", "--tokens", "24"]


def test_no_answer_differs_and_none_is_lost(tmp_path):
    assert export(["--model", "demo", "--agent", "demo", "--out", str(tmp_path / "demo"), "--quiet"]) == 0
    path = os.pathsep.join([str(ROOT), str(ROOT / "export"), str(ROOT / "runtime")])
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_load.py"), str(tmp_path / "demo"), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["different"], found["lost"]) == (0, 0)
    assert all(low > 0 for way in found["waiting"].values() for low, _ in [way["first_ms"]])
