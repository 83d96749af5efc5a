"""What README.md says is true: its commands run, its Python runs, its output is the output."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mara_export.hf.families import ALIASES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("mara_deploy", "export/mara_export", "runtime/mara_runtime")
NOT_RUN_HERE = {
    "make demo": "its program runs in test_the_demo_prints_what_the_page_shows",
    "make test": "is what runs this test",
    "mara-train --model qwen2 --prompts prompts.txt --score my_scores:politeness --out politeness": (
        "test_train_run.py does the like"
    ),
    "mara-export --model qwen2 --agent politeness/agent.safetensors": "another line exports an agent file",
    "mara-build qwen2-gpu --target tensorrt": "needs a GPU; the next line builds the same graph for TensorRT for RTX",
    'mara-run qwen2-gpu --engine tensorrt --prompt "How do I keep bread fresh?"': "needs a GPU",
    "pip wheel --no-deps -w dist .": "test_moved_bundle.py does the same",
    'pip install "$(ls dist/*.whl)[cpu]"': "test_moved_bundle.py does the same",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def place(tmp_path_factory, checkpoint, agent_file):
    """A folder with an agent, and a Hub cache that holds a tiny model under the name behind `qwen2`."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(agent_file("qwen2"), folder / "agent.safetensors")
    (folder / "prompts.txt").write_text("How do I keep bread fresh?\nAnd cheese?\n")
    (folder / "my_scores.py").write_text(
        "def politeness(prompts, answers):\n    return [answer.count('please') for answer in answers]\n"
    )
    repository = folder / "hf" / "hub" / ("models--" + ALIASES["qwen2"].hub_id.replace("/", "--"))
    revision = "0" * 40
    shutil.copytree(checkpoint("qwen2"), repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return folder


def run(command: str, folder: Path) -> str:
    environment = {
        **os.environ,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime")),
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def test_every_command_runs(place):
    ran = [command for command in commands() if command not in NOT_RUN_HERE]
    assert {command.split()[0] for command in ran} == {
        "mara-export",
        "mara-build",
        "mara-run",
        "mara-eval",
        "mara-inspect",
        "mara-bench",
    }
    for command in ran:
        assert run(command, place).strip(), command
    (code,) = blocks("python")
    (place / "example.py").write_text(code)
    assert "decisions," in run(f"{sys.executable} example.py", place)


def test_make_has_the_targets():
    for command in commands():
        if command.startswith("make "):
            subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_demo_prints_what_the_page_shows(tmp_path):
    marker = "<!-- a test compares this with what the demo prints -->\n```text\n"
    shown = README.split(marker)[1].split("```")[0]
    printed = run(f"COLUMNS=100 {sys.executable} -m mara_deploy.demo --prompts 2 --out demo", tmp_path)
    printed = printed.split("\nGo on with")[0]

    def same_everywhere(text: str) -> list[str]:
        lines = [line.rstrip() for line in text.strip().splitlines()]
        return [line for line in lines if not line.startswith("Decoding speed")]

    assert same_everywhere(printed) == same_everywhere(shown)


def test_the_tree_names_what_is_there():
    """Every module of the packages stands in the layout tree, and nothing that does not exist."""
    tree = README.split("## Layout")[1].split("```")[1]
    for package in PACKAGES:
        for module in (ROOT / package).glob("*.py"):
            assert module.name == "__init__.py" or module.name in tree, module
    there = {path.name for part in (*PACKAGES, "tests") for path in (ROOT / part).rglob("*.py")}
    for name in re.findall(r"[\w/]+\.py", tree):
        assert Path(name).name in there, name
