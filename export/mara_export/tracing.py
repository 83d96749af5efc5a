"""A Hugging Face model read, run for the gate and traced: what every bundle of it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from mara_export.targets import TRACERS
from mara_runtime import tensors
from mara_runtime.manifest import ModelFacts, adapted_name


@dataclass(frozen=True)
class Traced:
    """A model, traced, and its agents. Weights stay in the folder given to `trace`, which must outlive this."""

    model: ModelFacts
    agents: Sequence[NamedAgent]
    tokenizer: Any | None
    graph: pipeline.TracedGraph
    tracer: str
    max_candidates: int
    reference: parity.Reference | None
    """Hugging Face's results for the parity gate; None: traced without"""
    structure: StructuralGate | None
    """None: traced without"""

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
) -> Traced:
    """Load a model, run it for the parity gate, and trace it into `folder`, an existing directory.

    max_context, max_candidates, gate, eos, ignore_weights, tracer: as in ExportOptions. lora: an adapter to merge.
    lowerings: those of bundles to come, whose structural gate is run first. Raises ModelError, ParityError, and
    OptionError for tokens that the tokenizer does not have and patterns without weights.
    """
    progress = progress or Progress(quiet=True)
    tracer = choose_tracer(tracer)
    return_large_blocks()
    config, context, adapter = vet(source, agents, max_context, tracer, lora)
    sizes = decoder_sizes(config.to_dict(), source.name)
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
    reference = structure = None
    if gate:
        (folder / "miniature").mkdir()
        structure = StructuralGate(config, source.name, tracer, folder / "miniature")
        for lowering in dict.fromkeys(lowerings):
            structure.report(lowering, progress)
        with progress.stage("run the reference (Hugging Face eager)"):
            prompts = parity.prompts(source.name, tokenizer, sizes.vocab_size, context)
            in_torch = [each.agent for each in agents]
            reference = parity.run_reference(model, source.name, in_torch, prompts, max_candidates, progress)
    with progress.stage("trace the LLM"):
        positions = context + tensors.spare_slots(max_candidates)
        llm, rotary, caches = trace_llm(empty_model(config), folder, tracer, source.name, context, positions)
        shape = replace(sizes.shape, caches=caches)
        trace_agents(shape.hidden_size, folder / "agents.onnx")
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
        pipeline.TracedGraph(llm, weights, folder / "agents.onnx", shape, rotary, context),
        tracer,
        max_candidates,
        reference,
        structure,
    )


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
