"""How much memory a bundle takes where it runs, before there is one: pure arithmetic on a model's sizes.

What each figure was compared with is in docs/memory.md, and tests/export/test_memory.py does it again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mara_deploy.decoders import Decoder
from mara_export.targets import (
    BITS,
    BLOCK_SIZES_OF,
    COLUMN,
    HEAD_ROWS,
    LOWERINGS_OF,
    MAX_CANDIDATES,
    PRECISIONS_OF,
    TARGETS,
    engine_slots,
)
from mara_runtime.engines.ort import FIRST_SLOTS, grown
from mara_runtime.errors import OptionError
from mara_runtime.passes import PREFILL_ROWS
from mara_runtime.tensors import spare_slots

CONTEXTS = (2048, 8192)
JETSONS_GB = (8, 16, 32, 64)
"""Memory that processor and GPU of a Jetson share, in 10⁹ bytes: about what Linux has of a module of so many GiB."""
SYSTEM_BYTES = 2_500_000_000
"""Left for Linux without a desktop, the CUDA context and the libraries' kernels: an assumption, not a measurement."""
AGENT_WIDTHS = (1024, 256)
LOGIT_ROWS = HEAD_ROWS + 1
"""Rows that may go through the LM head in one pass of a TensorRT engine: those asked for, and the elected one."""
PLAN_BYTES, PLAN_BYTES_A_LAYER = 4_800_000, 710_000
"""Of a TensorRT engine beside its weights: kernels and names."""
SCRATCH_BYTES = 8_270_000
"""Of a TensorRT engine whatever its size, for choosing among candidates and finding the best tokens."""
HOST_BYTES = {"cpu": 60_000_000, "cuda": 60_000_000, "tensorrt": 145_000_000, "tensorrt-rtx": 145_000_000}
"""A process that has imported the runtime, the tokenizer and the engine's Python package, and opened nothing."""


@dataclass(frozen=True)
class Setting:
    """How a model is exported and run."""

    target: str = "tensorrt"
    """one of TARGETS"""
    precision: str = "fp16"
    """one that the target has"""
    context: int = 2048
    """tokens of prompt and answer; ≥ 2"""
    max_candidates: int = 64
    """candidates of a position; 1 … MAX_CANDIDATES"""
    lowering: str | None = None
    """ort, portable, decomposed; None: the target's own"""
    block_size: int | None = None
    """int8, int4: weights that share a scale, COLUMN for one of each column; None: the target's own"""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise OptionError(f"--target is {self.target!r}; it must be one of {', '.join(TARGETS)}")
        if self.precision not in PRECISIONS_OF[self.target]:
            has = ", ".join(PRECISIONS_OF[self.target])
            raise OptionError(f"--precision is {self.precision!r}; --target {self.target} has {has}")
        if self.context < 2:
            raise OptionError(f"--context is {self.context}; it must be at least 2")
        if not 1 <= self.max_candidates <= MAX_CANDIDATES:
            raise OptionError(f"--max-candidates is {self.max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")
        if self.lowering not in (None, *LOWERINGS_OF[self.target]):
            takes = " or ".join(LOWERINGS_OF[self.target])
            raise OptionError(f"--lowering is {self.lowering!r}; --target {self.target} takes {takes}")
        if self.block_size is not None and self.block_size != COLUMN and self.block_size < 1:
            raise OptionError(f"--block-size is {self.block_size}; it must be at least 1")
        if self.lowering is None:
            object.__setattr__(self, "lowering", LOWERINGS_OF[self.target][0])
        sizes = BLOCK_SIZES_OF[self.target].get(self.precision)
        if self.block_size is None and sizes is not None:
            object.__setattr__(self, "block_size", sizes[0])

    @property
    def on_tensorrt(self) -> bool:
        """Does TensorRT run it, of either kind?"""
        return self.target.startswith("tensorrt")

    @property
    def number_bytes(self) -> int:
        """Of an activation and of an entry of the KV cache."""
        return 4 if self.target == "cpu" or self.precision == "fp32" else 2

    @property
    def fused(self) -> bool:
        """Is the attention one kernel, without its scores in memory? TensorRT has none for float32."""
        return self.on_tensorrt and self.lowering == "portable" and self.precision != "fp32"

    @property
    def slots(self) -> int:
        """Size of the KV cache when it is largest."""
        if self.on_tensorrt:
            return engine_slots(self.context, self.max_candidates)
        return self.context + spare_slots(self.max_candidates)


@dataclass(frozen=True)
class Memory:
    """Bytes while decoding, by what they are for."""

    engine_bytes: int
    """weights as the engine holds them, and its code"""
    kv_bytes: int
    """the KV cache at its largest"""
    workspace_bytes: int
    """what lives during the widest pass, inputs and outputs included"""
    host_bytes: int
    """the process around it"""

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return self.engine_bytes + self.kv_bytes + self.workspace_bytes + self.host_bytes

    def left_bytes(self, gigabytes: int) -> int:
        """What a Jetson of so many gigabytes has left for everything else; negative: it does not fit."""
        return gigabytes * 10**9 - self.total_bytes

    def fits(self, gigabytes: int) -> bool:
        """Is enough left for the system?"""
        return self.left_bytes(gigabytes) >= SYSTEM_BYTES

    def to_json(self) -> dict[str, Any]:
        """With the sum and what each Jetson has left."""
        boards = {f"{gb} GB": {"left_bytes": self.left_bytes(gb), "fits": self.fits(gb)} for gb in JETSONS_GB}
        return {**asdict(self), "total_bytes": self.total_bytes, "jetson": boards}


