"""benchmarks/gpu.sh as far as it goes without a GPU, and what it makes of its steps' output."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gather, soak
from benchmarks.board import Jetson, NoBoard, find
from mara_export.tensorrt.build import BuildOptions
from mara_runtime.bundle import Bundle
from tests.unit import helpers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
BOARDS = {
    "server": {"kind": "gpu", "driver_cuda": "13.0"},
    "JetPack 6.2": {"kind": "jetson", "l4t": "36.4.3"},
    "JetPack 7.1": {"kind": "jetson", "l4t": "38.4.0"},
    "JetPack 7.2": {"kind": "jetson", "l4t": "39.2.0"},
}


def script(*arguments, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "BOARD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)], env={**clean, **environment}, capture_output=True, text=True, cwd=cwd
    )


def commands(*arguments, board="server", cwd=None, **environment):
    """What a dry run prints, as lists of words."""
    result = script("--dry-run", *arguments, cwd=cwd, BOARD=json.dumps(BOARDS[board]), **environment)
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines()]


def python(code: str) -> "subprocess.CompletedProcess[str]":
    """Code in a process of its own."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_ends_at_once_and_leaves_nothing(tmp_path):
    try:
        if isinstance(find(), Jetson):
            pytest.skip("this is a Jetson, whatever nvidia-smi says")
    except NoBoard:
        pass
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    program.chmod(0o755)
    result = script("--out", tmp_path / "out", PATH=f"{program.parent}:{os.environ['PATH']}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "no NVIDIA GPU here: nvidia-smi says 'No devices were found'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("size", [(), ("--smoke",)])
def test_every_command_is_one_that_its_program_takes(tmp_path, board, size):
    lines = commands("--out", tmp_path / "out", *size, board=board)
    assert not (tmp_path / "out").exists()
    names = [line[0] for line in lines]
    assert {"mara-export", "mara-build", "mara-bench"} <= set(names)
    for line in lines:
        if line[0].startswith("mara-"):
            module = importlib.import_module(f"mara_deploy.commands.{line[0].removeprefix('mara-')}")
            module.parser().parse_args(line[1:])
        elif "benchmarks.soak" in line:
            assert soak.parser().parse_args(line[3:]).steps == 2000
        elif any(word.endswith("shape.py") for word in line):
            assert f'"{line[2]}": {{' in (ROOT / line[1]).read_text()
        else:
            assert line[1:3] in (["-m", "venv"], ["-m", "pip"], ["-m", "benchmarks.gather"]) or line[0] == "env"
    tests = next(line for line in lines if line[0] == "env")
    exports = [line for line in lines if line[0] == "mara-export"]
    folder = tests[1].removeprefix("MARA_GPU_BUNDLES=")
    assert {line[line.index("--out") + 1] for line in exports} == {
        f"{folder}/{line[line.index('--target') + 1]}" for line in exports
    }


@pytest.mark.parametrize(
    ("board", "lowering", "targets", "site"),
    [
        ("server", "portable", ["tensorrt", "cuda"], False),
        ("JetPack 6.2", "decomposed", ["tensorrt"], True),  # TensorRT 10.3; Python 3.10 has no onnxruntime-gpu
        ("JetPack 7.1", "decomposed", ["tensorrt", "cuda"], True),  # TensorRT 10.13
        ("JetPack 7.2", "portable", ["tensorrt", "cuda"], True),
    ],
)
def test_what_differs_by_board(board, lowering, targets, site):
    lines = commands(board=board)
    exports = [line for line in lines if line[0] == "mara-export"]
    assert [line[line.index("--target") + 1] for line in exports] == targets
    assert exports[0][exports[0].index("--lowering") + 1] == lowering
    assert ("--system-site-packages" in lines[0]) == site  # where TensorRT comes with the system


def test_each_engine_is_built_once():
    lines = commands("--targets", "tensorrt tensorrt-rtx cuda")
    of = {name: [line for line in lines if line[0] == name] for name in ("mara-export", "mara-build")}
    assert ["--no-build" in line for line in of["mara-export"]] == [True, True, False]
    assert [line[line.index("--target") + 1] for line in of["mara-build"]] == ["tensorrt", "tensorrt-rtx"]
    assert all(line[line.index("--capacity") + 1] == "512,1024" for line in of["mara-build"])


STAND_IN = f"""#!{sys.executable}
# Python, as far as the script uses it: nothing is made but folders, and TensorRT builds one lowering alone.
import os, sys
from pathlib import Path
words = sys.argv[1:]
of = dict(zip(words, words[1:]))
if words[0] == "-c":
    os.execv(sys.executable, [sys.executable, *words])
if words[0] == "benchmarks/board.py":
    print('{{"kind": "gpu", "driver_cuda": "13.0"}}')
elif words[1] == "mara_deploy.commands.export":
    bundle = Path(of["--out"])
    bundle.mkdir(parents=True)  # fails where one is left
    (bundle / "lowering").write_text(of.get("--lowering", "ort"))
elif words[1] == "mara_deploy.commands.build":
    bundle = Path(words[2])
    if (bundle / "lowering").read_text() not in os.environ["BUILDS"]:
        sys.exit("mara-build: error: no attention with a mask")
    (bundle / "built").touch()
"""


def measured(tmp_path, builds, *arguments):
    """Run the script where TensorRT builds these lowerings: what it said, and the failures it noted."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    result = script("--out", tmp_path / "out", *arguments, PYTHON=str(python), BUILDS=builds)
    noted = tmp_path / "out" / "failed.tsv"
    return result, noted.read_text() if noted.exists() else ""


def test_a_lowering_that_tensorrt_does_not_build_gives_way_to_the_other(tmp_path):
    result, noted = measured(tmp_path, "decomposed", "--targets", "tensorrt cuda")
    assert result.returncode == 1  # not everything worked
    assert noted == "tensorrt-build\tmara-build: error: no attention with a mask\n"
    assert "gpu.sh: no engine of lowering portable for tensorrt: it is measured with decomposed" in result.stderr
    bundle = tmp_path / "out" / "bundles" / "tensorrt"
    assert ((bundle / "lowering").read_text(), (bundle / "built").exists()) == ("decomposed", True)
    benches = [line for line in result.stdout.splitlines() if line.startswith("mara-bench")]
    assert [shlex.split(line)[1] for line in benches] == [str(bundle), str(bundle.with_name("cuda"))]


@pytest.mark.parametrize("given", [False, True], ids=["ours", "given"])
def test_where_no_lowering_is_left_the_target_is_dropped(tmp_path, given):
    bundles = tmp_path / "given"
    for target in ("tensorrt", "cuda"):
        (bundles / target).mkdir(parents=True)
        (bundles / target / "lowering").write_text("portable")
    arguments = ("--bundles", bundles) if given else ()
    result, noted = measured(tmp_path, "", "--targets", "tensorrt cuda", *arguments)
    assert result.returncode == 1
    failed = ["tensorrt-build"] if given else ["tensorrt-build", "tensorrt-decomposed-build"]
    assert [line.partition("\t")[0] for line in noted.splitlines()] == failed
    assert (bundles / "tensorrt" / "lowering").read_text() == "portable"
    benches = [shlex.split(line)[3] for line in result.stdout.splitlines() if line.startswith("mara-bench")]
    assert benches == ["cuda"]


@pytest.mark.parametrize(
    ("context", "smaller"),
    [(4096, "512,1024"), (1100, "512,1024"), (1024, "512"), (600, "512"), (512, None), (64, None)],
)
def test_no_capacity_is_larger_than_the_bundle(tmp_path, context, smaller):
    folder = helpers.make_bundle(tmp_path / "tensorrt", max_context=context)
    lines = commands("--bundles", tmp_path, "--targets", "tensorrt", PYTHON=sys.executable)
    (line,) = [line for line in lines if line[0] == "mara-build"]
    assert line[4:] == ([] if smaller is None else ["--capacity", smaller])
    args = importlib.import_module("mara_deploy.commands.build").parser().parse_args(line[1:])
    sizes = BuildOptions(capacities=args.capacity).slots(Bundle.open(folder).manifest)
    assert len(sizes) == len(args.capacity) + 1


@pytest.mark.parametrize(
    ("given", "used"), [("env/bin/python", "{}/env/bin/python"), ("./python", "{}/python"), ("python3", "python3")]
)
def test_a_python_is_found_from_where_the_script_was_called(tmp_path, given, used):
    link = tmp_path / given
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(sys.executable)  # as in an environment: not to be followed
    lines = commands("--targets", "cuda", cwd=tmp_path, PYTHON=given)
    pythons = {word for line in lines for word in line if "python" in Path(word).name}
    assert pythons == {used.format(tmp_path)}


def test_an_environment_and_bundles_that_are_there_are_used(tmp_path):
    lines = commands("--bundles", tmp_path, "--targets", "tensorrt", PYTHON="python3")
    assert [line[0] for line in lines] == ["mara-build", "env", "mara-bench", "python3", "python3"]
    assert lines[0][1] == f"{tmp_path}/tensorrt"
    without = commands("--bundles", tmp_path)
    assert not any("export" in word or "torch" in word for line in without for word in line)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--quick",), {}, "there is no option --quick"),
        (("--out",), {}, "--out needs a value"),
        (("--dry-run",), {"BOARD": '{"kind": "gpu", "driver_cuda": "12.4"}'}, "this driver knows CUDA 12.4"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, environment, message):
    result = script(*arguments, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_device_needs_no_pytorch():
    """What gpu.sh --bundles runs."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'optimum', 'safetensors', 'hypothesis')))\n"
        "import benchmarks.soak, benchmarks.gather, mara_deploy.commands.bench\n"
        "import mara_export.tensorrt.build, mara_export.parity\n"
        "import tests.gpu.test_conformance, tests.gpu.test_real_model\n"
        "print('imported')"
    )
    result = python(code)
    assert result.stdout == "imported\n", result.stderr


