"""`step.onnx`, looked through before an engine reads it.

The file comes with a bundle, and engines trust it: a loop need not end, functions of functions multiply, weights may
lie in any file. Only what an export writes is accepted: its operators, and its fields of the format.

Format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mara_runtime.errors import BundleError
from mara_runtime.files import read_file
from mara_runtime.json_reader import shortened
from mara_runtime.manifest import Manifest
from mara_runtime.tensors import ModelShape, step_inputs

MOST_BYTES = 1 << 23
"""Of the file; that of a model with 24 layers has 0.2 MB."""
OPERATORS = {
    domain: frozenset(names.split())
    for domain, names in {
        "": "Abs Add And ArgMax Attention Cast Clip Compress Concat Constant DequantizeLinear Div Equal Erf Exp Expand "
        "Floor Gather Gemm Greater Identity If LayerNormalization Less Log MatMul Mul Neg Or Pad Pow "
        "RMSNormalization Range Reciprocal ReduceMean ReduceSum Relu Reshape RotaryEmbedding ScatterND Shape Sigmoid "
        "Size Slice Softmax Split Sqrt Squeeze Sub Tanh TensorScatter TopK Transpose Unsqueeze Where",
        "com.microsoft": "GatherBlockQuantized MatMulNBits MoE MultiHeadAttention QMoE RotaryEmbedding "
        "SkipSimplifiedLayerNormalization",
    }.items()
}
"""What exports write, by domain: the operators of every lowering and precision, and no others."""
MOST_DIMS = 8
BITS = {1: 32, 2: 8, 3: 8, 7: 64, 9: 8, 10: 16, 16: 16, 22: 4}
"""Bits of an element, by the number of a weight's type in the format."""

_INTEGER, _BYTES, _FLOAT = 0, 2, 5
"""How a field is encoded."""
_Fields = Mapping[int, tuple[str, bool]]
"""Of a message: by number and encoding, as they precede it, the field's name, and whether it may be given often."""


def _fields(integers: str = "", others: str = "", floats: str = "") -> _Fields:
    """From texts like "1 node*": * marks what may be given often."""
    fields = {}
    for kind, text in ((_INTEGER, integers), (_BYTES, others), (_FLOAT, floats)):
        for number, name in zip(text.split()[::2], text.split()[1::2], strict=True):
            fields[int(number) << 3 | kind] = name.rstrip("*"), name.endswith("*")
    return fields


_MODEL = _fields("1 ir_version", "2 producer_name 7 graph 8 opset_import*")
_OPSET = _fields("2 version", "1 domain")
_GRAPH = _fields("", "1 node* 2 name 5 initializer* 11 input* 12 output* 13 value_info*")
_NODE = _fields("", "1 input* 2 output* 3 name 4 op_type 5 attribute* 7 domain")
_ATTRIBUTE = _fields("3 i 8 ints* 20 type", "1 name 4 s 5 t 6 g", "2 f")
_TENSOR = _fields("1 dims* 2 data_type 14 data_location", "8 name 9 raw_data 13 external_data*")
_ENTRY = _fields("", "1 key 2 value")


class _Unfit(Exception):
    """What is wrong with a graph."""


def check_graph(path: Path, manifest: Manifest) -> None:
    """Raise BundleError for a step graph that no export writes, or whose weights lie in a file that is not listed."""
    try:
        _Graph(manifest).check(read_file(path, MOST_BYTES))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    except _Unfit as unfit:
        raise BundleError(f"{path} is not accepted: {unfit}; export the bundle again") from None