def estimate(model: Decoder, setting: Setting, engine_bytes: int | None = None) -> Memory:
    """The memory of a model in a setting. engine_bytes: of an engine that exists, in place of the estimate."""
    return Memory(
        engine_memory_bytes(model, setting) if engine_bytes is None else engine_bytes,
        kv_bytes(model, setting),
        workspace_bytes(model, setting),
        HOST_BYTES[setting.target] + _outgrown_bytes(model, setting),
    )


def weight_bytes(model: Decoder, setting: Setting) -> int:
    """Of the graph's weights as a bundle stores them: step.onnx.data, less its alignment."""
    matrices = sum(_matrix_bytes(k, n, setting) for _, k, n in model.matrices)
    plain = setting.number_bytes
    stored = 2 if setting.precision == "fp16" else plain  # on the CPU it is widened when it is loaded
    positions = setting.context + spare_slots(setting.max_candidates)
    return (
        model.num_layers * matrices
        + _vocabulary_bytes(model, setting)
        + model.small * plain
        + positions * model.head_dim * stored  # cosines and sines
        + 4 * _agent_parameters(model.hidden_size)
    )


def engine_memory_bytes(model: Decoder, setting: Setting) -> int:
    """Of the weights as the engine holds them, and of its code."""
    weights = weight_bytes(model, setting)
    if setting.on_tensorrt:
        return weights + PLAN_BYTES + PLAN_BYTES_A_LAYER * model.num_layers
    if setting.target == "cpu" and setting.precision == "fp16":  # widened when it is loaded
        return weights + 2 * (model.parameters - model.small)
    if (
        setting.target == "cpu" and model.tied
    ):  # multiplied from a copy in an order of its own; the lookup keeps the other
        return weights + _matrix_bytes(model.hidden_size, model.vocab_size, setting)
    return weights


def kv_bytes(model: Decoder, setting: Setting) -> int:
    """Of the KV cache: a decomposed graph under TensorRT has two, which change places."""
    copies = 2 if setting.lowering == "decomposed" and setting.on_tensorrt else 1
    return copies * setting.slots * _slot_bytes(model, setting)


def workspace_bytes(model: Decoder, setting: Setting) -> int:
    """The most that is alive at a time in the widest pass, inputs and outputs included."""
    outputs = 4 * (LOGIT_ROWS * model.vocab_size + PREFILL_ROWS * model.hidden_size)
    return outputs + activation_bytes(model, setting)


def activation_bytes(model: Decoder, setting: Setting) -> int:
    """The most that is alive at a time within the widest pass: in an MLP, in an attention, or in the LM head."""
    rows, b, d = PREFILL_ROWS, setting.number_bytes, model.hidden_size
    width = model.num_heads * model.head_dim
    mask = rows * setting.slots
    inner = 4 if setting.lowering == "ort" else 3  # gate and up come as one there, and are taken apart
    mlp = rows * (inner * model.intermediate_size + 4 * d) * b + mask
    attention = rows * (2 * d + 4 * width) * b + 4 * mask
    if setting.lowering == "ort":  # the mask for every query of a group, and the scores, twice: ONNX Runtime plans the
        # memory of a shape when it has run once, and then keeps what that run took beside the plan's
        attention += mask * (2 * model.num_heads + model.num_heads // model.num_kv_heads) * b
    elif not setting.fused:  # scores and their softmax; keys and values, repeated for every head
        attention += 2 * mask * model.num_heads * b + 2 * setting.slots * width * b
    head = LOGIT_ROWS * model.vocab_size * (b if setting.on_tensorrt else 12) + rows * d * 16
    return max(mlp, attention, head) + (SCRATCH_BYTES if setting.on_tensorrt else 0)


def _matrix_bytes(inputs: int, outputs: int, setting: Setting) -> int:
    """Of a matrix and its scales."""
    bits = BITS.get(setting.precision)
    if bits is None:
        return inputs * outputs * (4 if setting.precision == "fp32" else 2)
    size = inputs if setting.block_size in (None, COLUMN) else int(setting.block_size)
    blocks = -(-inputs // size)
    return outputs * blocks * (size * bits // 8 + setting.number_bytes)


def _vocabulary_bytes(model: Decoder, setting: Setting) -> int:
    """Of the embedding's table and the LM head."""
    head = _matrix_bytes(model.hidden_size, model.vocab_size, setting)
    if setting.precision not in BITS:
        return head if model.tied else 2 * head
    if setting.lowering == "ort" and model.hidden_size % (setting.block_size or 1) == 0:
        return head if model.tied else 2 * head
    return head + model.table * setting.number_bytes  # Q/DQ leaves the table as it is


def _slot_bytes(model: Decoder, setting: Setting) -> int:
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * setting.number_bytes


def _outgrown_bytes(model: Decoder, setting: Setting) -> int:
    """Of the smaller cache that ONNX Runtime's engine still holds while it fills the last, larger one."""
    if setting.on_tensorrt:
        return 0
    before, size = 0, FIRST_SLOTS
    while size < setting.slots:
        before, size = size, grown(setting.target, size, size + 1)
    return before * _slot_bytes(model, setting)


def _agent_parameters(hidden: int) -> int:
    first, second = AGENT_WIDTHS
    return 2 * hidden + (hidden + 1) * first + (first + 1) * second + 2 * (second + 1)
