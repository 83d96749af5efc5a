"""Bundles for TensorRT, of the tiny checkpoints of tests/export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mara_deploy.agent import Agent
from mara_export.export import export
from mara_export.graph.trace import trace_llm
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from tests import checkpoints
from tests.export.conftest import agent, agent_file, cache_folder, checkpoint, command, reference

__all__ = ["agent", "agent_file", "cache_folder", "checkpoint", "command", "reference"]

MAX_CONTEXT, MAX_CANDIDATES = 128, 16


@pytest.fixture(scope="session")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path], agent: Callable[[str], Agent]
) -> Callable[..., Path]:
    """(architecture, precision="fp16", lowering="portable") → folder of a bundle without engines."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def traced(architecture: str) -> Path:
        return trace_llm(checkpoints.load(checkpoint(architecture)), tmp_path_factory.mktemp("trace"))

    @cache
    def make(architecture: str, precision: str, lowering: str) -> Path:
        out = root / f"{architecture}-{lowering}-{precision}"
        with pytest.MonkeyPatch.context() as patch:  # the same for every precision
            patch.setattr("mara_export.export.trace_llm", lambda model, folder: traced(architecture))
            export(
                resolve_model(str(checkpoint(architecture))),
                agent(architecture),
                "an-agent",
                out,
                ExportOptions(
                    target="tensorrt-rtx",
                    lowering=lowering,
                    precision=precision,
                    max_context=MAX_CONTEXT,
                    max_candidates=MAX_CANDIDATES,
                    gate=False,
                ),
            )
        return out

    return lambda architecture, precision="fp16", lowering="portable": make(architecture, precision, lowering)
