"""The model of the conformance suite, which tests/gpu runs on a device, through NVIDIA's builder."""

from pathlib import Path

import pytest

from mara_export.build import build
from tests.gpu.test_conformance import suite, written_bundle

pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")


def test_it_builds_with_the_slots_that_the_suite_counts_on(tmp_path: Path) -> None:
    (engine,) = build(written_bundle("tensorrt-rtx", tmp_path), "tensorrt-rtx").manifest.engines
    assert (engine.slots, engine.in_place) == (suite.SLOTS, False)
    assert engine.options["layers"]["SCATTER"] == 2
