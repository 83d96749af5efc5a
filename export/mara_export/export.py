"""From a Hugging Face model and an agent to a bundle: the main path, top to bottom in `export`."""

from __future__ import annotations

import gc
import platform
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import onnx
import onnxruntime
import torch

from mara_export import parity
from mara_export.errors import ModelError, ParityError
from mara_export.folder import file_entries, whole_or_absent, write_manifest
from mara_export.graph.grouped import Tables
from mara_export.graph.lower import lower
from mara_export.graph.narrow import narrow
from mara_export.graph.qdq import check_blocks, quantise_qdq
from mara_export.graph.quantise import halve, quantise
from mara_export.graph.step import join
from mara_export.graph.trace import rotary_tables, trace_agent, trace_llm
from mara_export.graph.weights import Weights, load, return_large_blocks, tie_head
from mara_export.hf.checkpoint import eos_token_ids, load_config, load_model
from mara_export.hf.families import check_supported, model_shape
from mara_export.hf.sources import ModelSource
from mara_export.hf.tokenizer import check_chat_template, load_tokenizer, write_tokenizer
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.ort import CpuEngine
from mara_runtime.errors import first_line
from mara_runtime.manifest import AgentFacts, GraphFacts, Manifest, ModelFacts, TokenizerFacts
from mara_runtime.versions import installed

STEP_FILE = "step.onnx"


class ExportableAgent(Protocol):
    """What an agent must offer: a torch module (N, D) → (N, 2) with these facts."""

    fallback: str

    @property
    def hidden_size(self) -> int: ...  # noqa: D102

    @property
    def widths(self) -> tuple[int, int]: ...  # noqa: D102

    def margin(self, states: torch.Tensor) -> torch.Tensor: ...  # noqa: D102