class _Graph:
    """The rules for the graph of one bundle."""

    def __init__(self, manifest: Manifest) -> None:
        self._caches = manifest.model.shape.num_caches
        file = manifest.step.file
        self._folder = file[: file.rfind("/") + 1]
        self._sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
        self._seen: set[bytes] = set()
        """attributes, which repeat from layer to layer"""

    def check(self, content: bytes) -> None:
        model = _read(content, _MODEL)
        for opset in model.get("opset_import", ()):
            domain = _text(_read(opset, _OPSET), "domain")
            if domain not in OPERATORS:
                raise _Unfit(f"it has operators of the domain {shortened(domain)}")
        inputs = self._check_graph(model.get("graph", b""))
        expected = len(step_inputs(ModelShape(0, 0, 0, 0, ()))) + 2 * self._caches
        if inputs != expected:
            raise _Unfit(f"it has {inputs} inputs, and the {self._caches} caches of the manifest need {expected}")

    def _check_graph(self, content: bytes, inner: bool = False) -> int:
        """Check a graph, or one within it. Returns the number of inputs."""
        graph = _read(content, _GRAPH)
        for node in graph.get("node", ()):
            self._check_node(_read(node, _NODE), inner)
        for tensor in graph.get("initializer", ()):
            self._check_tensor(_read(tensor, _TENSOR))
        return len(graph.get("input", ()))

    def _check_node(self, node: dict[str, Any], inner: bool) -> None:
        domain, operator = _text(node, "domain"), _text(node, "op_type")
        if operator not in OPERATORS.get(domain, ()):
            raise _Unfit(
                f"its node {shortened(_text(node, 'name'))} is {shortened(f'{domain}.{operator}'.strip('.'))}, which "
                "no export writes"
            )
        for content in node.get("attribute", ()):
            if content not in self._seen:
                attribute = _read(content, _ATTRIBUTE)
                if "t" in attribute:
                    self._check_tensor(_read(attribute["t"], _TENSOR))
                if "g" not in attribute:
                    self._seen.add(content)
                elif operator == "If" and not inner:
                    self._check_graph(attribute["g"], inner=True)
                else:
                    raise _Unfit(f"its node {shortened(_text(node, 'name'))} contains a graph")

    def _check_tensor(self, tensor: dict[str, Any]) -> None:
        """Its numbers are as many as its sizes say, and lie in the graph or in a file that the manifest lists."""
        name, bits, dims = (
            shortened(_text(tensor, "name")),
            BITS.get(tensor.get("data_type", 0)),
            tensor.get("dims", ()),
        )
        if bits is None or len(dims) > MOST_DIMS:
            raise _Unfit(f"its tensor {name} has a type or shape that no export writes")
        size = (math.prod(dims) * bits + 7) // 8
        entries = [_read(entry, _ENTRY) for entry in tensor.get("external_data", ())]
        if not entries and "data_location" not in tensor:
            if len(tensor.get("raw_data", b"")) != size:
                raise _Unfit(f"its tensor {name} does not have the {size} bytes that it needs")
            return
        where = {_text(entry, "key"): _text(entry, "value") for entry in entries}
        if where.keys() != {"location", "offset", "length"} or "raw_data" in tensor or len(entries) != 3:
            raise _Unfit(f"its tensor {name} lies nowhere, or in several places")
        there = self._sizes.get(self._folder + where["location"])
        if there is None:
            raise _Unfit(f"its tensor {name} lies in {shortened(where['location'])}, which the manifest does not list")
        if not re.fullmatch(r"\d{1,18} \d{1,18}", f"{where['offset']} {where['length']}", re.ASCII) or (
            int(where["length"]) != size or int(where["offset"]) + size > there
        ):
            raise _Unfit(f"its tensor {name} does not lie within {shortened(where['location'])}")


def _read(content: bytes, fields: _Fields) -> dict[str, Any]:
    """The fields of a message by name, several in a list. Raises _Unfit for others, and for one given twice."""
    found: dict[str, Any] = {}
    at, end = 0, len(content)
    try:
        while at < end:
            key, at = content[at], at + 1
            if key > 127:
                key, at = _number(content, at - 1)
            name, many = fields[key]
            value: Any
            value, at = (4, at) if key & 7 == _FLOAT else (content[at], at + 1)
            if value > 127:
                value, at = _number(content, at - 1)
            if key & 7 != _INTEGER:
                value, at = content[at : at + value], at + value
            if many:
                found.setdefault(name, []).append(value)
            elif name in found:
                raise _Unfit(f"its field {name} is given twice")
            else:
                found[name] = value
    except KeyError:
        beside = ", ".join(name for name, _ in fields.values())
        raise _Unfit(f"beside {beside} it has the field {key >> 3} in encoding {key & 7}") from None
    except IndexError:
        at = -1
    if at != end:
        raise _Unfit("it is damaged")
    return found


def _number(content: bytes, at: int) -> tuple[int, int]:
    """An integer, seven bits a byte, and where the next value begins. Raises IndexError at the end."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at + shift // 7] & 127) << shift
        if content[at + shift // 7] < 128:
            return value, at + shift // 7 + 1
    raise IndexError


def _text(message: dict[str, Any], name: str) -> str:
    text: bytes = message.get(name, b"")
    return text.decode(errors="replace")
