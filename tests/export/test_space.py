"""An export is refused before it starts where disk or memory cannot hold it, in one line, with nothing written."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from mara_export import space
from mara_export.options import ExportOptions

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
