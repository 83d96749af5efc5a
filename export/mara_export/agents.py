"""A bundle's agents: what the export takes, and agents that are added and removed later.

Agents are data: adding or removing one changes its file and the manifest, and no graph, weight or engine. Only the gate
needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mara_export import parity
from mara_export.errors import ModelError, ParityError
from mara_export.folder import changing, entry_of, folder_inside, switch, unique_name
from mara_export.parity import Case, Rows, Side
from mara_export.progress import Progress
from mara_export.targets import CPU_DTYPES
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.json_reader import shortened
from mara_runtime.manifest import AgentFacts, Manifest, is_agent_name
from mara_runtime.text import TextSide
from mara_runtime.training import Training

if TYPE_CHECKING:
    import torch

GATE = "fp32"
"""Agents compute in float32, whatever the LLM's precision."""


class ExportableAgent(Protocol):
    """What an agent must offer: its margins in PyTorch, these facts, and its file."""

    fallback: str
    origin: Training | None

    @property
    def hidden_size(self) -> int: ...  # noqa: D102

    @property
    def widths(self) -> tuple[int, int]: ...  # noqa: D102

    def margin(self, states: torch.Tensor) -> torch.Tensor: ...  # noqa: D102

    def save(self, path: Path) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class NamedAgent:
    """An agent, and what it is called in a bundle."""

    name: str
    source: str
    """what the manifest says of where it came from; never a path of this machine"""
    agent: ExportableAgent

    def __post_init__(self) -> None:
        """Raise OptionError for a name that an agent may not have."""
        if not is_agent_name(self.name):
            raise OptionError(
                f"an agent cannot be called {shortened(self.name)}: give it a name of 1 to 64 of the characters A-Z, "
                "a-z, 0-9, '.', '_' and '-' that begins with a letter or digit"
            )

    def write(self, folder: Path) -> AgentFacts:
        """Write its file into a bundle's folder. Returns what the manifest says of it, before its gate."""
        file = f"agents/{self.name}.safetensors"
        (folder / file).parent.mkdir(exist_ok=True)
        self.agent.save(folder / file)
        return AgentFacts(
            name=self.name,
            file=file,
            source=self.source,
            hidden_size=self.agent.hidden_size,
            widths=self.agent.widths,
            fallback=self.agent.fallback,
            state="last hidden state after the final norm",
            training=self.agent.origin,
            parity=None,
            noise=None,
        )


def check_size(named: NamedAgent, hidden_size: int, model: str) -> None:
    """Raise ModelError for an agent of another hidden size than the model's. model: its source."""
    if named.agent.hidden_size != hidden_size:
        raise ModelError(
            f"the agent {named.source} was trained for a hidden size of {named.agent.hidden_size}; "
            f"{model} has {hidden_size}: use an agent trained for this model"
        )


