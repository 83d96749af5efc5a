"""What a caller leaves open, as the bundle and its agents have it: agents, candidates, fallback, template variables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mara_runtime.bundle import Bundle
from mara_runtime.config import TOP_K, TOP_P, DecodeConfig
from mara_runtime.errors import OptionError
from mara_runtime.manifest import AgentFacts
from mara_runtime.text import TextSide


def resolve(bundle: Bundle, config: DecodeConfig) -> DecodeConfig:
    """The configuration in force; see `AlignedDecoder.resolve`."""
    manifest = bundle.manifest
    most = manifest.max_candidates
    if config.top_k is not None and config.top_k > most and (config.align or config.sample):
        raise OptionError(f"--top-k is {config.top_k}; this bundle allows 1 to {most} (--max-candidates at export)")
    if config.stop and manifest.tokenizer is None:
        raise OptionError("--stop needs text, and this bundle holds no tokenizer")
    agent = _leading(bundle, config.agents)
    if agent is None and config.align:
        raise OptionError(f"{bundle.folder} has no agent: add one with mara-agent, or decode without: --no-align")
    agents = config.agents or ({} if agent is None else {agent.name: 1.0})
    for name in agents:
        manifest.agent(name)
    training = None if agent is None else agent.training
    top_k, top_p = (TOP_K, TOP_P) if training is None else (training.top_k, training.top_p)
    return replace(
        config,
        agents=agents or None,
        top_k=min(top_k, most) if config.top_k is None else config.top_k,
        top_p=top_p if config.top_p is None else config.top_p,
        fallback=config.fallback or ("first" if agent is None else agent.fallback),
    )


def variables(
    bundle: Bundle, side: TextSide | None, template: Mapping[str, Any] | None, agents: Iterable[str] | None
) -> dict[str, Any]:
    """The chat template's variables in force; see `AlignedDecoder.variables`."""
    agent = _leading(bundle, agents)
    training = None if agent is None else agent.training
    trained = {}
    if training is not None and training.template and side is not None and side.has_template:
        trained = {name: training.template[name] for name in training.template if name in side.template.variables}
    return {**trained, **(template or {})}


def _leading(bundle: Bundle, agents: Iterable[str] | None) -> AgentFacts | None:
    """The first of these agents, default the bundle's first; None: it has none. Raises OptionError."""
    manifest = bundle.manifest
    first = next(iter(agents or ()), None)
    return manifest.agent(first) if first is not None else next(iter(manifest.agents), None)
