"""A bundle in the gate: its graph as a whole or, where memory does not hold that, in parts.

What the gate feeds an engine depends on nothing that the engine returns. So all its passes go through one part of the
graph before the next one is loaded, and what a part computes for later ones is kept. Nodes and their order are those of
the whole graph, and so are the results.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from mara_export.parity.engine import perturber, run_engine
from mara_export.parity.rows import Case, Side
from mara_export.progress import Progress
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines.machine import free_memory
from mara_runtime.engines.ort_cpu import CpuEngine

_ITEM_BYTES: dict[int, float] = {
    TensorProto.INT4: 0.5,
    TensorProto.UINT4: 0.5,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
}
"""Of the numbers of large weights; the others are float32 on a CPU, or become it."""
_WHOLE, _PART = 2, 4
"""A graph is run as a whole if this many of it fit, else in parts, of which so many fit: ONNX Runtime copies weights
while it loads them."""
_MOST_ROWS = 4096
"""Of a pass."""


def run_bundle(bundle: Bundle, cases: Sequence[Case], progress: Progress) -> tuple[list[Side], int]:
    """Run a bundle with all its agents over cases, see `run_engine`. Returns its sides, and in how many parts it ran.

    A quantised bundle is run perturbed, too. Raises EngineError.
    """
    model = onnx.load(bundle.path(bundle.manifest.step.file), load_external_data=False)
    agents, free = [agent.name for agent in bundle.manifest.agents], free_memory() or math.inf
    whole = _WHOLE * loaded_bytes(model.graph.initializer) <= free
    parts = parts_of(model.graph, math.inf if whole else free / _PART)
    sides: list[Side] = []
    ticks = progress.parts(range(len(parts) * len(cases)))
    for engine in [CpuEngine(bundle)] if whole else engines_of_parts(bundle, model, parts):
        engine.use(agents)
        perturb = None if bundle.manifest.step.quantisation is None else perturber(engine)
        sides = [side for side, _ in zip(run_engine(engine, cases, len(agents), perturb), ticks, strict=False)]
        del engine, perturb  # before the next part is loaded
    return sides, len(parts)


def parts_of(graph: onnx.GraphProto, most_bytes: float) -> list[range]:
    """Indices of the nodes of each part, in order. most_bytes: of its weights, if it has more nodes than one."""
    sizes = {tensor.name: loaded_bytes([tensor]) for tensor in graph.initializer}
    parts, start, held = [], 0, set[str]()
    prepared = False  # by the node before: DequantizeLinear, say, which is fused with the MatMul that it precedes
    for index, node in enumerate(graph.node):
        own = sizes.keys() & _taken(node)
        if not prepared and index > start and sum(sizes[name] for name in held | own) > most_bytes:
            parts.append(range(start, index))
            start, held = index, set()
        held |= own
        prepared = own == _taken(node)
    return [*parts, range(start, len(graph.node))]


def _taken(node: onnx.NodeProto) -> set[str]:
    """What a node reads, its branches included."""
    inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {*filter(None, node.input)}.union(*(_taken(each) for graph in inner for each in graph.node))


def loaded_bytes(weights: Iterable[onnx.TensorProto]) -> float:
    """About what weights take in an engine on a CPU."""
    return math.fsum(math.prod(weight.dims) * _ITEM_BYTES.get(weight.data_type, 4) for weight in weights)


def engines_of_parts(bundle: Bundle, model: onnx.ModelProto, parts: Sequence[range]) -> Iterator[CpuEngine]:
    """An engine for each part of a bundle's graph, in order, one at a time. All take the same passes.

    The last returns what the graph returns; the others return numbers without meaning. Raises EngineError.
    """
    caches = {present for _, present in tensors.kv_names(bundle.manifest.model.shape.num_caches)}
    answers = {value.name for value in model.graph.output} - caches  # of which earlier parts have some, too
    path, kept = bundle.path(bundle.manifest.step.file), _Carried()
    for i, nodes in enumerate(parts):
        part = path.with_name(f"{path.stem}.part-{i}.onnx")  # beside its weights
        try:
            onnx.save(_part(model, nodes, answers, kept), part)
            yield _PartEngine(bundle, part, kept)
        finally:
            part.unlink(missing_ok=True)


@dataclass
class _Carried:
    """What parts compute for later ones."""

    names: set[str] = field(default_factory=set)
    """of the values that cross a border"""
    types: dict[str, int] = field(default_factory=dict)
    """of those that have been computed, as ONNX numbers them"""
    passes: list[dict[str, Any]] = field(default_factory=list)
    """their values, of each pass in turn"""


def _part(model: onnx.ModelProto, indices: range, answers: Set[str], kept: _Carried) -> onnx.ModelProto:
    """Nodes of a graph as a graph of their own, which takes and returns what crosses its borders."""
    whole = model.graph
    nodes, rest = whole.node[indices.start : indices.stop], whole.node[indices.stop :]
    taken, later = (set[str]().union(*map(_taken, some)) for some in (nodes, rest))
    made = {name for node in nodes for name in node.output}
    crossing = made & (later | answers) if rest else set()
    kept.names |= crossing
    given = [value for value in whole.input if value.name in taken]
    given += [helper.make_tensor_value_info(name, kind, None) for name, kind in kept.types.items() if name in taken]
    returned = [value for value in whole.output if value.name in made]
    returned += [onnx.ValueInfoProto(name=name) for name in sorted(crossing - {value.name for value in returned})]
    weights = [tensor for tensor in whole.initializer if tensor.name in taken]
    graph = helper.make_graph(nodes, whole.name, given, returned, weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


class _PartEngine(CpuEngine):
    """One part of a graph in place of the whole."""

    def __init__(self, bundle: Bundle, part: Path, kept: _Carried) -> None:
        self._part, self._kept = part, kept
        super().__init__(bundle)

    def _open(self, path: Path, options: Any) -> Any:
        return _PartSession(super()._open(self._part, options), self._kept)

    def _check_io(self, path: Path) -> None:
        """Not of a part."""


class _PartSession:
    """ONNX Runtime's session of a part, to which an engine binds what it would bind to the whole graph's."""

    def __init__(self, session: Any, kept: _Carried) -> None:
        self._session, self._kept, self._turn = session, kept, 0
        self._inputs = {value.name for value in session.get_inputs()}
        self._outputs = {value.name: value.type for value in session.get_outputs()}
        for name in self._outputs.keys() & kept.names:
            kept.types[name] = TensorProto.DataType.Value(self._outputs[name][len("tensor(") : -1].upper())

    def io_binding(self) -> _PartBinding:
        return _PartBinding()

    def run_with_iobinding(self, binding: _PartBinding, options: Any) -> None:
        if self._turn == len(self._kept.passes):
            self._kept.passes.append({})
        values, real = self._kept.passes[self._turn], self._session.io_binding()
        self._turn += 1
        for bind, name, *where in binding.inputs:
            if name in self._inputs:
                getattr(real, bind)(name, *where)
        for name in self._inputs & values.keys():
            real.bind_ortvalue_input(name, values[name])
        bound = [(name, where) for name, *where in binding.outputs if name in self._outputs]
        own = [(name, ["cpu"]) for name in self._outputs.keys() & self._kept.names - {name for name, _ in bound}]
        for name, where in (*bound, *own):
            real.bind_output(name, *where)
        self._session.run_with_iobinding(real, options)
        found = dict(zip((name for name, _ in (*bound, *own)), real.get_outputs(), strict=True))
        for name in found.keys() & self._kept.names:  # a copy: the engine will use its memory again
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(found[name].numpy().copy())
        for name, *where in binding.outputs:
            if name in values.keys() - found.keys():  # of an earlier part
                _return(values[name], where)
        binding.logits = (found | values).get(tensors.LOGITS, _NOTHING)


def _return(value: Any, where: Sequence[Any]) -> None:
    """Copy a value to the memory that an output is bound to, if it is."""
    if len(where) > 1:
        array = value.numpy()
        ctypes.memmove(where[-1], array.ctypes.data, array.nbytes)


class _PartBinding:
    """What an engine binds, for whatever part has it."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[tuple[Any, ...]] = []
        self.logits: Any = _NOTHING

    def bind_input(self, *where: Any) -> None:
        self.inputs.append(("bind_input", *where))

    def bind_ortvalue_input(self, *where: Any) -> None:
        self.inputs.append(("bind_ortvalue_input", *where))

    def bind_output(self, *where: Any) -> None:
        self.outputs.append(where)

    def get_outputs(self) -> list[Any]:
        return [self.logits]  # bound last, where they are asked for


class _Nothing:
    """In place of an output that another part has."""

    def numpy(self) -> NDArray[np.float32]:
        return np.zeros((_MOST_ROWS, 1), np.float32)


_NOTHING = _Nothing()
