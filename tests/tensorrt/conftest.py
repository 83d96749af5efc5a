"""Bundles for TensorRT, of the tiny checkpoints of tests/export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mara_export.export import finish
from mara_export.options import ExportOptions
from mara_export.tensorrt.build import BuildOptions, build
from mara_export.tracing import Traced
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError
from tests.export.conftest import agent, agent_file, checkpoint, command, reference, traced

__all__ = ["agent", "agent_file", "checkpoint", "command", "reference", "traced"]

MAX_CONTEXT, MAX_CANDIDATES = 128, 16
RTX = "tensorrt-rtx"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Callable[..., Path]:
    """(architecture, precision="fp16", lowering="portable") → folder of a bundle without engines."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def make(architecture: str, precision: str, lowering: str) -> Path:
        options = ExportOptions(
            target=RTX,
            lowering=lowering,
            precision=precision,
            max_context=MAX_CONTEXT,
            max_candidates=MAX_CANDIDATES,
            gate=False,
        )
        return finish(traced(architecture), options, root / f"{architecture}-{lowering}-{precision}").folder

    return lambda architecture, precision="fp16", lowering="portable": make(architecture, precision, lowering)


@pytest.fixture
def copied(bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Bundle]:
    """(architecture="qwen2", precision="fp16") → a bundle that a test may change."""

    def copy(architecture: str = "qwen2", precision: str = "fp16", lowering: str = "portable") -> Bundle:
        source = bundle(architecture, precision, lowering)
        return Bundle.open(shutil.copytree(source, tmp_path / source.name))

    return copy


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(bundle: Bundle, **options: Any) -> str:
    """The message with which a build is refused; the bundle is as it was."""
    before = files(bundle.folder)
    with pytest.raises(MaraError) as caught:
        build(bundle, RTX, BuildOptions(**options))
    assert files(bundle.folder) == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message
