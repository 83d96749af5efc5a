"""The passes from a traced graph to a step graph, in order. This is the one place that knows the order.

trace (trace.py)      PyTorch → a graph with a custom node for each attention, norm, linear map, …
load (weights.py)     constants become weights, duplicates go
KV cache (traced.py)  the nodes that lowerings take: attention has its cache
lowering              custom nodes → operators of an engine: PASSES of ort.py, portable.py or decomposed.py
weights               int8, int4: QUANTISE of the lowering (quantise.py, qdq.py); else tie_head (weights.py)
float precision       precision.py: compute in the KV cache's type, or store in float16
join (step.py)        the agents, the choice among candidates, the LM head on the chosen rows
save (weights.py)     the graph, and its weights beside it
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from onnx import helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mara_export.errors import ModelError
from mara_export.graph import decomposed, ort, portable, traced
from mara_export.graph.nodes import GraphContext, GraphPass, Tables
from mara_export.graph.packed import keep_integers
from mara_export.graph.precision import narrow, store_float16
from mara_export.graph.seam import INPUTS
from mara_export.graph.step import join_agents
from mara_export.graph.weights import fill, load, save, tie_head
from mara_export.hf.packing import quantisation_of
from mara_export.hf.weights import Weights
from mara_export.options import ExportOptions
from mara_export.progress import Progress, no_logs
from mara_runtime.graph_file import OPERATORS
from mara_runtime.tensors import ModelShape, spare_slots

LOWERINGS: dict[str, ModuleType] = {"ort": ort, "portable": portable, "decomposed": decomposed}
"""Modules with OPSETS, PASSES and QUANTISE; targets.LOWERINGS has their facts."""


@dataclass(frozen=True)
class TracedGraph:
    """What tracing left on disk, and what it found out on the way."""

    llm: Path
    """a graph whose weights are inputs, named as in the model"""
    weights: Weights
    agents: Path
    shape: ModelShape
    rotary: Tables
    """for the longest context and most candidates that a bundle of this trace may have"""
    max_context: int


def passes(options: ExportOptions) -> Iterator[tuple[str, tuple[GraphPass, ...]]]:
    """(stage, passes) in order."""
    lowering = LOWERINGS[options.lowering]
    yield f"lower to {options.lowering!r}", (*traced.PASSES, *lowering.PASSES)
    if options.quantisation is not None:
        yield f"quantise to {options.precision}", (lowering.QUANTISE,)
    else:
        yield "tie the LM head", (tie_head,)
    if options.cache != "float32":
        yield f"narrow to {options.cache}", (narrow,)
    elif options.precision == "fp16":
        yield "store as float16", (store_float16,)
    yield "join with the agents", (join_agents,)


def write(trace: TracedGraph, options: ExportOptions, path: Path, progress: Progress) -> None:
    """Make the step graph for one set of options and write it to `path`. Raises MaraError."""
    tables, max_context = _tables(trace, options), options.max_context or trace.max_context
    quantisation = quantisation_of(options, trace.weights.packing)
    context = GraphContext(trace.shape, tables, max_context, options, trace.agents, progress, quantisation)
    with no_logs(logging.INFO):  # onnx-ir and ONNX Runtime's quantisers report every step
        model = load(trace.llm)
        graph = model.graph
        fill(graph, [*INPUTS], trace.weights)
        if quantisation is not None and quantisation.packed:
            keep_integers(graph, trace.weights, quantisation.block_size)
        graph.opset_imports.clear()
        graph.opset_imports.update(LOWERINGS[options.lowering].OPSETS)
        for stage, steps in passes(options):
            with progress.stage(stage):
                for step in steps:
                    step(graph, context)
                    RemoveUnusedNodesPass()(model)
        for node in graph.all_nodes():
            if node.op_type not in OPERATORS.get(node.domain, ()):
                raise ModelError(
                    f"the model's {node.name} is {node.op_type!r}, an operator that bundles may not have: its "
                    "family is not supported"
                )
        with progress.stage("write"):
            graph.sort()
            opsets = [helper.make_opsetid(domain, version) for domain, version in graph.opset_imports.items()]
            model.ir_version = max(10, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
            model.producer_name, model.producer_version = "mara-export", ""
            save(model, path)


def _tables(trace: TracedGraph, options: ExportOptions) -> Tables:
    """Rotary tables for as many positions as a row may have."""
    if options.max_context is None:
        return trace.rotary
    count = options.max_context + spare_slots(options.max_candidates)
    return {key: (cos[:count], sin[:count]) for key, (cos, sin) in trace.rotary.items()}
