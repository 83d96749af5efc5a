"""A Hugging Face model read, run for the gate and traced: what every bundle of it starts from."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime

from mara_export import parity
from mara_export.agents import NamedAgent, check_size
from mara_export.graph import pipeline
from mara_export.graph.trace import choose_tracer, trace_agents, trace_llm
from mara_export.graph.weights import return_large_blocks
from mara_export.hf.checkpoint import (
    eos_token_ids,
    load_config,
    load_model,
    open_stored,
    reference_config,
    takes_more_than_text,
)
from mara_export.hf.families import FAMILIES, decoder_sizes
from mara_export.hf.lora import Adapter, read_adapter
from mara_export.hf.sources import ModelSource
from mara_export.hf.supported import check_supported, check_traceable
from mara_export.hf.tokenizer import (
    check_chat_template,
    end_of_turn,
    end_tokens,
    load_tokenizer,
    template_checksum,
)
from mara_export.hf.weights import Weights, empty_model
from mara_export.parity.structure import StructuralGate
from mara_export.progress import Progress
from mara_export.stages import Arrays, Stages
from mara_export.targets import TRACERS
from mara_runtime import tensors
from mara_runtime.bundle import sha256
from mara_runtime.manifest import ModelFacts, adapted_name
from mara_runtime.tensors import CacheGroup
from mara_runtime.versions import installed

AGENTS_FILE = "agents.onnx"
_SETTINGS = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
"""Files of a model beside its weights."""


@dataclass(frozen=True)
class Traced:
    """A model, traced, and its agents. Weights stay in the folder given to `trace`, which must outlive this."""

    model: ModelFacts
    agents: Sequence[NamedAgent]
    tokenizer: Any | None
    graph: pipeline.TracedGraph
    made_with: Mapping[str, str]
    """the tracer, and {package: version}"""
    max_candidates: int
    reference: parity.Reference | None
    """Hugging Face's results for the parity gate; None: traced without"""
    structure: StructuralGate | None
    """None: traced without"""
    stages: Stages
    """where graphs are kept, too"""

    @property
    def max_context(self) -> int:
        """Longest context a bundle may have."""
        return self.graph.max_context


