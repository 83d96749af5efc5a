"""A bundle whose graph, of operators that an export writes, asks for more memory than there is: one line, no kill."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mara_deploy.commands import process
from mara_deploy.commands.shared import Parser, guarded
from tests.unit import helpers, written_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
resource = pytest.importorskip("resource")

MIB = 1 << 20
FREE = 256 * MIB
"""Bytes that seem to be free."""
PIECES = {"large": (24, 16 * MIB), "small": (6000, MIB // 16)}
"""How many pieces a graph holds at once, and bytes of each."""
WITH_LITTLE = """
import sys
from mara_deploy.commands import process
process.free_memory = lambda: {free}
"""
RUN = ["from mara_deploy.commands.run import main; sys.exit(main(sys.argv[1:]))", "--engine", "cpu"]
RUN += ["--input-ids", "1,2,3", "--max-new-tokens", "4", "--json"]


def with_little(code: str, *arguments: str, free: int = FREE) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, where little memory is free."""
    command = [sys.executable, "-c", WITH_LITTLE.format(free=free) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_model.write_bundle(tmp_path_factory.mktemp("harmless"), always_head=False)


@pytest.fixture(scope="module", params=PIECES)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but a pass also adds the sum of many tensors, times 0, to the margins; with checksums that fit."""
    count, size_of_each = PIECES[request.param]
    folder = written_model.write_bundle(tmp_path_factory.mktemp("hostile"), always_head=False)
    model = onnx.load(folder / "step.onnx")
    graph = model.graph

    def constant(name: str, value: object, dtype: type = np.int64) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(op: str, result: str, *inputs: str, **attributes: object) -> str:
        graph.node.append(helper.make_node(op, inputs, [result], name=result, **attributes))
        return result

    (judging,) = (node for node in graph.node if "margins" in node.output)
    judging.output[list(judging.output).index("margins")] = "honest"
    first, size = constant("first", [0]), constant("size", [size_of_each // 4])
    position = node("Gather", "position", node("Reshape", "row", "position_ids", constant("flat", [-1])), first)
    number = node("Cast", "number", position, to=onnx.TensorProto.FLOAT)
    apart = [node("Add", f"apart_{i}", number, constant(f"piece_{i}", [i], np.float32)) for i in range(count)]
    pieces = [node("Expand", f"expanded_{i}", value, size) for i, value in enumerate(apart)]
    total = node("ReduceSum", "total", node("Concat", "all", *pieces, axis=0), first, keepdims=0)
    node("Add", "margins", "honest", node("Mul", "nothing", total, constant("zero", 0, np.float32)))
    content = model.SerializeToString()
    (folder / "step.onnx").write_bytes(content)
    helpers.add_file(folder, "step.onnx", content)
    return folder


@pytest.mark.parametrize("free", [FREE, *(pytest.param(n * MIB, marks=pytest.mark.long) for n in range(8, 361, 16))])
def test_a_hostile_graph_ends_in_one_line(hostile: Path, free: int) -> None:
    done = with_little(RUN[0], str(hostile), *RUN[1:], free=free)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mara-run: error: there is not enough memory (")
    assert "mara-memory" in line


def test_a_hostile_graph_ends_a_benchmark(hostile: Path) -> None:
    code = "from mara_deploy.bench.worker import main; main()"
    command = [sys.executable, "-c", WITH_LITTLE.format(free=FREE) + code, str(hostile), "--engine", "cpu"]
    request = json.dumps({"do": "decode", "context": 8, "tokens": 2}) + "\n"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, input=request)
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    assert process.one_line(RuntimeError(error)).startswith("there is not enough memory (ONNX Runtime cannot run ")  # type: ignore[union-attr]


@pytest.mark.long
def test_a_hostile_graph_ends_the_gate_of_an_agent(hostile: Path, tmp_path: Path) -> None:
    manifest, agent = helpers.read_manifest(hostile), tmp_path / "new.safetensors"
    agent.write_bytes(helpers.agent_file([0.25, 0.5, 0.25, 0.0]))
    code = "from mara_deploy.commands.agent import main; sys.exit(main(sys.argv[1:]))"
    done = with_little(code, "add", str(hostile), str(agent), "--quiet")
    assert done.returncode == 2, done.stderr
    assert "there is not enough memory" in done.stderr.splitlines()[-1]
    assert helpers.read_manifest(hostile) == manifest


def test_a_harmless_graph_decodes_under_the_limit_as_without(harmless: Path) -> None:
    limited, free = (
        with_little(code, str(harmless), *RUN[1:]) for code in (RUN[0], f"process.free_memory = lambda: None\n{RUN[0]}")
    )
    assert limited.returncode == free.returncode == 0, limited.stderr
    assert json.loads(limited.stdout)["token_ids"] == json.loads(free.stdout)["token_ids"]


@pytest.mark.parametrize(
    ("engine", "driver", "soft", "expected"),
    [
        ("auto", False, -1, True),
        ("auto", True, -1, False),  # which a GPU's engine may need
        ("cpu", True, -1, True),
        ("cpu", False, 1 << 50, True),
        ("cpu", False, 1 << 20, False),  # the user's own is kept
    ],
)
def test_the_limit_lasts_as_long_as_the_command(
    engine: str, driver: bool, soft: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """driver: of NVIDIA; soft: the limit before."""
    hard = 1 << 60
    limits = [(soft, hard)]
    monkeypatch.setattr(process, "_GPU_FILES", [str(tmp_path if driver else tmp_path / "none")])
    monkeypatch.setattr(process, "free_memory", lambda: 1600 * MIB)
    monkeypatch.setattr(process, "allocated_memory", lambda: 100 * MIB)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1] if kind == resource.RLIMIT_DATA else (MIB, -1))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limit: limits.append(limit))

    def body(_: argparse.Namespace) -> None:
        process.limit_memory(engine, threads=4)
        # a sixteenth of the memory is kept, and each thread has a stack
        assert limits[-1] == ((1604 * MIB, hard) if expected else (soft, hard))

    assert guarded(Parser("mara-test", ""), body, []) == 0
    assert limits[-1] == (soft, hard)
