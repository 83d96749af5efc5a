"""The structural gate: does a miniature of the model, in a lowering, compute what Hugging Face eager computes of it?

The gate of a bundle sees the model's own weights, in short prompts. This one sees what those cannot show: a miniature
(miniature.py) has random weights that are all audible and windows that are shorter than its texts. It goes the way of
an export, traced by the same tracer, lowered in the same way, in float32, and is compared as fp32 bundles are: prompts
at once, in parts, and row by row beside each other, with siblings after each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mara_export.errors import ModelError, ParityError
from mara_export.graph import pipeline
from mara_export.graph.nodes import ATTENTION, attribute, custom_nodes
from mara_export.graph.trace import trace_agents, trace_llm
from mara_export.graph.weights import load
from mara_export.hf.families import model_shape
from mara_export.hf.supported import longest_context
from mara_export.hf.weights import Weights
from mara_export.options import ExportOptions
from mara_export.parity.compare import GATES, compare
from mara_export.parity.engine import run_engine, run_parts
from mara_export.parity.miniature import miniature
from mara_export.parity.reference import Reference, run_reference
from mara_export.parity.rows import SIBLINGS, Side
from mara_export.progress import Progress
from mara_export.stages import Stages
from mara_runtime.bundle import Bundle
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.manifest import GraphFacts, Manifest, ModelFacts
from mara_runtime.tensors import spare_slots

CONTEXT = 64
PROMPTS = (43, 36, 29, 21)
"""Their tokens: more than any window of a miniature, and a different number each."""
PART = 13
"""Rows of a pass where prompts are run in parts."""
_Key = tuple[str, str, str]
_passed: dict[_Key, dict[str, Any]] = {}
"""Reports of this process, by configuration, tracer and lowering: nothing else makes a difference."""


@dataclass(frozen=True)
class Miniature:
    """A miniature, traced, and what Hugging Face computes of it."""

    model: ModelFacts
    graph: pipeline.TracedGraph
    windows: tuple[int, ...]
    """of its layers, in tokens"""
    reference: Reference


class StructuralGate:
    """The structural gate of one model and tracer, for any lowering. Each is run once in a process."""

    def __init__(self, config: Any, name: str, tracer: str, folder: Path, stages: Stages | None = None) -> None:
        """config: as Hugging Face has it; name: of the model, for messages; folder: an existing one, to work in.

        stages: where reports are kept.
        """
        self._config, self._name, self._tracer, self._folder = config, name, tracer, folder
        self._stages = stages or Stages(folder)
        said = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        self._key = json.dumps(said, sort_keys=True, default=str)
        self._traced: Miniature | None = None

    def report(self, lowering: str, progress: Progress) -> dict[str, Any]:
        """What the manifest of a bundle in this lowering says of it. Raises ModelError, and ParityError where it fails.

        With `layers` and `windows` of the miniature beside what a Report has.
        """
        key = (self._key, self._tracer, lowering)
        if key not in _passed:
            what, run = f"structural gate ({lowering})", partial(self._run, lowering)
            _, _passed[key], _ = self._stages.run(f"structure-{lowering}", what, run, progress)
        return _passed[key]

    def _run(self, lowering: str, _: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        if self._traced is None:
            self._traced = trace_miniature(self._config, self._name, self._tracer, self._folder)
        return judge(self._traced, lowering, self._folder), {}


def trace_miniature(config: Any, name: str, tracer: str, folder: Path) -> Miniature:
    """Make a miniature of a model, run it, and trace it into `folder`. Raises ModelError."""
    model = miniature(config, name)
    context = min(CONTEXT, longest_context(model.config) or CONTEXT)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    texts = [torch.randint(vocabulary, (min(count, context - 1),), generator=generator).tolist() for count in PROMPTS]
    reference = run_reference(model, name, (), [(text, False) for text in texts], SIBLINGS, Progress(quiet=True))
    llm, rotary, caches = trace_llm(model, folder, tracer, name, context, context + spare_slots(SIBLINGS))
    shape = replace(model_shape(model.config), caches=caches)
    trace_agents(shape.hidden_size, folder / "agents.onnx")
    windows = [attribute(node, "window") for node in custom_nodes(load(llm).graph, ATTENTION)]
    longest = max(map(len, texts))
    if beyond := [window for window in windows if window >= longest < context]:
        raise ModelError(
            f"{name} has a window of {beyond[0]} tokens that the structural gate cannot shorten; --no-gate exports "
            "without gates"
        )
    facts = ModelFacts(name, None, None, config.model_type, False, shape, 1, 0, False, (), "", ())
    graph = pipeline.TracedGraph(llm, Weights(model), folder / "agents.onnx", shape, rotary, context)
    return Miniature(facts, graph, tuple(windows), reference)


def judge(traced: Miniature, lowering: str, folder: Path) -> dict[str, Any]:
    """Lower a miniature in `folder`, run it, and report. Raises ParityError where it differs from Hugging Face."""
    context, cases = traced.graph.max_context, traced.reference.cases
    options = ExportOptions(lowering=lowering, precision="fp32", max_context=context, max_candidates=SIBLINGS)
    step = GraphFacts("step.onnx", lowering, options.precision, None, options.cache)
    path = folder / step.file
    pipeline.write(traced.graph, options, path, Progress(quiet=True))
    manifest = Manifest(traced.model, (), context, SIBLINGS, options.runs_on, step, (), None, {}, None, None, None, {})
    engine = CpuEngine(Bundle(folder, manifest), threads=1)
    sides = [*run_engine(engine, cases, 0)]
    in_parts = [Side(rows, side.recomputed) for rows, side in zip(run_parts(engine, cases, PART), sides, strict=True)]
    report = compare([*cases, *cases], [*sides, *in_parts], GATES["fp32"])
    if report.failures:
        raise ParityError(
            f"{traced.model.source}: in miniature, with random weights and short windows, the exported graph differs "
            "from Hugging Face eager (" + "; ".join(report.failures) + "); nothing was written"
        )
    found = report.to_json() | {"prompts": len(cases)}
    return {"layers": traced.model.shape.num_layers, "windows": [*traced.windows], **found}
