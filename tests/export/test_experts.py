"""Experts in every lowering, against transformers' own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mara_export.graph.pipeline import LOWERINGS
from mara_export.options import ExportOptions
from mara_runtime.errors import OptionError
from tests.experts import INPUTS, lowered, random_stacks
from tests.families import SIZES, config

pytest.importorskip("transformers.integrations.moe", reason="experts are for transformers 5")

from mara_export.graph.seam_experts import WEIGHTS, probe_experts

SIZE, INNER, CHOSEN, ROWS = 64, 32, 2, 7
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def experts(request: pytest.FixtureRequest) -> Any:
    """transformers' module, with random weights: halves, or neighbours with biases and a limit."""
    sizes = {**SIZES, "hidden_size": SIZE, "intermediate_size": INNER, "num_hidden_layers": 4}
    model = AutoModelForCausalLM.from_config(config(request.param, {**sizes, "vocab_size": 300}))
    model.set_experts_implementation("eager")
    module = next(each for each in model.modules() if hasattr(each, "is_transposed"))
    sizes = {"transposed": module.is_transposed}
    fill(module, random_stacks(module.num_experts, SIZE, INNER, sizes, module.has_bias))
    return module


def fill(module: Any, stacks: Sequence[NDArray[Any]]) -> None:
    for name, stack in zip(WEIGHTS, stacks, strict=False):
        getattr(module, name).data = torch.from_numpy(stack)


def graph_of(module: Any, options: ExportOptions) -> onnx.ModelProto:
    stacks = [getattr(module, name).detach().numpy() for name in WEIGHTS if name in module._parameters]
    found = probe_experts(module)
    assert found is not None
    return lowered(stacks, {"k": CHOSEN, **found}, options)


def run(model: onnx.ModelProto, values: Sequence[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, dict(zip(INPUTS, map(np.asarray, values), strict=True)))[0]
    return found


def rows(count: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids, weights; those of a row do not sum up to 1."""
    generator = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(count, 4, generator=generator).topk(CHOSEN)
    return torch.randn(count, SIZE, generator=generator), ids, weights


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_computes_what_transformers_computes(experts, lowering) -> None:
    values = rows()
    model = graph_of(experts, ExportOptions(lowering=lowering))
    with torch.no_grad():
        expected = experts(*values).numpy()
    found = run(model, values)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    alone = np.concatenate([run(model, [value[i : i + 1] for value in values]) for i in range(ROWS)])
    np.testing.assert_allclose(alone, found, **TOLERANCE)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_what_a_row_has_not_chosen_does_not_reach_it(experts, lowering) -> None:
    """Neither the infinite results of other experts nor what is not a number in other rows."""
    x, ids, weights = rows()
    x[4] = weights[4] = float("nan")
    ids = torch.tensor([[1, 2]] * ROWS)
    ids[3, 0] = 0
    with torch.no_grad():
        experts.down_proj[0] = 3e38
        expected = experts(x, ids, weights).numpy()
    found = run(graph_of(experts, ExportOptions(lowering=lowering)), (x, ids, weights))
    others = [0, 1, 2, 5, 6]
    assert np.isfinite(expected[others]).all()
    np.testing.assert_allclose(found[others], expected[others], **TOLERANCE)


def test_int4_experts_are_those_that_were_stored(experts) -> None:
    """Of weights that int4 holds exactly nothing is lost."""
    options = ExportOptions(precision="int4", block_size=16)
    draw, stacks = np.random.default_rng(1), []
    for name in WEIGHTS[:2]:
        shape = getattr(experts, name).shape
        whole = draw.integers(-8, 8, shape).astype(np.float32)
        inputs = np.moveaxis(whole, 1 if experts.is_transposed else 2, 0)
        inputs[::16] = -8  # the largest of each block
        stacks.append(np.ascontiguousarray(whole) / 32)
    fill(experts, stacks)
    model = graph_of(experts, options)
    (node,) = (node for node in model.graph.node if node.op_type == "QMoE")
    stored = {each.name: each for each in model.graph.initializer}
    assert stored[node.input[2]].dims == [experts.num_experts, 2 * INNER, SIZE // 2]
    with torch.no_grad():
        np.testing.assert_allclose(run(model, rows()), experts(*rows()).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantiser": "k-quant"}, "--quantiser is 'k-quant'; the experts at .* support rtn: leave it out"),
        ({"block_size": 64}, "--block-size is 64, which does not divide the 32 inputs of the experts at"),
    ],
)
def test_what_experts_cannot_be_quantised_by_is_refused(experts, options, named) -> None:
    with pytest.raises(OptionError, match=named):
        graph_of(experts, ExportOptions(precision="int4", **options))
    kept = graph_of(experts, ExportOptions(precision="int4", keep=("*/experts/*",), **options))
    assert [node.op_type for node in kept.graph.node].count("MoE") == 1


@pytest.mark.parametrize(
    "gate", [lambda both: both[..., ::2].tanh() * both[..., 1::2], lambda both: 0 * both[..., ::2]]
)
def test_another_activation_is_not_taken_for_a_known_one(experts, gate) -> None:
    assert probe_experts(experts) is not None
    type(experts)._apply_gate, own = lambda self, both: gate(both), type(experts)._apply_gate
    try:
        assert probe_experts(experts) is None
    finally:
        type(experts)._apply_gate = own
