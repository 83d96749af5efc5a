"""From a Hugging Face model and agents to bundles: a model is traced once, and `finish` makes each bundle of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mara_export import parity
from mara_export.agents import NamedAgent
from mara_export.errors import ParityError
from mara_export.folder import claimed, destination, file_entries, whole_or_absent, working_folder, write_manifest
from mara_export.graph import pipeline
from mara_export.hf.checkpoint import read_packing
from mara_export.hf.packing import quantisation_of
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import write_tokenizer
from mara_export.options import ExportOptions
from mara_export.parity.parts import run_bundle
from mara_export.progress import Progress
from mara_export.space import check_space
from mara_export.stages import Arrays, graph_name, is_written, work_folder
from mara_export.tracing import Traced, trace
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.manifest import GraphFacts, Manifest

STEP_FILE = "step.onnx"


def finish(traced: Traced, options: ExportOptions, out: Path, progress: Progress | None = None) -> Bundle:
    """Make a bundle of a traced model in the folder `out`, which must not exist or be empty.

    Raises MaraError (OptionError, ParityError); then, or when interrupted, nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    manifest = _manifest(traced, options)
    reference = _reference(traced, options)
    stages, name = traced.stages, graph_name(options)
    what = f"graph for {options.target} in {options.precision}"

    def write(into: Path) -> tuple[Any, Arrays]:
        pipeline.write(traced.graph, options, into / STEP_FILE, progress)
        return {}, {}

    with whole_or_absent(out) as folder:
        stages.write(folder, name, what, write, progress)
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
        stages.will_write(name, folder)
    return Bundle(out if out.is_dir() else destination(out), manifest)


def export(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    out: Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
    lora: ModelSource | None = None,
    work: Path | None = None,
) -> Bundle:
    """Export a frozen LLM and its agents, the default first, to the folder `out`, which must not exist or be empty.

    lora: an adapter to merge into it. work: a folder that keeps the results of finished stages, from which the same
    export goes on; removed on success. Returns the finished bundle. Raises MaraError (ModelError, ParityError); then,
    or when interrupted, nothing is left behind but `work`.
    """
    return export_all(source, agents, [(options or ExportOptions(), out)], progress, lora, work)[0]


def export_all(
    source: ModelSource,
    agents: Sequence[NamedAgent],
    bundles: Sequence[tuple[ExportOptions, Path]],
    progress: Progress | None = None,
    lora: ModelSource | None = None,
    work: Path | None = None,
) -> list[Bundle]:
    """Export several bundles of one model, one for each (options, out), from one trace. lora, work: as in `export`.

    All must have the same tracer, max_context, max_candidates, gate, eos and ignore_weights. Where a bundle fails,
    those before it stay, and an export that goes on from `work` leaves them as they are. Raises as `export` does.
    """
    progress = progress or Progress(quiet=True)
    first, first_out = bundles[0]
    for options, _ in bundles:
        for name in ("max_context", "max_candidates", "gate", "eos", "ignore_weights", "tracer"):
            if getattr(options, name) != getattr(first, name):
                raise ValueError(f"bundles of one trace must have the same {name}")
    outs = [destination(out) for _, out in bundles]
    if len({*outs}) < len(outs):
        raise OptionError("two of the bundles have the same folder: choose another --out")
    packing = read_packing(source)
    for options, _ in bundles:
        quantisation_of(options, packing)
    with contextlib.ExitStack() as claims:
        stages = None if work is None else claims.enter_context(work_folder(work, outs))
        to_do = [(options, destination(out)) for options, out in bundles if not _is_done(options, out, work)]
        check_space(source, to_do, stages)
        for out in outs:
            claims.enter_context(claimed(out, is_written(work, out)))
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
            stages=stages,
        )
        made = []
        for options, out in bundles:
            if _is_done(options, out, work):
                progress.note(f"{f'bundle {out.name}':<44} written before")
                made.append(Bundle.open(out, verify=False))
            else:
                made.append(finish(traced, options, out, progress))
        if stages is not None:
            stages.clear()
        return made


def _is_done(options: ExportOptions, out: Path, work: Path | None) -> bool:
    """Whether an earlier run of the export has written that bundle."""
    return is_written(work, out, graph_name(options))


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
    manifest = bundle.manifest
    gate = parity.gate_of(options.precision, manifest.model.experts)
    sides, parts = run_bundle(bundle, reference.cases, progress)
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
    return replace(
        manifest, agents=tuple(agents), parity=replace(report, parts=parts).to_json(), noise=report.engine_noise
    )


def _manifest(traced: Traced, options: ExportOptions) -> Manifest:
    """What is known before tokenizer, gate and checksums."""
    quantisation = quantisation_of(options, traced.graph.weights.packing)
    return Manifest(
        model=traced.model,
        agents=(),
        max_context=options.max_context or traced.max_context,
        max_candidates=options.max_candidates,
        targets=options.runs_on,
        step=GraphFacts(
            STEP_FILE,
            options.lowering,
            options.precision,
            None if quantisation is None else quantisation.to_json(),
            options.cache,
        ),
        engines=(),
        tokenizer=None,
        made_with={**traced.made_with},
        parity=None,
        structure=None,
        noise=None,
        files={},
    )
