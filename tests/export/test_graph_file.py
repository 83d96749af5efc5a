"""The exported step graph as a file: its inputs and outputs, its nodes, and where its weights lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from mara_export.graph.pipeline import LOWERINGS as LOWERING_MODULES
from mara_export.hf.families import model_shape
from mara_runtime import tensors
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, PAIRS

INLINE_BYTES, ALIGNMENT = 1024, 4096
TOP = MAX_CANDIDATES + 8


@dataclass
class Exported:
    """A bundle's graph, without its weights, and the model it was made of."""

    architecture: str
    lowering: str
    folder: Path
    model: Any

    def __post_init__(self) -> None:
        self.proto = onnx.load(self.folder / "step.onnx", load_external_data=False)
        self.graph = self.proto.graph


@pytest.fixture(params=PAIRS)
def exported(request: pytest.FixtureRequest, bundle, reference) -> Exported:
    architecture, lowering = request.param
    return Exported(architecture, lowering, bundle(architecture, lowering), reference(architecture))


def described(infos: Sequence[onnx.ValueInfoProto]) -> list[tensors.Tensor]:
    kinds = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}
    return [
        tensors.Tensor(
            info.name,
            kinds[info.type.tensor_type.elem_type],
            tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim),
        )
        for info in infos
    ]


def test_inputs_and_outputs_are_those_of_the_one_table(exported: Exported) -> None:
    config = exported.model.config
    shape = model_shape(config)
    assert (shape.hidden_size, shape.vocab_size) == (config.hidden_size, config.vocab_size)
    assert described(exported.graph.input) == tensors.step_inputs(shape)
    assert described(exported.graph.output) == tensors.step_outputs(shape, TOP)


def test_the_graph_is_made_of_what_its_lowering_promises(exported: Exported) -> None:
    """The trace's nodes are gone, attention is fused unless decomposed, and no layer moves heads at run time."""
    lowering = exported.lowering
    onnx.checker.check_model(str(exported.folder / "step.onnx"), full_check=lowering != "ort")
    opsets = LOWERING_MODULES[lowering].OPSETS
    assert {opset.domain: opset.version for opset in exported.proto.opset_import} == opsets
    nodes = exported.graph.node
    assert {node.domain for node in nodes} == set(opsets)
    kinds = {node.op_type for node in nodes}
    assert "Identity" not in kinds
    assert ("Softmax" in kinds) == (lowering == "decomposed")
    assert len({node.name for node in nodes}) == len(nodes)
    if lowering == "ort":
        assert not [node.name for node in nodes if node.op_type == "Transpose" and "layers" in node.name]


def place(tensor: TensorProto) -> tuple[int, int]:
    """Where its bytes lie in the data file: offset and length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["location"] == "step.onnx.data"
    return int(entries["offset"]), int(entries["length"])


def test_weights_lie_beside_the_graph_once_and_aligned(exported: Exported, agent) -> None:
    graph, model = exported.graph, exported.model
    outside = [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]
    places = sorted({place(t) for t in outside})  # equal bytes share a place
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(offset + length <= after for (offset, length), (after, _) in pairwise(places))
    size = (exported.folder / "step.onnx.data").stat().st_size
    assert sum(places[-1]) == size
    parameters = {id(p): p.numel() for p in [*model.parameters(), *agent(exported.architecture).parameters()]}
    tables = sum(place(t)[1] for t in outside if "rotary_emb" in t.name)
    stored = sum(length for _, length in places) - tables
    rows = MAX_CONTEXT + MAX_CANDIDATES + 17 + (exported.lowering == "ort")  # one at which nothing rotates
    assert tables <= 2 * 4 * rows * model_shape(model.config).caches[0].head_dim / 2
    assert 0.95 * 4 * sum(parameters.values()) <= stored <= 4 * sum(parameters.values())
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    inside = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL]
    assert all(len(t.raw_data) <= INLINE_BYTES for t in [*inside, *constants])
    branches = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    read = {name for part in (graph, *branches) for node in part.node for name in node.input}
    assert {t.name for t in graph.initializer} <= read
    assert (exported.folder / "step.onnx").stat().st_size < 150_000 < size


def test_a_tied_head_reads_the_table_of_the_embedding(exported: Exported) -> None:
    graph, config = exported.graph, exported.model.config
    (head,) = [node for node in graph.node if node.name == "/lm_head/MatMul"]
    (lookup,) = [node for node in graph.node if node.op_type == "Gather" and tensors.INPUT_IDS in node.input]
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    assert sizes[lookup.input[0]] == [config.vocab_size, config.hidden_size]
    assert (head.input[1] == lookup.input[0]) == config.tie_word_embeddings
    vocabularies = [name for name, dims in sizes.items() if config.vocab_size in dims]
    assert len(vocabularies) == (1 if config.tie_word_embeddings else 2)
