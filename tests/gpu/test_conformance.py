"""The conformance suite of every engine (tests/unit/test_ort_engine.py), on the device.

Its model is made of small whole numbers, so the GPU has to give the same bits; it writes its KV cache by ScatterND,
which TensorRT does in a second cache (lowering `decomposed`).
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import ort_engine
from mara_runtime.bundle import Bundle
from mara_runtime.engine import Engine, open_engine
from tests.gpu.conftest import close
from tests.unit import helpers
from tests.unit import test_ort_engine as suite

OTHER_FIXTURES = {"bundle", "trt_bundles", "machine", "monkeypatch", "tmp_path"}
"""Of tests that are about one engine only."""
CONFORMANCE = {
    name: test
    for name, test in vars(suite).items()
    if name.startswith("test_")
    and {"engine", "growing_and_whole"} & inspect.signature(test).parameters.keys()
    and not OTHER_FIXTURES & inspect.signature(test).parameters.keys()
}
globals().update(CONFORMANCE)
CAPACITIES = (10, 26)
"""Contexts of the smaller engines, so that the suite's model grows twice."""


def written_bundle(target: str, folder: Path) -> Bundle:
    """The suite's model for a target, without engines."""
    suite.write_bundle(folder, always_head=True)
    manifest = helpers.read_manifest(folder)
    manifest["targets"] = [target]
    manifest["step"].update(lowering="ort" if target == "cuda" else "decomposed", precision="fp32", quantisation=None)
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def written(target: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The suite's model, with engines of three sizes."""
    bundle = written_bundle(target, tmp_path_factory.mktemp("written"))
    if target == "cuda":
        return bundle
    from mara_export.build import BuildOptions, build

    return build(bundle, target, BuildOptions(capacities=CAPACITIES))


def opened(written: Bundle, target: str, growing: bool, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that begins small, or one that begins with all its slots."""
    if target == "cuda":
        monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 4 if growing else suite.SLOTS)
    engine, _ = open_engine(written if growing or target == "cuda" else suite.largest_only(written), target)
    assert engine.describe()["name"] == target
    return engine


@pytest.fixture(params=[False, True], ids=["one size", "growing"])
def engine(
    written: Bundle, target: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    engine = opened(written, target, request.param, monkeypatch)
    yield engine
    close(engine)


@pytest.fixture
def growing_and_whole(written: Bundle, target: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    growing, whole = (opened(written, target, grows, monkeypatch) for grows in (True, False))
    yield growing, whole
    close(growing)
    close(whole)


def test_the_suite_is_there() -> None:
    assert len(CONFORMANCE) >= 12
    assert any("growing_and_whole" in inspect.signature(test).parameters for test in CONFORMANCE.values())
