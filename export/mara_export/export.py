"""From a Hugging Face model and an agent to a bundle: the main path, top to bottom in `export`."""

from __future__ import annotations

import gc
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import onnxruntime
import torch
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from mara_export import parity, qdq
from mara_export.architectures import check_supported, model_shape
from mara_export.checkpoint import eos_token_ids, from_pretrained, load_model
from mara_export.errors import ModelError, ParityError
from mara_export.folder import file_entries, whole_or_absent, write_manifest
from mara_export.lower import LOWERINGS, lower
from mara_export.narrow import narrow
from mara_export.progress import Progress
from mara_export.quantise import BLOCK_SIZES, Quantisation, halve, quantise
from mara_export.sources import ModelSource
from mara_export.step import join
from mara_export.tokenizer import load_tokenizer, write_tokenizer
from mara_export.trace import rotary_tables, trace_agent, trace_llm
from mara_export.weights import load, return_large_blocks, tie_head
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.manifest import (
    AgentFacts,
    GraphFacts,
    Manifest,
    ModelFacts,
)
from mara_runtime.ort_engine import OrtEngine

STEP_FILE = "step.onnx"
TARGETS = {
    "cpu": LOWERINGS,
    "cuda": ("ort",),
    "tensorrt": ("portable", "decomposed"),
    "tensorrt-rtx": ("portable", "decomposed"),
}
"""Engines to export for, and the lowerings that each runs, its own first."""
PRECISIONS = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt": ("fp16", "bf16", "fp32", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "bf16", "fp32", "int8", "int4"),
}
"""What a target's weights may be, the default first."""
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
    target: str = "cpu",
    lowering: str | None = None,
    precision: str | None = None,
    quantisation: Quantisation | None = None,
    max_context: int | None = None,
    max_candidates: int = 64,
    gate: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a frozen LLM and its agent to the folder `out`, which must not exist or be empty.

    target: engine to export for, one of TARGETS; lowering, precision: one of the target's, None for its first;
    quantisation: how int8 and int4 are made, None for the defaults;
    max_context: tokens of prompt and answer, None for 4096 or the model's own if smaller; max_candidates: of a
    position; gate: compare with Hugging Face eager before anything is kept. Returns the finished bundle.
    Raises MaraError (ModelError, ParityError, OptionError); then, or when interrupted, nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    return_large_blocks()
    plan = make_plan(target, lowering, precision, quantisation, max_candidates, gate)
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
                with parity.watched(model) as largest:
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
            with progress.stage(f"lower to {plan.lowering!r}"):
                lower(graph, weights, shape, plan.lowering, rotary)
            if plan.quantisation is not None:
                with progress.stage(f"quantise to {plan.precision}"):
                    (quantise if plan.lowering == "ort" else qdq.quantise_qdq)(
                        graph, weights, plan.quantisation, progress.parts
                    )
            else:
                tie_head(graph.graph, weights)
            if plan.cache != "float32":
                narrow(graph.graph, weights, plan.cache)
            elif plan.precision == "fp16":
                halve(graph.graph, weights)
            weights.drop_unused()
            with progress.stage("join with the agent, and write"):
                trace_agent(cast(torch.nn.Module, agent), agent.hidden_size, scratch / "agent.onnx")
                traced = onnx.load(scratch / "agent.onnx")
                join(graph, traced, shape, max_candidates, cache=plan.cache, always_head=target != "cpu")
                weights.save(graph, folder / STEP_FILE)
                del graph, weights

        top = tensors.top_tokens(max_candidates, shape.vocab_size)
        manifest = Manifest(
            model=ModelFacts(source.name, source.revision, config.model_type, shape, eos),
            agent=AgentFacts(
                agent_name, agent.hidden_size, agent.widths, agent.fallback, "last hidden state after the final norm"
            ),
            max_context=context,
            max_candidates=max_candidates,
            targets=tuple(dict.fromkeys((target, *(("cpu",) if plan.runs_on_cpu else ())))),
            step=GraphFacts(
                STEP_FILE,
                plan.lowering,
                plan.precision,
                None if plan.quantisation is None else plan.quantisation.to_json(),
                plan.cache,
            ),
            engines=(),
            tokenizer=None if tokenizer is None else write_tokenizer(tokenizer, folder),
            made_with=_versions(),
            parity=None,
            noise=None,
            files={},
            io={
                "inputs": [asdict(t) for t in tensors.step_inputs(shape, plan.cache)],
                "outputs": [asdict(t) for t in tensors.step_outputs(shape, top, plan.cache)],
            },
        )
        if gate:
            with progress.stage("parity gate"):
                engine = OrtEngine(Bundle(folder, manifest))
                report = parity.compare(
                    cases,
                    [parity.engine_side(engine, case) for case in progress.parts(cases)],
                    parity.GATES[plan.precision],
                    largest() if plan.cache == "float16" else None,
                )
                del engine
            if report.failures:
                raise ParityError(
                    f"{source.name}: the exported graphs differ from Hugging Face eager ("
                    + "; ".join(report.failures)
                    + "); nothing was written"
                )
            manifest = replace(manifest, parity=report.to_json(), noise=report.engine_noise())
        manifest = replace(manifest, files=file_entries(folder))
        write_manifest(folder, manifest)
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


