"""Weight-only precisions: what the graph then holds, what is stored once, what is kept, what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mara_deploy.demo import MODEL_FOLDER, export_demo
from mara_export.graph.quantise import SLICE_COLUMNS, quantise_blocks
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import BITS
from mara_runtime.errors import OptionError
from tests import checkpoints

WAYS = [("int8", "rtn"), ("int8", "k-quant"), ("int4", "rtn"), ("int4", "hqq"), ("int4", "k-quant")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(precision, **quantisation) → a bundle of the demo that passed its gate."""
    made = {}

    def get(precision: str, **how):
        key = (precision, *sorted(how.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("precision") / "demo"
            made[key] = export_demo(out, quiet=True, max_context=64, precision=precision, **how)
        return made[key]

    return get


def graph_of(bundle) -> onnx.GraphProto:
    return onnx.load(bundle.path("step.onnx"), load_external_data=False).graph


def place(graph: onnx.GraphProto, name: str) -> tuple[str, str]:
    (tensor,) = [t for t in graph.initializer if t.name == name]
    external = {entry.key: entry.value for entry in tensor.external_data}
    return external["offset"], external["length"]


def test_bundles_shrink_with_the_precision(demo) -> None:
    sizes = [demo(p).manifest.files["step.onnx.data"].size_bytes for p in ("fp32", "fp16", "int8", "int4")]
    weights = 4 * sum(p.numel() for p in checkpoints.load(MODEL_FOLDER).parameters())
    agent = sizes[0] - weights  # which stays float32, as do biases and norms
    assert 0 < agent < sizes[0] / 2
    for size, share in zip(sizes[1:], (1 / 2, 9 / 32, 5 / 32), strict=True):  # a scale of 4 bytes for 32 weights
        assert size - agent == pytest.approx(weights * share, rel=0.15)


@pytest.mark.parametrize(("precision", "quantiser"), WAYS)
def test_every_quantiser_ends_in_the_operators_of_onnx_runtime(demo, precision, quantiser) -> None:
    bundle = demo(precision, quantiser=quantiser)
    graph = graph_of(bundle)
    matrices = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert any("lm_head" in node.name for node in matrices)
    assert not [node for node in graph.node if node.op_type == "MatMul"]
    for node in matrices:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"]) == (BITS[precision], 32)
        if quantiser == "rtn":
            assert attributes["accuracy_level"] == 4
    assert bundle.manifest.step.quantisation == {
        "bits": BITS[precision],
        "block_size": 32,
        "quantiser": quantiser,
        "keep": [],
    }
    assert bundle.manifest.parity["passed"]


@pytest.mark.parametrize(("precision", "quantiser"), WAYS)
def test_a_tied_head_and_its_table_are_the_same_bytes(demo, precision, quantiser) -> None:
    graph = graph_of(demo(precision, quantiser=quantiser))
    (table,) = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    head = [node for node in graph.node if node.op_type == "MatMulNBits"][-1]
    assert place(graph, table.input[0]) == place(graph, head.input[1])
    assert place(graph, table.input[2]) == place(graph, head.input[2])


def test_a_tied_head_is_stored_once_in_float_too(demo) -> None:
    graph = graph_of(demo("fp32"))
    (table,) = [node for node in graph.node if node.op_type == "Gather" and node.input[0].startswith("model.embed")]
    (head,) = [node for node in graph.node if "logits" in node.output]
    assert head.op_type == "Gemm"
    assert head.input[1] == table.input[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [48, SLICE_COLUMNS + 32])
def test_rounding_to_nearest_errs_by_half_a_step(bits: int, columns: int) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, columns)).astype(np.float32)
    blocks = quantise_blocks(matrix, "m", Quantisation(bits))
    packed, scales = blocks.arrays
    assert {name: blocks.attributes[name] for name in "KN"} == {"K": 64, "N": columns}
    levels = packed.reshape(columns, 2, -1)
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], -1).reshape(columns, 2, 32)
    step = scales.reshape(columns, 2, 1)
    restored = ((levels.astype(np.float32) - 2 ** (bits - 1)) * step).reshape(columns, 64).T
    error = np.abs(restored - matrix).reshape(2, 32, columns)
    # the scale comes from the largest value; one of the other sign may be cut to the last level
    assert (error <= np.abs(step[:, :, 0].T)[:, None] * 1.001).all()
    assert np.mean(error <= np.abs(step[:, :, 0].T)[:, None] * 0.501) > 0.97


def test_what_is_kept_stays_float32(demo) -> None:
    graph = graph_of(demo("int4", keep=("*/lm_head/*", "*layers.0/mlp/*")))
    kept = [node.name for node in graph.node if node.op_type == "MatMul"]
    assert any("layers.0/mlp" in name for name in kept)
    assert any("lm_head" in name for name in kept)
    assert all("layers.0/mlp" in name or "lm_head" in name for name in kept)
    assert not [
        n.name for n in graph.node if n.op_type == "MatMulNBits" and ("layers.0/mlp" in n.name or "lm_head" in n.name)
    ]


def test_a_row_that_is_no_whole_number_of_blocks_is_looked_up_in_float32(demo) -> None:
    graph = graph_of(demo("int4", block_size=256))  # the demo's hidden size is 128
    assert not [node for node in graph.node if node.op_type == "GatherBlockQuantized"]


def test_half_precision_is_widened_when_it_is_read(demo) -> None:
    graph = graph_of(demo("fp16"))
    ours = ("agent/", "step/")
    stored = {t.name: t.data_type for t in graph.initializer if len(t.dims) == 2 and not t.name.startswith(ours)}
    assert TensorProto.FLOAT16 in stored.values()
    assert {n for n, kind in stored.items() if kind == TensorProto.FLOAT} <= {"rotary/cos", "rotary/sin"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--precision", "int4", "--lowering", "portable", "--quantiser", "hqq"], "--lowering portable has rtn"),
        (["--block-size", 64], "--block-size, --quantiser and --keep are for --precision int8 and int4"),
        (["--precision", "int8", "--quantiser", "hqq"], "--quantiser hqq is for --precision int4"),
        (["--precision", "int4", "--quantiser", "k-quant", "--block-size", 64], "k-quant has blocks of 32"),
        (["--precision", "int4", "--block-size", 48], "--block-size is 48; it must be one of 16, 32"),
        (["--precision", "int4", "--block-size", 0], "--block-size is 0; it must be one of 16, 32"),
        (["--precision", "int4", "--block-size", -1], "--block-size is -1; it must be one of 16, 32"),
        (["--block-size", 0], "--block-size, --quantiser and --keep are for --precision int8 and int4"),
        (["--precision", "int4", "--keep", "nothing/*"], "--keep is 'nothing/*', which matches no matrix"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(command, tmp_path, options, said) -> None:
    out = tmp_path / "out"
    done = command("export", "--model", "demo", "--agent", "demo", "--quiet", "--out", out, *options)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("wrong", [{"precision": "int4", "quantiser": "gptq"}, {"precision": "int8", "block_size": 0}])
def test_options_are_checked_where_they_are_made(wrong) -> None:
    with pytest.raises(OptionError, match="must be one of"):
        ExportOptions(**wrong)


def test_a_matrix_that_the_quantiser_cannot_take_is_named() -> None:
    """k-quant at 4 bits wants an even number of blocks."""
    matrix = np.ones((96, 8), np.float32)
    with pytest.raises(OptionError, match=r"^--quantiser k-quant cannot quantise /mlp/down_proj/MatMul, .* 96 rows: "):
        quantise_blocks(matrix, "/mlp/down_proj/MatMul", Quantisation(4, 32, "k-quant"))
