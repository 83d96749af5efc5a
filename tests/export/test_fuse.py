"""Matrices of one value are joined, and what is joined computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from mara_export.graph.grouped import with_still_row
from onnx import TensorProto, helper, numpy_helper

from mara_export.graph.fuse import join_projections
from mara_export.graph.weights import Weights
from mara_runtime.tensors import ModelShape

WIDTH = 6
COLUMNS = {"q": 8, "k": 4, "v": 4, "gate": 300, "up": 300}  # of 300 the data lie outside the graph's file


def model(*, biases: str = "", reused: str = "", order: str = "qkv") -> onnx.ModelProto:
    """x by five matrices; biases: of which, reused: whose product is read twice, order: how q, k and v are joined."""
    rng = np.random.default_rng(0)
    nodes, weights, outputs = [], [], ["gate", "up", "end"]
    for part, columns in COLUMNS.items():
        bias = part in biases
        weights.append(numpy_helper.from_array(rng.normal(size=(WIDTH, columns)).astype(np.float32), f"{part}/w"))
        product = f"{part}/product" if bias else part
        nodes.append(helper.make_node("MatMul", ["x", f"{part}/w"], [product], f"/layer/{part}_proj/MatMul"))
        if bias:
            weights.append(numpy_helper.from_array(rng.normal(size=columns).astype(np.float32), f"{part}/b"))
            nodes.append(helper.make_node("Add", [f"{part}/b", product], [part], f"/layer/{part}_proj/Add"))
        if part == reused:
            nodes.append(helper.make_node("Neg", [product], ["again"], "again"))
            outputs.append("again")
    nodes.append(helper.make_node("Concat", list(order), ["together"], "together", axis=-1))
    nodes.append(helper.make_node("Abs", ["together"], ["end"], "end"))
    of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "projections",
        [of("x", TensorProto.FLOAT, [1, "S", WIDTH])],
        [of(name, TensorProto.FLOAT, [1, "S", None]) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto | Path) -> list[Any]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).normal(size=(1, 3, WIDTH)).astype(np.float32)
    return session.run(None, {"x": x})


@pytest.mark.parametrize(
    ("options", "matrices", "splits", "concats"),
    [
        ({}, 1, 1, 1),  # all five are one: what is cut out of it is put together
        ({"biases": "qkv"}, 2, 1, 0),  # q, k and v are never taken apart
        ({"biases": "qkv", "order": "kqv"}, 2, 2, 1),
        ({"biases": "qk"}, 2, 2, 1),
        ({"biases": "qkv", "reused": "k"}, 2, 2, 1),  # k's product is wanted without its bias: one of gate's and up's
    ],
)
def test_matrices_of_a_value_are_one(tmp_path, options, matrices, splits, concats) -> None:
    expected = run(model(**options))
    graph = model(**options)
    weights = Weights(graph.graph, tmp_path)
    join_projections(graph.graph, weights)
    weights.drop_unused()
    weights.save(graph, tmp_path / "joined.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "joined.onnx", load_external_data=False).graph.node]
    assert [kinds.count(kind) for kind in ("MatMul", "Split", "Concat")] == [matrices, splits, concats]
    for ours, theirs in zip(run(tmp_path / "joined.onnx"), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_made_is_read_anew_each_time_and_replaced_for_good(tmp_path) -> None:
    graph = model()
    weights = Weights(graph.graph, tmp_path)
    read = []
    weights.make("double", (WIDTH, 8), lambda: read.append("double") or 2 * weights.read("q/w"))
    weights.make("fourfold", (WIDTH, 8), lambda: 2 * weights.read("double"))
    graph.graph.node[0].input[1] = "fourfold"
    weights.drop_unused()  # neither q/w nor double, which fourfold is made of, is read by a node
    assert {tensor.name for tensor in graph.graph.initializer}.isdisjoint({"q/w", "double"})
    original = numpy_helper.to_array(model().graph.initializer[0])
    np.testing.assert_array_equal(weights.read("fourfold"), 4 * original)
    np.testing.assert_array_equal(weights.read("fourfold"), 4 * original)
    assert read == ["double", "double"]
    weights.replace(numpy_helper.from_array(original, "fourfold"))
    np.testing.assert_array_equal(weights.read("fourfold"), original)
    assert len(read) == 2


@pytest.mark.parametrize("positions", [3, 7, 8, 9, 40])
def test_the_rotary_tables_end_in_rows_at_which_nothing_turns(positions: int) -> None:
    shape = ModelShape(16, 32, 1, 4, 2, 4)  # 8 heads of queries, keys and values
    tables = (np.full((positions, 2), 0.5, np.float32), np.full((positions, 2), 0.25, np.float32))
    cos, sin = with_still_row(tables, shape)
    assert cos.shape == sin.shape == (max(8, positions + 1), 2)
    assert cos.dtype == sin.dtype == np.float32
    assert (cos[:positions] == 0.5).all()
    assert (sin[:positions] == 0.25).all()
    assert (cos[positions:] == 1).all()
    assert (sin[positions:] == 0).all()