def export(
    source: ModelSource,
    agent: ExportableAgent,
    agent_name: str,
    out: Path,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a frozen LLM and its agent to the folder `out`, which must not exist or be empty.

    Returns the finished bundle. Raises MaraError (ModelError, ParityError); then, or when interrupted, nothing is left
    behind.
    """
    options, progress = options or ExportOptions(), progress or Progress(quiet=True)
    return_large_blocks()
    config, context = vet(source, agent, agent_name, options.max_context)
    shape = model_shape(config)

    with whole_or_absent(out) as folder:
        tokenizer = load_tokenizer(source)
        if tokenizer is not None:
            check_chat_template(tokenizer, source.name)
        with progress.stage(f"load {source.name}"):
            model = load_model(source)
        eos = eos_token_ids(model, tokenizer)
        if options.gate:
            with progress.stage("run the reference (Hugging Face eager)"):
                prompts = _gate_prompts(source, tokenizer, shape.vocab_size, context)
                cases, largest = _reference(model, source.name, agent, prompts, options.max_candidates, progress)

        with tempfile.TemporaryDirectory(prefix="trace.", dir=folder) as name:
            scratch = Path(name)
            with progress.stage("trace the LLM"):
                rotary = rotary_tables(model, context + tensors.spare_slots(options.max_candidates), source.name)
                graph, weights = load(trace_llm(model, scratch))
                del model
                gc.collect()  # it sits in cycles
            _rewrite(graph, weights, shape, rotary, options, progress)
            with progress.stage("join with the agent, and write"):
                trace_agent(cast(torch.nn.Module, agent), agent.hidden_size, scratch / "agent.onnx")
                traced, on_gpu = onnx.load(scratch / "agent.onnx"), options.target != "cpu"
                join(graph, traced, shape, options.max_candidates, cache=options.cache, always_head=on_gpu)
                weights.save(graph, folder / STEP_FILE)
                del graph, weights

        manifest = _manifest(
            ModelFacts(source.name, source.revision, config.model_type, shape, eos),
            AgentFacts(
                agent_name, agent.hidden_size, agent.widths, agent.fallback, "last hidden state after the final norm"
            ),
            None if tokenizer is None else write_tokenizer(tokenizer, folder),
            context,
            options,
        )
        if options.gate:
            with progress.stage("parity gate"):
                report = _compare(Bundle(folder, manifest), cases, largest, options, progress)
            manifest = replace(manifest, parity=report.to_json(), noise=report.engine_noise)
        manifest = replace(manifest, files=file_entries(folder))
        write_manifest(folder, manifest)
    return Bundle(out, manifest)


def vet(
    source: ModelSource, agent: ExportableAgent, agent_name: str, max_context: int | None = None
) -> tuple[Any, int]:
    """Refuse, from the model's configuration alone, what cannot be exported. Returns it and the context length.

    max_context: as in ExportOptions. Raises ModelError.
    """
    config = load_config(source)
    context = check_supported(config, source.name, max_context)
    if agent.hidden_size != config.hidden_size:
        raise ModelError(
            f"the agent {agent_name} was made for a hidden size of {agent.hidden_size}; "
            f"{source.name} has {config.hidden_size}: take an agent trained for this model"
        )
    return config, context


_Prompts = list[tuple[list[int], bool]]
"""Token ids, and whether they are text."""


def _gate_prompts(source: ModelSource, tokenizer: Any, vocab_size: int, context: int) -> _Prompts:
    """For the parity gate, each short enough for a sibling to follow."""
    count = min(parity.PROMPT_TOKENS, context - 1)
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"][:count] for text in parity.TEXTS]
    prompts = [(ids, True) for ids in texts if ids]
    largest = max((max(ids) for ids, _ in prompts), default=0)
    if largest >= vocab_size:
        raise ModelError(f"{source.name}: its tokenizer gives id {largest}, its vocabulary ends at {vocab_size - 1}")
    generator = torch.Generator().manual_seed(0)
    while len(prompts) < parity.PROMPTS:
        prompts.append((torch.randint(vocab_size, (count,), generator=generator).tolist(), False))
    return prompts


def _reference(
    model: Any, name: str, agent: ExportableAgent, prompts: _Prompts, max_candidates: int, progress: Progress
) -> tuple[list[parity.Case], float]:
    """What Hugging Face makes of the prompts, and the largest number that a module of the model met.

    Raises ModelError where it makes nothing of them.
    """
    with parity.watched(model) as largest:
        try:
            cases = [
                parity.reference_case(model, agent, ids, max_candidates, is_text)
                for ids, is_text in progress.parts(prompts)
            ]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of a model that loads
            raise ModelError(f"{name} cannot be run by transformers: {first_line(error)}") from error
    rows = [case.reference.rows for case in cases]
    if not all(np.isfinite(r.hidden).all() and np.isfinite(r.logits).all() for r in rows):
        raise ModelError(f"{name} gives numbers that are not finite, in transformers, too: its weights are damaged")
    if not all(np.isfinite(r.margins).all() for r in rows):
        raise ModelError(f"the agent gives margins that are not finite on {name}: its weights are damaged")
    return cases, largest()


def _rewrite(
    graph: onnx.ModelProto,
    weights: Weights,
    shape: tensors.ModelShape,
    rotary: Tables,
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Make of a traced LLM, in place, one for the target's engine, in the precision asked for."""
    with progress.stage(f"lower to {options.lowering!r}"):
        lower(graph, weights, shape, options.lowering, rotary)
    if options.quantisation is not None:
        if options.lowering != "ort":
            check_blocks(graph, weights, options)
        with progress.stage(f"quantise to {options.precision}"):
            by_blocks = quantise if options.lowering == "ort" else quantise_qdq
            by_blocks(graph, weights, options.quantisation, progress.parts)
    else:
        tie_head(graph.graph, weights)
    if options.cache != "float32":
        narrow(graph.graph, weights, options.cache)
    elif options.precision == "fp16":
        halve(graph.graph, weights)
    weights.drop_unused()


def _compare(
    bundle: Bundle, cases: list[parity.Case], largest: float, options: ExportOptions, progress: Progress
) -> parity.Report:
    """Run the bundle's graph over what the reference was run over. Raises ParityError where they differ."""
    engine = CpuEngine(bundle)
    disturb = None if options.quantisation is None else parity.disturber(engine)
    sides = [parity.engine_side(engine, case, disturb) for case in progress.parts(cases)]
    in_float16 = options.cache == "float16"
    report = parity.compare(cases, sides, parity.GATES[options.precision], largest if in_float16 else None)
    if report.failures:
        raise ParityError(
            f"{bundle.manifest.model.source}: the exported graphs differ from Hugging Face eager ("
            + "; ".join(report.failures)
            + "); nothing was written"
        )
    return report


def _manifest(
    model: ModelFacts, agent: AgentFacts, tokenizer: TokenizerFacts | None, context: int, options: ExportOptions
) -> Manifest:
    """What is known before the gate and the checksums of the files."""
    how = options.quantisation
    top = tensors.top_tokens(options.max_candidates, model.shape.vocab_size)
    return Manifest(
        model=model,
        agent=agent,
        max_context=context,
        max_candidates=options.max_candidates,
        targets=options.runs_on,
        step=GraphFacts(
            STEP_FILE, options.lowering, options.precision, None if how is None else how.to_json(), options.cache
        ),
        engines=(),
        tokenizer=tokenizer,
        made_with=_versions(),
        parity=None,
        noise=None,
        files={},
        io={
            "inputs": [asdict(t) for t in tensors.step_inputs(model.shape, options.cache)],
            "outputs": [asdict(t) for t in tensors.step_outputs(model.shape, top, options.cache)],
        },
    )


def _versions() -> dict[str, str]:
    packages = ("mara-deploy", "torch", "transformers", "optimum", "optimum-onnx", "onnx")
    return {"python": platform.python_version(), **installed(*packages), "onnxruntime": onnxruntime.__version__}
