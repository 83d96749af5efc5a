"""Bundles for CUDA, and stand-ins of its libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from mara_deploy.demo import export_demo
from mara_export.export import finish
from mara_export.options import ExportOptions
from mara_export.tracing import Traced
from tests.cuda.fake import FakeCuda, why_not
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, agent, agent_file, checkpoint, reference, traced

__all__ = ["agent", "agent_file", "checkpoint", "reference", "traced"]


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    return FakeCuda(tmp_path_factory.mktemp("fake-cuda"))


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, traced: Callable[[str], Traced]) -> Callable[[str, str], Path]:
    """(architecture or "demo", precision) → folder of a bundle that passed the gate."""
    root = tmp_path_factory.mktemp("bundles")

    @cache
    def make(architecture: str, precision: str) -> Path:
        out = root / f"{architecture}-{precision}"
        if architecture == "demo":
            return export_demo(out, quiet=True, target="cuda", precision=precision).folder
        options = ExportOptions(
            target="cuda", precision=precision, max_context=MAX_CONTEXT, max_candidates=MAX_CANDIDATES
        )
        return finish(traced(architecture), options, out).folder

    return make
