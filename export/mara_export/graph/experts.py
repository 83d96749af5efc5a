"""Experts, as engines compute them.

all_experts     as one MLP, as wide as all experts together: standard operators, which quantise like any matrix. What a
                row has not chosen counts 0, so a pass costs E / k times what it uses
chosen_experts  as com.microsoft MoE, which multiplies by the matrices of chosen experts only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mara_export.graph.nodes import (
    EXPERTS,
    MICROSOFT,
    Builder,
    GraphContext,
    attribute,
    custom_nodes,
    dims,
    replace_node,
)
from mara_export.graph.weights import lazy, read

MOE = "MoE"
_LEAST = 1e-30
"""Weight of an expert that was not chosen, where a logarithm is taken."""


class _Stacks:
    """The matrices of one Experts node, in the layouts that lowerings want."""

    def __init__(self, add: Builder, node: ir.Node) -> None:
        gate_up, down, *biases = [value for value in node.inputs[3:] if value is not None]
        self._add, self._transposed = add, bool(attribute(node, "transposed"))
        self._interleaved = bool(attribute(node, "interleaved"))
        self._gate_up, self._down, self._biases = gate_up, down, biases
        (self.count, *rest), (_, *others) = dims(gate_up), dims(down)
        self.size = rest[0] if self._transposed else rest[1]
        self.inner = others[0] if self._transposed else others[1]

    def _made(self, source: ir.Value, layout: str, shape: tuple[int, ...], make: Callable[[Any], Any]) -> ir.Value:
        tensor = source.const_value
        return self._add.initializer(
            lazy(f"{source.name}/{layout}", shape, lambda: np.ascontiguousarray(make(read(tensor)).reshape(shape)))
        )

    def _paired(self, both: NDArray[Any], beside: bool) -> NDArray[Any]:
        """(E, 2 I, …) with each gate beside its value, or all gates before all values: (E, I, 2, …), (E, 2, I, …)."""
        apart = both.reshape(self.count, *((self.inner, 2) if self._interleaved else (2, self.inner)), *both.shape[2:])
        return apart if beside == self._interleaved else apart.swapaxes(1, 2)

    def _rows(self, stack: NDArray[Any]) -> NDArray[Any]:
        """(E, outputs, inputs)"""
        return stack.swapaxes(1, 2) if self._transposed else stack

    def beside(self) -> list[ir.Value | None]:
        """Gates and values beside each other (E, 2 I, D), their bias; (E, D, I), its bias."""
        e, d, i = self.count, self.size, self.inner
        up = self._made(self._gate_up, "beside", (e, 2 * i, d), lambda a: self._paired(self._rows(a), True))
        down = self._down if not self._transposed else self._made(self._down, "rows", (e, d, i), self._rows)
        if not self._biases:
            return [up, None, down, None]
        up_bias, down_bias = self._biases
        return [up, self._made(up_bias, "beside", (e, 2 * i), lambda a: self._paired(a, True)), down, down_bias]

    def together(self) -> list[ir.Value | None]:
        """Gates of all experts, then values of all (D, 2 E I), their bias; (E I, D), its biases (E, D)."""
        e, d, i = self.count, self.size, self.inner

        up = self._made(  # (E, 2, I, D) → (D, 2, E, I)
            self._gate_up,
            "together",
            (d, 2 * e * i),
            lambda a: self._paired(self._rows(a), False).transpose(3, 1, 0, 2),
        )
        down = self._made(self._down, "together", (e * i, d), lambda a: self._rows(a).swapaxes(1, 2))
        if not self._biases:
            return [up, None, down, None]
        up_bias, down_bias = self._biases
        flat = self._made(up_bias, "together", (2 * e * i,), lambda a: self._paired(a, False).swapaxes(0, 1))
        return [up, flat, down, down_bias]


def _spread(add: Builder, node: ir.Node, count: int) -> ir.Value:
    """(S, E): the weight of each expert for each row, 0 where it was not chosen."""
    ids, weights = (add("Unsqueeze", value, add.ints(-1)) for value in node.inputs[1:3])
    is_it = add("Equal", ids, add.constant(np.arange(count)))
    each = add("Where", is_it, weights, add.constant(0.0), out=f"{node.name}/each")  # (S, k, E)
    return add("ReduceSum", each, add.ints(1), out=f"{node.name}/weights", keepdims=0)


def all_experts(graph: ir.Graph, context: GraphContext) -> None:
    """Experts → two products, and between them the activation times the weights of the chosen."""
    add = Builder(graph, "experts")
    for node in custom_nodes(graph, EXPERTS):
        stacks, name = _Stacks(add, node), str(node.name)
        path, (up, up_bias, down, down_bias) = name.rpartition("/")[0], stacks.together()
        spread, width = _spread(add, node, stacks.count), stacks.count * stacks.inner
        both = add("MatMul", node.inputs[0], up, out=f"{path}/gate_up_proj/product", name=f"{path}/gate_up_proj/MatMul")
        if up_bias is not None:
            both = add("Add", both, up_bias, out=f"{path}/gate_up_proj/sum")
        inner = _activation(add, both, node, width)
        apart = add("Reshape", inner, add.ints(-1, stacks.count, stacks.inner), out=f"{name}/apart")
        weights = add("Unsqueeze", spread, add.ints(-1))
        # not the product alone: in float16 what was not chosen may be infinite
        left_out = add("Equal", weights, add.constant(0.0), out=f"{name}/left_out")
        weighted = add("Mul", apart, weights, out=f"{name}/weighted")
        kept = add("Where", left_out, add.constant(0.0), weighted, out=f"{name}/kept")
        flat = add("Reshape", kept, add.ints(-1, width), out=f"{name}/flat")
        out = add("MatMul", flat, down, out=f"{path}/down_proj/product", name=f"{path}/down_proj/MatMul")
        if down_bias is not None:
            out = add("Gemm", spread, down_bias, out, out=f"{path}/down_proj/sum")
        replace_node(node, out)


def _activation(add: Builder, both: ir.Value, node: ir.Node, width: int) -> ir.Value:
    """(S, 2 · width), gates first → (S, width)."""
    name, (alpha, limit, offset) = node.name, (attribute(node, each) for each in ("alpha", "limit", "offset"))
    gate, value = add.several("Split", [both, add.ints(width, width)], [f"{name}/gate", f"{name}/value"], axis=-1)
    if limit:
        gate = add("Clip", gate, None, add.constant(limit), out=f"{name}/gate_within")
        value = add("Clip", value, add.constant(-limit), add.constant(limit), out=f"{name}/value_within")
    bent = gate if alpha == 1 else add("Mul", gate, add.constant(alpha), out=f"{name}/bent")
    swish = add("Mul", gate, add("Sigmoid", bent, out=f"{name}/sigmoid"), out=f"{name}/swish")
    if offset:
        value = add("Add", value, add.constant(offset), out=f"{name}/moved")
    return add("Mul", swish, value, out=f"{name}/inner")


def chosen_experts(graph: ir.Graph, context: GraphContext) -> None:
    """Experts → MoE; for CUDA, whose kernels want other layouts, as `all_experts`.

    MoE takes logits, of which it makes weights by a softmax that sum up to 1.
    """
    if context.options.target == "cuda":
        all_experts(graph, context)
        return
    add = Builder(graph, "experts")
    for node in custom_nodes(graph, EXPERTS):
        stacks, name = _Stacks(add, node), str(node.name)
        spread = _spread(add, node, stacks.count)
        logits = add("Log", add("Clip", spread, add.constant(_LEAST)), out=f"{name}/logits")
        limit = {"swiglu_limit": attribute(node, "limit")} if attribute(node, "limit") else {}
        out = add(
            MOE,
            *(node.inputs[0], logits, *stacks.beside()),
            out=f"{name}/sum",
            name=name,
            domain=MICROSOFT,
            k=attribute(node, "k"),
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=attribute(node, "alpha"),
            activation_beta=attribute(node, "offset"),
            **limit,
        )
        total = add("ReduceSum", node.inputs[2], add.ints(1), out=f"{name}/total", keepdims=1)
        replace_node(node, add("Mul", out, total, out=f"{name}/scaled"))
