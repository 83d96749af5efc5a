"""A bundle is self-contained: it runs where it is moved to, without any package that exported it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import AlignedDecoder, DecodeConfig

ROOT = Path(__file__).parents[2]
EXPORTERS = ["torch", "transformers", "onnx", "optimum", "safetensors", "huggingface_hub", "mara_export"]
PROMPT = "How do I cook rice?"
OPTIONS = ["--prompt", PROMPT, "--max-new-tokens", "40", "--json", "--threads", "1"]

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not here")

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError as error:
        assert "is not here" in str(error)
    else:
        raise AssertionError(name)
"""

COMMAND = BLOCKED + "from mara_deploy.commands.run import main\nsys.exit(main())\n"

LIBRARY = (
    BLOCKED
    + """
import json
from mara_runtime import AlignedDecoder, DecodeConfig
result = AlignedDecoder(sys.argv[1], threads=1).generate(sys.argv[2], DecodeConfig(max_new_tokens=40))
print(json.dumps(result.to_json()))
"""
)


@pytest.fixture
def moved(bundle, tmp_path) -> tuple[dict[str, Any], Path]:
    """The result before, and the bundle after, the move; the folder it was in is gone."""
    first, second = tmp_path / "first" / "bundle", tmp_path / "another name"
    shutil.copytree(bundle("qwen2"), first)
    result = AlignedDecoder(first, threads=1).generate(PROMPT, DecodeConfig(max_new_tokens=40)).to_json()
    assert len(result["token_ids"]) > 3
    assert result["stats"]["decisions"] > 0
    shutil.move(first, second)
    first.parent.rmdir()
    return result, second


def prints(argv: Sequence[object], cwd: Path) -> dict[str, Any]:
    """The JSON object that a command prints."""
    environment = {**os.environ, "PYTHONPATH": ""}
    outcome = subprocess.run(
        [*map(str, argv)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("token_ids", "text", "finish_reason"):
        assert found[name] == expected[name]
    for name in ("decisions", "examined", "forced", "accepted_rank", "candidate_counts"):
        assert found["stats"][name] == expected["stats"][name]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes of files are those of POSIX")
def test_the_command_runs_a_moved_bundle_that_nobody_may_change(moved) -> None:
    """From within, by a relative path, and without the packages that exported it."""
    expected, folder = moved
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        found = prints([sys.executable, "-c", COMMAND, ",".join(EXPORTERS), ".", *OPTIONS], cwd=folder)
        assert_same(found, expected)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


def test_the_library_needs_no_other_package_of_ours(moved, tmp_path) -> None:
    expected, folder = moved
    blocked = ",".join([*EXPORTERS, "mara_deploy"])
    assert_same(prints([sys.executable, "-c", LIBRARY, blocked, folder, PROMPT], cwd=tmp_path), expected)


@pytest.mark.long
def test_a_fresh_environment_with_the_wheel_runs_it(moved, tmp_path) -> None:
    """Needs a package index."""
    expected, folder = moved
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", ROOT], check=True, timeout=600)
    (wheel,) = (tmp_path / "wheels").glob("mara_deploy-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    subprocess.run([programs / "pip", "install", "-q", f"{wheel}[cpu]"], check=True, timeout=600)
    packages = json.loads(subprocess.check_output([programs / "pip", "list", "--format=json"]))
    names = {package["name"].lower().replace("_", "-") for package in packages}
    assert {"mara-deploy", "onnxruntime", "numpy", "tokenizers", "jinja2"} <= names
    assert names & {"torch", "transformers", "onnx", "optimum", "safetensors"} == set()
    assert_same(prints([programs / "mara-run", folder, *OPTIONS], cwd=tmp_path), expected)
    assert "intact" in subprocess.check_output([programs / "mara-inspect", folder], text=True)
    # What this installation cannot do, it says in one line.
    refused = subprocess.run(
        [programs / "mara-export", "--model", "x", "--agent", "y"], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "pip install 'mara-deploy[cpu,export]'" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
