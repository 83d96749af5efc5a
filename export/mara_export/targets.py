"""What an export can be asked for: targets, and the lowerings, precisions and blocks that each of them has; and what is
the same in every TensorRT engine.

Imports nothing heavy, as the help texts and the memory model (mara_deploy/memory.py) read it without PyTorch and onnx.
"""

from __future__ import annotations

from mara_runtime.tensors import DRAFT_ROWS, spare_slots

LOWERINGS = ("ort", "portable", "decomposed")
"""What the traced nodes become; lower.py describes each."""
LOWERINGS_OF = {
    "cpu": LOWERINGS,
    "cuda": ("ort",),
    "tensorrt": ("portable", "decomposed"),
    "tensorrt-rtx": ("portable", "decomposed"),
}
"""By target, its own first."""
TARGETS = tuple(LOWERINGS_OF)
"""Engines to export for."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
PRECISIONS_OF = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp16", "int8", "int4"),
    "tensorrt": ("fp16", "bf16", "fp32", "int8", "int4"),
    "tensorrt-rtx": ("fp16", "bf16", "fp32", "int8", "int4"),
}
"""What the LLM's weights may be, by target, the default first."""
BITS = {"int8": 8, "int4": 4}
"""Of a weight, for the precisions that quantise."""
QUANTISERS = ("rtn", "hqq", "k-quant")
"""rtn: round to nearest; hqq: half-quadratic, int4 only; k-quant: as llama.cpp chooses scales, blocks of 32 only"""
COLUMN = -1
"""Block size of a scale for each column, as GPTQ writes it; in standard operators only (qdq.py)."""
BLOCK_SIZES = (32, 16, 64, 128, 256)
"""Weights that may share a scale in ONNX Runtime, the default first."""
BLOCK_SIZES_OF: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"int8": BLOCK_SIZES, "int4": BLOCK_SIZES},
    "cuda": {"int8": BLOCK_SIZES, "int4": BLOCK_SIZES},
    "tensorrt": {"int8": (COLUMN,), "int4": (64, 128)},
    "tensorrt-rtx": {"int8": (COLUMN,), "int4": (32, 64, 128)},
}
"""By target and precision, the default first. Source for TensorRT: its documentation, "Quantization Schemes"; that for
RTX builds blocks of 32 was tried with 1.7.1."""
MAX_CANDIDATES = 1024
"""More siblings than this would make the mask of one pass larger than the model's own work."""
HEAD_ROWS = DRAFT_ROWS + 1
"""Rows whose logits one pass of a TensorRT engine may ask for: a whole draft and the row before it."""
SLOT_MULTIPLE = 16
"""An engine's slots are rounded up to it, so that the rows of the mask are aligned as fused kernels want them."""


def engine_slots(tokens: int, max_candidates: int) -> int:
    """Size of the KV cache that a TensorRT engine has for so many tokens of prompt and answer."""
    return -(-(tokens + spare_slots(max_candidates)) // SLOT_MULTIPLE) * SLOT_MULTIPLE
