"""The step graph, looked through before an engine reads it. The files are onnx's own work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper

from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError
from tests.unit import helpers, written_model

NODE = "node_0"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = written_model.write_bundle(tmp_path_factory.mktemp("model"), always_head=False)
    return (folder / "step.onnx").read_bytes()


@pytest.fixture
def model(content: bytes) -> ModelProto:
    return onnx.load_from_string(content)


def opened(folder: Path, content: bytes, caches: int = 2) -> Bundle:
    helpers.make_bundle(folder, graph=content)
    manifest = helpers.read_manifest(folder)
    group = {"count": caches, "kv_heads": 1, "head_dim": 4}
    manifest["model"]["shape"].update(num_layers=caches, caches=[group])
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)


def refused(folder: Path, content: bytes, caches: int = 2) -> str:
    with pytest.raises(BundleError) as caught:
        opened(folder, content, caches)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'step.onnx'} is not accepted: ")
    assert message.isprintable()
    assert len(message) < 600
    return message


def node(model: ModelProto, *args: object, **attributes: object) -> None:
    model.graph.node.append(helper.make_node(*args, name="bad", **attributes))  # type: ignore[arg-type]


def a_graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(nodes, "inner", [], [])


def in_an_if(model: ModelProto, inner: onnx.NodeProto) -> None:
    node(model, "If", ["x"], ["y"], then_branch=a_graph(inner), else_branch=a_graph())


def weight(model: ModelProto, dims: tuple[int, ...] = (64,), kind: int = TensorProto.FLOAT, **where: object) -> None:
    """A weight of 256 bytes in step.onnx.data, which has so many; where: what is said otherwise."""
    tensor = TensorProto(name="bad", dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "step.onnx.data", "offset": 0, "length": 256, **where}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    model.graph.initializer.append(tensor)


def inline(model: ModelProto, content: bytes, dims: tuple[int, ...] = (2,), **fields: object) -> None:
    model.graph.initializer.append(
        TensorProto(name="bad", dims=dims, data_type=TensorProto.FLOAT, raw_data=content, **fields)  # type: ignore[arg-type]
    )


LOOP = helper.make_node("Loop", ["n", "c"], ["z"], body=a_graph())
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]),
    helper.make_tensor("i", TensorProto.INT64, [1], [0]),
    [10**9],
)
FUNCTION = helper.make_function("own", "f", ["x"], ["y"], [], [helper.make_opsetid("", 20)])

BAD: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "an endless loop": (lambda m: m.graph.node.append(LOOP), "'Loop'"),
    "a scan": (lambda m: node(m, "Scan", [], ["y"], body=a_graph(), num_scan_inputs=1), "'bad' is 'Scan'"),
    "a loop in an If": (lambda m: in_an_if(m, LOOP), "'Loop'"),
    "an If in an If": (lambda m: in_an_if(m, helper.make_node("If", ["a"], ["b"], then_branch=a_graph())), "a graph"),
    "a graph in another operator": (lambda m: node(m, "Add", [], ["y"], body=a_graph()), "'bad' contains a graph"),
    "memory from a number": (lambda m: node(m, "ConstantOfShape", ["x"], ["y"]), "'ConstantOfShape'"),
    "an own operator": (lambda m: node(m, "Add", ["x"], ["y"], domain="own"), "'own.Add'"),
    "another of ONNX Runtime's": (lambda m: node(m, "BiasGelu", [], ["y"], domain="com.microsoft"), "BiasGelu"),
    "the domain by its other name": (lambda m: node(m, "Add", [], ["y"], domain="ai.onnx"), "'ai.onnx.Add'"),
    "no operator": (lambda m: node(m, "", [], ["y"]), "''"),
    "a domain that nobody uses": (lambda m: m.opset_import.add(domain="own", version=1), "domain 'own'"),
    "a function": (lambda m: m.functions.append(FUNCTION), "field 25"),
    "a function's overload": (lambda m: m.graph.node[0].__setattr__("overload", "x"), "field 8"),
    "training": (lambda m: m.training_info.add(), "field 20"),
    "a sparse weight": (lambda m: m.graph.sparse_initializer.append(SPARSE), "field 15"),
    "a sparse constant": (lambda m: node(m, "Constant", [], ["y"], sparse_value=SPARSE), "field 22"),
    "several graphs": (lambda m: node(m, "If", [], ["y"], branches=[a_graph()]), "field 11"),
    "a reference": (
        lambda m: m.graph.node[0].attribute.append(AttributeProto(name="a", ref_attr_name="b")), "field 21",
    ),
    "weights elsewhere": (lambda m: weight(m, location="../step.onnx.data"), "'../step.onnx.data', which"),
    "weights anywhere": (lambda m: weight(m, location="/etc/passwd"), "'/etc/passwd', which"),
    "weights of another name": (lambda m: weight(m, location="./step.onnx.data"), "not list"),
    "weights in memory": (lambda m: weight(m, location="*/_ORT_MEM_ADDR_/*"), "not list"),
    "weights nowhere": (lambda m: weight(m, location=None), "lies nowhere"),
    "weights in two places": (lambda m: weight(m, **{"location ": "x"}), "several places"),
    "weights with a checksum": (lambda m: weight(m, checksum="x"), "several places"),
    "weights here and there": (lambda m: inline(m, bytes(8), data_location=TensorProto.EXTERNAL), "lies nowhere"),
    "weights beyond the file": (lambda m: weight(m, offset=1), "does not lie within"),
    "weights before the file": (lambda m: weight(m, offset=-1), "does not lie within"),
    "weights that are more": (lambda m: weight(m, dims=(65,)), "does not lie within"),
    "weights that are fewer": (lambda m: weight(m, dims=(64,), length=255), "does not lie within"),
    "weights without end": (lambda m: weight(m, dims=(2**40, 2**40)), "does not lie within"),
    "weights below zero": (lambda m: weight(m, dims=(-1, -64)), "does not lie within"),
    "weights in letters": (lambda m: weight(m, offset="zero"), "does not lie within"),
    "many dimensions": (lambda m: weight(m, dims=(1,) * 100_000), "type or shape"),
    "texts": (lambda m: weight(m, kind=TensorProto.STRING), "type or shape"),
    "a number that is short": (lambda m: inline(m, bytes(7)), "8 bytes"),
    "a number that is long": (lambda m: inline(m, bytes(9)), "8 bytes"),
    "numbers in another field": (lambda m: inline(m, bytes(8), float_data=[0.0]), "field 4"),
    "a constant that is short": (
        lambda m: node(m, "Constant", [], ["y"], value=TensorProto(data_type=1, dims=[2], raw_data=b"")), "8 bytes",
    ),
    "an input less": (lambda m: m.graph.input.pop(), "22 inputs, and the 2 caches of the manifest need 23"),
}  # fmt: skip
"""What is done to a graph, and what must be named."""


@pytest.mark.parametrize("what", BAD)
def test_what_no_export_writes_is_refused_by_name(model: ModelProto, tmp_path: Path, what: str) -> None:
    change, named = BAD[what]
    change(model)
    assert named in refused(tmp_path, model.SerializeToString())


def test_what_an_export_writes_is_accepted(model: ModelProto, tmp_path: Path) -> None:
    opened(tmp_path, model.SerializeToString())
    weight(model, dims=(511,), kind=TensorProto.INT4)
    weight(model, dims=(), offset=252, length=4)
    opened(tmp_path, model.SerializeToString())


def test_what_a_parser_might_read_otherwise_is_refused(model: ModelProto, tmp_path: Path) -> None:
    whole = model.SerializeToString()
    assert "given twice" in refused(tmp_path, whole + helpers.message(7, b""))  # parsers merge the two
    assert "field 7 in encoding 0" in refused(tmp_path, bytes([7 << 3, 1]))
    for cut in (1, 2, 100, len(whole) // 2):
        refused(tmp_path, whole[:-cut])
    refused(tmp_path, b"\xff" * 30)
    refused(tmp_path, b"")


def test_caches_are_counted_before_anything_is_made_of_them(model: ModelProto, tmp_path: Path) -> None:
    begun = time.process_time()
    assert "the 10000000 caches of the manifest need 20000019" in refused(tmp_path, model.SerializeToString(), 10**7)
    assert time.process_time() - begun < 5


def test_a_file_too_large_for_a_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"step.onnx cannot be read: it has more than 8,388,608 bytes"):
        opened(tmp_path, bytes(8_388_609))
