"""The graphs for TensorRT: operators that its parser knows, types, and numbers against Hugging Face eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from mara_export.export import finish
from mara_export.graph.nodes import Builder, GraphContext
from mara_export.graph.precision import island, narrow
from mara_export.graph.qdq import quantise_matrix
from mara_export.hf.families import model_shape
from mara_export.options import ExportOptions, Quantisation
from mara_export.progress import Progress
from mara_export.targets import COLUMN
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from tests import checkpoints

# github.com/onnx/onnx-tensorrt, docs/operators.md of its branch 10.1-GA: the rows marked Y that an exported LLM could
# have. TensorRT 10.2 and 10.3 add none (docs/Changelog.md); it says it reads opsets 9 to 20.
TENSORRT_10_3 = frozenset(
    """
    Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum DequantizeLinear
    Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual
    Identity IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mod Mul Neg Not Or Pad
    Pow QuantizeLinear Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice
    Softmax Softplus Split Sqrt Squeeze Sub Sum Tan Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905
)
OPSETS = range(9, 21)
BLOCK_OPSET = 21  # of int4; the importer of 10.1 takes the blocks from the shapes, and refuses no opset for being new
CONSTANT_AXES = ("ReduceMean", "ReduceSum", "ReduceMax", "Squeeze", "Unsqueeze")  # by their second input
MOST_TOP = 3840
NO_BLOCKS_OF_64 = ("*/down_proj/*", "*/o_proj/*")  # 96 inputs, in the tiny checkpoints
GRAPHS = [*((a, "fp16") for a in checkpoints.ARCHITECTURES), *(("qwen3", p) for p in ("fp32", "bf16", "int8", "int4"))]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, traced) -> Callable[..., Bundle]:
    """(architecture, precision, lowering="decomposed") → a bundle for target tensorrt, without the gate."""
    root = tmp_path_factory.mktemp("engines")

    @cache
    def make(architecture: str, precision: str, lowering: str) -> Bundle:
        options = ExportOptions(
            target="tensorrt",
            lowering=lowering,
            precision=precision,
            keep=NO_BLOCKS_OF_64 if precision == "int4" else (),
            max_context=64,
            max_candidates=8,
            gate=False,
        )
        return finish(traced(architecture), options, root / f"{architecture}-{precision}-{lowering}")

    return lambda architecture, precision, lowering="decomposed": make(architecture, precision, lowering)


