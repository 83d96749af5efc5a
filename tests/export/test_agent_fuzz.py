"""Agent files with random damage: read or refused by an AgentError, without a traceback, a hang or much memory."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_deploy import agent as agents
from mara_deploy.agent import AgentError
from mara_runtime.training import Training
from tests import checkpoints
from tests.unit.helpers import TRAINING

SEED = 0
EXTREMES = (
    0,
    1,
    -1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    1e308,
    0.5,
    None,
    True,
    "",
    "last",
    [],
    {},
    [[]],
    "\x00\u2028",
)
MOST_KIB = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """By suffix: an agent in each form."""
    folder = tmp_path_factory.mktemp("agents")
    agent = agents.untrained(6, 0, (5, 4))
    agent.load_state_dict(checkpoints.make_agent(6, seed=0, widths=(5, 4)).state_dict())
    agent.origin = Training(**TRAINING)
    agent.save(folder / "a.safetensors")
    torch.save(agent.state_dict(), folder / "a.pth")
    torch.save(agent.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 8, len(data)))]


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice((rng.randbytes(rng.choice((1, 16, 4096))), data[at : at + rng.randrange(1, 512)]))


def overwrite(data: bytearray, rng: random.Random) -> None:
    """A size, in one of the widths that sizes have."""
    form = rng.choice(["<B", "<H", "<I", "<Q"])
    size = struct.calcsize(form)
    at = rng.randrange(max(1, min(len(data), rng.choice((16, 2048, 1 << 20))) - size))
    data[at : at + size] = struct.pack(form, rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)) % (1 << 8 * size))


BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, cut, insert, overwrite)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A value with one of its parts replaced, removed or renamed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(EXTREMES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = rng.choice(keys), value.copy()
    action = rng.random()
    if action < 0.15:
        copy.pop(key)
    elif action < 0.3 and isinstance(copy, dict):
        copy[rng.choice(("fallback", "data_offsets", "mara", "x", ""))] = copy.pop(key)
    else:
        copy[key] = mutated_json(value[key], rng)
    return copy


def with_header(data: bytes, rng: random.Random) -> bytes:
    """A .safetensors file whose header, or the metadata in it, says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.6:
        metadata = mutated_json(json.loads(header["__metadata__"][agents.METADATA]), rng)
        text = json.dumps(metadata)
        header["__metadata__"][agents.METADATA] = text if rng.random() < 0.9 else text[: rng.randrange(len(text))]
    else:
        header = mutated_json(header, rng)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + size :]


def damaged(name: str, data: bytes, rng: random.Random) -> bytes:
    if name.endswith(".safetensors") and rng.random() < 0.5:
        return with_header(data, rng)
    damage = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        if damage:
            rng.choice(BYTES)(damage, rng)
    return bytes(damage)


@pytest.mark.parametrize("count", [70, pytest.param(3500, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_damage_of_any_kind_is_read_or_refused(files, tmp_path: Path, name: str, count: int) -> None:
    path, before = tmp_path / name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = []
    for number in range(count):
        path.write_bytes(damaged(name, files[name], random.Random(f"{SEED} {name} {number}")))
        try:
            agent = agents.load(path)
        except AgentError as error:
            refused.append(str(error))
        else:
            assert agent.hidden_size * max(agent.widths) < 1 << 20, number
    assert count > len(refused) > count // 3
    assert max(map(len, refused)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
