"""Optimum's door: its exporter traces a decoder with the seam in place, through TorchScript.

It comes in by public interfaces: an export configuration with its own inputs, outputs and model patcher. Python that
depends on data, as the loops of a mixture of experts, would become what it was for the example.

This is the only module that uses Optimum.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optimum.exporters.onnx.convert as optimum_convert
import torch
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher
from optimum.utils import NormalizedTextConfig
from torch import Tensor
from transformers import masking_utils

from mara_export.graph.nodes import DOMAIN
from mara_export.graph.probes import Attributes
from mara_export.graph.seam import INPUTS, OUTPUTS, Seam, Traceable, examples, replaced
from mara_runtime import tensors

OPSET = 18
_INFER = "_jit_pass_onnx_graph_shape_type_inference"
_SUFFIXES = {int: "i", float: "f", str: "s"}
"""Of attributes, as TorchScript wants their types."""


class _Node(torch.autograd.Function):
    """A custom node; in PyTorch, zeros."""

    @staticmethod
    def forward(ctx: Any, op: str, attributes: Attributes, shapes: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(torch.zeros([int(size) for size in shape]) for shape in shapes)

    @staticmethod
    def symbolic(g: Any, op: str, attributes: Attributes, shapes: Any, *inputs: Any) -> Any:
        given = [value for value in inputs if value is not None]
        marked = {f"{key}_{_SUFFIXES[type(value)]}": value for key, value in attributes.items()}
        made = g.op(f"{DOMAIN}::{op}", *given, outputs=len(shapes), **marked)
        outputs = made if len(shapes) > 1 else (made,)
        for output, shape in zip(outputs, shapes, strict=True):
            output.setType(torch._C.TensorType.get().with_dtype(torch.float32).with_sizes([None] * len(shape)))
        return outputs


def _make(
    op: str, inputs: Sequence[Tensor | None], attributes: Attributes, shapes: Sequence[Sequence[Any]]
) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = _Node.apply(op, attributes, shapes, *inputs)  # type: ignore[no-untyped-call]
    return made


class _Patcher(ModelPatcher):  # type: ignore[misc]
    """Replaces the model's forward by the decoder's."""

    def __init__(self, config: Any, model: Any, model_kwargs: Any = None) -> None:
        super().__init__(config, model, model_kwargs)
        decoder = Traceable(model)

        def forward(input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
            with replaced(masking_utils, "find_packed_sequence_indices", lambda *_: None):  # the patcher's own
                logits, hidden = decoder(input_ids, position_ids, rows)
            return {tensors.LOGITS: logits, tensors.LAST_HIDDEN_STATE: hidden}

        self.patched_forward = forward


class _Config(OnnxConfig):  # type: ignore[misc]
    """The inputs and outputs of a trace, as Optimum asks for them."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    _MODEL_PATCHER = _Patcher
    inputs = property(lambda self: INPUTS)
    outputs = property(lambda self: OUTPUTS)

    def ordered_inputs(self, _: Any) -> dict[str, dict[int, str]]:
        return INPUTS

    def generate_dummy_inputs(self, *_: Any, **__: Any) -> dict[str, Any]:
        return dict(zip(INPUTS, examples(), strict=True))


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Within, nothing is printed: for an operator that it does not know, PyTorch prints the whole graph, from C++."""
    sys.stdout.flush()
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):  # a process without
            kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, 1)
        yield


def trace(model: Any, seam: Seam, path: Path) -> None:
    """Trace `model` with the seam in place and write the graph to `path`; weights are inputs with the model's names."""
    infer = getattr(torch._C, _INFER)
    with (
        seam.tracing(_make),
        _without_stdout(),
        # it looks up the names in the signature of the model's own forward
        replaced(optimum_convert, "check_dummy_inputs_are_allowed", lambda *_: None),
        replaced(torch.onnx, "export", partial(torch.onnx.export, export_params=False)),  # which it calls
        # which would read the weights: to make one of those that are equal, and to infer shapes from their numbers
        replaced(torch._C, "_jit_pass_onnx_deduplicate_initializers", lambda _, weights, __: weights),
        replaced(torch._C, _INFER, lambda graph, _, opset: infer(graph, {}, opset)),
    ):
        config = _Config(model.config, "text-generation")
        optimum_convert.export_pytorch(model, config, OPSET, path, do_constant_folding=False)
