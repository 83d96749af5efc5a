"""Experts in every lowering, against what the node means, and what it means against transformers' own modules."""

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

from mara_export.errors import ParityError
from mara_export.export import finish
from mara_export.graph import quantise
from mara_export.graph.pipeline import LOWERINGS
from mara_export.graph.seam_experts import WEIGHTS, probe_experts, results
from mara_export.options import ExportOptions
from mara_export.parity.compare import REROUTED
from mara_runtime.errors import OptionError
from tests.experts import CLAMPED, INPUTS, PLAIN, lowered, random_stacks
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT
from tests.families import NAMES, SIZES, config

EXPERTS, SIZE, INNER, ROWS = 4, 64, 32, 7
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BOTH = pytest.mark.parametrize("attributes", [PLAIN, CLAMPED], ids=["plain", "clamped"])
EVERY = pytest.mark.parametrize("lowering", LOWERINGS)


def stacks_of(attributes: dict[str, Any]) -> list[NDArray[Any]]:
    return random_stacks(EXPERTS, SIZE, INNER, attributes, biases=attributes is CLAMPED)


def expected(
    stacks: Sequence[NDArray[Any]], values: Sequence[torch.Tensor], attributes: dict[str, Any]
) -> NDArray[Any]:
    by_name = dict(zip(WEIGHTS, map(torch.from_numpy, stacks), strict=False))
    return results(by_name, *values, attributes).numpy()


def run(model: onnx.ModelProto, values: Sequence[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, dict(zip(INPUTS, map(np.asarray, values), strict=True)))[0]
    return found


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, ids, weights; those of a row do not sum up to 1."""
    generator = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(ROWS, EXPERTS, generator=generator).topk(PLAIN["k"])
    return torch.randn(ROWS, SIZE, generator=generator), ids, weights


@BOTH
@EVERY
def test_a_lowering_computes_what_the_node_means_in_whatever_company(attributes, lowering) -> None:
    stacks, values = stacks_of(attributes), rows()
    model = lowered(stacks, attributes, ExportOptions(lowering=lowering))
    found = run(model, values)
    np.testing.assert_allclose(found, expected(stacks, values, attributes), **TOLERANCE)
    alone = np.concatenate([run(model, [value[i : i + 1] for value in values]) for i in range(ROWS)])
    np.testing.assert_allclose(alone, found, **TOLERANCE)


@BOTH
@EVERY
def test_what_a_row_has_not_chosen_does_not_reach_it(attributes, lowering) -> None:
    """Neither the infinite results of other experts nor what is not a number in other rows."""
    stacks, (x, ids, weights) = stacks_of(attributes), rows()
    ids[:] = torch.tensor([1, 2])
    ids[3, 0] = 0
    x[4] = weights[4] = float("nan")
    values, others = (x, ids, weights), [0, 1, 2, 5, 6]
    finite = expected(stacks, values, attributes)
    stacks[0][0] = 3e38
    found = run(lowered(stacks, attributes, ExportOptions(lowering=lowering)), values)
    np.testing.assert_allclose(found[others], finite[others], **TOLERANCE)


@BOTH
def test_int4_experts_are_those_that_were_stored(attributes) -> None:
    """Of weights that int4 holds exactly nothing is lost."""
    draw, stacks = np.random.default_rng(1), stacks_of(attributes)
    for stack in stacks[:2]:
        whole = draw.integers(-8, 8, stack.shape)
        np.moveaxis(whole, 1 if attributes["transposed"] else 2, 0)[::16] = -8  # the largest of each block
        stack[:] = whole / 32
    model = lowered(stacks, attributes, ExportOptions(precision="int4", block_size=16))
    (node,) = (node for node in model.graph.node if node.op_type == "QMoE")
    stored = {each.name: each for each in model.graph.initializer}
    assert stored[node.input[2]].dims == [EXPERTS, 2 * INNER, SIZE // 2]
    found, exact = run(model, rows()), expected(stacks, rows(), attributes)
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"quantiser": "k-quant"}, "--quantiser is 'k-quant'; the experts at .* support rtn: leave it out"),
        ({"block_size": 64}, "--block-size is 64, which does not divide the 32 inputs of the experts at"),
    ],
)
def test_what_experts_cannot_be_quantised_by_is_refused(options, named) -> None:
    with pytest.raises(OptionError, match=named):
        lowered(stacks_of(PLAIN), PLAIN, ExportOptions(precision="int4", **options))
    kept = lowered(stacks_of(PLAIN), PLAIN, ExportOptions(precision="int4", keep=("*/experts/*",), **options))
    assert [node.op_type for node in kept.graph.node].count("MoE") == 1


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def module(request: pytest.FixtureRequest) -> Any:
    """transformers' own, with random weights."""
    if request.param not in NAMES:
        pytest.skip("experts are modules that can be called by name in transformers 5 only")
    sizes = {**SIZES, "hidden_size": SIZE, "intermediate_size": INNER, "num_hidden_layers": 4}
    model = AutoModelForCausalLM.from_config(config(request.param, {**sizes, "vocab_size": 300}))
    model.set_experts_implementation("eager")
    found = next(each for each in model.modules() if hasattr(each, "is_transposed"))
    attributes = {"transposed": found.is_transposed}
    stacks = random_stacks(found.num_experts, SIZE, INNER, attributes, found.has_bias)
    for name, stack in zip(WEIGHTS, stacks, strict=False):
        getattr(found, name).data = torch.from_numpy(stack)
    return found


def test_the_node_means_what_transformers_computes(module) -> None:
    found = probe_experts(module)
    with torch.no_grad():
        wanted = module(*rows())
        given = results(dict(module.named_parameters()), *rows(), found)
    np.testing.assert_allclose(given.numpy(), wanted.numpy(), **TOLERANCE)


@pytest.mark.parametrize(
    "gate", [lambda both: both[..., ::2].tanh() * both[..., 1::2], lambda both: 0 * both[..., ::2]]
)
def test_another_activation_is_not_taken_for_a_known_one(module, gate, monkeypatch) -> None:
    monkeypatch.setattr(type(module), "_apply_gate", lambda _, both: gate(both))
    assert probe_experts(module) is None


def test_below_fp32_a_model_with_experts_passes_its_gate_and_with_wrong_experts_does_not(
    tmp_path, traced, monkeypatch
) -> None:
    if "qwen3_moe" not in NAMES:
        pytest.skip("models with experts are exported with transformers 5 only")
    options = ExportOptions(precision="int8", max_context=MAX_CONTEXT, max_candidates=MAX_CANDIDATES)
    manifest = finish(traced("qwen3_moe"), options, tmp_path / "right").manifest
    assert manifest.parity["rerouted"] == manifest.agents[0].parity["rerouted"] == REROUTED
    assert manifest.structure["rerouted"] == 0
    stacked = quantise._quantised_stack

    def wrong(*args: Any) -> list[Any]:
        integers, scales = stacked(*args)
        return [integers, args[0].weight(f"{scales.name}/wrong", 1.5 * scales.const_value.numpy())]

    monkeypatch.setattr(quantise, "_quantised_stack", wrong)
    with pytest.raises(ParityError, match="hidden: greatest difference"):
        finish(traced("qwen3_moe"), options, tmp_path / "wrong")
