"""The graph of agents, traced from PyTorch: it computes their margins, and mixes them."""

from typing import Any

import numpy as np
import onnxruntime
import torch

from mara_deploy import agent as agents
from mara_export.graph.trace import trace_agents
from mara_runtime import tensors
from mara_runtime.agents import fold, stack
from tests import checkpoints


def test_the_graph_of_agents_computes_the_margin_of_pytorch(tmp_path) -> None:
    hidden_size = 64
    torch.save(checkpoints.make_agent(hidden_size, seed=1).state_dict(), tmp_path / "agent.pth")
    agent = agents.load(tmp_path / "agent.pth")
    trace_agents(hidden_size, tmp_path / "agents.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "agents.onnx", providers=["CPUExecutionProvider"])
    state = {name: parameter.numpy() for name, parameter in agent.state_dict().items()}
    weights = stack([fold(state)], hidden_size)
    feeds = {t.name: w for t, w in zip(tensors.agent_weights(hidden_size), weights, strict=True)}

    def margins_of(states: torch.Tensor) -> Any:
        mix = np.ones((1, len(states)), np.float32)
        return session.run(["margins"], {**feeds, "agent_mix": mix, "hidden_states": states.numpy()})[0]

    generator = torch.Generator().manual_seed(0)
    # Magnitudes of hidden states differ between models by orders; the agent's LayerNorm takes them out.
    scales = 10 ** (4 * torch.rand(1000, 1, generator=generator) - 1)
    states = scales * torch.randn(1000, hidden_size, generator=generator)
    with torch.no_grad():
        expected = agent.margin(states).numpy()
    margins = margins_of(states)
    assert (margins.shape, margins.dtype) == ((1000,), np.float32)
    np.testing.assert_allclose(margins, expected, rtol=1e-5, atol=1e-5)
    clear = np.abs(expected) > 1e-5
    assert clear.sum() > 990
    assert ((margins > 0) == (expected > 0))[clear].all()
    assert 100 < (margins > 0).sum() < 900
    for count in (0, 1, 3):
        np.testing.assert_allclose(margins_of(states[:count]), expected[:count], rtol=1e-5, atol=1e-5)


def test_the_margins_of_several_agents_are_mixed_and_a_part_of_0_leaves_one_out(tmp_path) -> None:
    trace_agents(8, tmp_path / "agents.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "agents.onnx", providers=["CPUExecutionProvider"])
    states = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)

    def margins_of(members: Any, mix: Any) -> Any:
        weights = zip(tensors.agent_weights(8), stack(members, 8), strict=True)
        feeds = {"agent_mix": np.array(mix, np.float32), "hidden_states": states, **{t.name: w for t, w in weights}}
        return session.run(["margins"], feeds)[0]

    modules = [checkpoints.make_agent(8, seed=i, widths=widths) for i, widths in enumerate(((5, 4), (3, 7)))]
    members = [fold({name: p.numpy() for name, p in module.state_dict().items()}) for module in modules]
    endless = tuple(np.full_like(array, 3e38) for array in members[0])
    first, second, last = (margins_of([member], [[1] * 6]) for member in (*members, endless))
    assert not np.isfinite(last).any()
    mix = np.array([[1, 0.5, 0, 0, -1, 2], [0, 1, 2, 0, 1, 1], [0] * 6], np.float32)
    expected = mix[0] * first + mix[1] * second
    np.testing.assert_allclose(margins_of([*members, endless], mix), expected, rtol=1e-5, atol=1e-6)
    assert margins_of([], [[1] * 6]).tolist() == [0] * 6  # no agent is one that is zero