@dataclass(frozen=True)
class Plan:
    """What the graph becomes."""

    lowering: str
    precision: str
    quantisation: Quantisation | None
    cache: str
    """type that the LLM computes in, and of its KV cache"""

    @property
    def runs_on_cpu(self) -> bool:
        """ONNX Runtime's CPU provider has no kernels for bfloat16."""
        return self.cache != "bfloat16"


def make_plan(
    target: str,
    lowering: str | None,
    precision: str | None,
    quantisation: Quantisation | None,
    max_candidates: int,
    gate: bool,
) -> Plan:
    """Refuse what cannot be, and fill in what was not said; options as of `export`. Raises OptionError."""
    if target not in TARGETS:
        raise OptionError(f"--target is {target!r}; it must be one of {', '.join(TARGETS)}")
    lowering = lowering or TARGETS[target][0]
    if lowering not in LOWERINGS:
        raise OptionError(f"--lowering is {lowering!r}; it must be one of {', '.join(LOWERINGS)}")
    if lowering not in TARGETS[target]:
        raise OptionError(f"--lowering is {lowering!r}; for --target {target} take {' or '.join(TARGETS[target])}")
    precision = precision or PRECISIONS[target][0]
    if precision not in parity.GATES:
        raise OptionError(f"--precision is {precision!r}; it must be one of {', '.join(parity.GATES)}")
    if precision not in PRECISIONS[target]:
        raise OptionError(f"--precision is {precision!r}; for --target {target} take {', '.join(PRECISIONS[target])}")
    if not 1 <= max_candidates <= MAX_CANDIDATES:
        raise OptionError(f"--max-candidates is {max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")
    bits = {"int8": 8, "int4": 4}.get(precision)
    if bits is None and quantisation is not None:
        raise OptionError(f"--precision is {precision}; block size and quantiser are for int8 and int4")
    how = quantisation or (None if bits is None else Quantisation(bits, block_size(bits, target, lowering)))
    if how is not None and how.bits != bits:
        raise OptionError(f"--precision is {precision}; the quantisation given has {how.bits} bits")
    if how is not None and lowering != "ort":
        qdq.check(how, target, lowering)
    elif how is not None and how.block_size not in BLOCK_SIZES:
        raise OptionError(f"--block-size is {how.block_size}; it must be one of {', '.join(map(str, BLOCK_SIZES))}")
    narrowed = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, "float16")
    plan = Plan(lowering, precision, how, "float32" if target == "cpu" else narrowed)
    if gate and not plan.runs_on_cpu:
        raise OptionError(
            "--precision is 'bf16', which ONNX Runtime on a CPU cannot run, so the parity gate cannot either: "
            "take fp16, or give --no-gate and compare on the device (benchmarks/gpu.sh)"
        )
    return plan


def block_size(bits: int, target: str, lowering: str) -> int:
    """How many weights share a scale unless the user says it."""
    standard = qdq.BLOCK_SIZES.get(target) if lowering != "ort" else None
    return standard[bits][0] if standard else Quantisation(bits).block_size


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
