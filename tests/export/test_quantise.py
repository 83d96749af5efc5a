"""Weight-only precisions on ONNX Runtime: what the graph then holds, what is stored once, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mara_export.export import finish
from mara_export.graph.quantise import SLICE_COLUMNS, quantise_blocks
from mara_export.hf.families import decoder_of
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import BITS
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError


@pytest.fixture(scope="module")
def demo(tmp_path_factory, traced) -> Callable[..., Bundle]:
    """(precision, **options) → a bundle of the demo: random matrices lose too much to four bits for the gate."""

    @cache
    def make(precision: str, **options: Any) -> Bundle:
        folder = tmp_path_factory.mktemp("precision") / "demo"
        return finish(traced("demo"), ExportOptions(precision=precision, **options), folder)

    return make


def graph_of(bundle: Bundle) -> onnx.GraphProto:
    return onnx.load(bundle.path("step.onnx"), load_external_data=False).graph


def nodes(graph: onnx.GraphProto, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == op_type]


def place(graph: onnx.GraphProto, name: str) -> tuple[str, str]:
    (tensor,) = [t for t in graph.initializer if t.name == name]
    external = {entry.key: entry.value for entry in tensor.external_data}
    return external["offset"], external["length"]


def test_bundles_shrink_with_the_precision(demo, traced) -> None:
    sizes = [demo(p).manifest.files["step.onnx.data"].size_bytes for p in ("fp32", "fp16", "int8", "int4")]
    model = traced("demo").model
    weights = 4 * decoder_of(model.shape, model.architecture, model.intermediate_size, model.tied).parameters
    agent = sizes[0] - weights  # which stays float32, as do biases and norms
    assert 0 < agent < sizes[0] / 2
    for size, share in zip(sizes[1:], (1 / 2, 9 / 32, 5 / 32), strict=True):  # a scale of 4 bytes for 32 weights
        assert size - agent == pytest.approx(weights * share, rel=0.15)


@pytest.mark.parametrize(
    ("precision", "quantiser"),
    [("int8", "rtn"), ("int8", "k-quant"), ("int4", "rtn"), ("int4", "hqq"), ("int4", "k-quant")],
)
def test_every_quantiser_passes_the_gate_and_stores_a_tied_head_once(demo, precision, quantiser) -> None:
    bundle = demo(precision, quantiser=quantiser) if quantiser != "rtn" else demo(precision)
    assert bundle.manifest.parity["passed"]
    stated = {"bits": BITS[precision], "block_size": 32, "quantiser": quantiser, "keep": []}
    assert bundle.manifest.step.quantisation == stated
    graph = graph_of(bundle)
    matrices = nodes(graph, "MatMulNBits")
    assert not [node for node in nodes(graph, "MatMul") if not node.name.startswith("agents/")]
    for node in matrices:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (BITS[precision], 32)
        if quantiser == "rtn":
            assert attributes["accuracy_level"] == 4
    (head,) = [node for node in matrices if "lm_head" in node.name]
    (table,) = nodes(graph, "GatherBlockQuantized")
    assert place(graph, table.input[0]) == place(graph, head.input[1])
    assert place(graph, table.input[2]) == place(graph, head.input[2])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [48, SLICE_COLUMNS + 32])
def test_rounding_to_nearest_errs_by_half_a_step(bits: int, columns: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    blocks = quantise_blocks(matrix, "m", Quantisation(bits))
    packed, scales = blocks.arrays
    assert {name: blocks.attributes[name] for name in "KN"} == {"K": 64, "N": columns}
    levels = packed.reshape(columns, 2, -1)
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], -1).reshape(columns, 2, 32)
    step = scales.reshape(columns, 2, 1)
    restored = ((levels.astype(np.float32) - 2 ** (bits - 1)) * step).reshape(columns, 64).T
    error = np.abs(restored - matrix).reshape(2, 32, columns)
    # the scale comes from the largest value; one of the other sign may be cut to the last level
    assert (error <= np.abs(step[:, :, 0].T)[:, None] * 1.001).all()
    assert np.mean(error <= np.abs(step[:, :, 0].T)[:, None] * 0.501) > 0.97


def test_what_is_kept_stays_float32(demo) -> None:
    graph = graph_of(demo("int4", keep=("*/lm_head/*", "*layers.0/mlp/*", "*/embed_tokens/*"), gate=False))
    for op_type, kept in (("MatMul", True), ("MatMulNBits", False)):
        names = [node.name for node in nodes(graph, op_type) if not node.name.startswith("agents/")]
        assert names
        assert all(("layers.0/mlp" in name or "lm_head" in name) is kept for name in names)
    assert not nodes(graph, "GatherBlockQuantized")


def test_an_embedding_that_is_not_a_whole_number_of_blocks_wide_stays_float32(demo) -> None:
    graph = graph_of(demo("int4", block_size=256, gate=False))  # the demo's hidden size is 128
    assert not nodes(graph, "GatherBlockQuantized")


def test_half_precision_is_widened_when_it_is_read(demo) -> None:
    graph = graph_of(demo("fp16"))
    ours = ("agents/", "step/")
    stored = {t.name: t.data_type for t in graph.initializer if len(t.dims) == 2 and not t.name.startswith(ours)}
    assert TensorProto.FLOAT16 in stored.values()
    assert all("rotary_emb" in name for name, kind in stored.items() if kind == TensorProto.FLOAT)


def test_a_matrix_that_the_quantiser_cannot_take_is_named() -> None:
    """k-quant at 4 bits takes an even number of blocks."""
    matrix = np.ones((96, 8), np.float32)
    with pytest.raises(OptionError, match=r"^--quantiser k-quant cannot quantise /mlp/down_proj/MatMul, .* 96 rows: "):
        quantise_blocks(matrix, "/mlp/down_proj/MatMul", Quantisation(4, 32, "k-quant"))
