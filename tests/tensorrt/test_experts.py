"""Experts against NVIDIA's own parser and builder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mara_export.options import ExportOptions
from tests.experts import CLAMPED, INPUTS, PLAIN, lowered, random_stacks
from tests.tensorrt.conftest import RTX

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")


@pytest.mark.parametrize(
    ("lowering", "precision", "attributes"),
    [("portable", "fp16", CLAMPED), ("portable", "int4", PLAIN), ("decomposed", "int8", CLAMPED)],
)
def test_experts_are_built(lowering: str, precision: str, attributes: dict[str, Any]) -> None:
    options = ExportOptions(target=RTX, lowering=lowering, precision=precision, gate=False)
    stacks = random_stacks(4, 64, 32, attributes, biases=attributes is CLAMPED)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(lowered(stacks, attributes, options).SerializeToString()), parser.get_error(0)
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for name, width in zip(INPUTS, (64, 2, 2), strict=True):
        profile.set_shape(name, *np.array([[1, width], [8, width], [256, width]]).tolist())
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    assert plan.nbytes > 0
