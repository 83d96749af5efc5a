"""torch.export's door: traces a decoder with the seam in place; for any version of transformers.

Weights keep the names that they have in the model, and their layout. They become inputs, so that nothing reads, folds
or joins them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from torch import Tensor
from torch.onnx.ops import symbolic_multi_out

from mara_export.graph.nodes import DOMAIN
from mara_export.graph.probes import Attributes
from mara_export.graph.seam import INPUTS, OUTPUTS, Seam, Traceable, examples

OPSET = 18
_MOST_ROWS = 1 << 20
_PREFIX = "model."
"""Of names in a `Traceable`, which holds the model as `model`."""


def _make(
    op: str, inputs: Sequence[Tensor | None], attributes: Attributes, shapes: Sequence[Sequence[Any]]
) -> tuple[Tensor, ...]:
    given = [value for value in inputs if value is not None]
    dtypes = [torch.float32] * len(shapes)
    return tuple(symbolic_multi_out(f"{DOMAIN}::{op}", given, attributes, dtypes=dtypes, shapes=shapes, version=1))


def trace(model: Any, seam: Seam, path: Path) -> None:
    """Trace `model` with the seam in place and write the graph to `path`."""
    rows, chosen = (torch.export.Dim(name, min=1, max=_MOST_ROWS) for name in ("S", "R"))
    with torch.no_grad(), seam.tracing(_make):
        decoder = Traceable(model).eval()
        program = torch.export.export(
            decoder, examples(), dynamic_shapes=({1: rows}, {1: rows}, {0: chosen}), strict=False
        )
    _select_rows(program.graph)
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each step
        made = torch.onnx.export(
            program,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=[*INPUTS],
            output_names=[*OUTPUTS],
        )
    assert made is not None
    written = made.model
    for weight in _named_as_in(model, written.graph):
        del written.graph.initializers[str(weight.name)]
        weight.const_value = None
        written.graph.inputs.append(weight)
    optimize_ir(written)
    ir.save(written, path, external_data=f"{path.name}.data")


def _select_rows(graph: torch.fx.Graph) -> None:
    """Write x[:, rows] as a selection, which becomes one Gather instead of a GatherND between transpositions."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor):
        x, indices = node.args
        given = [axis for axis, index in enumerate(indices) if index is not None]
        if len(given) == 1 and indices[given[0]].meta["val"].dim() == 1:
            node.target, node.args = torch.ops.aten.index_select.default, (x, given[0], indices[given[0]])


def _named_as_in(model: Any, graph: ir.Graph) -> list[ir.Value]:
    """Give weights and stored buffers the model's names, and one those that are tied. Returns them."""
    first: dict[int, str] = {}
    names = {
        f"{_PREFIX}{name}": first.setdefault(id(tensor), name)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    found: dict[str, ir.Value] = {}
    for value in [*graph.initializers.values()]:
        if value.name not in names:
            continue
        name = names[value.name]
        del graph.initializers[value.name]
        if name in found:
            value.replace_all_uses_with(found[name])
            continue
        value.name = name
        found[name] = value
        graph.register_initializer(value)
    return list(found.values())