def trace(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    folder: Path,
    *,
    max_context: int | None = None,
    max_candidates: int = 64,
    gate: bool = True,
    eos: Sequence[str] = (),
    ignore_weights: Sequence[str] = (),
    tracer: str = TRACERS[0],
    lora: ModelSource | None = None,
    lowerings: Sequence[str] = (),
    progress: Progress | None = None,
    stages: Stages | None = None,
) -> Traced:
    """Load a model, run it for the parity gate, and trace it into `folder`, an existing directory.

    max_context, max_candidates, gate, eos, ignore_weights, tracer: as in ExportOptions. lora: an adapter to merge.
    lowerings: those of bundles to come, whose structural gate is run first. stages: of a work folder; None: nothing is
    kept. Raises ModelError, ParityError, OptionError for tokens that the tokenizer does not have and patterns without
    weights, and MaraError for a work folder that holds another export.
    """
    progress, stages = progress or Progress(quiet=True), stages or Stages(folder)
    tracer = choose_tracer(tracer)
    return_large_blocks()
    config, context, adapter = vet(source, agents, max_context, tracer, lora)
    sizes = decoder_sizes(config.to_dict(), source.name)
    if takes_more_than_text(source):
        progress.note(
            f"note: {source.name} takes more than text; its text part, {config.model_type}, is exported alone"
        )
    if config.model_type not in FAMILIES:
        progress.note(
            f"note: {config.model_type} is not on the list of tested families; the parity gate judges the export"
        )
    tokenizer = load_tokenizer(source)
    if tokenizer is not None and (why := check_chat_template(tokenizer, source.name)) is not None:
        progress.note(f"note: the chat template wants a system message (--system of mara-run): {why}")
    if adapter is not None:
        for doubt in adapter.doubts(source.name, tokenizer):
            progress.note(f"note: {doubt}")
    added = end_tokens(tokenizer, eos, sizes.vocab_size, source.name)
    with progress.stage(f"open {source.name}"):
        first = reference_config(source) if gate else config
        (folder / "converted").mkdir()
        model = load_model(source, config=first, ignore_weights=ignore_weights, streamed=folder / "converted")
        weights = Weights(model, open_stored(source), adapter)
        fingerprint = weights.fingerprint()
        if adapter is not None:
            adapter.inject(model)  # for the reference, which is not merged
    model.config.eos_token_id = config.eos_token_id  # of which the gate compares nothing
    ends = tuple(dict.fromkeys((*eos_token_ids(model, tokenizer), *added)))
    if tokenizer is not None and (end := end_of_turn(tokenizer)) is not None and end[0] not in ends:
        progress.note(
            f"note: the chat template ends an answer with {end[1]}, which is not an end token of the model: add "
            f"--eos '{end[1]}' if answers run on"
        )
    for each in agents:
        if each.agent.origin is not None:
            name = source.name if adapter is None else adapted_name(source.name, adapter.source.name)
            for doubt in each.agent.origin.doubts(name, fingerprint, template_checksum(tokenizer)):
                progress.note(f"note: the agent {each.name} may not align this model: {doubt}")
    made_with = {
        "tracer": tracer,
        "python": platform.python_version(),
        **installed("mara-deploy", "torch", "transformers", "optimum", "optimum-onnx", "onnxscript", "onnx"),
        **({} if adapter is None else installed("peft")),
        "onnxruntime": onnxruntime.__version__,
    }
    stages.begin(
        {
            "model": source.name,
            "revision": source.revision,
            "files": {file.name: sha256(file)[:16] for name in _SETTINGS for file in sorted(source.folder.glob(name))},
            "adapter": None if adapter is None else f"{adapter.source.name} {adapter.facts.sha256[:16]}",
            "weights": fingerprint,
            "agents": ", ".join(_described(each, folder) for each in agents),
            "max_context": context,
            "max_candidates": max_candidates,
            "made_with": made_with,
        }
    )
    reference = structure = None
    if gate:
        (folder / "miniature").mkdir()
        structure = StructuralGate(config, source.name, tracer, folder / "miniature", stages)
        for lowering in dict.fromkeys(lowerings):
            structure.report(lowering, progress)

        def run(_: Path) -> tuple[Any, Arrays]:
            prompts = parity.prompts(source.name, tokenizer, sizes.vocab_size, context)
            in_torch = [each.agent for each in agents]
            found = parity.run_reference(model, source.name, in_torch, prompts, max_candidates, progress)
            return found.taken_apart()

        _, facts, arrays = stages.run("reference", "run the reference (Hugging Face eager)", run, progress)
        reference = parity.Reference.put_together(facts, arrays)

    def trace_all(into: Path) -> tuple[Any, Arrays]:
        positions = context + tensors.spare_slots(max_candidates)
        llm, rotary, caches = trace_llm(empty_model(config), into, tracer, source.name, context, positions)
        trace_agents(sizes.shape.hidden_size, into / AGENTS_FILE)
        tables = {f"{i}.{part}": table[part] for i, table in enumerate(rotary.values()) for part in (0, 1)}
        return {"llm": llm.name, "rotary": [*rotary], "caches": [astuple(group) for group in caches]}, tables

    graphs, facts, tables = stages.run("trace", "trace the LLM", trace_all, progress)
    shape = replace(sizes.shape, caches=tuple(CacheGroup(*group) for group in facts["caches"]))
    rotary = {tuple(key): (tables[f"{i}.0"], tables[f"{i}.1"]) for i, key in enumerate(facts["rotary"])}
    return Traced(
        ModelFacts(
            source=source.name,
            revision=source.revision,
            adapter=None if adapter is None else adapter.facts,
            architecture=config.model_type,
            tested=config.model_type in FAMILIES,
            shape=shape,
            intermediate_size=max(layer.intermediate_size for layer in sizes.layers),
            experts=max(layer.experts for layer in sizes.layers),
            tied=sizes.tied,
            eos_token_ids=ends,
            weights=fingerprint,
            ignored_weights=tuple(ignore_weights),
        ),
        agents,
        tokenizer,
        pipeline.TracedGraph(graphs / facts["llm"], weights, graphs / AGENTS_FILE, shape, rotary, context),
        made_with,
        max_candidates,
        reference,
        structure,
        stages,
    )


def _described(named: NamedAgent, folder: Path) -> str:
    """An agent and its checksum. folder: for a temporary file."""
    named.agent.save(folder / "agent.safetensors")
    return f"{named.name} ({named.source}, {sha256(folder / 'agent.safetensors')[:16]})"


def vet(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    max_context: int | None = None,
    tracer: str = TRACERS[0],
    lora: ModelSource | None = None,
) -> tuple[Any, int, Adapter | None]:
    """Reject, from the model's configuration alone, what cannot be exported.

    max_context, tracer: as in ExportOptions; lora: an adapter to merge. Returns the configuration, the context length
    and the adapter. Raises ModelError and OptionError.
    """
    config = load_config(source)
    context = check_supported(config, source.name, max_context)
    check_traceable(config, source.name, choose_tracer(tracer))
    for each in agents:
        check_size(each, config.hidden_size, source.name)
    return config, context, None if lora is None else read_adapter(lora, source, config)
