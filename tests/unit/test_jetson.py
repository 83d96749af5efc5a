"""runtime/jetson: what its page and its Dockerfiles call exists, and they name the same versions.

Nothing here needs a Jetson, and nothing here shows that a Jetson does what the page says.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

from mara_deploy.commands import inspect
from mara_runtime.config import ENGINES
from mara_runtime.engines import cuda
from mara_runtime.engines import tensorrt as trt_engine

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runtime" / "jetson"
GUIDE = (FOLDER / "README.md").read_text(encoding="utf-8")
DOCKERFILES = sorted(FOLDER.glob("Dockerfile.*"))
COMMANDS = ("export", "build", "run", "bench", "inspect")
IN_PLACE = Version("10.15")
"""The first TensorRT that updates a KV cache in place, which `portable` asks for."""
OTHERS_FLAGS = {"--system-site-packages", "--runtime", "--gpus", "--restore", "--platform", "--dry-run"}
"""Of python, docker, jetson_clocks, pip and gpu.sh."""
BINDINGS = {"12.6": "12.8", "13.2": "13.2"}
"""CUDA of a board, and the cuda-bindings for it: 12.8 is the last without a CUDA runtime that a driver could refuse."""
ARM_WHEELS = {"cuda-bindings": ("12.8.0", "13.2.0"), "numpy": ("1.26.4",)}
"""Versions that PyPI has for arm64 and the boards' Python (November 2026)."""
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def shell_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(keyword, arguments), continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in joined.splitlines()) if keyword]


def calls() -> list[list[str]]:
    """Every call of a `mara-` command in the guide and in the Dockerfiles' comments: its words, the command first."""
    comments = [line[1:] for path in DOCKERFILES for line in path.read_text().splitlines() if line.startswith("#")]
    lines = [line for line in [*shell_lines(), *comments] if re.search(r"(^|\s)mara-[a-z]+\s", line)]
    words = [shlex.split(line) for line in lines]
    starts = [next(i for i, word in enumerate(line) if re.fullmatch(r"mara-[a-z]+", word)) for line in words]
    return [line[start:] for line, start in zip(words, starts, strict=True)]


def pip_lines(dockerfile: Path) -> list[str]:
    return [part for keyword, rest in instructions(dockerfile) for part in rest.split("&&") if "pip install" in part]


def requirements(line: str) -> dict[str, Requirement]:
    """What a `pip install` line asks for beside the project itself."""
    found = [
        Requirement(word) for word in shlex.split(line.partition("pip install")[2]) if re.match(r"\w[\w-]*[=<>]", word)
    ]
    return {requirement.name: requirement for requirement in found}


def table() -> list[dict[str, str]]:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in GUIDE.splitlines() if line.startswith("| ")
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "JetPack")
    names, found = rows[start], []
    for row in rows[start + 1 :]:
        if len(row) != len(names):
            break
        found.append(dict(zip(names, row, strict=True)))
    return found


def test_every_command_has_the_options_that_are_used() -> None:
    used = set()
    for command, *arguments in calls():
        parser = importlib.import_module(f"mara_deploy.commands.{command.removeprefix('mara-')}").parser()
        args = parser.parse_args(arguments)  # leaves with an error of its own
        assert getattr(args, "engine", "auto") in ("auto", *ENGINES)
        used.add(command)
    assert used == {"mara-export", "mara-build", "mara-run", "mara-bench", "mara-inspect"}


def test_the_memory_line_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [call for call in calls() if call[0] == "mara-inspect"]
    assert inspect.main(line[1:]) == 0
    printed = capsys.readouterr().out
    assert "8 GB" in printed
    for part in ("engine", "KV", "workspace", "host"):
        assert part in printed


