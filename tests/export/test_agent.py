"""Agent files: what is read, what is refused, and that agent.onnx computes what PyTorch computes."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from mara_deploy import agent as agents
from mara_deploy.agent import AgentError
from mara_export.graph.trace import trace_agent
from tests import checkpoints

D = 24
WIDTHS = (32, 16)


def state_dict(hidden_size: int = D, widths: tuple[int, int] = WIDTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """As the released checkpoints have it; the module is the tests' own, not the product's."""
    agent = checkpoints.make_agent(hidden_size, seed=seed, widths=widths)
    return {name: tensor.detach().clone() for name, tensor in agent.state_dict().items()}


def saved(path: Path, state: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(params=[".pth", ".safetensors"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("hidden_size", "widths"), [(24, (32, 16)), (7, (5, 3)), (64, (256, 128)), (16, (4, 9))])
def test_both_formats_load_equally_and_widths_come_from_the_shapes(tmp_path, hidden_size, widths) -> None:
    state = state_dict(hidden_size, widths)
    loaded = [agents.load(saved(tmp_path / f"agent{suffix}", state)) for suffix in (".pth", ".safetensors")]
    for agent in loaded:
        assert (agent.hidden_size, agent.widths) == (hidden_size, widths)
        assert not agent.training
        assert agent.state_dict().keys() == state.keys()
        assert all(torch.equal(agent.state_dict()[name], tensor) for name, tensor in state.items())


def test_margin_is_accept_minus_reject_of_the_released_network(tmp_path) -> None:
    module = checkpoints.make_agent(D, seed=3)
    states = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    z = module(states)
    agent = agents.load(saved(tmp_path / "agent.pth", module.state_dict()))
    assert torch.equal(agent(states), z)
    assert torch.equal(agent.margin(states), z[:, 1] - z[:, 0])
    assert 0 < (agent.margin(states) > 0).sum() < 50


@pytest.mark.parametrize(("hidden_size", "parameters"), [(4096, 4_466_434), (3072, 3_415_810), (2048, 2_365_186)])
def test_released_sizes(hidden_size: int, parameters: int) -> None:
    with torch.device("meta"):
        agent = agents.Agent(hidden_size)
    assert sum(p.numel() for p in agent.parameters()) == parameters
    assert agent.ln.eps == 1e-5


def test_a_released_size_loads(tmp_path) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in agents.Agent(4096).state_dict().items()}
    path = saved(tmp_path / "agent.pth", {name: torch.zeros(shape) for name, shape in shapes.items()})
    agent = agents.load(path)
    assert (agent.hidden_size, agent.widths) == (4096, (1024, 256))
    assert sum(p.numel() for p in agent.parameters()) == 4_466_434


def test_half_precision_files_become_float32(tmp_path, suffix) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {name: tensor.to(dtype) for name, tensor in state_dict().items()}
        agent = agents.load(saved(tmp_path / f"{dtype}{suffix}", state))
        assert {p.dtype for p in agent.parameters()} == {torch.float32}
        assert all(torch.equal(agent.state_dict()[name], tensor.float()) for name, tensor in state.items())


def test_torchs_remarks_on_a_pickle_stay_off_the_screen(tmp_path, recwarn) -> None:
    path = tmp_path / "agent.pth"
    path.write_bytes(pickle.dumps([1, 2], protocol=4))
    with pytest.raises(AgentError):
        agents.load(path)
    assert [str(warning.message) for warning in recwarn] == []


# --- what is refused -------------------------------------------------------------------------------------------------


def test_twin_critics_are_refused_by_name(tmp_path, suffix) -> None:
    actor = state_dict()
    critics = {name: tensor for name, tensor in actor.items() if name.startswith("ln.")}
    for twin in "12":
        for layer, source in (("1", "linear1"), ("2", "linear2"), ("3", "output_linear")):
            for part in ("weight", "bias"):
                critics[f"linear{twin}{layer}.{part}"] = actor[f"{source}.{part}"].clone()
    with pytest.raises(AgentError, match="twin critics"):
        agents.load(saved(tmp_path / f"critic{suffix}", critics))


@pytest.mark.parametrize("key", sorted(state_dict()))
def test_a_missing_key_is_named(tmp_path, suffix, key) -> None:
    state = state_dict()
    del state[key]
    with pytest.raises(AgentError, match=rf"lacks {key}$"):
        agents.load(saved(tmp_path / f"agent{suffix}", state))


def test_an_extra_key_is_named(tmp_path, suffix) -> None:
    state = {**state_dict(), "linear3.weight": torch.zeros(2, 3)}
    with pytest.raises(AgentError, match=r"linear3\.weight \[2, 3\] does not belong"):
        agents.load(saved(tmp_path / f"agent{suffix}", state))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("ln.weight", (D + 1,)),
        ("ln.bias", ()),
        ("linear1.bias", (WIDTHS[0], 1)),
        ("linear1.weight", (WIDTHS[0],)),
        ("linear1.weight", (WIDTHS[0], D, 1)),
        ("linear2.weight", (WIDTHS[1], WIDTHS[0] + 1)),
        ("output_linear.weight", (1, WIDTHS[1])),
        ("output_linear.weight", (3, WIDTHS[1])),
        ("output_linear.bias", (3,)),
    ],
)
def test_a_wrong_shape_is_refused(tmp_path, suffix, key, shape) -> None:
    with pytest.raises(AgentError, match="is not a MARA agent"):
        agents.load(saved(tmp_path / f"agent{suffix}", {**state_dict(), key: torch.zeros(shape)}))


def test_layers_without_a_unit_are_refused(tmp_path, suffix) -> None:
    empty = {"linear1.weight": torch.ones(0, D), "linear1.bias": torch.ones(0), "linear2.weight": torch.ones(16, 0)}
    with pytest.raises(AgentError, match=r"is not a MARA agent: it has layers without a unit$"):
        agents.load(saved(tmp_path / f"agent{suffix}", {**state_dict(), **empty}))


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, torch.Tensor.long, lambda t: t.to("meta")])
def test_what_holds_no_plain_numbers_is_refused(tmp_path, change) -> None:
    state = state_dict() | {"ln.weight": change(torch.ones(D))}
    with pytest.raises(AgentError, match=r"ln\.weight holds no plain floating-point numbers$"):
        agents.load(saved(tmp_path / "agent.pth", state))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, suffix, value) -> None:
    state = state_dict()
    state["linear2.weight"][3, 4] = value
    with pytest.raises(AgentError, match="not finite"):
        agents.load(saved(tmp_path / f"agent{suffix}", state))


def test_weights_beyond_float32_are_refused(tmp_path, suffix) -> None:
    state = {name: tensor.double() for name, tensor in state_dict().items()}
    state["linear1.bias"][0] = 1e300
    with pytest.raises(AgentError, match="not finite"):
        agents.load(saved(tmp_path / f"agent{suffix}", state))


def test_a_missing_file_and_a_folder_are_refused(tmp_path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(AgentError, match="there is no agent file at"):
            agents.load(path)


@pytest.mark.parametrize("inside", ["agent.safetensors", "actor.pth"])
def test_a_folder_that_holds_an_agent_is_refused_with_its_file(tmp_path, inside) -> None:
    saved(tmp_path / inside, state_dict())
    with pytest.raises(AgentError, match=f"which is a folder that holds {inside}: give --agent .*{inside}$"):
        agents.load(tmp_path)


def test_a_pickled_module_is_refused_with_what_to_save(tmp_path) -> None:
    path = saved(tmp_path / "agent.pth", agents.Agent(D, WIDTHS))
    with pytest.raises(
        AgentError, match=r"it is a pickled module .*mara_deploy\.agent\.Agent.*save its state_dict\(\)"
    ) as e:
        agents.load(path)
    assert "\x1b" not in str(e.value)


def test_no_colours_of_torch_are_passed_on(tmp_path) -> None:
    path = tmp_path / "agent.pth"
    path.write_bytes(pickle.dumps(_Touch(tmp_path / "proof"), protocol=2)[:-3])
    with pytest.raises(AgentError, match="cannot be read as a PyTorch state dict") as e:
        agents.load(path)
    assert "\x1b" not in str(e.value)


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [("module.", "as DataParallel writes them: save its .module's state_dict"), ("actor.", "without")],
)
def test_the_prefix_of_all_names_is_named(tmp_path, suffix, prefix, hint) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in state_dict().items()}
    with pytest.raises(AgentError, match=f"its names begin with '{prefix}'.*{hint}"):
        agents.load(saved(tmp_path / f"agent{suffix}", state))


def test_a_damaged_old_style_pickle_is_refused_or_read(tmp_path) -> None:
    path = tmp_path / "agent.pth"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=False)
    good = path.read_bytes()
    rng, refused = random.Random(0), 0
    for index in range(300):
        data = bytearray(good[: rng.randrange(len(good))] if index % 3 == 0 else good)
        for _ in range(4):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            agents.load(path)  # a changed weight cannot be told from a trained one
        except AgentError:
            refused += 1
    assert refused > 150


def test_an_empty_file_is_refused(tmp_path, suffix) -> None:
    path = tmp_path / f"agent{suffix}"
    path.touch()
    with pytest.raises(AgentError, match="cannot be read as"):
        agents.load(path)


def test_random_and_truncated_bytes_are_refused(tmp_path, suffix) -> None:
    path = tmp_path / f"agent{suffix}"
    good = saved(path, state_dict()).read_bytes()
    rng = random.Random(0)
    damaged = [good[: len(good) * i // 12] for i in range(12)]
    damaged += [rng.randbytes(rng.choice([1, 2, 7, 100, 5000])) for _ in range(60)]
    # What begins like a pickle, or like a zip archive, gets further into the reader.
    damaged += [b"\x80\x02" + rng.randbytes(rng.choice([1, 5, 50, 500])) for _ in range(100)]
    damaged += [good[:64] + rng.randbytes(500) for _ in range(20)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(AgentError, match=r"cannot be read as|is not a plain state dict"):
            agents.load(path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2, 3],
        [torch.zeros(2)],
        torch.zeros(3),
        None,
        {"ln.weight": [1.0]},
        {"state_dict": {"ln.weight": torch.zeros(2)}},
        {0: torch.zeros(2)},
        {("ln", "weight"): torch.zeros(2)},
        {},
    ],
    ids=repr,
)
def test_pickles_of_something_else_are_refused(tmp_path, content) -> None:
    with pytest.raises(AgentError, match="is not a"):
        agents.load(saved(tmp_path / "agent.pth", content))


class _Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_code_in_a_pickle_is_not_run(tmp_path, how, protocol) -> None:
    proof, path = tmp_path / "proof", tmp_path / "agent.pth"
    content = {**state_dict(), "more": _Touch(proof)}
    if how == "torch":
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(_Touch(proof), protocol=protocol))
    with pytest.raises(AgentError, match="cannot be read as a PyTorch state dict"):
        agents.load(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(_Touch(proof)))
    assert proof.exists()  # it would have


# --- the recorded fallback -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["first", "last"])
def test_the_fallback_of_the_file_is_honoured(tmp_path, fallback) -> None:
    save_file(state_dict(), tmp_path / "agent.safetensors", metadata={"fallback": fallback})
    agent = agents.load(tmp_path / "agent.safetensors")
    assert agent.fallback == fallback
    agents.save(agent, tmp_path / "again.safetensors")
    assert agents.load(tmp_path / "again.safetensors").fallback == fallback


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_a_file_that_records_no_fallback_has_the_papers(tmp_path, metadata) -> None:
    save_file(state_dict(), tmp_path / "agent.safetensors", metadata=metadata)
    assert agents.load(tmp_path / "agent.safetensors").fallback == "first"
    assert agents.load(saved(tmp_path / "agent.pth", state_dict())).fallback == "first"


@pytest.mark.parametrize("fallback", ["middle", "", "LAST"])
def test_an_unknown_fallback_is_refused(tmp_path, fallback) -> None:
    save_file(state_dict(), tmp_path / "agent.safetensors", metadata={"fallback": fallback})
    with pytest.raises(AgentError, match=rf"records the fallback '{fallback}'; known are first, last"):
        agents.load(tmp_path / "agent.safetensors")


# --- the graph -------------------------------------------------------------------------------------------------------


def test_untrained_is_a_matter_of_the_seed() -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, again, other = agents.untrained(D, 0), agents.untrained(D, 0), agents.untrained(D, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.linear1.weight, again.linear1.weight)
    assert not torch.equal(one.linear1.weight, other.linear1.weight)


@pytest.mark.parametrize(("hidden_size", "widths"), [(64, (32, 16)), (200, (1024, 256))])
def test_agent_onnx_is_the_margin_of_pytorch(tmp_path, hidden_size, widths) -> None:
    module = checkpoints.make_agent(hidden_size, seed=1, widths=widths)
    agent = agents.load(saved(tmp_path / "agent.pth", module.state_dict()))
    trace_agent(agent, hidden_size, tmp_path / "agent.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "agent.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    # Sizes of hidden states differ a lot between models, and the agent's norm takes them out.
    scales = 10 ** (4 * torch.rand(1000, 1, generator=generator) - 1)
    states = scales * torch.randn(1000, hidden_size, generator=generator)
    with torch.no_grad():
        expected = agent.margin(states).numpy()
    (found,) = session.run(["margin"], {"hidden_states": states.numpy()})
    assert found.shape == (1000,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    clear = np.abs(expected) > 1e-5
    assert clear.sum() > 990
    assert ((found > 0) == (expected > 0))[clear].all()
    assert 100 < (found > 0).sum() < 900
    for count in (0, 1, 3):
        (few,) = session.run(["margin"], {"hidden_states": states[:count].numpy()})
        np.testing.assert_allclose(few, expected[:count], rtol=1e-5, atol=1e-5)
