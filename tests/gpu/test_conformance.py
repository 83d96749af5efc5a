"""The conformance suite of every engine (tests/unit/test_ort_engine.py), on the device.

Its model is made of small whole numbers, so the GPU has to give the same bits; it writes its KV cache by ScatterND,
which TensorRT does in a second cache (lowering `decomposed`).
"""

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    and "engine" in inspect.signature(test).parameters
    and not OTHER_FIXTURES & inspect.signature(test).parameters.keys()
}
globals().update(CONFORMANCE)


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
    """The suite's model, with its engine."""
    bundle = written_bundle(target, tmp_path_factory.mktemp("written"))
    if target == "cuda":
        return bundle
    from mara_export.build import build

    return build(bundle, target)


@pytest.fixture
def engine(written: Bundle, target: str) -> Iterator[Engine]:
    engine, _ = open_engine(written, target)
    assert engine.describe()["name"] == target
    yield engine
    close(engine)


def test_the_suite_is_there() -> None:
    assert len(CONFORMANCE) >= 8
