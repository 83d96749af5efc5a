"""A graph of one Experts node, lowered: what tests of experts run and build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mara_export.graph import experts
from mara_export.graph.nodes import DOMAIN, EXPERTS, GraphContext
from mara_export.graph.pipeline import LOWERINGS
from mara_export.graph.precision import DTYPES, narrow
from mara_export.graph.traced import named
from mara_export.options import ExportOptions
from mara_export.progress import Progress

INPUTS = ("x", "ids", "weights")
NAME = "model.layers.0.mlp.experts"


def lowered(stacks: Sequence[NDArray[Any]], attributes: Mapping[str, Any], options: ExportOptions) -> onnx.ModelProto:
    """x (S, D), ids and weights (S, k) → y (S, D). stacks: as transformers has them; attributes: of the node."""
    number = DTYPES.get(options.cache, ir.DataType.FLOAT)
    dtypes = (number, ir.DataType.INT64, number)
    size = stacks[1].shape[2 if attributes["transposed"] else 1]
    widths = (size, attributes["k"], attributes["k"])
    inputs = [ir.val(*each) for each in zip(INPUTS, dtypes, [["S", width] for width in widths], strict=True)]
    given = [
        ir.val(f"{NAME}.{i}", ir.DataType.FLOAT, stack.shape, const_value=ir.Tensor(stack, name=f"{NAME}.{i}"))
        for i, stack in enumerate(stacks)
    ]
    out = ir.val("y", number, ["S", size])
    node = ir.node(EXPERTS, [*inputs, *given], {"name": NAME, **attributes}, domain=DOMAIN, outputs=[out])
    opsets = dict(LOWERINGS[options.lowering].OPSETS)
    graph = ir.Graph(inputs, [out], nodes=[node], initializers=given, opset_imports=opsets, name="experts")
    model = ir.Model(graph, ir_version=10)
    progress = Progress(quiet=True)
    context = GraphContext(None, {}, 64, options, Path(), progress, options.quantisation)  # type: ignore[arg-type]
    lowering = LOWERINGS[options.lowering]
    steps = [named, *(each for each in lowering.PASSES if each.__module__ == experts.__name__)]
    steps += [lowering.QUANTISE] if options.quantisation else []
    for step in (*steps, *([narrow] if options.cache != "float32" else [])):
        step(graph, context)
        RemoveUnusedNodesPass()(model)
    graph.sort()
    return ir.to_proto(model)


def random_stacks(
    count: int, size: int, inner: int, attributes: Mapping[str, Any], biases: bool = False
) -> list[NDArray[Any]]:
    """Matrices, and biases, of random numbers."""
    draw = np.random.default_rng(0)
    shapes = [(count, 2 * inner, size), (count, size, inner)]
    if attributes["transposed"]:
        shapes = [(count, columns, rows) for _, rows, columns in shapes]
    sizes = [*shapes, *([(count, 2 * inner), (count, size)] if biases else [])]
    return [draw.standard_normal(each).astype(np.float32) / 4 for each in sizes]


PLAIN = {"transposed": 0, "interleaved": 0, "alpha": 1.0, "limit": 0.0, "offset": 0.0, "k": 2}
CLAMPED = {"transposed": 1, "interleaved": 1, "alpha": 1.702, "limit": 0.5, "offset": 1.0, "k": 2}
"""Attributes: gates before values; neighbours with biases and a limit."""
