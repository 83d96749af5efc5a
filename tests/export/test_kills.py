"""A process that is killed at any moment leaves no half state, and the same command then works, without remains.

Killed before any one change to the file system: tests/unit/test_kills.py.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from mara_runtime.bundle import Bundle
from tests.fork_server import ForkServer, fork_server

pytestmark = pytest.mark.long
SIGKILL = -9


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with fork_server("mara_deploy.commands.export", "mara_export.export", "mara_deploy.agent") as running:
        yield running


def kills(run: Callable[..., tuple[int, int]], randoms: int) -> Iterator[int]:
    """Number the kills: at each rename, and at random moments. run: the command."""
    code, renames = run()  # the first takes longer
    started = time.perf_counter()
    run()
    took = time.perf_counter() - started
    assert code == 0
    assert renames > 1
    generator, landed = random.Random(0), 0
    for landed in range(1, renames + 1):
        assert run(kill_at_rename=landed)[0] == SIGKILL
        yield landed
    while landed < renames + randoms:
        code, _ = run(kill_after=generator.uniform(0, took))
        if code == SIGKILL:
            landed += 1
            yield landed
        else:
            took *= 0.8


def test_a_killed_export(server, checkpoint, agent_file, tmp_path) -> None:
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()
    options = ["--no-gate", "--max-context", 64, "--max-candidates", 8, "--quiet"]
    given = ["--model", checkpoint("mistral"), "--agent", agent_file("mistral"), "--out", out, *options]

    def run(**kill: float) -> tuple[int, int]:
        shutil.rmtree(out, ignore_errors=True)
        return server.run("export", *given, **kill)

    for number in kills(run, 60):
        if out.exists():
            Bundle.open(out)
        if number % 4 == 2:
            assert run()[0] == 0
            Bundle.open(out)
            assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx_bindings"), reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_a_killed_build(server, checkpoint, agent_file, tmp_path, before) -> None:
    """An engine that was there before stays until the new one is in its place."""
    bundle, fresh = tmp_path / "bundle", tmp_path / "fresh"
    options = ["--target", "tensorrt-rtx", "--no-build", "--no-gate", "--max-context", 64, "--max-candidates", 8]
    given = ["--model", checkpoint("mistral"), "--agent", agent_file("mistral"), "--out", fresh, *options]
    build = ["--target", "tensorrt-rtx", "--optimisation-level", 0, "--quiet"]
    assert server.run("export", *given, "--quiet")[0] == 0
    if before:
        assert server.run("build", fresh, *build)[0] == 0

    def run(**kill: float) -> tuple[int, int]:
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(fresh, bundle)
        return server.run("build", bundle, *build, **kill)

    for _ in kills(run, 6):
        opened = Bundle.open(bundle)
        assert len(opened.manifest.engines) == 1 or not before
        assert server.run("build", bundle, *build)[0] == 0
        manifest = Bundle.open(bundle).manifest
        assert len(manifest.engines) == 1
        files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
        assert files == {*manifest.files, "manifest.json"}
        assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []
