"""benchmarks/gpu.sh as far as it goes without a GPU, and what reads its steps' output."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gather, soak
from tests.unit import helpers

ROOT = Path(__file__).resolve().parents[2]
BOARDS = {
    # board: facts, lowering of TensorRT's graphs, targets
    "server": ({"kind": "gpu", "driver_cuda": "13.0"}, "portable", ["tensorrt", "cuda"]),
    "JetPack 6.2": ({"kind": "jetson", "l4t": "36.4.3"}, "decomposed", ["tensorrt"]),
    "JetPack 7.1": ({"kind": "jetson", "l4t": "38.4.0"}, "decomposed", ["tensorrt", "cuda"]),
    "JetPack 7.2": ({"kind": "jetson", "l4t": "39.2.0"}, "portable", ["tensorrt", "cuda"]),
}


def script(*arguments, cwd=None, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "BOARD", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, cwd=cwd)


def dry_run(*arguments, board="server", **options):
    """The commands that would run, as lists of words; each takes the options that it is given."""
    result = script("--dry-run", *arguments, BOARD=json.dumps(BOARDS[board][0]), **options)
    assert (result.returncode, result.stderr) == (0, "")
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    for line in lines:
        if line[0].startswith("mara-"):
            importlib.import_module(f"mara_deploy.commands.{line[0][5:]}").parser().parse_args(line[1:])
        elif "benchmarks.soak" in line:
            soak.parser().parse_args(line[3:])
    return lines


@pytest.mark.parametrize("board", BOARDS)
def test_each_board_gets_its_lowering_and_targets(tmp_path, board):
    _, lowering, targets = BOARDS[board]
    lines = dry_run("--out", tmp_path / "out", board=board)
    assert list(tmp_path.iterdir()) == []
    assert ("--system-site-packages" in lines[0]) == board.startswith("JetPack")  # which brings TensorRT
    exports = [line for line in lines if line[0] == "mara-export"]
    assert [line[line.index("--target") + 1] for line in exports] == targets
    assert exports[0][exports[0].index("--lowering") + 1] == lowering
    assert [line[1] for line in lines if line[0] == "mara-build"] == [exports[0][exports[0].index("--out") + 1]]
    assert sum(line[0] == "mara-bench" for line in lines) == len(targets)
    assert sum(line[0] == "env" for line in lines) == 1  # the tests


def test_with_bundles_and_an_environment_nothing_is_exported_or_installed(tmp_path):
    helpers.make_bundle(tmp_path / "tensorrt", max_context=600)
    (tmp_path / "python").symlink_to(sys.executable)  # as in an environment: not to be followed
    lines = dry_run("--bundles", tmp_path, "--targets", "tensorrt", cwd=tmp_path, PYTHON="./python")
    python = f"{tmp_path}/python"
    assert [line[0] for line in lines] == ["mara-build", "env", "mara-bench", python, python]
    assert lines[0][-2:] == ["--capacity", "512"]  # 1024 is beyond the bundle's context


STAND_IN = f"""#!{sys.executable}
# Python, as far as the script uses it: TensorRT builds the lowerings of $BUILDS alone.
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
elif words[1] == "mara_deploy.commands.build" and (Path(words[2]) / "lowering").read_text() not in os.environ["BUILDS"]:
    sys.exit("mara-build: error: no attention with a mask")
"""


@pytest.mark.parametrize(
    ("builds", "failed", "measured"),
    [
        ("decomposed", ["tensorrt-build"], ["tensorrt", "cuda"]),
        ("", ["tensorrt-build", "tensorrt-decomposed-build"], ["cuda"]),
    ],
)
def test_where_tensorrt_cannot_build_a_lowering_the_other_is_measured(tmp_path, builds, failed, measured):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    result = script("--out", out, "--targets", "tensorrt cuda", PYTHON=str(python), BUILDS=builds)
    assert result.returncode == 1  # not everything worked
    noted = [line.split("\t") for line in (out / "failed.tsv").read_text().splitlines()]
    assert noted == [[step, "mara-build: error: no attention with a mask"] for step in failed]
    benches = [shlex.split(line) for line in result.stdout.splitlines() if line.startswith("mara-bench")]
    assert [line[1] for line in benches] == [f"{out}/bundles/{target}" for target in measured]


@pytest.mark.parametrize(
    ("arguments", "board", "named"),
    [
        (["--quick"], "", "--quick"),
        (["--out"], "", "--out"),
        (["--dry-run"], '{"kind": "gpu", "driver_cuda": "12.4"}', "12.4"),
    ],
)
def test_the_script_refuses_in_one_line(arguments, board, named):
    result = script(*arguments, BOARD=board)
    assert (result.returncode, result.stdout) == (2, "")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_device_needs_no_pytorch():
    """What gpu.sh --bundles runs."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'optimum', 'safetensors', 'hypothesis')))\n"
        "import benchmarks.soak, benchmarks.gather, mara_deploy.commands.bench\n"
        "import mara_export.tensorrt.build, mara_export.parity\n"
        "import tests.gpu.test_conformance, tests.gpu.test_real_model"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


# ── soak.py and gather.py ────────────────────────────────────────────────────────────────────────────────────────────


class Counting:
    """A subject that counts its steps and loses so many bytes in each."""

    def __init__(self, capacity: int = 512, lost: int = 0) -> None:
        self.capacity, self.lost, self.steps = capacity, lost, 0
        self.seeds: list[int] = []

    def profile(self, profile, context, tokens, ways):
        assert 1 <= context < self.capacity - tokens
        self.steps += tokens
        self.seeds.append(profile["seed"])

    def memory(self):
        return {"device_bytes": 10**9 + self.lost * self.steps, "host_bytes": 10**8}


@pytest.mark.parametrize(
    ("capacity", "lost", "where", "grown"),
    [(40, 0, "device", 0), (512, 2000, "device", 1), (4096, 2000, "host", 0), (512, 20_000, "shared", 1)],
)
def test_a_soak_runs_its_steps_on_different_texts_and_reports_growth_of_memory(capacity, lost, where, grown):
    subject = Counting(capacity, lost)
    found = soak.soak(subject, "aligned", 2000, memory=subject.memory)
    assert 2000 <= found["steps"] < 2200
    assert len(set(subject.seeds)) == len(subject.seeds)
    assert len(soak.too_much(found["memory"], where)) == grown


def test_memory_that_cannot_be_read_is_not_taken_for_constant():
    unread = {"device_bytes": None, "host_bytes": 1}
    assert len(soak.too_much({"before": unread, "after": unread}, "device")) == 1
    assert soak.memory_in_use()["host_bytes"] > 10**6


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
    assert gather.untested(found) == ["cuda"]
    assert gather.untested({**found, "tests": None}) == ["tensorrt", "cuda"]