@pytest.fixture(scope="module")
def graphs(bundles) -> Callable[..., onnx.ModelProto]:
    """The same → its step graph, weights within it."""
    read = cache(lambda *which: onnx.load(bundles(*which).path("step.onnx")))
    return lambda architecture, precision, lowering="decomposed": read(architecture, precision, lowering)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every value; the checker of ONNX refuses operators that do not take them."""
    graph = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    return {
        **{v.name: v.type.tensor_type.elem_type for v in values},
        **{t.name: t.data_type for t in graph.initializer},
    }


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# --- what the parser of TensorRT 10.3 reads --------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "precision"), GRAPHS)
def test_every_node_is_one_that_tensorrt_10_3_reads(graphs, architecture, precision) -> None:
    model = graphs(architecture, precision)
    assert {(node.domain, node.op_type) for node in model.graph.node} <= {("", op) for op in TENSORRT_10_3}
    assert not model.functions
    (opset,) = model.opset_import
    assert opset.version in OPSETS or (precision == "int4" and opset.version == BLOCK_OPSET)

    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = attributes(node)["value"]
    kinds = types(model)
    for node in model.graph.node:
        kind, given = node.op_type, attributes(node)
        if kind in CONSTANT_AXES:
            assert node.input[1] in constants, node
        elif kind == "Slice":
            assert len(node.input) < 4 or node.input[3] in constants, node
        elif kind == "TopK":
            assert given["sorted"] == 1
            assert constants[node.input[1]] < MOST_TOP
        elif kind == "ScatterND":
            assert not given  # a `reduction`, even of none, is refused
        elif kind == "LayerNormalization":
            assert len(node.output) == 1
        elif kind == "Range":
            assert {kinds[name] for name in node.input} == {TensorProto.INT64}
        elif kind in ("Less", "Equal", "Greater"):
            assert kinds[node.input[0]] in (TensorProto.INT64, TensorProto.FLOAT)
        elif kind in ("Gather", "Where"):
            floats = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
            assert kinds[node.output[0]] in (TensorProto.INT64, *floats)
        elif kind == "DequantizeLinear":
            integers, scales = (constants[name] for name in node.input)  # symmetric: no zero point
            assert integers.ndim == 2
            assert (scales > 0).all()
            if precision == "int8":  # IDequantizeLayer (NvInfer.h, 10.3): blocks are for int4 only
                assert given == {"axis": 1}
                assert scales.shape == integers.shape[1:]
            else:
                assert given == {"axis": 0, "block_size": 64}
                assert scales.shape == (integers.shape[0] // 64, integers.shape[1])


def test_the_cache_that_is_given_stays_as_it_is(graphs, reference) -> None:
    """Two buffers may change places: present holds what is new and all that past holds, which stays."""
    model, shape = graphs("qwen3", "fp32"), model_shape(reference("qwen3").config)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    slot, sizes = 5, {"S": 3, "C": 12, "H0": 1, "N": 1, "Q": 1, "A": 2, "B": 1, "M": 3, "W1": 3, "W2": 4}
    rng, feeds = np.random.default_rng(0), {}
    for tensor in tensors.step_inputs(shape):
        size = [sizes.get(n, n) if isinstance(n, str) else n for n in tensor.shape]
        feeds[tensor.name] = rng.integers(0, 3, size).astype(tensor.dtype)
    feeds |= {tensors.WRITE_INDICES: np.array([slot]), tensors.POSITION_IDS: np.array([[5, 5, 6]])}
    feeds |= {name: np.arange(3)[None] for name in (tensors.GRID, tensors.SEATS)}
    before = {name: array.copy() for name, array in feeds.items()}
    names = tensors.kv_names(shape.num_caches)
    written = slice(slot, slot + sizes["S"])
    for (past, _), present in zip(names, session.run([present for _, present in names], feeds), strict=True):
        assert np.array_equal(feeds[past], before[past])
        assert np.array_equal(np.delete(present, written, 2), np.delete(feeds[past], written, 2))
        assert (present[:, :, written] != feeds[past][:, :, written]).all()


# --- types -----------------------------------------------------------------------------------------------------------


HALF = ("Gemm", "MatMul", "Attention", "RMSNormalization", "TensorScatter", "ScatterND", "Sigmoid")


@pytest.mark.parametrize("lowering", ["portable", "decomposed"])
def test_the_llm_computes_in_float16_and_the_step_in_float32(graphs, lowering) -> None:
    model = graphs("qwen3", "fp16", lowering)
    kinds = types(model)
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    for node in model.graph.node:
        if node.name.startswith("agents/"):
            assert kinds[node.output[0]] in (single, TensorProto.BOOL), node.name
        elif node.op_type in HALF:
            assert kinds[node.output[0]] == half, node.name
        elif node.op_type in ("Softmax", "ReduceMean", "Sqrt", "LayerNormalization", "Exp", "TopK"):
            assert kinds[node.output[0]] == single, node.name
    shown = {t.name: kinds[t.name] for t in model.graph.output}
    cache_ = {present for _, present in tensors.kv_names(10)} & set(shown)
    assert {shown.pop(name) for name in cache_} == {half}
    assert set(shown.values()) == {single, TensorProto.INT64}


@pytest.mark.parametrize("lowering", ["portable", "decomposed"])
def test_bfloat16_differs_from_float16_in_types_alone(bundles, graphs, lowering) -> None:
    """ONNX Runtime has no bfloat16 on a CPU: that the float16 graph is right has to do for both."""
    short, brain = graphs("qwen3", "fp16", lowering).graph, graphs("qwen3", "bf16", lowering).graph

    def as_float16(element: int) -> int:
        return TensorProto.FLOAT16 if element == TensorProto.BFLOAT16 else element

    changed = 0
    for a, b in zip(short.initializer, brain.initializer, strict=True):
        assert (a.name, a.data_type) == (b.name, as_float16(b.data_type))
        x, y = (numpy_helper.to_array(t).astype(np.float64) for t in (a, b))
        np.testing.assert_allclose(x, y, rtol=2**-8, atol=2**-14)  # the same number, rounded to either
        changed += a.data_type != b.data_type
    assert changed > 10
    for node in brain.node:
        if node.op_type == "Cast":
            node.attribute[0].i = as_float16(node.attribute[0].i)
        elif node.op_type == "Constant":
            node.attribute[0].t.data_type = as_float16(node.attribute[0].t.data_type)
    assert list(short.node) == list(brain.node)
    for value in (*brain.input, *brain.output):
        value.type.tensor_type.elem_type = as_float16(value.type.tensor_type.elem_type)
    assert [*short.input, *short.output] == [*brain.input, *brain.output]
    bundle = bundles("qwen3", "bf16", lowering)
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|not a registered|bfloat16"):
        onnxruntime.InferenceSession(str(bundle.path("step.onnx")), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("marked", [True, False])
def test_an_island_computes_in_float32(reference, tmp_path: Path, marked: bool) -> None:
    """300² is more than float16 holds. (ONNX's own evaluator rounds every result; ONNX Runtime on a CPU does not.)"""
    hidden = ir.val("hidden", ir.DataType.FLOAT16, [1, 4])
    graph = ir.Graph([hidden], [], nodes=[], opset_imports={"": 20}, name="norm")
    add = Builder(graph, "norm")
    factor = add.constant([2.0])
    x = add("Mul", hidden, factor)
    same = add("Cast", x, to=ir.DataType.FLOAT)  # as a model may have it: to the type of the rest
    squares = add("Mul", same, same)
    mean = add("ReduceMean", squares, add.ints(-1))
    root = add("Sqrt", mean)
    unit = add("Div", x, root)
    for value in (squares, mean, root, unit) if marked else ():
        island(value)
    graph.outputs.append(add("Mul", unit, factor, out=tensors.LAST_HIDDEN_STATE))
    options = ExportOptions(target="tensorrt")
    shape = model_shape(reference("qwen2").config)
    narrow(graph, GraphContext(shape, ((), ()), 256, options, tmp_path, Progress(quiet=True)))
    graph.outputs[0].dtype, graph.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([1, 4])
    graph.sort()
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    with np.errstate(over="ignore"):
        (found,) = ReferenceEvaluator(model).run(None, {"hidden": np.array([[150, 150, -150, 150]], np.float16)})
    assert found.tolist() == [[2.0, 2.0, -2.0, 2.0] if marked else [0.0, 0.0, 0.0, 0.0]]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "lowering", "precision"),
    [
        ("qwen2", "decomposed", "fp16"),
        ("llama", "decomposed", "int8"),
        ("mistral", "portable", "int8"),
        pytest.param("qwen3", "portable", "fp16", marks=pytest.mark.long),
        # random matrices, as the tiny checkpoints have them, lose too much to four bits in any lowering
        ("demo", "decomposed", "int4"),
        ("demo", "portable", "int4"),
    ],
)
def test_a_graph_for_tensorrt_passes_the_gate_on_the_cpu(traced, tmp_path, model, lowering, precision) -> None:
    options = ExportOptions(target="tensorrt", lowering=lowering, precision=precision, max_context=64, max_candidates=8)
    manifest = finish(traced(model), options, tmp_path / "out").manifest
    assert manifest.targets == ("tensorrt", "cpu")  # ONNX Runtime ran the same graph, which chooses always
    assert manifest.step.cache == "float16"
    assert manifest.parity is not None
    if precision == "int4":
        assert manifest.step.quantisation == {"bits": 4, "block_size": 64, "quantiser": "rtn", "keep": []}


