"""An export is refused before it starts where disk or memory cannot hold it, in one line, with nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mara_export import space
from mara_export.errors import ModelError
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.stages import Stages, graph_name

SIZES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.125, "int4": 0.625}
"""Bytes for each number of a weight; scales of blocks of 32 included."""


@pytest.mark.parametrize(("precision", "size"), SIZES.items())
def test_the_estimate_of_a_bundle(precision: str, size: float) -> None:
    options = ExportOptions(precision=precision, **({"block_size": 32} if precision.startswith("int") else {}))
    assert space.bundle_bytes(1 << 20, options) == size * (1 << 20)


@pytest.mark.parametrize(
    ("free", "line"),
    [
        ({"disk": 1000}, "qwen2 needs about 0.0 GB of disk where out goes, and 0.0 GB are free: free some, or"),
        ({"memory": 1000}, "qwen2 needs about 0.0 GB of memory to be exported, for its largest weight, and 0.0 GB are"),
    ],
)
def test_what_does_not_fit_is_refused(command, checkpoint, tmp_path, monkeypatch, free: dict[str, int], line) -> None:
    plenty: dict[str, Any] = {"disk": 1 << 40, "memory": 1 << 40, **free}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plenty["disk"]))
    monkeypatch.setattr(space, "free_memory", lambda: plenty["memory"])
    outcome = command("export", "--model", checkpoint("qwen2"), "--out", tmp_path / "out")
    assert line in outcome.refusal("mara-export")
    assert not any(tmp_path.iterdir())


def test_a_graph_in_the_work_folder_is_there_already(checkpoint, tmp_path, monkeypatch) -> None:
    """On the same disk it becomes the bundle's; on another one, the bundle needs its own."""
    source, options, kept = resolve_model(str(checkpoint("qwen2"))), ExportOptions(gate=False), 100_000
    size = space.bundle_bytes(sum(space._sizes(source)), options)
    (tmp_path / "work" / graph_name(options)).mkdir(parents=True)
    (tmp_path / "work" / graph_name(options) / "step.onnx.data").write_bytes(bytes(kept))
    here, elsewhere = tmp_path, Path("/proc")
    monkeypatch.setattr(space, "free_memory", lambda: None)

    def check(out: Path, free: int, free_elsewhere: int = 0) -> None:
        found = {elsewhere: free_elsewhere}
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=found.get(place, free)))
        space.check_space(source, [(options, out)], Stages(tmp_path / "work", kept=True))

    check(here / "out", size - kept)
    check(elsewhere / "out", size - kept, size)
    with pytest.raises(ModelError, match=r"of disk where work goes, and .* choose another --work"):
        check(here / "out", size - kept - 1)
    with pytest.raises(ModelError, match=r"of disk where out goes, and .* choose another --out"):
        check(elsewhere / "out", size - kept, size - 1)