def test_help_is_the_head_of_the_file():
    text = script("--help").stdout
    for option in ("--smoke", "--dry-run", "--out", "--bundles", "--targets", "PYTHON="):
        assert option in text
    assert "set -euo" not in text


# ── two thousand steps under watch ───────────────────────────────────────────────────────────────────────────────────


class Counting:
    """A subject that counts its steps and loses so many bytes each."""

    def __init__(self, capacity: int = 512, lost: int = 0) -> None:
        self.capacity, self.lost, self.steps = capacity, lost, 0
        self.seeds: list[int] = []

    def profile(self, profile, context, tokens, ways):
        assert context >= 1
        assert context + tokens < self.capacity
        self.steps += tokens
        self.seeds.append(profile["seed"])

    def memory(self):
        return {"device_bytes": 10**9 + self.lost * self.steps, "host_bytes": 10**8}


@pytest.mark.parametrize("capacity", [40, 512, 4096])
def test_as_many_steps_as_asked_for_and_no_text_twice(capacity):
    subject = Counting(capacity)
    found = soak.soak(subject, "aligned", 2000, memory=subject.memory)
    assert 2000 <= found["steps"] < 2200
    assert len(set(subject.seeds)) == len(subject.seeds)
    assert found["joules_per_token"] is None


def test_a_kilobyte_a_step_is_too_much():
    for lost, where, grown in ((0, "device", 0), (2000, "device", 1), (2000, "host", 0), (20_000, "shared", 1)):
        subject = Counting(lost=lost)
        found = soak.soak(subject, "plain", 2000, memory=subject.memory)
        assert len(soak.too_much(found["memory"], where)) == grown
        assert grown == 0 or "device_bytes grew" in soak.too_much(found["memory"], where)[0]


