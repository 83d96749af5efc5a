"""From a Hugging Face model and an agent to a bundle: the main path, top to bottom in `export`."""

from __future__ import annotations

import gc
import platform
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import onnxruntime
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from mara_export import parity
from mara_export.architectures import check_supported, model_shape
from mara_export.checkpoint import eos_token_ids, from_pretrained, load_model
from mara_export.errors import ModelError, ParityError
from mara_export.folder import whole_or_absent
from mara_export.lower import LOWERINGS, lower
from mara_export.progress import Progress
from mara_export.quantise import PRECISIONS, Quantisation, halve, quantise
from mara_export.sources import ModelSource
from mara_export.step import join
from mara_export.tokenizer import load_tokenizer, write_tokenizer
from mara_export.trace import rotary_tables, trace_agent, trace_llm
from mara_export.weights import Weights, load, return_large_blocks, tie_head
from mara_runtime import tensors
from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import OptionError
from mara_runtime.manifest import (
    MANIFEST_FILE,
    AgentFacts,
    FileEntry,
    GraphFacts,
    Manifest,
    ModelFacts,
)
from mara_runtime.ort_engine import OrtEngine

STEP_FILE = "step.onnx"
MAX_CANDIDATES = 1024
"""More siblings than this would make the mask of one pass larger than the model's own work."""


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
    *,
    lowering: str = "ort",
    precision: str = "fp32",
    quantisation: Quantisation | None = None,
    max_context: int | None = None,
    max_candidates: int = 64,
    gate: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a frozen LLM and its agent to the folder `out`, which must not exist or be empty.

    precision: of the LLM's weights, one of PRECISIONS; quantisation: how int8 and int4 are made, None for the defaults;
    max_context: tokens of prompt and answer, None for 4096 or the model's own if smaller; max_candidates: of a
    position; gate: compare with Hugging Face eager before anything is kept. Returns the finished bundle.
    Raises MaraError (ModelError, ParityError, OptionError); then, or when interrupted, nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    return_large_blocks()
    how = _check_options(lowering, precision, quantisation, max_candidates)
    config, context = vet(source, agent, agent_name, max_context)
    shape = model_shape(config)

    with whole_or_absent(out) as folder:
        tokenizer = load_tokenizer(source.folder)
        with progress.stage(f"load {source.name}"):
            model = load_model(source)
        eos = eos_token_ids(model, tokenizer)
        if gate:
            with progress.stage("run the reference (Hugging Face eager)"):
                prompts = _gate_prompts(source, tokenizer, shape.vocab_size, context)
                cases = [
                    parity.reference_case(model, agent, ids, max_candidates, is_text)
                    for ids, is_text in progress.parts(prompts)
                ]
        with tempfile.TemporaryDirectory(prefix="trace.", dir=folder) as name:
            scratch = Path(name)
            with progress.stage("trace the LLM"):
                rotary = rotary_tables(model, context + tensors.spare_slots(max_candidates))
                graph, weights = load(trace_llm(model, scratch))
                del model
                gc.collect()  # it sits in cycles
            with progress.stage(f"lower to {lowering!r}"):
                lower(graph, weights, shape, lowering, rotary)
            if how is not None:
                with progress.stage(f"quantise to {precision}"):
                    quantise(graph, weights, how, progress.parts)
            else:
                tie_head(graph.graph, weights)
                if precision == "fp16":
                    halve(graph.graph, weights)
            weights.drop_unused()
            with progress.stage("join with the agent, and write"):
                trace_agent(cast(torch.nn.Module, agent), agent.hidden_size, scratch / "agent.onnx")
                join(graph, onnx.load(scratch / "agent.onnx"), shape, max_candidates)
                Weights(graph.graph, scratch).save(graph, folder / STEP_FILE)
                del graph, weights

        top = tensors.top_tokens(max_candidates, shape.vocab_size)
        manifest = Manifest(
            model=ModelFacts(source.name, source.revision, config.model_type, shape, eos),
            agent=AgentFacts(
                agent_name, agent.hidden_size, agent.widths, agent.fallback, "last hidden state after the final norm"
            ),
            max_context=context,
            max_candidates=max_candidates,
            targets=("cpu",),
            step=GraphFacts(STEP_FILE, lowering, precision, None if how is None else how.to_json()),
            tokenizer=None if tokenizer is None else write_tokenizer(tokenizer, folder),
            made_with=_versions(),
            parity=None,
            noise=None,
            files={},
            io={
                "inputs": [asdict(t) for t in tensors.step_inputs(shape)],
                "outputs": [asdict(t) for t in tensors.step_outputs(shape, top)],
            },
        )
        if gate:
            with progress.stage("parity gate"):
                engine = OrtEngine(Bundle(folder, manifest))
                report = parity.compare(
                    cases,
                    [parity.engine_side(engine, case) for case in progress.parts(cases)],
                    parity.GATES[precision],
                )
                del engine
            if report.failures:
                raise ParityError(
                    f"{source.name}: the exported graphs differ from Hugging Face eager ("
                    + "; ".join(report.failures)
                    + "); nothing was written"
                )
            manifest = replace(manifest, parity=report.to_json(), noise=report.engine_noise())
        manifest = replace(manifest, files=_file_entries(folder))
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(out, manifest)


def vet(
    source: ModelSource, agent: ExportableAgent, agent_name: str, max_context: int | None = None
) -> tuple[Any, int]:
    """Refuse, from the model's configuration alone, what cannot be exported. Returns it and the context length.

    Raises ModelError and OptionError.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if max_context is not None and max_context < 2:
        raise OptionError(f"--max-context is {max_context}; it must be at least 2")
    config = from_pretrained(AutoConfig, source)
    context = check_supported(config, source.name, max_context)
    if agent.hidden_size != config.hidden_size:
        raise ModelError(
            f"the agent {agent_name} was made for a hidden size of {agent.hidden_size}; "
            f"{source.name} has {config.hidden_size}: take an agent trained for this model"
        )
    return config, context


def _check_options(
    lowering: str, precision: str, quantisation: Quantisation | None, max_candidates: int
) -> Quantisation | None:
    """Refuse what cannot be; return how the weights are quantised, if they are."""
    if lowering not in LOWERINGS:
        raise OptionError(f"--lowering is {lowering!r}; it must be one of {', '.join(LOWERINGS)}")
    if precision not in PRECISIONS:
        raise OptionError(f"--precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if not 1 <= max_candidates <= MAX_CANDIDATES:
        raise OptionError(f"--max-candidates is {max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")
    bits = {"int8": 8, "int4": 4}.get(precision)
    if bits is None:
        if quantisation is not None:
            raise OptionError(f"--precision is {precision}; block size and quantiser are for int8 and int4")
        return None
    if lowering != "ort":
        raise OptionError(f"--lowering {lowering} is for fp32 and fp16 so far; --precision {precision} needs ort")
    how = quantisation or Quantisation(bits)
    if how.bits != bits:
        raise OptionError(f"--precision is {precision}; the quantisation given has {how.bits} bits")
    return how


def _gate_prompts(source: ModelSource, tokenizer: Any, vocab_size: int, context: int) -> list[tuple[list[int], bool]]:
    """(token ids, whether they are text) for the parity gate, each short enough for a sibling to follow."""
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


def _versions() -> dict[str, str]:
    packages = ("mara-deploy", "torch", "transformers", "optimum", "optimum-onnx", "onnx")
    versions = {name: version(name) for name in packages}
    return {"python": platform.python_version(), **versions, "onnxruntime": onnxruntime.__version__}


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256(p)) for p in paths}
