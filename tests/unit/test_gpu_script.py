"""benchmarks/gpu.sh and first_gpu.py as far as they go without a GPU."""

import importlib
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import carry, first_gpu, soak
from mara_runtime.errors import MaraError
from tests.unit import helpers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BOARDS = {
    # board: facts, lowering of TensorRT's graphs, targets, extras
    "server": ({"kind": "gpu", "driver_cuda": "13.0"}, "portable", ["tensorrt", "cuda"], "tensorrt,gpu"),
    "JetPack 6.2": ({"kind": "jetson", "l4t": "36.5.0"}, "decomposed", ["tensorrt"], "tensorrt,cpu"),
    "JetPack 7.1": ({"kind": "jetson", "l4t": "38.4.0"}, "decomposed", ["tensorrt"], "tensorrt,cpu"),
    "JetPack 7.2": ({"kind": "jetson", "l4t": "39.2.0"}, "portable", ["tensorrt"], "tensorrt,cpu"),
}
SHAPES = [f"{precision}-{model}" for precision in ("fp16", "int4") for model in ("demo", "shape")]


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
        elif "benchmarks.first_gpu" in line:
            first_gpu.parser().parse_args(line[3:])
    return lines


@pytest.mark.parametrize("board", BOARDS)
def test_each_board_gets_its_lowering_targets_and_packages(tmp_path, board):
    _, lowering, targets, extras = BOARDS[board]
    lines = dry_run("--out", tmp_path / "out", board=board)
    assert list(tmp_path.iterdir()) == []
    assert ("--system-site-packages" in lines[0]) == board.startswith("JetPack")  # which brings TensorRT
    assert f".[{extras},export]" in lines[2]
    exports = [line for line in lines if line[0] == "mara-export"]
    names = [Path(line[line.index("--out") + 1]).name for line in exports]
    assert names == [f"{target}-{shape}" for target in targets for shape in SHAPES]
    assert {line[line.index("--lowering") + 1] for line in exports if "--lowering" in line} == {lowering}
    built = [Path(line[1]).name for line in lines if line[0] == "mara-build"]
    assert built == [f"tensorrt-{shape}" for shape in SHAPES]
    assert lines[-1][1:3] == ["-m", "benchmarks.first_gpu"]


def test_with_bundles_and_an_environment_nothing_is_exported_or_installed(tmp_path):
    helpers.make_bundle(tmp_path / "ours", max_context=600, targets=["tensorrt"])
    helpers.make_bundle(tmp_path / "theirs")
    (tmp_path / "python").symlink_to(sys.executable)  # as in an environment: not to be followed
    build, measure = dry_run("--bundles", tmp_path, cwd=tmp_path, PYTHON="./python")
    assert build[:2] == ["mara-build", f"{tmp_path}/ours"]
    assert build[-2:] == ["--capacity", "512"]  # 1024 is beyond the bundle's context
    assert measure[0] == f"{tmp_path}/python"


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
elif words[1] == "benchmarks.first_gpu":
    sys.exit(os.environ["PYTHONPATH"].split(os.pathsep)[-1] != "/carried")
"""


@pytest.mark.parametrize(("builds", "code"), [("decomposed portable", 0), ("decomposed", 1), ("", 1)])
def test_where_tensorrt_cannot_build_a_lowering_the_other_is_measured(tmp_path, builds, code):
    """What could not be built is measured as far as it goes; the caller's own packages are found."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    result = script("--smoke", "--out", out, PYTHON=str(python), BUILDS=builds, PYTHONPATH="/carried")
    assert result.returncode == code
    lowering = {name: (out / "bundles" / f"{name}-fp16-demo" / "lowering").read_text() for name in ("tensorrt", "cuda")}
    assert lowering == {"tensorrt": "portable" if "portable" in builds else "decomposed", "cuda": "ort"}
    assert ("no attention" in result.stdout) == ("portable" not in builds)
    assert "benchmarks.first_gpu" in result.stdout.splitlines()[-1]


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


