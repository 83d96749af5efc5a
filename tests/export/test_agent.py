"""Agent files: what is read and what is refused; the agents' graph computes what PyTorch computes."""

from __future__ import annotations

import codecs
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mara_deploy import agent as agents
from mara_deploy.agent import AgentError
from mara_runtime.training import Training
from tests import checkpoints
from tests.unit.helpers import TRAINING

D = 24
ORIGIN = Training(**TRAINING)
WIDTHS = (32, 16)


def state_dict(hidden_size: int = D, widths: tuple[int, int] = WIDTHS, seed: int = 0) -> dict[str, torch.Tensor]:
    """In the format of the released checkpoints; the module is the tests' own, not the product's."""
    agent = checkpoints.make_agent(hidden_size, seed=seed, widths=widths)
    return {name: tensor.detach().clone() for name, tensor in agent.state_dict().items()}


STATE = state_dict()


def saved(path: Path, state: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(params=[".pth", ".safetensors"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("hidden_size", "widths", "dtype"),
    [
        (24, (32, 16), torch.float32),
        (7, (5, 3), torch.float16),
        (16, (4, 9), torch.bfloat16),
        (24, (32, 16), torch.float64),
    ],
)
def test_an_agent_loads_in_float32_with_the_widths_of_its_shapes(tmp_path, suffix, hidden_size, widths, dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_dict(hidden_size, widths).items()}
    agent = agents.load(saved(tmp_path / f"agent{suffix}", state))
    assert (agent.hidden_size, agent.widths, agent.training) == (hidden_size, widths, False)
    assert agent.state_dict().keys() == state.keys()
    assert {p.dtype for p in agent.parameters()} == {torch.float32}
    assert all(torch.equal(agent.state_dict()[name], tensor.float()) for name, tensor in state.items())


def test_equal_agents_make_equal_files(tmp_path) -> None:
    agent, path = agents.untrained(D, seed=0, widths=WIDTHS), tmp_path / "agent.safetensors"
    contents = set()
    for template in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        agent.origin = Training(**{**TRAINING, "template": template})
        for _ in range(3):
            agent.save(path)
            contents.add(path.read_bytes())
    assert len(contents) == 1


def test_margin_is_accept_minus_reject_of_the_released_network(tmp_path) -> None:
    module = checkpoints.make_agent(D, seed=3)
    states = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    z = module(states)
    agent = agents.load(saved(tmp_path / "agent.pth", module.state_dict()))
    assert torch.equal(agent(states), z)
    assert torch.equal(agent.margin(states), z[:, 1] - z[:, 0])
    assert 0 < (agent.margin(states) > 0).sum() < 50


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def with_value(name: str, index: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32):
    state = {key: tensor.to(dtype, copy=True) for key, tensor in STATE.items()}
    state[name][index] = value
    return state


CRITICS = {name: tensor for name, tensor in STATE.items() if name.startswith("ln.")} | {
    f"linear{twin}{layer}.{part}": STATE[f"{source}.{part}"].clone()
    for twin in "12"
    for layer, source in (("1", "linear1"), ("2", "linear2"), ("3", "output_linear"))
    for part in ("weight", "bias")
}
SHAPES = [
    ("ln.weight", (D + 1,)),
    ("ln.bias", ()),
    ("linear1.bias", (WIDTHS[0], 1)),
    ("linear1.weight", (WIDTHS[0],)),
    ("linear1.weight", (WIDTHS[0], D, 1)),
    ("linear2.weight", (WIDTHS[1], WIDTHS[0] + 1)),
    ("output_linear.weight", (1, WIDTHS[1])),
    ("output_linear.weight", (3, WIDTHS[1])),
    ("output_linear.bias", (3,)),
]
EMPTY = {"linear1.weight": torch.ones(0, D), "linear1.bias": torch.ones(0), "linear2.weight": torch.ones(16, 0)}
REFUSED = [
    (CRITICS, "twin critics"),
    *(({k: v for k, v in STATE.items() if k != key}, f"missing {key}$") for key in STATE),
    ({**STATE, "linear3.weight": torch.zeros(2, 3)}, r"linear3\.weight has shape \[2, 3\]"),
    *(({**STATE, key: torch.zeros(shape)}, "is not a MARA agent") for key, shape in SHAPES),
    ({**STATE, **EMPTY}, "size 0"),
    *((with_value("linear2.weight", (3, 4), value), "not finite") for value in (np.nan, np.inf, -np.inf)),
    (with_value("linear1.bias", (0,), 1e300, torch.float64), "not finite"),  # beyond float32
    ({f"module.{k}": v for k, v in STATE.items()}, "prefix 'module.': .*DataParallel"),
    ({f"actor.{k}": v for k, v in STATE.items()}, "prefix 'actor.'"),
    ({**STATE, "ln.weight": torch.ones(D).long()}, r"ln\.weight is not a dense float"),
]
REFUSED_PICKLES = [
    *(
        ({**STATE, "ln.weight": tensor}, r"ln\.weight is not a dense floating-point tensor$")
        for tensor in (torch.ones(D).to_sparse(), torch.ones(D, device="meta"))
    ),
    *((content, "is not a") for content in ([torch.zeros(2)], torch.zeros(3), None, {}, {0: torch.zeros(2)})),
    *((content, "is not a") for content in ({"ln.weight": [1.0]}, {"state_dict": {"ln.weight": torch.zeros(2)}})),
]


def test_what_is_not_an_agent_is_named(tmp_path) -> None:
    for suffix, cases in ((".safetensors", REFUSED), (".pth", [*REFUSED, *REFUSED_PICKLES])):
        for index, (content, named) in enumerate(cases):
            path = saved(tmp_path / f"{index}{suffix}", content)
            with pytest.raises(AgentError, match=named):
                agents.load(path)


def test_a_folder_suggests_the_agent_inside(tmp_path) -> None:
    for path in (tmp_path / "none.pth", tmp_path, Path("nul\0.pth")):
        with pytest.raises(AgentError, match="no agent file found at"):
            agents.load(path)
    for inside in ("actor.pth", "agent.safetensors"):  # in this order: the second one is preferred
        saved(tmp_path / inside, STATE)
        with pytest.raises(AgentError, match=f"pass .*{inside}$"):
            agents.load(tmp_path)


def test_a_pickled_module_is_refused_without_torchs_colours(tmp_path) -> None:
    path = saved(tmp_path / "agent.pth", agents.Agent(D, WIDTHS))
    with pytest.raises(AgentError, match=r"pickled module .*mara_deploy\.agent\.Agent.*state_dict\(\)") as error:
        agents.load(path)
    assert "\x1b" not in str(error.value)
    path.write_bytes(pickle.dumps(_Touch(tmp_path / "proof"), protocol=2)[:-3])
    with pytest.raises(AgentError, match="cannot be read as a PyTorch state dict") as error:
        agents.load(path)
    assert "\x1b" not in str(error.value)


def test_damaged_files_are_refused(tmp_path, suffix, recwarn) -> None:
    path, rng = tmp_path / f"agent{suffix}", random.Random(0)
    good = saved(path, STATE).read_bytes()
    # What begins like a pickle, or like a zip archive, gets further into the reader.
    heads = (*[b""] * 3, *[b"\x80\x02"] * 6, good[:64])
    damaged = [head + rng.randbytes(rng.choice([1, 5, 50, 500, 5000])) for head in heads for _ in range(10)]
    damaged += [good[: len(good) * i // 12] for i in range(12)] + [pickle.dumps([1, 2], protocol=4)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(AgentError, match=r"cannot be read as|is not a plain state dict"):
            agents.load(path)
    assert [str(warning.message) for warning in recwarn] == []  # torch comments on the age of a pickle


class _Touch:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class _Bytes:
    """Unpickling this calls a function that PyTorch's reader allows."""

    def __init__(self, function: Callable[..., Any], *given: object) -> None:
        self.called = function, given

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


def test_a_small_file_takes_little_memory(tmp_path, monkeypatch) -> None:
    path = saved(tmp_path / "agent.pth", STATE)
    for compression, named in ((zipfile.ZIP_DEFLATED, "compressed entries"), (zipfile.ZIP_STORED, None)):
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "a.pth", "w", compression) as copy:
            for name in whole.namelist():
                copy.writestr(name, whole.read(name))
        if named:
            with pytest.raises(AgentError, match=named):
                agents.load(tmp_path / "a.pth")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")  # the last entry of the directory: its size is at 24
    data[at + 20 : at + 28] = 2 * (1 << 30).to_bytes(4, "little")
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(AgentError, match="larger than the file"):
        agents.load(tmp_path / "a.pth")
    for bomb in (_Bytes(bytearray, 1 << 32), _Bytes(codecs.encode, b"a", "hex")):
        for zipped in (True, False):
            torch.save({**STATE, "more": bomb}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(AgentError, match=r"its pickle makes bytes|cannot be read"):
                agents.load(tmp_path / "a.pth")
    wide = {**STATE, "linear1.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}
    with pytest.raises(AgentError, match="its tensors take more than 268,435,456 bytes"):
        agents.load(saved(tmp_path / "a.pth", wide))
    monkeypatch.setattr(agents, "MOST_BYTES", 1000)
    for name in ("agent.pth", "agent.safetensors"):
        with pytest.raises(AgentError, match=r"it has [\d,]+ bytes, and an agent has at most 1,000"):
            agents.load(saved(tmp_path / name, STATE))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("writer", "protocol"), [("torch", 2), ("torch", 4), ("pickle", 0), ("pickle", 4)])
def test_code_in_a_pickle_is_not_run(tmp_path, writer, protocol) -> None:
    proof, path = tmp_path / "proof", tmp_path / "agent.pth"
    if writer == "torch":
        torch.save({**STATE, "more": _Touch(proof)}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(_Touch(proof), protocol=protocol))
    with pytest.raises(AgentError, match="cannot be read as a PyTorch state dict"):
        agents.load(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(_Touch(proof)))
    assert proof.exists()  # it would have


# ── the recorded fallback ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_fallback_of_the_file(tmp_path) -> None:
    """Recorded, missing (the paper's), or unknown."""
    path = tmp_path / "agent.safetensors"
    for fallback in ("first", "last"):
        agent = agents.load(saved(path, STATE))
        agent.fallback, agent.origin = fallback, ORIGIN
        agent.save(path)
        again = agents.load(path)
        assert (again.fallback, again.origin) == (fallback, ORIGIN)
        again.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    for metadata in (None, {}, {"format": "pt"}):
        save_file(STATE, path, metadata=metadata)
        assert (agents.load(path).fallback, agents.load(path).origin) == ("first", None)
    assert agents.load(saved(tmp_path / "agent.pth", STATE)).fallback == "first"


METADATA = {"fallback": "last", "training": TRAINING}
BAD_METADATA = [
    ("{", "JSON"),
    ("[1]", r"mara is \[1\]"),
    ("[" * 99 + "]" * 99, "nested"),
    ('{"fallback": NaN}', "NaN"),
    *((json.dumps({**METADATA, "fallback": name}), "not one of first, last") for name in ("middle", "", "LAST")),
    (json.dumps({**METADATA, "more": 1}), r"mara\.more is not known"),
    (json.dumps({"fallback": "last"}), r"mara\.training is missing"),
    *(
        (json.dumps({**METADATA, "training": {**TRAINING, name: value}}), rf"mara\.training\.{name}")
        for name, value in (
            *((name, []) for name in TRAINING),
            *(("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("updates", -1), ("more", 1), ("episodes", True)),
        )
    ),
    *(
        (json.dumps({**METADATA, "training": {k: v for k, v in TRAINING.items() if k != name}}), rf"{name} is missing")
        for name in TRAINING
    ),
]


def test_metadata_that_cannot_be_read_is_named(tmp_path) -> None:
    path = tmp_path / "agent.safetensors"
    for text, named in BAD_METADATA:
        save_file(STATE, path, metadata={"mara": text})
        with pytest.raises(AgentError, match=named) as error:
            agents.load(path)
        assert str(error.value).startswith(str(path))
