"""An agent is added to a bundle that has its engine: the engine stays, and takes it.

NVIDIA's builder builds the engine; the double (tests/double) runs its graph with its sizes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mara_deploy import agent as agents
from mara_export.agents import NamedAgent, add_agent
from mara_export.export import finish
from mara_export.options import BuildOptions, ExportOptions
from mara_export.tensorrt.build import build
from mara_export.tracing import Traced
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines.tensorrt import TrtEngine
from tests import checkpoints, oracle
from tests.double.machine import Machine, write_engine
from tests.tensorrt.conftest import MAX_CANDIDATES, MAX_CONTEXT, RTX, files

pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")

MIXES: list[dict[str, float]] = [{"agent": 1.0}, {"wide": 1.0}, {"wide": -0.5, "agent": 1.5}]
PROMPT, TOKENS = [3, 1, 4, 1, 5, 9, 2, 6], 24
CHOICE: dict[str, Any] = {"top_k": 8, "strategy": "max_prob"}


class Mixed:
    """Agents in PyTorch, mixed, as the oracle calls one."""

    def __init__(self, agents: dict[str, Any], mix: dict[str, float]) -> None:
        self._parts = [(agents[name], part) for name, part in mix.items()]

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """(N, D) → (N, 2)"""
        margins = sum(part * agent.margin(states) for agent, part in self._parts)
        return torch.stack([torch.zeros_like(margins), margins], dim=1)


@pytest.fixture(scope="module")
def built(traced: Callable[[str], Traced], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle in float32, which the double can run on a CPU, with an engine of NVIDIA's builder."""
    options = ExportOptions(
        target=RTX,
        lowering="decomposed",
        precision="fp32",
        max_context=MAX_CONTEXT,
        max_candidates=MAX_CANDIDATES,
        gate=False,
    )
    bundle = finish(traced("qwen2"), options, tmp_path_factory.mktemp("built") / "bundle")
    return build(bundle, RTX, BuildOptions(optimisation_level=0))


def test_an_agent_is_added_without_touching_the_engine_which_decodes_with_it_and_with_a_mix(
    built: Bundle,
    reference: Callable[[str], Any],
    agent: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Bundle.open(shutil.copytree(built.folder, tmp_path / "bundle"))
    before, model, trained = files(bundle.folder), reference("qwen2"), agent("qwen2")
    made = checkpoints.make_agent(bundle.manifest.model.shape.hidden_size, seed=7, widths=(40, 24))
    save_file(made.state_dict(), tmp_path / "wide.safetensors")
    wide = agents.load(tmp_path / "wide.safetensors")
    after = add_agent(bundle, NamedAgent("wide", "wide.safetensors", wide))
    changed = {name for name, content in files(after.folder).items() if before.get(name) != content}
    assert changed == {"manifest.json", "agents/wide.safetensors"}
    assert after.manifest.engines == bundle.manifest.engines
    assert Bundle.open(after.folder) == after

    (facts,) = after.manifest.engines
    write_engine(after.path(facts.file), after.path(after.manifest.step.file), **asdict(facts))
    machine = Machine(__version__=facts.version)
    machine.install(monkeypatch)
    engine = TrtEngine(after, RTX)
    decoder = AlignedDecoder(after, engine=engine)
    answers = []
    for mix in MIXES:
        expected = oracle.decode(
            model, Mixed({"agent": trained, "wide": wide}, mix), PROMPT, eos_ids=(), max_new_tokens=TOKENS, **CHOICE
        )
        config = DecodeConfig(agents=mix, max_new_tokens=TOKENS, fallback="first", **CHOICE)
        answers.append(decoder.generate(PROMPT, config).token_ids)
        assert answers[-1] == expected.token_ids
        assert min(expected.gaps) > 1e-5
    assert len({*map(tuple, answers)}) == len(MIXES)
    engine.close()
    machine.check_given_back()
