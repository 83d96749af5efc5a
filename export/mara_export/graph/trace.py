"""Tracing: a Hugging Face decoder, through one of two doors, and the layers of agents.

Both doors trace the model with the seam in place (seam.py) and give the same nodes; traced.py makes of them what the
lowerings take.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mara_export.errors import ModelError
from mara_export.graph.nodes import Tables
from mara_export.graph.seam import Seam
from mara_export.progress import no_logs
from mara_runtime import tensors
from mara_runtime.agents import EPSILON
from mara_runtime.errors import OptionError, first_line
from mara_runtime.tensors import CacheGroup

_OPSET = 18
"""Of the agents' graph."""
_DOORS = {"optimum": "by_optimum", "torch": "by_export"}
"""Their modules, the preferred one first; each needs packages that the other does not."""


def choose_tracer(asked: str) -> str:
    """The door to take, "optimum" or "torch". asked: one of targets.TRACERS. Raises OptionError if it is not there."""
    why = ""
    for name in _DOORS if asked == "auto" else (asked,):
        try:
            _door(name)
        except ImportError as error:  # Optimum beside a transformers that it does not know, too
            why = first_line(error)
        else:
            return name
    extra = "export" if asked == "optimum" else "export-torch"
    raise OptionError(f"--tracer is {asked!r}, which cannot be used here ({why}): pip install 'mara-deploy[{extra}]'")


def _door(name: str) -> Any:
    return import_module(f"mara_export.graph.{_DOORS[name]}")


def trace_llm(
    model: Any, folder: Path, tracer: str, name: str, context: int, positions: int
) -> tuple[Path, Tables, tuple[CacheGroup, ...]]:
    """Trace `model` into `folder`. Returns the path of the graph, the angles of so many positions, and its KV caches.

    model: a Hugging Face causal LM in eval mode, float32. tracer: "optimum" or "torch". name: of the model, for
    messages. context: of the model; positions beyond it, of rows that nobody reads, have the last one's angles. Raises
    ModelError.
    """
    path = folder / "model.onnx"
    with _quiet():
        try:
            seam = Seam(model, name)
            _door(tracer).trace(model, seam, path)
        except (RuntimeError, ValueError, TypeError) as error:  # of the model's code and of PyTorch's exporters
            hint = "; --tracer torch may be able to" if tracer == "optimum" else ""
            raise ModelError(f"{name} cannot be traced (--tracer {tracer}): {first_line(error)}{hint}") from error
    return path, seam.rotary_tables(np.arange(positions).clip(max=context - 1)), seam.caches


class _Margins(torch.nn.Module):
    """The margins of stacked agents, mixed: LayerNorm → linear → ReLU → linear → ReLU → linear.

    The weights stand on the left: a stack is one matrix for ONNX Runtime, which need not be packed for each pass.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden_size, EPSILON, elementwise_affine=False)

    def forward(self, states: Tensor, mix: Tensor, *weights: Tensor) -> Tensor:
        """(N, D), (A, N), and tensors.agent_weights → (N,)."""
        (w1, b1), (w2, b2), (w3, b3) = zip(weights[::2], weights[1::2], strict=True)
        x = self.norm(states).T
        x = torch.relu(w1 @ x + b1)
        x = torch.relu(w2 @ x + b2)
        margins = (w3 @ x + b3).squeeze(1)
        return torch.where(mix == 0, 0.0, mix * margins).sum(0)  # one that is left out may have any margin


def trace_agents(hidden_size: int, path: Path) -> None:
    """Write the graph of the agents' mixed margins, for any agents of that hidden size."""
    inputs, outputs = tensors.agent_inputs(hidden_size), tensors.agent_outputs()
    sizes = {"N": 2, "A": 3, "W1": 5, "W2": 4}
    with _quiet():
        torch.onnx.export(
            _Margins(hidden_size).eval(),
            tuple(torch.ones([sizes[d] if isinstance(d, str) else d for d in t.shape]) for t in inputs),
            str(path),
            input_names=[t.name for t in inputs],
            output_names=[t.name for t in outputs],
            dynamic_axes=tensors.dynamic_axes([*inputs, *outputs]),
            opset_version=_OPSET,
            dynamo=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer, which warns of every shape it reads."""
    with no_logs(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