def add_agent(
    bundle: Bundle,
    named: NamedAgent,
    *,
    gate: bool = True,
    replace: bool = False,
    default: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Add an agent to a bundle, after its gate.

    replace: it may take the place of one of its name. default: put it first. Returns the bundle with its new manifest.
    Raises MaraError (OptionError, ModelError, EngineError, ParityError); then, and when interrupted, the bundle is as
    it was.
    """
    progress = progress or Progress(quiet=True)
    _check(bundle.manifest, named, replace)
    if gate and bundle.manifest.step.cache not in CPU_DTYPES:
        raise OptionError(
            f"{bundle.folder} computes in {bundle.manifest.step.cache}, which ONNX Runtime on a CPU cannot run, so the "
            "gate cannot either: add the agent with --no-gate"
        )
    with folder_inside(bundle, "agents") as staged:
        facts = named.write(staged)
        for doubt in replaced(bundle.manifest, agents=(facts,)).doubts(named.name):
            progress.note(f"note: the agent {named.name} may not align this model: {doubt}")
        if gate:
            with progress.stage("parity gate"):
                facts = _gate(bundle, named, facts, staged, progress)
        with changing(bundle, "its agent was checked: add the agent again") as before:
            _check(before, named, replace)
            entry = entry_of(staged / facts.file)
            # no listed file changes, so that the manifest is the one switch
            file = unique_name(facts.file, entry) if facts.file in before.files else facts.file
            agents = {agent.name: agent for agent in before.agents}
            agents[named.name] = replaced(facts, file=file)
            ordered = sorted(agents.values(), key=lambda agent: default and agent.name != named.name)
            after = replaced(before, agents=tuple(ordered))
            return switch(bundle.folder, before, after, {file: (staged / facts.file, entry)})


def remove_agent(bundle: Bundle, name: str) -> Bundle:
    """Remove an agent from a bundle; the last one may go, too. Needs no PyTorch.

    Returns the bundle with its new manifest. Raises MaraError; then the bundle is as it was.
    """
    with changing(bundle, f"{name} was removed: remove it again") as before:
        kept = tuple(agent for agent in before.agents if agent.name != name)
        if len(kept) == len(before.agents):
            known = ", ".join(agent.name for agent in before.agents)
            raise OptionError(f"NAME is {shortened(name)}; the bundle has {known or 'no agent'}")
        return switch(bundle.folder, before, replaced(before, agents=kept), {})


def _check(manifest: Manifest, named: NamedAgent, replace: bool) -> None:
    """Reject what cannot be added to a bundle."""
    name, widths = named.name, named.agent.widths
    check_size(named, manifest.model.shape.hidden_size, manifest.model.source)
    if not replace and name in {agent.name for agent in manifest.agents}:
        raise OptionError(f"the bundle has an agent {name} already: give --replace, or another --name")
    for engine in manifest.engines:
        most = engine.agent_widths
        if widths[0] > most[0] or widths[1] > most[1]:
            raise EngineError(
                f"the agent {name} has hidden layers of {widths[0]} and {widths[1]}, and {engine.file} takes at most "
                f"{most[0]} and {most[1]}: export a bundle with this agent, and build its engine with mara-build "
                f"--target {engine.target}"
            )


def _gate(bundle: Bundle, named: NamedAgent, facts: AgentFacts, staged: Path, progress: Progress) -> AgentFacts:
    """Compare the agent in the bundle's graph with the agent in PyTorch, on the graph's own hidden states.

    Returns the facts with report and noise. Raises ParityError.
    """
    manifest, gate = bundle.manifest, parity.GATES[GATE]
    here = replaced(facts, file=(staged / facts.file).relative_to(bundle.folder).as_posix())
    engine = CpuEngine(Bundle(bundle.folder, replaced(manifest, agents=(here,))))
    engine.use([named.name])
    own = [*_run(bundle, engine, progress)]
    every = [_every_row(case.reference) for case in own]
    in_torch = [replaced(case, reference=_in_torch(named, side.rows)) for case, side in zip(own, every, strict=True)]
    report = parity.compare_agent(in_torch, every, 0, gate)
    if report.failures:
        raise ParityError(
            f"the agent {named.name} has other margins in the graph of {bundle.folder} than in PyTorch "
            f"({'; '.join(report.failures)}); the bundle was not changed"
        )
    moved = parity.compare_agent(own, [case.reference for case in own], 0, gate)  # by the width of a pass
    report = replaced(report, noise=moved.noise, level_flips=moved.level_flips)
    return replaced(facts, parity=report.to_json(), noise=report.engine_noise)


def _run(bundle: Bundle, engine: CpuEngine, progress: Progress) -> Iterator[Case]:
    """The gate's prompts with their best next tokens, each with what the engine makes of it, one agent in use."""
    manifest, tokenizer = bundle.manifest, None
    perturb = None if manifest.step.quantisation is None else parity.perturber(engine)
    if manifest.tokenizer is not None:
        text = TextSide(bundle)
        tokenizer = lambda prompt: {"input_ids": text.encode_raw(prompt)}  # noqa: E731 - as transformers' are called
    model = manifest.model
    prompts = parity.prompts(model.source, tokenizer, model.shape.vocab_size, manifest.max_context)
    for tokens, is_text in progress.parts(prompts):
        best = engine.run(Pass.prefill(tokens, 0, last=True)).top_ids[0]
        siblings = best[: min(parity.SIBLINGS, manifest.max_candidates)].tolist()
        side = parity.run_rows(engine, tokens, siblings, 1, perturb)
        perturbed = None if side.perturbed is None else _slim(side.perturbed)
        yield Case(tokens, siblings, Side(_slim(side.rows), _slim(side.recomputed), perturbed), is_text)


def _slim(rows: Rows) -> Rows:
    """Without logits, of which an agent knows nothing: they take hundreds of megabytes."""
    return replaced(rows, logits=np.zeros((len(rows.hidden), 0), np.float32))


def _every_row(side: Side) -> Side:
    """All rows of a side as rows to compare: each is right if the agent is right about its own hidden state."""
    rows = Rows.concatenate([side.rows, side.recomputed, *([] if side.perturbed is None else [side.perturbed])])
    return Side(rows, rows.tail(parity.SIBLINGS))


def _in_torch(named: NamedAgent, rows: Rows) -> Side:
    """The agent's margins in PyTorch on these rows' hidden states; the last ones are recomputed, one at a time."""
    import torch

    hidden = torch.from_numpy(rows.hidden)
    last = hidden[-parity.SIBLINGS :]
    alone = [parity.margins_of([named.agent], state[None]) for state in last]
    return Side(
        replaced(rows, margins=parity.margins_of([named.agent], hidden)),
        replaced(rows.tail(len(last)), margins=np.concatenate(alone)),
    )
