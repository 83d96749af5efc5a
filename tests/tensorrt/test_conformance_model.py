"""The model of the conformance suite, which tests/gpu runs on a device, through NVIDIA's builder."""

from pathlib import Path

import pytest

from mara_export.options import BuildOptions
from mara_export.tensorrt.build import build
from tests.gpu.test_conformance import CAPACITIES, written_bundle
from tests.unit.written_model import SLOTS

pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")


def test_it_builds_with_the_slots_that_the_suite_counts_on(tmp_path: Path) -> None:
    bundle = build(written_bundle("tensorrt-rtx", tmp_path), "tensorrt-rtx", BuildOptions(capacities=CAPACITIES))
    assert [engine.slots for engine in bundle.manifest.engines] == [32, 48, SLOTS]
    for engine in bundle.manifest.engines:
        assert not engine.in_place
        assert engine.options["layers"]["SCATTER"] == 2
