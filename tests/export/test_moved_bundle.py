"""A bundle is self-contained: it runs where it is moved to, without any package that exported it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import AlignedDecoder, DecodeConfig

ROOT = Path(__file__).parents[2]
EXPORTERS = ["torch", "transformers", "onnx", "optimum", "safetensors", "huggingface_hub", "mara_export"]
PROMPT = "How do I cook rice?"

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
def moved(bundle, tmp_path) -> Any:
    """(architecture, lowering) → the result before, and the bundle after the move; the folder it was in is gone."""

    def move(architecture: str, lowering: str) -> tuple[dict[str, Any], Path]:
        first, second = tmp_path / "first" / "bundle", tmp_path / "another name"
        shutil.copytree(bundle(architecture, lowering), first)
        result = AlignedDecoder(first, threads=1).generate(PROMPT, DecodeConfig(max_new_tokens=40)).to_json()
        assert len(result["token_ids"]) > 3
        assert result["stats"]["decisions"] > 0
        shutil.move(first, second)
        first.parent.rmdir()
        return result, second

    return move


def python(script: str, *argv: object, cwd: Path) -> dict[str, Any]:
    outcome = subprocess.run(
        [sys.executable, "-c", script, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""
    result: dict[str, Any] = json.loads(outcome.stdout)
    return result


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("token_ids", "text", "finish_reason"):
        assert found[name] == expected[name]
    for name in ("decisions", "examined", "forced", "accepted_rank", "candidate_counts"):
        assert found["stats"][name] == expected["stats"][name]


@pytest.mark.parametrize(("architecture", "lowering"), [("qwen2", "ort"), ("llama", "portable")])
def test_the_command_on_a_moved_bundle_without_what_exported_it(moved, tmp_path, architecture, lowering) -> None:
    expected, folder = moved(architecture, lowering)
    options = ["--prompt", PROMPT, "--max-new-tokens", 40, "--json", "--threads", 1]
    assert_same(python(COMMAND, ",".join(EXPORTERS), folder, *options, cwd=tmp_path), expected)
    # By a relative path, from within.
    assert_same(python(COMMAND, ",".join(EXPORTERS), ".", *options, cwd=folder), expected)


def test_the_library_needs_no_other_package_of_ours(moved, tmp_path) -> None:
    expected, folder = moved("mistral", "ort")
    blocked = [*EXPORTERS, "mara_deploy"]
    assert_same(python(LIBRARY, ",".join(blocked), folder, PROMPT, cwd=tmp_path), expected)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes of files are those of POSIX")
def test_a_bundle_that_nobody_may_change_runs(moved, tmp_path) -> None:
    expected, folder = moved("qwen2", "ort")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        options = ["--prompt", PROMPT, "--max-new-tokens", 40, "--json", "--threads", 1]
        assert_same(python(COMMAND, ",".join(EXPORTERS), folder, *options, cwd=tmp_path), expected)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


@pytest.mark.long
def test_a_fresh_environment_with_the_wheel_runs_it(moved, tmp_path) -> None:
    """Needs a package index."""
    expected, folder = moved("qwen2", "ort")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "wheels", ROOT], check=True, timeout=600)
    (wheel,) = (tmp_path / "wheels").glob("mara_deploy-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    bin_folder = tmp_path / "venv" / "bin"
    subprocess.run([bin_folder / "pip", "install", "-q", f"{wheel}[cpu]"], check=True, timeout=600)
    packages = json.loads(
        subprocess.run([bin_folder / "pip", "list", "--format=json"], check=True, capture_output=True).stdout
    )
    names = {package["name"].lower().replace("_", "-") for package in packages}
    assert {"mara-deploy", "onnxruntime", "numpy", "tokenizers", "jinja2"} <= names
    assert names & {"torch", "transformers", "onnx", "optimum", "safetensors"} == set()
    outcome = subprocess.run(
        [bin_folder / "mara-run", folder, "--prompt", PROMPT, "--max-new-tokens", "40", "--json", "--threads", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert_same(json.loads(outcome.stdout), expected)
    inspected = subprocess.run([bin_folder / "mara-inspect", folder], check=True, capture_output=True, text=True)
    assert "intact" in inspected.stdout
    # What this installation cannot do, it says in a line.
    refused = subprocess.run(
        [bin_folder / "mara-export", "--model", "x", "--agent", "y"], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "pip install 'mara-deploy[cpu,export]'" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
