"""A first run on a GPU from end to end, without one: every stage runs, and none takes what it finds for an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import carry
from benchmarks.first_gpu import LIMITS_S
from tests.cuda.fake import ROOT, WHEEL, FakeCuda
from tests.export.test_gpu_script_runs import SMI

pytestmark = pytest.mark.long

Records = dict[str, list[dict[str, Any]]]
COMPARING = {"passes", "conformance", "answers", "real-model"}
"""Stages that find by themselves that nothing is computed; the others are told so."""


@pytest.fixture(scope="module")
def found(fake: FakeCuda, bundle: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Records:
    """{stage: its records} of a bundle that was carried without its large weights, as on an H100."""
    folder = tmp_path_factory.mktemp("first-gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carry, "SMALL_BYTES", 0)
        carry.carry_bundle(bundle("demo", "fp16"), folder / "bundles" / "demo")
    program = folder / "nvidia-smi"
    program.write_text(SMI, encoding="utf-8")
    program.chmod(0o755)
    environment = {**fake.environment(90), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    words = ["--bundles", folder / "bundles", "--packages", WHEEL, "--out", folder / "out", "--smoke"]
    command = [sys.executable, "-m", "benchmarks.first_gpu", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    results = json.loads((folder / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["ended"]
    records: Records = {}
    for record in results["stages"]:
        records.setdefault(record["stage"], []).append(record)
    return records


def test_every_stage_has_run(found: Records) -> None:
    assert list(found) == [stage for stage in LIMITS_S if stage != "reference"]  # which was carried
    assert {stage for stage, records in found.items() if "skipped" in records[-1]} == {"hugging-face"}
    assert {stage for stage, records in found.items() if "failed" not in records[-1]} == {
        *("machine", "fill", "hugging-face")
    }


def test_no_stage_takes_zeros_for_an_answer(found: Records) -> None:
    for stage in list(LIMITS_S)[list(LIMITS_S).index("passes") :]:
        record = found[stage][-1]
        if "skipped" not in record:
            assert "kernels do nothing" in record["doubt"], stage
            assert stage not in COMPARING or "kernels do nothing" not in record["failed"], stage


def test_what_could_be_found_is_recorded(found: Records) -> None:
    """Also that the stand-in of cuDNN refuses to build attention, which is a trial: it stops nothing."""
    assert found["machine"][0]["result"]["board"]["name"] == "Stand-in"
    opened = found["open"][0]["result"]
    assert opened["nodes"] > 50
    assert opened["engine"]["name"] == "cuda"
    passes = found["passes"][0]["result"]
    assert "cudnn" in passes.pop("cuda, cuDNN's attention")["refused"]
    assert {label: len(one) for label, one in passes.items()} == {"cuda": 7, "cuda, graphs": 7}
    assert min(one["difference"] for label in passes.values() for one in label.values()) >= 1.0
    widths = found["widths"][0]["result"]
    assert "cudnn" in widths["cuda, cuDNN's attention"]
    assert len(widths["cuda, graphs"]) == len(widths["rows"])
    assert found["captures"][0]["result"]["runs"] == 6 * 7 * 3
