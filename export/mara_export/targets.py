"""What can be exported: one row for each lowering and for each target, and what is common to all TensorRT engines.

Imports nothing heavy: help texts, options and the memory model (mara_deploy/memory.py) read these tables without
PyTorch and onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mara_runtime.tensors import DRAFT_ROWS, spare_slots

TRACERS = ("auto", "optimum", "torch")
"""auto: Optimum where it is installed; torch: torch.export"""
QUANTISERS = ("rtn", "hqq", "k-quant")
"""rtn: round to nearest; hqq: half-quadratic, int4 only; k-quant: as llama.cpp chooses scales, blocks of 32 only"""
COLUMN = -1
"""Block size that stands for one scale per output column (per-channel), as GPTQ writes it."""


@dataclass(frozen=True)
class Lowering:
    """A form of the graph. Its passes are in the module of its name in mara_export/graph."""

    summary: str
    """for help texts"""
    quantisers: tuple[str, ...]
    """default first"""
    in_place: bool
    """the engine writes new KV entries into its cache; False: TensorRT needs a second cache, and the two are swapped"""
    tensorrt_since: tuple[int, int] | None = None
    """oldest TensorRT that reads it; None: TensorRT does not"""
    fused_attention: bool = False
    """TensorRT runs attention as one kernel, without its scores in memory (not in float32)"""
    grouped_attention: bool = False
    """queries that share keys are rows of one matrix, so the mask is repeated for each query of a group"""
    quantised_table: bool = False
    """int8 and int4 quantise the embedding table, too"""
    fused_projections: bool = False
    """q, k, v are one matrix, and gate and up another"""


LOWERINGS = {
    "ort": Lowering(
        summary="ONNX Runtime's fused attention",
        quantisers=QUANTISERS,
        in_place=True,
        grouped_attention=True,
        quantised_table=True,
        fused_projections=True,
    ),
    "portable": Lowering(
        summary="standard ONNX operators; TensorRT 10.15 or later",
        quantisers=("rtn",),
        in_place=True,
        tensorrt_since=(10, 15),
        fused_attention=True,
    ),
    "decomposed": Lowering(
        summary="basic operators, for the TensorRT of JetPack 6 to 7.1",
        quantisers=("rtn",),
        in_place=False,
        tensorrt_since=(10, 3),
    ),
}

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
BITS = {"int8": 8, "int4": 4}
"""Bits per weight of the precisions that quantise."""
BLOCK_SIZES = (32, 16, 64, 128, 256)
"""Weights that may share a scale in ONNX Runtime, default first."""
CPU_DTYPES = ("float32", "float16")
"""KV cache types that ONNX Runtime's CPU kernels can run."""

_FLOAT32 = dict.fromkeys(PRECISIONS, "float32")
_NARROW = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16"}


@dataclass(frozen=True)
class Target:
    """An engine to export for."""

    lowerings: tuple[str, ...]
    """default first"""
    precisions: tuple[str, ...]
    """of the LLM's weights, default first"""
    block_sizes: Mapping[str, tuple[int, ...]]
    """by precision, default first"""
    compute: Mapping[str, str]
    """type of activations and KV cache, by precision"""
    fixed_shapes: bool
    """output sizes must follow from input sizes, as TensorRT and CUDA graphs need"""
    quantisers: tuple[str, ...] = QUANTISERS
    """those whose weights it multiplies as they are; a lowering may have fewer"""
    is_tensorrt: bool = False
    """engines are built from the graph (mara-build)"""
    just_in_time: bool = False
    """TensorRT for RTX: kernels are compiled on the GPU that runs the engine, not timed while it is built"""
    install: str = ""
    """how to install the package that builds its engines"""


_ORT_BLOCKS = {"int8": BLOCK_SIZES, "int4": BLOCK_SIZES}
_TENSORRT_PRECISIONS = ("fp16", "bf16", "fp32", "int8", "int4")

# Block sizes of TensorRT: its documentation, "Quantization Schemes"; TensorRT for RTX 1.7.1 was found to build blocks
# of 32, too. int8 has per-channel scales, as TensorRT 10.3's DequantizeLinear takes no int8 blocks (NvInfer.h,
# IDequantizeLayer).
TARGETS = {
    "cpu": Target(
        lowerings=("ort", "portable", "decomposed"),
        precisions=("fp32", "fp16", "int8", "int4"),
        block_sizes=_ORT_BLOCKS,
        compute=_FLOAT32,
        fixed_shapes=False,
    ),
    "cuda": Target(
        lowerings=("ort",),
        precisions=("fp16", "int8", "int4"),
        block_sizes=_ORT_BLOCKS,
        compute=_NARROW,
        fixed_shapes=True,
        quantisers=("rtn", "k-quant"),
    ),
    "tensorrt": Target(
        lowerings=("portable", "decomposed"),
        precisions=_TENSORRT_PRECISIONS,
        block_sizes={"int8": (COLUMN,), "int4": (64, 128)},
        compute=_NARROW,
        fixed_shapes=True,
        is_tensorrt=True,
        install="pip install 'mara-deploy[tensorrt]', but on a Jetson it comes with JetPack (apt install tensorrt, "
        "and a virtual environment made with --system-site-packages)",
    ),
    "tensorrt-rtx": Target(
        lowerings=("portable", "decomposed"),
        precisions=_TENSORRT_PRECISIONS,
        block_sizes={"int8": (COLUMN,), "int4": (32, 64, 128)},
        compute=_NARROW,
        fixed_shapes=True,
        is_tensorrt=True,
        just_in_time=True,
        install="pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
    ),
}
"""By name, default first."""
DEFAULT_TARGET = next(iter(TARGETS))

MAX_CANDIDATES = 1024
"""More siblings than this would make the mask of one pass larger than the model's own work."""
HEAD_ROWS = DRAFT_ROWS + 1
"""Rows of a conversation whose logits one pass of a TensorRT engine may return: a whole draft and the row before."""
SHARED_ROWS = 32
"""Rows of one conversation in a pass that it shares with others; wider passes, as of prompts, run alone."""
MOST_AGENTS = 4
"""Agents that one pass of a TensorRT engine may mix."""
PLACES, MOST_PLACES = 4, 64
"""Conversations in one pass of a TensorRT engine: by default, and at most."""
SLOT_MULTIPLE = 16
"""KV slots of an engine are rounded up to it: fused kernels want aligned mask rows."""


def engine_slots(tokens: int, max_candidates: int) -> int:
    """KV slots of a TensorRT engine for `tokens` of prompt and answer."""
    return -(-(tokens + spare_slots(max_candidates)) // SLOT_MULTIPLE) * SLOT_MULTIPLE
