"""The conformance suite of every engine (tests/conformance.py), on the device.

Its model is made of small whole numbers, so the GPU has to give the same bits. It writes its KV cache by ScatterND,
which TensorRT does in a second copy (lowering `decomposed`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.bundle import Bundle
from mara_runtime.engines import ort_memory
from mara_runtime.engines.base import Engine
from tests.conformance import DeviceConformance
from tests.gpu.conftest import close, open_on
from tests.unit import helpers
from tests.unit.test_ort_engine import largest_only
from tests.unit.written_model import SLOTS, write_bundle

CAPACITIES = (10, 26)
"""Contexts of the smaller engines, so that the suite's model grows twice."""


def written_bundle(target: str, folder: Path) -> Bundle:
    """The suite's model for a target, without engines."""
    write_bundle(folder, always_head=True)
    manifest = helpers.read_manifest(folder)
    manifest["targets"] = [target.split(",")[0]]
    manifest["step"].update(
        lowering="ort" if target.startswith("cuda") else "decomposed", precision="fp32", quantisation=None
    )
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def written(target: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The suite's model, with engines of three sizes."""
    bundle = written_bundle(target, tmp_path_factory.mktemp("written"))
    if target.startswith("cuda"):
        return bundle
    from mara_export.options import BuildOptions
    from mara_export.tensorrt.build import build

    return build(bundle, target, BuildOptions(capacities=CAPACITIES))


def opened(written: Bundle, target: str, growing: bool, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that begins small, or one that begins with all its slots."""
    on_cuda = target.startswith("cuda")
    if on_cuda:
        monkeypatch.setattr(ort_memory, "FIRST_SLOTS", 4 if growing else SLOTS)
    return open_on(target, written if growing or on_cuda else largest_only(written))


class TestDevice(DeviceConformance):
    """Every target that this machine runs."""

    @pytest.fixture(params=[False, True], ids=["one size", "growing"])
    def engine(
        self, written: Bundle, target: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Engine]:
        engine = opened(written, target, request.param, monkeypatch)
        yield engine
        close(engine)

    @pytest.fixture
    def growing_and_whole(
        self, written: Bundle, target: str, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[Any, Any]]:
        growing, whole = (opened(written, target, grows, monkeypatch) for grows in (True, False))
        yield growing, whole
        close(growing)
        close(whole)
