"""From a Hugging Face model and an agent to a bundle: the main path, top to bottom in `export`."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mara_export import parity
from mara_export.architectures import check_supported, model_shape
from mara_export.errors import ModelError, ParityError
from mara_export.folder import whole_or_absent
from mara_export.lower import LOWERINGS, lower
from mara_export.progress import Progress
from mara_export.sources import ModelSource
from mara_export.tokenizer import load_tokenizer, write_tokenizer
from mara_export.trace import trace_agent, trace_llm
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

LLM_FILE, AGENT_FILE = "llm.onnx", "agent.onnx"
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
    max_context: int | None = None,
    max_candidates: int = 64,
    gate: bool = True,
    progress: Progress | None = None,
) -> Bundle:
    """Export a frozen LLM and its agent to the folder `out`, which must not exist or be empty.

    max_context: tokens of prompt and answer, None for 4096 or the model's own if smaller; max_candidates: of a
    position; gate: compare with Hugging Face eager before anything is kept. Returns the finished bundle.
    Raises MaraError (ModelError, ParityError, OptionError); then, or when interrupted, nothing is left behind.
    """
    progress = progress or Progress(quiet=True)
    _check_options(lowering, precision, max_candidates)
    config, context = vet(source, agent, agent_name, max_context)
    shape = model_shape(config)

    with whole_or_absent(out) as folder:
        tokenizer = load_tokenizer(source.folder)
        with progress.stage(f"load {source.name}"):
            model = _load_model(source)
        eos = _eos_token_ids(model, tokenizer)
        if gate:
            with progress.stage("run the reference (Hugging Face eager)"):
                prompts = _gate_prompts(source, tokenizer, shape.vocab_size, context)
                cases = [parity.reference_case(model, agent, p, max_candidates) for p in progress.parts(prompts)]
        with progress.stage("trace the LLM"), tempfile.TemporaryDirectory(dir=folder) as scratch:
            graph = onnx.load(trace_llm(model, Path(scratch)))
            del model
        with progress.stage(f"lower to {lowering!r} and write"):
            lower(graph, shape, lowering)
            _save(graph, folder / LLM_FILE)
            del graph
            trace_agent(cast(torch.nn.Module, agent), agent.hidden_size, folder / AGENT_FILE)
            onnx.checker.check_model(str(folder / AGENT_FILE))

        manifest = Manifest(
            model=ModelFacts(source.name, source.revision, config.model_type, shape, eos),
            agent=AgentFacts(
                agent_name, agent.hidden_size, agent.widths, agent.fallback, "last hidden state after the final norm"
            ),
            max_context=context,
            max_candidates=max_candidates,
            targets=("cpu",),
            llm=GraphFacts(LLM_FILE, lowering, precision),
            agent_graph=GraphFacts(AGENT_FILE, "onnx", "fp32"),
            tokenizer=None if tokenizer is None else write_tokenizer(tokenizer, folder),
            made_with=_versions(),
            parity=None,
            files={},
            io={
                "llm": _io(tensors.llm_inputs(shape), tensors.llm_outputs(shape)),
                "agent_graph": _io(tensors.agent_inputs(shape.hidden_size), tensors.agent_outputs()),
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
            manifest = replace(manifest, parity=report.to_json())
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
    config = _load(AutoConfig, source)
    context = check_supported(config, source.name, max_context)
    if agent.hidden_size != config.hidden_size:
        raise ModelError(
            f"the agent {agent_name} was made for a hidden size of {agent.hidden_size}; "
            f"{source.name} has {config.hidden_size}: take an agent trained for this model"
        )
    return config, context


def _check_options(lowering: str, precision: str, max_candidates: int) -> None:
    if lowering not in LOWERINGS:
        raise OptionError(f"--lowering is {lowering!r}; it must be one of {', '.join(LOWERINGS)}")
    if precision not in parity.GATES:
        raise OptionError(f"--precision is {precision!r}; it must be one of {', '.join(parity.GATES)}")
    if not 1 <= max_candidates <= MAX_CANDIDATES:
        raise OptionError(f"--max-candidates is {max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")


def _load(kind: Any, source: ModelSource, **options: Any) -> Any:
    """Call `from_pretrained`; why it fails, in one line. Code that a model brings along is not run."""
    try:
        return kind.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source.name} cannot be loaded: {reason}") from error


def _load_model(source: ModelSource) -> Any:
    """The LLM in float32 with eager attention.

    A checkpoint that lacks weights is refused, as transformers fills the gaps at random; so is one with weights that
    the architecture has no place for, as they would be left out.
    """
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, loading = _load(AutoModelForCausalLM, source, **options)
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{source.name} is not a whole causal LM: it lacks {', '.join(missing[:3])}{more}")
    unknown = sorted(key for key in loading["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ModelError(
            f"{source.name} has weights that {model.config.model_type} has no place for: {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        )
    return model.eval()


def _save(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph with its weights beside it, and check it."""
    data = f"{path.name}.data"
    onnx.save(graph, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data, size_threshold=1024)
    onnx.checker.check_model(str(path))


def _eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: the generation config's list, else the model's, else the tokenizer's."""
    for holder in (model.generation_config, model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
    return ()


def _gate_prompts(source: ModelSource, tokenizer: Any, vocab_size: int, context: int) -> list[list[int]]:
    """Token sequences for the parity gate, each short enough for a sibling to follow."""
    count = min(parity.PROMPT_TOKENS, context - 1)
    texts = [] if tokenizer is None else [tokenizer(text)["input_ids"][:count] for text in parity.TEXTS]
    prompts = [ids for ids in texts if ids]
    largest = max((max(ids) for ids in prompts), default=0)
    if largest >= vocab_size:
        raise ModelError(f"{source.name}: its tokenizer gives id {largest}, its vocabulary ends at {vocab_size - 1}")
    generator = torch.Generator().manual_seed(0)
    while len(prompts) < parity.PROMPTS:
        prompts.append(torch.randint(vocab_size, (count,), generator=generator).tolist())
    return prompts


def _io(inputs: Sequence[tensors.Tensor], outputs: Sequence[tensors.Tensor]) -> dict[str, Any]:
    return {"inputs": [asdict(t) for t in inputs], "outputs": [asdict(t) for t in outputs]}


def _versions() -> dict[str, str]:
    packages = ("mara-deploy", "torch", "transformers", "optimum", "optimum-onnx", "onnx")
    versions = {name: version(name) for name in packages}
    return {"python": platform.python_version(), **versions, "onnxruntime": onnxruntime.__version__}


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256(p)) for p in paths}