@pytest.mark.parametrize("l4t", ["36.4.3", "38.4.0", "39.2.0"])
def test_the_measuring_line_is_one_that_the_script_takes(l4t: str, tmp_path: Path) -> None:
    (line,) = [shlex.split(line) for line in shell_lines() if line.startswith("benchmarks/")]
    board = json.dumps({"kind": "jetson", "l4t": l4t})
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHON"}, "BOARD": board}
    found = subprocess.run(
        [ROOT / line[0], *line[1:], "--dry-run"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert f"mara-build {tmp_path}/bundles/tensorrt --target tensorrt" in found.stdout
    assert "mara-export" not in found.stdout  # without PyTorch
    results = next(line.split()[1] for line in shell_lines() if line.startswith("cat "))
    assert f"{tmp_path}/{results.rpartition('/')[0]}" in found.stdout


def test_options_named_in_the_text_exist() -> None:
    parsers = [importlib.import_module(f"mara_deploy.commands.{name}").parser() for name in COMMANDS]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    text = re.sub(r"^```sh\n.*?^```", "", GUIDE, flags=re.MULTILINE | re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]+)`", text) for flag in re.findall(r"--[a-z-]+", code)}
    assert {"--lowering", "--precision", "--workspace", "--weight-streaming"} <= named
    assert named - known <= OTHERS_FLAGS


def test_the_lowering_follows_from_the_version_of_tensorrt() -> None:
    rows = table()
    assert {row["JetPack"][0] for row in rows} == {"6", "7"}
    for row in rows:
        in_place = Version(row["TensorRT"]) >= IN_PLACE
        assert row["`--lowering`"] == ("`portable`" if in_place else "`decomposed`"), row


def test_the_export_line_is_for_jetpack_6() -> None:
    (line,) = [call for call in calls() if call[0] == "mara-export"]
    assert line[line.index("--lowering") + 1] == "decomposed"
    assert line[line.index("--target") + 1] == "tensorrt"


@each_dockerfile
def test_an_image_gets_all_that_the_package_is_built_from(dockerfile: Path) -> None:
    copied = {word for keyword, rest in instructions(dockerfile) if keyword == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied), copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert needed | {Path(package).parts[0] for package in packages} == copied


@each_dockerfile
def test_a_dockerfile_names_the_versions_of_the_table(dockerfile: Path) -> None:
    first = dockerfile.read_text(encoding="utf-8").splitlines()[0]
    facts = dict(re.findall(r"(JetPack|L4T|CUDA|TensorRT|Python) (\d[\d.]*\d)", first))
    (row,) = [row for row in table() if facts["JetPack"] in row["JetPack"].split(", ")]
    for name, column in (("L4T", "Jetson Linux"), ("CUDA", "CUDA"), ("TensorRT", "TensorRT"), ("Python", "Python")):
        assert facts[name] == row[column]
    source = "".join(rest for keyword, rest in instructions(dockerfile) if keyword in ("FROM", "ARG"))
    assert f"r{facts['L4T']}" in source
    assert row["`--lowering`"].strip("`") in first
    (line,) = pip_lines(dockerfile)
    assert str(requirements(line)["cuda-bindings"].specifier) == f"=={BINDINGS[facts['CUDA']]}.*"


def test_the_page_and_the_images_install_the_same() -> None:
    by_hand = [requirements(line) for line in shell_lines() if "pip install" in line]
    assert by_hand == [requirements(line) for dockerfile in DOCKERFILES for line in pip_lines(dockerfile)]


def test_what_cuda_12_needs_is_the_same_everywhere() -> None:
    everywhere = ["tensorrt-cu12", "cuda-bindings<13", f"cuda-bindings=={BINDINGS['12.6']}.*"]
    comment = re.findall(r"^# .*", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    for text in (cuda.FOR_CUDA_12, trt_engine.INSTALL["tensorrt"], " ".join(comment)):
        assert [word for word in everywhere if word not in text] == [], text
    for text in (GUIDE, *(path.read_text(encoding="utf-8") for path in DOCKERFILES[:1])):
        assert f'"{everywhere[-1]}"' in text


def test_on_arm_the_extra_leaves_tensorrt_to_jetpack_and_allows_the_pins() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    jetson = {"platform_machine": "aarch64", "sys_platform": "linux"}
    extra = {r.name: r for r in map(Requirement, project["optional-dependencies"]["tensorrt"])}
    assert {name for name, r in extra.items() if r.marker is None or r.marker.evaluate(jetson)} == {
        "cuda-bindings",
        "onnx",
    }
    allowed = extra | {r.name: r for r in map(Requirement, project["dependencies"])}
    for line in (line for dockerfile in DOCKERFILES for line in pip_lines(dockerfile)):
        for name, pin in requirements(line).items():
            assert any(v in pin.specifier and v in allowed[name].specifier for v in ARM_WHEELS[name]), (line, name)


def test_links_and_sources() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (FOLDER / target).exists(), target
    used, defined = set(re.findall(r"\[(\d+)\](?!:)", GUIDE)), re.findall(r"^\[(\d+)\]: https://", GUIDE, re.MULTILINE)
    assert used == set(defined)
    assert len(defined) == len(used)
    for path in re.findall(r"-f (\S+)", GUIDE):
        assert (ROOT / path).exists(), path


def test_the_page_says_that_it_has_not_run() -> None:
    assert "**Nothing on this page has run on a Jetson yet.**" in GUIDE
    for dockerfile in DOCKERFILES:
        assert "# Not built and not run on a Jetson yet" in dockerfile.read_text(encoding="utf-8")
