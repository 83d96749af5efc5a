"""From a Hugging Face model and agents to bundles: `trace` once, `finish` once per bundle; `export` does both."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime

from mara_export import parity
from mara_export.agents import NamedAgent, check_size
from mara_export.errors import ParityError
from mara_export.folder import claimed, destination, file_entries, whole_or_absent, working_folder, write_manifest
from mara_export.graph import pipeline
from mara_export.graph.trace import choose_tracer, trace_agents, trace_llm
from mara_export.graph.weights import return_large_blocks
from mara_export.hf.checkpoint import eos_token_ids, load_config, load_model, reference_config
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
    write_tokenizer,
)
from mara_export.hf.weights import Weights, empty_model
from mara_export.options import ExportOptions
from mara_export.parity.structure import StructuralGate
from mara_export.progress import Progress
from mara_export.space import check_space
from mara_export.targets import TRACERS
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.errors import OptionError
from mara_runtime.manifest import GraphFacts, Manifest, ModelFacts, adapted_name
from mara_runtime.versions import installed

STEP_FILE = "step.onnx"


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
        weights = Weights(model, source.folder, adapter)
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


def finish(traced: Traced, options: ExportOptions, out: Path, progress: Progress | None = None) -> Bundle:
    """Make a bundle of a traced model in the folder `out`, which must not exist or be empty.

    Raises MaraError (OptionError, ParityError); then, or when interrupted, nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    manifest = _manifest(traced, options)
    reference = _reference(traced, options)
    with whole_or_absent(out) as folder:
        pipeline.write(traced.graph, options, folder / STEP_FILE, progress)
        if traced.tokenizer is not None:
            manifest = replace(manifest, tokenizer=write_tokenizer(traced.tokenizer, folder))
        manifest = replace(manifest, agents=tuple(each.write(folder) for each in traced.agents))
        if traced.structure is not None and options.gate:
            manifest = replace(manifest, structure=traced.structure.report(options.lowering, progress))
        if reference is not None:
            with progress.stage("parity gate"):
                manifest = _check_parity(Bundle(folder, manifest), reference, options, progress)
        manifest = replace(manifest, files=file_entries(folder))
        write_manifest(folder, manifest)
    return Bundle(out if out.is_dir() else destination(out), manifest)


def export(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    out: Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    lora: ModelSource | None = None,
) -> Bundle:
    """Export a frozen LLM and its agents, the default first, to the folder `out`, which must not exist or be empty.

    lora: an adapter to merge into it. Returns the finished bundle. Raises MaraError (ModelError, ParityError); then, or
    when interrupted, nothing is left behind.
    """
    return export_all(source, agents, [(options or ExportOptions(), out)], progress, lora)[0]


def export_all(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    bundles: Sequence[tuple[ExportOptions, Path]],
    progress: Progress | None = None,
    lora: ModelSource | None = None,
) -> list[Bundle]:
    """Export several bundles of one model, one for each (options, out), from a single trace. lora: as of `export`.

    All must have the same tracer, max_context, max_candidates, gate, eos and ignore_weights. Where a bundle fails,
    those before it stay. Raises as `export` does.
    """
    first, first_out = bundles[0]
    for options, _ in bundles:
        for name in ("max_context", "max_candidates", "gate", "eos", "ignore_weights", "tracer"):
            if getattr(options, name) != getattr(first, name):
                raise ValueError(f"bundles of one trace must have the same {name}")
    outs = [destination(out) for _, out in bundles]
    if len({*outs}) < len(outs):
        raise OptionError("two of the bundles have the same folder: choose another --out")
    check_space(source, [(options, out) for (options, _), out in zip(bundles, outs, strict=True)])
    with contextlib.ExitStack() as claims:
        for out in outs:
            claims.enter_context(claimed(out))
        folder = claims.enter_context(working_folder(first_out))
        traced = trace(
            source,
            agents,
            folder,
            max_context=first.max_context,
            max_candidates=first.max_candidates,
            gate=first.gate,
            eos=first.eos,
            ignore_weights=first.ignore_weights,
            tracer=first.tracer,
            lora=lora,
            lowerings=[options.lowering for options, _ in bundles],
            progress=progress,
        )
        return [finish(traced, options, out, progress) for options, out in bundles]


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
    return config, context, None if lora is None else read_adapter(lora, empty_model(config), source.name)


def _reference(traced: Traced, options: ExportOptions) -> parity.Reference | None:
    """What the gate compares with; None: the gate is off. Raises OptionError for options the trace does not cover."""
    context = options.max_context or traced.max_context
    if context > traced.max_context:
        raise OptionError(f"--max-context is {context}; the model was traced for {traced.max_context} tokens")
    if options.max_candidates > traced.max_candidates:
        raise OptionError(
            f"--max-candidates is {options.max_candidates}; the model was traced for {traced.max_candidates}"
        )
    if not options.gate:
        return None
    if traced.reference is None:
        raise OptionError("the model was traced without a reference, which the parity gate needs: trace with gate=True")
    longest = max(len(case.tokens) for case in traced.reference.cases)
    if longest >= context:
        raise OptionError(
            f"--max-context is {context}; the reference has prompts of {longest} tokens: trace with max_context"
        )
    return traced.reference


def _check_parity(bundle: Bundle, reference: parity.Reference, options: ExportOptions, progress: Progress) -> Manifest:
    """Run the bundle over the reference's cases. Returns its manifest with the reports.

    Raises ParityError where LLM or agents differ.
    """
    manifest, gate = bundle.manifest, parity.GATES[options.precision]
    engine = CpuEngine(bundle)
    engine.use([agent.name for agent in manifest.agents])
    perturb = None if options.quantisation is None else parity.perturber(engine)
    count = len(manifest.agents)
    found = parity.run_engine(engine, reference.cases, count, perturb)
    sides = [side for _, side in zip(progress.parts(reference.cases), found, strict=True)]
    in_float16 = options.cache == "float16"
    report = parity.compare(reference.cases, sides, gate, reference.largest_activation if in_float16 else None)
    failures, agents = list(report.failures), []
    for i, agent in enumerate(manifest.agents):
        judged = parity.compare_agent(reference.cases, sides, i, gate)
        failures += [f"agent {agent.name}: {failure}" for failure in judged.failures]
        agents.append(replace(agent, parity=judged.to_json(), noise=judged.engine_noise))
    if failures:
        raise ParityError(
            f"{manifest.model.name}: the exported graphs differ from Hugging Face eager ("
            + "; ".join(failures)
            + "); nothing was written"
        )
    return replace(manifest, agents=tuple(agents), parity=report.to_json(), noise=report.engine_noise)


def _manifest(traced: Traced, options: ExportOptions) -> Manifest:
    """What is known before tokenizer, gate and checksums."""
    quantisation = None if options.quantisation is None else options.quantisation.to_json()
    packages = ["mara-deploy", "torch", "transformers", "optimum", "optimum-onnx", "onnxscript", "onnx"]
    if traced.model.adapter is not None:
        packages.append("peft")
    return Manifest(
        model=traced.model,
        agents=(),
        max_context=options.max_context or traced.max_context,
        max_candidates=options.max_candidates,
        targets=options.runs_on,
        step=GraphFacts(STEP_FILE, options.lowering, options.precision, quantisation, options.cache),
        engines=(),
        tokenizer=None,
        made_with={
            "tracer": traced.tracer,
            "python": platform.python_version(),
            **installed(*packages),
            "onnxruntime": onnxruntime.__version__,
        },
        parity=None,
        structure=None,
        noise=None,
        files={},
    )