@pytest.mark.parametrize(
    "how", [Quantisation(8, COLUMN), Quantisation(8, 32), Quantisation(4, 64), Quantisation(4, 16)]
)
def test_rounding_loses_half_a_step_at_most(how: Quantisation) -> None:
    matrix = np.random.default_rng(0).normal(size=(128, 24)).astype(np.float32)
    matrix[:, 3] = 0.0
    integers, scales = quantise_matrix(matrix, how)
    assert (scales > 0).all()  # of zeros, too
    most = 2 ** (how.bits - 1) - 1
    assert int(np.abs(integers.astype(np.int8)).max()) == most
    size = 128 if how.block_size == COLUMN else how.block_size
    assert scales.shape == ((24,) if how.block_size == COLUMN else (128 // size, 24))
    steps = np.repeat(scales.reshape(-1, 24), size, axis=0)
    error = np.abs(integers.astype(np.float32) * steps - matrix)
    assert (error <= steps * 0.5001).all()
    assert not error[:, 3].any()


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_name_to_keep_that_matches_no_matrix_is_refused(traced, tmp_path, target) -> None:
    options = ExportOptions(target=target, precision="int8", keep=("nothing/*",), gate=False)
    with pytest.raises(OptionError, match=r"--keep is 'nothing/\*'"):
        finish(traced("qwen2"), options, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