def test_memory_that_cannot_be_read_is_no_evidence():
    nobody_knows = {"device_bytes": None, "host_bytes": 1}
    found = {"before": nobody_knows, "after": nobody_knows}
    assert soak.too_much(found, "host") == []
    assert soak.too_much(found, "device") == ["device_bytes cannot be read, so nobody knows whether it grew"]


def test_this_process_has_memory():
    assert soak.memory_in_use()["host_bytes"] > 10**6


def test_reading_the_memory_does_not_count_as_growth():
    """The first reading imports CUDA's bindings, if they are there; in a process of its own, where nobody has yet."""
    code = (
        "from benchmarks.soak import memory_in_use\n"
        "first, second = memory_in_use(), memory_in_use()\n"
        "print(second['host_bytes'] - first['host_bytes'])"
    )
    found = python(code)
    assert int(found.stdout) < soak.GROWTH_BYTES["host"] // 4, found.stderr


# ── one file of all ──────────────────────────────────────────────────────────────────────────────────────────────────

JUNIT = """<testsuites><testsuite>
<testcase name="a[tensorrt]"><properties><property name="target" value="tensorrt"/></properties></testcase>
<testcase name="b[tensorrt]"><properties><property name="target" value="tensorrt"/></properties><failure/></testcase>
<testcase name="c[cuda]"><skipped message="no CUDA"/></testcase>
</testsuite></testsuites>"""


def test_results_are_gathered(tmp_path):
    (tmp_path / "board-before.json").write_text('{"kind": "gpu"}')
    (tmp_path / "tests.xml").write_text(JUNIT)
    (tmp_path / "tensorrt-bench.txt").write_text('a table\n{"rounds": 9}\na last word on stderr\n')
    (tmp_path / "cuda-soak.txt").write_text("{ broken\nno object\n")
    (tmp_path / "failed.tsv").write_text("cuda-soak\tit did not work\n")
    found = gather.gather(tmp_path)
    assert found["board"]["before"] == {"kind": "gpu"}
    assert found["targets"] == {"tensorrt": {"bench": {"rounds": 9}}, "cuda": {"soak": None}}
    assert found["tests"] == {"passed": {"tensorrt": 1}, "failed": ["b[tensorrt]"], "skipped": {"no CUDA": 1}}
    assert found["failed"] == {"cuda-soak": "it did not work"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["versions"]["python"])
    assert gather.untested(found) == ["cuda"]
    assert gather.untested({**found, "tests": None}) == ["tensorrt", "cuda"]
