"""A process that is killed at any moment leaves no half state, and the same command then works, without remains.

Killed before any one change to the file system: tests/unit/test_kills.py."""

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


def moments(run: Callable[..., tuple[int, int]], randoms: int) -> Iterator[dict[str, float]]:
    """When to kill: at random, and at each rename. run: without a kill."""
    started = time.perf_counter()
    code, count = run()
    took = time.perf_counter() - started
    assert code == 0
    assert count > 1
    generator = random.Random(0)
    yield from ({"kill_after": generator.uniform(0, took)} for _ in range(randoms))
    yield from ({"kill_at_rename": at} for at in range(1, count + 1))


def test_a_killed_export(server, checkpoint, agent_file, tmp_path) -> None:
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()
    options = ["--no-gate", "--max-context", 64, "--max-candidates", 8, "--quiet"]
    given = ["--model", checkpoint("mistral"), "--agent", agent_file("mistral"), "--out", out, *options]

    def run(**kill: float) -> tuple[int, int]:
        shutil.rmtree(out, ignore_errors=True)
        return server.run("export", *given, **kill)

    killed = 0
    for number, kill in enumerate(moments(run, 60)):
        code, _ = run(**kill)
        killed += code == SIGKILL
        assert code == SIGKILL or (code == 0 and "kill_after" in kill)
        if out.exists():
            Bundle.open(out)
        if number % 4 == 3:
            assert run()[0] == 0
            Bundle.open(out)
            assert list(out.parent.iterdir()) == [out]
    assert killed >= 50
    assert run()[0] == 0
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx_bindings"), reason="TensorRT for RTX is not installed")
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_a_killed_build(server, checkpoint, agent_file, tmp_path, before) -> None:
    """An engine that was there before stays until the new one is in its place."""
    bundle, fresh = tmp_path / "bundle", tmp_path / "fresh"
    options = ["--target", "tensorrt-rtx", "--no-build", "--no-gate", "--max-context", 64, "--max-candidates", 8]
    given = ["--model", checkpoint("mistral"), "--agent", agent_file("mistral"), "--out", fresh, *options]
    assert server.run("export", *given, "--quiet")[0] == 0
    build = ["--target", "tensorrt-rtx", "--optimisation-level", 0, "--quiet"]
    if before:
        assert server.run("build", fresh, *build)[0] == 0
    shutil.copytree(fresh, bundle)

    def run(**kill: float) -> tuple[int, int]:
        return server.run("build", bundle, *build, **kill)

    killed = 0
    for kill in moments(run, 8):
        shutil.rmtree(bundle)
        shutil.copytree(fresh, bundle)
        killed += run(**kill)[0] == SIGKILL
        opened = Bundle.open(bundle)
        assert len(opened.manifest.engines) == 1 or not before
        assert run()[0] == 0
        manifest = Bundle.open(bundle).manifest
        assert len(manifest.engines) == 1
        files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
        assert files == {*manifest.files, "manifest.json"}
        assert [path.name for path in bundle.iterdir() if path.name.startswith(".")] == []
    assert killed >= 8
