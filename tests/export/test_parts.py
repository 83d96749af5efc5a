"""The gate of a graph that memory does not hold: run in parts, it says what the whole graph would."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mara_deploy.commands.inspect import parity_lines
from mara_export.errors import ParityError
from mara_export.export import finish
from mara_export.graph import pipeline
from mara_export.options import ExportOptions
from mara_export.parity import parts
from mara_runtime.bundle import Bundle
from mara_runtime.engines.ort_cpu import CpuEngine
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT

FREE = 160_000
"""Bytes of memory, of which a part takes a quarter; the smallest graph below takes 80,000."""


@pytest.fixture
def in_little_memory(monkeypatch, traced) -> Callable[..., Bundle]:
    """(name, out, **options) → a bundle whose gate has FREE bytes."""

    def make(name: str, out: Path, **options: Any) -> Bundle:
        monkeypatch.setattr(parts, "free_memory", lambda: FREE)
        chosen = ExportOptions(max_context=MAX_CONTEXT, max_candidates=MAX_CANDIDATES, **options)
        return finish(traced(name), chosen, out)

    return make


@pytest.mark.parametrize(
    ("name", "lowering", "precision"),
    [
        ("qwen2", "ort", "fp32"),
        ("llama", "portable", "int8"),
        ("phi3", "decomposed", "fp16"),
        pytest.param("qwen2", "ort", "int8", marks=pytest.mark.long),
        pytest.param("qwen3", "portable", "fp32", marks=pytest.mark.long),
        pytest.param("llama", "decomposed", "int8", marks=pytest.mark.long),
    ],
)
def test_the_report_is_that_of_the_whole_graph(tmp_path, bundle, in_little_memory, name, lowering, precision) -> None:
    whole = Bundle.open(bundle(name, lowering, precision)).manifest
    found = in_little_memory(name, tmp_path / "out", lowering=lowering, precision=precision).manifest
    assert whole.parity["parts"] == 1
    assert found.parity["parts"] > 2
    assert found.parity | {"parts": 1} == whole.parity
    assert parity_lines(found.parity)[0].endswith(f"eager, in {found.parity['parts']} parts")
    assert [agent.parity for agent in found.agents] == [agent.parity for agent in whole.agents]
    assert (found.noise, found.files) == (whole.noise, whole.files)  # and none of a part's


def test_one_part_is_in_memory_at_a_time(tmp_path, in_little_memory, monkeypatch) -> None:
    opened: list[weakref.ref[CpuEngine]] = []
    make = CpuEngine._open

    def watched(self: CpuEngine, path: Path, options: Any) -> Any:
        if type(self) is not CpuEngine:  # which the structural gate has
            assert [engine for engine in opened if engine() is not None] == []
            opened.append(weakref.ref(self))
        return make(self, path, options)

    monkeypatch.setattr(CpuEngine, "_open", watched)
    found = in_little_memory("qwen2", tmp_path / "out")
    assert len(opened) == found.manifest.parity["parts"]
    graph = onnx.load(found.path("step.onnx"), load_external_data=False).graph
    sizes = {tensor.name: parts.loaded_bytes([tensor]) for tensor in graph.initializer}
    for indices in parts.parts_of(graph, FREE / 4):
        of_nodes = [{*graph.node[index].input} & sizes.keys() for index in indices]
        largest = max(sum(map(sizes.__getitem__, names)) for names in of_nodes)
        assert sum(map(sizes.__getitem__, set[str]().union(*of_nodes))) <= max(FREE / 4, largest)


def test_a_graph_that_is_wrong_fails_in_parts_too(tmp_path, in_little_memory, monkeypatch) -> None:
    write = pipeline.write

    def damaged(trace: Any, options: ExportOptions, path: Path, *rest: Any) -> None:
        write(trace, options, path, *rest)
        data = path.with_name(f"{path.name}.data")
        content = bytearray(data.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4096] = bytes(4096)
        data.write_bytes(content)

    monkeypatch.setattr(pipeline, "write", damaged)
    with pytest.raises(ParityError, match=r"differ from Hugging Face eager \(hidden: greatest difference"):
        in_little_memory("qwen2", tmp_path / "out")
    assert not any(tmp_path.iterdir())
