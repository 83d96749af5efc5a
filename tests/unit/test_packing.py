"""What a quantization_config says: read, refused by name, or in conflict with what is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mara_export.errors import ModelError
from mara_export.hf.packing import Packing, packing_of, quantisation_of
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import COLUMN
from mara_runtime.errors import OptionError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "kv_cache_scheme": None,
    "sparsity_config": {},
}


def compressed(weights: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    said: dict[str, Any] = copy.deepcopy(COMPRESSED)
    said["config_groups"]["group_0"] |= {**group, "weights": WEIGHTS | (weights or {})}
    return said


def read(said: Any, **config: Any) -> Packing:
    packing = packing_of({"model_type": "llama", "quantization_config": said, **config}, "my/model")
    assert packing is not None
    return packing


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (AWQ, ("awq", 4, 128, False, False)),
        (AWQ | {"zero_point": False, "version": "GEMM"}, ("awq", 4, 128, True, False)),
        (GPTQ, ("gptq", 4, 64, True, True)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "bits": 8}, ("gptq", 8, 64, False, False)),
        (GPTQ | {"group_size": -1, "desc_act": True}, ("gptq", 4, COLUMN, True, True)),  # one block: in any order
        (GPTQ | {"desc_act": True, "static_groups": True}, ("gptq", 4, 64, True, True)),
        (GPTQ | {"dynamic": {"-:.*lm_head.*": {}}}, ("gptq", 4, 64, True, True)),
        (COMPRESSED, ("compressed-tensors", 4, 32, True, False)),
        (compressed({"strategy": "channel", "symmetric": False}), ("compressed-tensors", 4, COLUMN, False, False)),
        (compressed({"actorder": "weight"}), ("compressed-tensors", 4, 32, True, False)),
    ],
)
def test_settings_are_read(said, found) -> None:
    assert read(said) == Packing("my/model", *found)


def test_a_checkpoint_of_floats_is_not_packed() -> None:
    for said in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        assert packing_of(said, "my/model") is None


@pytest.mark.parametrize(
    ("said", "named"),
    [
        *(({"quant_method": each}, each) for each in ("bitsandbytes", "fp8", "mxfp4", "gguf", "auto-round")),
        ("int4", "quantization_config"),
        (AWQ | {"version": "gemv"}, "layout gemv"),
        (AWQ | {"bits": 8}, "8 bits"),
        (AWQ | {"group_size": "128"}, "group_size = '128'"),
        (GPTQ | {"desc_act": True}, "out of order (desc_act)"),
        (GPTQ | {"checkpoint_format": "marlin"}, "layout marlin"),
        (GPTQ | {"bits": 3}, "3 bits"),
        (GPTQ | {"group_size": 0}, "group_size = 0"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "(dynamic)"),
        (COMPRESSED | {"format": "float-quantized"}, "format float-quantized"),
        (COMPRESSED | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (COMPRESSED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (COMPRESSED | {"config_groups": {}}, "0 groups of settings"),
        (COMPRESSED | {"config_groups": ["Linear"]}, "settings of an unknown form"),
        (compressed({"actorder": "group"}), "out of order (actorder)"),
        (compressed({"strategy": "block"}), "int, block"),
        (compressed({"type": "float"}), "float, group"),
        (compressed(input_activations={"num_bits": 8}), "input_activations"),
    ],
)
def test_what_is_not_read_is_refused_by_name(said, named) -> None:
    with pytest.raises(ModelError) as caught:
        read(said)
    assert str(caught.value).startswith("my/model is quantised already (")
    assert named in str(caught.value)
    assert "export the checkpoint that it was made from" in str(caught.value)


def test_packed_experts_are_refused() -> None:
    with pytest.raises(ModelError, match=r"my/model is quantised already \(awq\) and a mixture of experts: "):
        read(AWQ, num_experts=8)


@pytest.mark.parametrize(
    ("said", "given", "how"),
    [
        (AWQ, {}, Quantisation(4, 128, packed="awq")),
        (AWQ, {"block_size": 64, "keep": ("*/lm_head/*",)}, Quantisation(4, 64, "rtn", ("*/lm_head/*",), "awq")),
        (AWQ | {"group_size": 512}, {}, Quantisation(4, 256, packed="awq")),
        (GPTQ, {"target": "tensorrt"}, Quantisation(4, 64, packed="gptq")),
        (GPTQ | {"group_size": -1}, {"block_size": 128}, Quantisation(4, 128, packed="gptq")),
        # requantised
        (AWQ, {"precision": "int8"}, Quantisation(8, 32)),
        (AWQ, {"precision": "int8", "quantiser": "k-quant"}, Quantisation(8, 32, "k-quant")),
        (GPTQ | {"bits": 8}, {"block_size": 16}, Quantisation(4, 16)),
        (AWQ, {"precision": "fp32"}, None),
    ],
)
def test_the_precision_with_as_many_bits_keeps_the_integers(said, given, how) -> None:
    assert quantisation_of(ExportOptions(**{"precision": "int4", **given}), read(said)) == how


def test_the_manifest_names_what_the_integers_came_from() -> None:
    assert Quantisation(4, 128, packed="awq").to_json() == {
        "bits": 4,
        "block_size": 128,
        "quantiser": "awq",
        "keep": [],
    }


@pytest.mark.parametrize(
    ("said", "given", "message"),
    [
        (AWQ, {"quantiser": "hqq"}, r"--quantiser is 'hqq', .* the integers of my/model \(awq\); leave it out"),
        (COMPRESSED, {"block_size": 64}, "--block-size is 64, but the weights of my/model .* blocks of 32 .*leave it"),
        (AWQ, {"target": "tensorrt"}, "zero points .* TensorRT does not read: take --precision fp16, or int8"),
        (COMPRESSED, {"target": "tensorrt"}, "blocks of 32 .* takes blocks of 64 or 128: take --precision fp16"),
        (GPTQ | {"bits": 8}, {"target": "tensorrt", "precision": "int8"}, "takes one scale per column: .* fp16$"),
        (AWQ | {"group_size": 24}, {}, "blocks of 24 .* takes blocks of 16 or 32"),
    ],
)
def test_options_that_contradict_a_checkpoint_are_refused(said, given, message) -> None:
    with pytest.raises(OptionError, match=message):
        quantisation_of(ExportOptions(**{"precision": "int4", **given}), read(said))


@pytest.mark.parametrize(
    ("said", "target", "precision"),
    [
        (AWQ, "cpu", "int4"),
        (AWQ, "cuda", "int4"),
        (AWQ, "tensorrt", "fp16"),  # which does not read zero points
        (GPTQ, "tensorrt", "int4"),
        (GPTQ | {"bits": 8}, "cpu", "int8"),
        (COMPRESSED, "tensorrt", "fp16"),
        (COMPRESSED, "tensorrt-rtx", "int4"),
    ],
)
def test_the_default_precision_keeps_the_integers_where_that_is_possible(said, target, precision) -> None:
    assert read(said).default_precision(target) == precision
