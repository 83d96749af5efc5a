"""What NVIDIA's parser and builder refuse is one line, and leaves the bundle as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from mara_runtime.bundle import Bundle
from tests.tensorrt.conftest import refused

pytest.importorskip("tensorrt_rtx_bindings", reason="NVIDIA has no wheel of TensorRT for RTX for this platform")


def edited(op: str, change: Callable[[onnx.GraphProto, onnx.NodeProto], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        model = onnx.load(str(path), load_external_data=False)
        change(model.graph, next(node for node in model.graph.node if node.op_type == op))
        onnx.save(model, str(path))

    return edit


def lose(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    node.op_type = "Identity"
    del node.input[1:]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown operator": (
        edited("RMSNormalization", lambda graph, node: setattr(node, "op_type", "RootMeanSquare")),
        r"^TensorRT for RTX \S+ cannot read step\.onnx: node \S+ \(RootMeanSquare\): ",
    ),
    "missing node": (
        edited("RMSNormalization", lambda graph, node: graph.node.remove(node)),
        r"cannot read step\.onnx: node ",
    ),
    "wrong axis": (
        edited("TensorScatter", lambda graph, node: [setattr(a, "i", -1) for a in node.attribute if a.name == "axis"]),
        r"node \S+ \(TensorScatter\): ",
    ),
    "lost layer": (edited("TensorScatter", lose), "read 3 KV_CACHE_UPDATE layers from the graph.* should have 4"),
    "no file": (Path.unlink, r"step\.onnx cannot be read: "),
    "cut file": (lambda path: path.write_bytes(path.read_bytes()[:-3]), r"step\.onnx cannot be read: "),
}
"""What happens to a graph after its bundle was verified, and what must be named."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_graph_is_refused(copied: Callable[..., Bundle], damage: str) -> None:
    happens, named = DAMAGE[damage]
    bundle = copied()
    happens(bundle.path("step.onnx"))
    assert re.search(named, refused(bundle))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace_mib": 1}, "^TensorRT for RTX .* cannot build the engine: .*workspace"),
        # TensorRT for RTX names Turing among its GPUs, and then has no kernel for a Gemm in float32
        ({"compute_capabilities": ("7.5",)}, "--compute-capability is '7.5'; .* builds for 8.0"),
        ({"compute_capabilities": ("8.6", "9.9")}, "--compute-capability is '9.9'; .* 8.6, 8.9, 12.0"),
        ({"hardware": "ampere-plus"}, "--hardware is for tensorrt; "),
        ({"version_compatible": True}, "--version-compatible is for tensorrt; "),
        ({"timing_cache": Path("a.timings")}, "--timing-cache is for tensorrt; "),
    ],
    ids=str,
)
def test_options_that_tensorrt_for_rtx_does_not_take_are_refused(
    copied: Callable[..., Bundle], options: dict[str, Any], message: str
) -> None:
    found = refused(copied(), **options)
    assert re.search(message, found)
    assert "/_src/" not in found  # no place in NVIDIA's source
