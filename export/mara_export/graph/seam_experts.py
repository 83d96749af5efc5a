"""The seam where a row chooses experts: transformers 5 calls them by a registry, as it calls attention.

Experts (x (S, D), ids and weights (S, k), gate_up_proj, down_proj, their biases → x) is, for each row, the sum of its
chosen experts' results times their weights. Attributes: `k`; `transposed`: matrices are (E, inputs, outputs), not
(E, outputs, inputs); `interleaved`: a gate stands beside its value, not all gates before all values; `alpha`, `limit`
(0: none) and `offset`, of the activation g · sigmoid(alpha · g) · (v + offset), g and v kept within the limit. What
computes otherwise is refused.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mara_export.errors import ModelError
from mara_export.graph.nodes import EXPERTS
from mara_export.graph.probes import Attributes, Make

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # version 4
    ALL_EXPERTS_FUNCTIONS = None

IMPLEMENTATION = "mara"
"""Name of the implementation of experts in transformers."""


class ExpertNodes:
    """What a model's experts compute, observed once, and the nodes in their place."""

    def __init__(self, model: Any, name: str) -> None:
        """name: of the model, for messages."""
        self._model, self._name = model, name
        self._found: dict[Any, Attributes] = {}

    @contextlib.contextmanager
    def in_place(self, make: Make | None) -> Iterator[None]:
        """Within, experts are observed, or nodes that `make` makes. Raises ModelError for those not recognised."""
        if ALL_EXPERTS_FUNCTIONS is None:
            yield
            return

        def choose(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            if make is None:
                self._found[module] = self._observed(module)
                return torch.zeros_like(x)
            stacks = [getattr(module, weight, None) for weight in WEIGHTS]
            attributes = {**self._found[module], "k": int(ids.shape[1])}
            return make(EXPERTS, (x, ids, weights, *stacks), attributes, [x.shape])[0]

        model, before = self._model, self._model.config._experts_implementation
        ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = choose
        try:
            model.set_experts_implementation(IMPLEMENTATION)
            yield
        finally:
            model.set_experts_implementation(before)
            del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]

    def _observed(self, module: Any) -> Attributes:
        name = next(name for name, each in self._model.named_modules() if each is module)
        found = probe_experts(module)
        if found is None:
            raise ModelError(f"{self._name}: the experts at {name} compute what is not supported")
        return {"name": name, **found}


WEIGHTS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
"""Parameters of transformers' experts, in the order in which the node takes them."""


def _gated(both: Tensor, found: Mapping[str, Any]) -> Tensor:
    """Gates and values (…, 2 I) → g · sigmoid(alpha · g) · (v + offset) (…, I), both kept within the limit."""
    gate, value = (both[..., ::2], both[..., 1::2]) if found["interleaved"] else both.chunk(2, -1)
    if found["limit"]:
        gate, value = gate.clamp(max=found["limit"]), value.clamp(-found["limit"], found["limit"])
    activated: Tensor = gate * torch.sigmoid(found["alpha"] * gate) * (value + found["offset"])
    return activated


def results(
    stacks: Mapping[str, Tensor], x: Tensor, ids: Tensor, weights: Tensor, attributes: Mapping[str, Any]
) -> Tensor:
    """What a node of these attributes computes of rows x (S, D), ids and weights (S, k), by all experts: (S, D)."""
    names = [(name, f"{name}_bias") for name in WEIGHTS[:2]]
    up, down = (stacks[name] if attributes["transposed"] else stacks[name].mT for name, _ in names)  # (E, K, N)
    up_bias, down_bias = (
        stacks.get(bias, matrix.new_zeros(1)) for matrix, (_, bias) in zip((up, down), names, strict=True)
    )
    inner = _gated(torch.einsum("sd,edi->sei", x, up) + up_bias, attributes)
    by_all = torch.einsum("sei,eid->sed", inner, down) + down_bias  # (S, E, D)
    chosen = by_all.gather(1, ids[..., None].expand(*ids.shape, by_all.shape[2]))
    return (chosen * weights[..., None]).sum(1)


def _activation(module: Any) -> Attributes:
    """alpha, limit and offset of the activation, if it is one of that kind."""
    small, large = 0.125, 1e9

    def value_at(gate: float, value: float) -> float:
        return float(module._apply_gate(torch.tensor([[gate, value]], dtype=torch.float64)))

    slope = (value_at(small, small) - value_at(small, 0)) / small  # small · sigmoid(alpha · small)
    offset = value_at(small, 0) / slope
    limit = value_at(small, large) / slope - offset
    alpha = float(torch.tensor(slope / small, dtype=torch.float64).logit()) / small
    return {"alpha": alpha, "limit": limit if limit < large / 2 else 0.0, "offset": offset}


@torch.no_grad()
def probe_experts(module: Any) -> Attributes | None:
    """How transformers' experts compute, on random numbers; None: in no way that is known here."""
    biases = getattr(module, "has_bias", None)
    if {*module._parameters} != {*WEIGHTS[: 4 if biases else 2]} or not getattr(module, "has_gate", False):
        return None
    exact: dict[str, Any] = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    count, size, inner, transposed = int(module.num_experts), 6, 4, bool(module.is_transposed)
    shapes = [(2 * inner, size), (size, inner)]
    sizes = [*(shape[::-1] if transposed else shape for shape in shapes), (2 * inner,), (size,)]
    stacks = {name: 2 * torch.randn(count, *shape, **exact) for name, shape in zip(WEIGHTS, sizes, strict=True)}
    stacks = {name: stacks[name] for name in module._parameters}
    twin = copy.copy(module)
    twin._parameters = {name: torch.nn.Parameter(stack) for name, stack in stacks.items()}
    twin.config = SimpleNamespace(_experts_implementation="eager")
    x = torch.randn(5, size, **exact) * torch.tensor([[1], [2], [4], [16], [64]])  # beyond the limit, too
    weights, ids = torch.rand(5, count, **exact).topk(min(2, count))
    try:
        known, wanted = _activation(module), type(module).forward(twin, x, ids, weights)
    except (RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError):
        return None
    for interleaved in (False, True):
        layout = {"transposed": int(transposed), "interleaved": int(interleaved)}
        if torch.allclose(results(stacks, x, ids, weights, {**layout, **known}), wanted, rtol=1e-9):
            return layout | {name: float(torch.tensor(value, dtype=torch.float32)) for name, value in known.items()}
    return None
