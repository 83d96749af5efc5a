"""A damaged file of a run's state is refused by `--resume` in one line that names it, and everything is left alone."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mara_deploy.train.config import TrainConfig
from mara_runtime.manifest import checksum
from tests.export.training.conftest import error_of, read_run

FILES = ("run.json", "prompts.json", "log.jsonl", "checkpoint.pt", "replay/000000000000000.f16")
SEED = 7


@pytest.fixture
def out(run, tmp_path, monkeypatch) -> Path:
    """A run of two rounds, of which nothing is loaded but its state."""
    assert run("out", episodes=4, start_transitions=4).code == 0
    monkeypatch.setattr("mara_deploy.commands.train_open._open", lambda *_: pytest.fail("it was not noticed"))
    return tmp_path / "out"


def content(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def refused(out: Path, resume: Any, name: str, changed: bytes) -> str:
    """The reason for which the run is refused once a file is changed, which is then as it was."""
    file = out / name
    before = content(out)
    file.write_bytes(changed)
    line = error_of(resume(out, "--episodes", 8))
    assert content(out) == {**before, file: changed}
    file.write_bytes(before[file])
    assert f"{file} is damaged (" in line, line
    assert "--init-agent" in line
    return line


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flips", [12, pytest.param(300, marks=pytest.mark.long)])
def test_a_flipped_byte_anywhere(out, resume, name, flips) -> None:
    rng = random.Random(f"{SEED} {name}")
    whole = (out / name).read_bytes()
    for at in rng.sample(range(len(whole)), min(flips, len(whole))):
        refused(out, resume, name, whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cases", [8, pytest.param(100, marks=pytest.mark.long)])
def test_files_of_another_content(out, resume, name, cases) -> None:
    whole = (out / name).read_bytes()
    others = [b"", b"\x00", b"5", b"null", b"[]", b"{}", b'{"x": 1}\n', b"[" * 100_000, b"\xff\xfe", b"NaN", whole[:-1]]
    rng = random.Random(f"{SEED} {name}")
    for _ in range(cases):
        at, length = rng.randrange(len(whole)), rng.randrange(1, 64)
        others.append(
            whole[:at] + rng.choice((b"", rng.randbytes(length), whole[at:][:length] * 2)) + whole[at + length :]
        )
    for other in others:
        if other[: len(whole)] != whole and not (name == "run.json" and same_json(other, whole)):
            refused(out, resume, name, other)
    (out / name).unlink()
    line = error_of(resume(out, "--episodes", 8))
    assert name in line


def same_json(one: bytes, other: bytes) -> bool:
    """Whether they differ in white space at most."""
    try:
        return json.loads(one) == json.loads(other)
    except (ValueError, RecursionError):
        return False


def test_files_of_another_version(out, resume) -> None:
    """Their checksums hold."""
    run = read_run(out)
    del run["sha256"]
    config, state = run["config"], torch.load(out / "checkpoint.pt", weights_only=True)
    for other in (
        *(
            {key: value for key, value in run.items() if key != name}
            for name in ("config", "scores", "prompts", "model")
        ),
        {**run, "config": {**config, "sdart_transitions": 4}},
        {**run, "config": {**config, "top_k": -1}},
        {**run, "config": {**config, "widths": "wide"}},
        {**run, "config": 5},
        {**run, "scores": [5]},
    ):
        text = json.dumps({**other, "sha256": checksum(other)}).encode()
        assert "another version" in refused(out, resume, "run.json", text)
    for other in ({name: value for name, value in state.items() if name != "log"}, {**state, "more": 1}):
        torch.save(other, buffer := io.BytesIO())
        text = buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()
        assert "another version" in refused(out, resume, "checkpoint.pt", text)


def test_what_no_resumption_needs_may_change(run, resume, whole, tmp_path) -> None:
    """The results of a run are written anew."""
    shutil.copytree(whole, tmp_path / "out")
    results = ("agent.safetensors", "agent.pth")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in results}
    for name in results:
        (tmp_path / "out" / name).write_bytes(b"damaged")
    for file in (tmp_path / "out" / "tensorboard").iterdir():
        file.write_bytes(b"damaged")
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"episodes": 34, "sc')
    assert resume("out").code == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in results} == before
    assert TrainConfig.from_json(read_run(tmp_path / "out")["config"]).episodes == 32
