"""The passes for ONNX Runtime: what is joined computes the same, in fewer products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mara_export.graph.fuse import join_projections
from mara_export.graph.nodes import Builder, GraphContext
from mara_export.graph.ort import still_tables
from mara_export.graph.weights import lazy, read, save
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_runtime.tensors import CacheGroup, ModelShape

WIDTH = 6
COLUMNS = {"q": 8, "k": 4, "v": 4, "gate": 300, "up": 300}  # of 300 the data lie outside the graph's file
SHAPE = ModelShape(16, 32, 1, 4, (CacheGroup(1, 2, 4),))  # 8 heads of queries, keys and values
CONTEXT = GraphContext(SHAPE, (np.zeros((1, 2), np.float32),) * 2, 256, ExportOptions(), Path(), Progress(quiet=True))


def model(*, biases: str = "", reused: str = "", order: str = "qkv") -> ir.Model:
    """x by five matrices; biases: of which, reused: whose product is read twice, order: how q, k and v are joined."""
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, [1, "S", WIDTH])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="projections")
    add, parts = Builder(graph, "test"), {}
    for part, columns in COLUMNS.items():
        weight = add.weight(f"{part}/w", rng.normal(size=(WIDTH, columns)).astype(np.float32))
        product = add("MatMul", x, weight, out=f"{part}/product", name=f"/layer/{part}_proj/MatMul")
        parts[part] = product
        if part in biases:
            bias = add.weight(f"{part}/b", rng.normal(size=columns).astype(np.float32))
            parts[part] = add("Add", bias, product, out=f"{part}/sum", name=f"/layer/{part}_proj/Add")
        if part == reused:
            graph.outputs.append(add("Neg", product, out="again"))
    together = add("Concat", *(parts[part] for part in order), out="together", axis=-1)
    graph.outputs.extend([parts["gate"], parts["up"], add("Abs", together, out="end")])
    for value in graph.outputs:
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([1, "S", None])
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> list[Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.random.default_rng(1).normal(size=(1, 3, WIDTH)).astype(np.float32)})


@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, 1),
        ({"biases": "qkv"}, 2),  # q, k and v are one, gate and up another
        ({"biases": "qkv", "order": "kqv"}, 2),  # what is joined in another order is taken apart first
        ({"biases": "qk"}, 2),
        ({"biases": "qkv", "reused": "k"}, 2),  # k's product is needed without its bias
    ],
)
def test_products_of_a_value_become_one_and_compute_the_same(tmp_path, options, products) -> None:
    save(model(**options), tmp_path / "plain.onnx")
    joined = model(**options)
    join_projections(joined.graph, CONTEXT)
    RemoveUnusedNodesPass()(joined)
    joined.graph.sort()
    names = [value.name for value in joined.graph.outputs]
    assert names == [value.name for value in model(**options).graph.outputs]
    assert [node.op_type for node in joined.graph].count("MatMul") == products
    if options == {"biases": "qkv"}:  # q, k and v are never taken apart
        assert "Concat" not in [node.op_type for node in joined.graph]
    save(joined, tmp_path / "joined.onnx")
    for ours, theirs in zip(run(tmp_path / "joined.onnx"), run(tmp_path / "plain.onnx"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_lazy_weight_is_computed_when_it_is_read_and_written_once(tmp_path) -> None:
    """So no stage holds a second copy of the model; equal bytes are stored once, whatever their shape."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="weights")
    add, reads = Builder(graph, "test"), []
    base = add.weight("base", np.arange(512, dtype=np.float32))
    double = add.initializer(lazy("double", (512,), lambda: reads.append(1) or 2 * read(base)))
    square = add.weight("square", 2 * np.arange(512, dtype=np.float32).reshape(16, 32))
    graph.outputs.append(add("Concat", double, add("Reshape", square, add.ints(-1)), base, out="end", axis=0))
    graph.outputs[0].dtype, graph.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([1536])
    assert reads == []
    save(ir.Model(graph, ir_version=10), tmp_path / "weights.onnx")
    assert reads == [1]
    assert (tmp_path / "weights.onnx.data").stat().st_size == 4096 + 2048  # base, aligned, and double once
    session = ort.InferenceSession(str(tmp_path / "weights.onnx"), providers=["CPUExecutionProvider"])
    expected = np.concatenate([2 * np.arange(512.0), 2 * np.arange(512.0), np.arange(512.0)])
    assert np.array_equal(session.run(None, {})[0], expected.astype(np.float32))


@pytest.mark.parametrize("positions", [3, 7, 8, 9, 40])
def test_the_rotary_tables_end_in_rows_at_which_nothing_rotates(positions: int) -> None:
    tables = (np.full((positions, 2), 0.5, np.float32), np.full((positions, 2), 0.25, np.float32))
    cos, sin = still_tables(tables, 8)
    assert cos.shape == sin.shape == (max(8, positions + 1), 2)
    assert cos.dtype == sin.dtype == np.float32
    assert (cos[:positions] == 0.5).all()
    assert (sin[:positions] == 0.25).all()
    assert (cos[positions:] == 1).all()
    assert (sin[positions:] == 0).all()
