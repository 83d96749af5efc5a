"""Bundles for TensorRT, of the tiny checkpoints of tests/export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mara_export.export import Traced, finish
from mara_export.options import ExportOptions
from tests.export.conftest import agent, agent_file, checkpoint, command, reference, traced

__all__ = ["agent", "agent_file", "checkpoint", "command", "reference", "traced"]

MAX_CONTEXT, MAX_CANDIDATES = 128, 16


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Callable[..., Path]:
    """(architecture, precision="fp16", lowering="portable") → folder of a bundle without engines."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def make(architecture: str, precision: str, lowering: str) -> Path:
        options = ExportOptions(
            target="tensorrt-rtx",
            lowering=lowering,
            precision=precision,
            max_context=MAX_CONTEXT,
            max_candidates=MAX_CANDIDATES,
            gate=False,
        )
        return finish(traced(architecture), options, root / f"{architecture}-{lowering}-{precision}").folder

    return lambda architecture, precision="fp16", lowering="portable": make(architecture, precision, lowering)