def test_a_device_needs_no_pytorch():
    """What gpu.sh --bundles runs."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'optimum', 'hypothesis')))\n"
        "import benchmarks.soak, benchmarks.first_gpu, benchmarks.gpu_stages, mara_deploy.commands.bench\n"
        "import mara_export.tensorrt.build, mara_export.parity\n"
        "import tests.gpu.test_conformance, tests.gpu.test_real_model"
    )
    path = os.pathsep.join(str(ROOT / part) for part in ("", "export", "runtime"))
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


# ── soak.py, first_gpu.py and carry.py ────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize(
    ("junit", "how"),
    [
        (JUNIT, {"passed": {"tensorrt": 1}, "not_passed": ["b[tensorrt]"], "failed": "1 tests, the first b[tensorrt]"}),
        (JUNIT.replace("<failure/>", ""), {"passed": {"tensorrt": 2}, "not_run": {"no CUDA": 1}}),
        (JUNIT.replace("<failure/>", "").replace('name="target"', ""), {"skipped": "no test could run: no CUDA"}),
    ],
)
def test_tests_count_only_where_some_have_passed(tmp_path, junit, how):
    (tmp_path / "tests.xml").write_text(junit)
    found = first_gpu.tests(tmp_path / "tests.xml")
    assert how.items() <= found.items()
    assert ("failed" in found, "skipped" in found) == ("failed" in how, "skipped" in how)


class Machine(first_gpu.Run):
    """Runs scripts instead of stages."""

    def __init__(self, args, scripts):
        super().__init__(args)
        self.scripts = scripts

    def _command(self, stage, bundle):
        return ["-I", "-S", "-c", self.scripts.get(stage, "print('{}')")]

    _own = _command


@pytest.mark.parametrize(
    ("scripts", "expected"),
    [
        ({}, {"open": "ok", "widths": "ok"}),
        ({"machine": 'print(\'{"skipped": "no board"}\')'}, {"machine": "skipped: no board", "widths": "ok"}),
        # cut short: what it knew is kept
        (
            {"widths": "print('{\"a\": 1}', flush=True); import time; time.sleep(60)"},
            {"widths": "failed: stopped after 2 s", "soak": "ok"},
        ),
        ({"open": "raise SystemExit('no CUDA')"}, {"open": "failed: no CUDA", "widths": "skipped: it does not open"}),
        (
            {"open": 'print(\'{"failed": "zeros", "does_nothing": true}\')'},
            {"open": "failed: zeros", "widths": "failed: zeros", "reference": "ok"},
        ),
        ({"reference": "raise SystemExit(1)"}, {"passes": "skipped: there is nothing to compare with", "widths": "ok"}),
    ],
)
def test_a_stage_that_fails_says_why_and_the_others_go_on(tmp_path, scripts, expected, monkeypatch):
    helpers.make_bundle(tmp_path / "bundles" / "tiny", targets=["cuda"])
    limits = {stage: 2 if stage == "widths" else 60 for stage in first_gpu.LIMITS_S}
    monkeypatch.setattr(first_gpu, "LIMITS_S", limits)
    stages = ["--stages", "machine", "reference", "open", "passes", "widths", "soak"]
    where = ["--bundles", str(tmp_path / "bundles"), "--out", str(tmp_path / "out")]
    args = first_gpu.parser().parse_args([*where, *stages])
    run = Machine(args, scripts)
    good = run.all(first_gpu.find_bundles(args.bundles))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["ended"]
    told = {record["stage"]: first_gpu.told(record).partition(" s  ")[2] for record in found["stages"]}
    for stage, how in expected.items():
        assert told[stage].startswith(how), told
    assert good == (not any("failed" in record for record in found["stages"]))
    widths = next(record for record in found["stages"] if record["stage"] == "widths")
    if "a" in scripts.get("widths", ""):
        assert widths["result"] == {"a": 1}


@pytest.mark.parametrize(
    ("folder", "named"), [("empty", "mara-export"), ("broken", "manifest.json"), ("taken", "exists already")]
)
@pytest.mark.parametrize("script", [first_gpu, carry])
def test_wrong_folders_are_refused_in_one_line(tmp_path, script, folder, named, capsys, monkeypatch):
    helpers.make_bundle(tmp_path / "taken" / "tiny")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "one").mkdir(parents=True)
    (tmp_path / "broken" / "one" / "manifest.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["", "--bundles", str(tmp_path / folder), "--out", str(tmp_path / "taken")])
    try:
        code = script.main()
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert (code, len(error.splitlines())) == (2, 1)
    assert named in error


def fat_binary(*gpus: int) -> bytes:
    """What nvcc embeds: a piece of eight bytes for each GPU."""
    heads = [struct.pack("<HHIQ12xI32x", 2, 1, 64, 8, gpu) for gpu in gpus]
    pieces = b"".join(head + b"machine." for head in heads)
    return carry.FAT_BINARY + struct.pack("<HHQ", 1, 16, len(pieces)) + pieces


def test_machine_code_of_other_gpus_is_zeroed(tmp_path):
    library = b"head" + fat_binary(80, 90) + b"between" + fat_binary(90, 120) + b"tail"
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "lib.so").write_bytes(library)
    (packages / "other.so").write_bytes(b"no code")
    carry.carry_packages(packages, tmp_path / "thin", 90)
    thin = (tmp_path / "thin" / "lib.so").read_bytes()
    assert (len(thin), thin.count(b"machine."), library.count(b"machine.")) == (len(library), 2, 4)
    assert thin.startswith(library[:20])
    assert thin.endswith(b"tail")
    with pytest.raises(MaraError, match=r"8\.7.*8\.0, 9\.0, 12\.0"):
        carry.carry_packages(packages, tmp_path / "nothing", 87)
