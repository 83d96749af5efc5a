"""How much memory a bundle needs where it runs, computed from a model's sizes before there is a bundle.

docs/reference/memory.md says what each figure was compared with; tests/export/test_memory.py repeats the comparisons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mara_export.hf.families import Decoder
from mara_export.options import ExportOptions
from mara_export.targets import (
    BITS,
    COLUMN,
    HEAD_ROWS,
    LOWERINGS,
    MAX_CANDIDATES,
    MOST_AGENTS,
    MOST_PLACES,
    PLACES,
    PRECISIONS,
    SHARED_ROWS,
    TARGETS,
    Lowering,
    engine_slots,
)
from mara_runtime.options import Options, option
from mara_runtime.tensors import AGENT_WIDTHS, CACHE_BYTES, PREFILL_ROWS, spare_slots

CONTEXTS = (2048, 8192)
JETSONS_GB = (8, 16, 32, 64)
"""Memory shared by processor and GPU of a Jetson, in 10⁹ bytes: about what Linux has of as many GiB."""
SYSTEM_BYTES = 2_500_000_000
"""For Linux without a desktop, the CUDA context and the libraries' kernels: assumed, not measured."""
LOGIT_ROWS = HEAD_ROWS + 1
"""Maximum rows of a conversation through the LM head in one pass: those requested, and the chosen one."""
PLAN_BYTES, PLAN_BYTES_A_LAYER = 10_200_000, 1_065_000
"""Kernels and names in a TensorRT engine, besides its weights; without passes of several conversations two thirds."""
SCRATCH_BYTES = 8_270_000
"""Workspace of any TensorRT engine for choosing among candidates and finding the best tokens."""
ORT_HOST_BYTES, TENSORRT_HOST_BYTES = 60_000_000, 145_000_000
"""A process that has imported the runtime, the tokenizer and ONNX Runtime or TensorRT, and has opened nothing."""


@dataclass(frozen=True)
class Setting(Options):
    """How a model is exported and run. What is left out becomes the target's default."""

    target: str = option("tensorrt", "engine that runs the model", choices=tuple(TARGETS))
    precision: str = option(
        "fp16", "data type of the stored LLM weights", choices=PRECISIONS, unset="all that the target supports"
    )
    context: int = option(
        2048, "number of tokens, prompt and answer", least=2, unset="2048 and 8192, or the model's own limit"
    )
    max_candidates: int = option(64, "maximum number of candidates per position", least=1, most=MAX_CANDIDATES)
    conversations: int = option(1, "number of conversations at once", least=1, most=MOST_PLACES)
    lowering: str = option(
        "",
        "form of the graph; with decomposed, TensorRT needs two KV caches",
        choices=tuple(LOWERINGS),
        unset="the target's own",
    )
    block_size: int | None = option(None, "int8, int4: number of weights that share a scale", unset="as in mara-export")

    def __post_init__(self) -> None:
        super().__post_init__()
        complete = ExportOptions(self.target, self.precision, self.lowering, self.block_size, gate=False)
        object.__setattr__(self, "lowering", complete.lowering)
        if (quantisation := complete.quantisation) is not None:
            object.__setattr__(self, "block_size", quantisation.block_size)

    @property
    def form(self) -> Lowering:
        """The lowering's facts."""
        return LOWERINGS[self.lowering]

    @property
    def on_tensorrt(self) -> bool:
        """Whether TensorRT or TensorRT for RTX runs it."""
        return TARGETS[self.target].is_tensorrt

    @property
    def chooses(self) -> bool:
        """Whether only the chosen experts of a row are computed; else all of them are, as one MLP."""
        return self.target == "cpu" and self.lowering == "ort"

    @property
    def number_bytes(self) -> int:
        """Bytes of one number in activations and KV cache."""
        return CACHE_BYTES[TARGETS[self.target].compute[self.precision]]

    @property
    def fused(self) -> bool:
        """Whether attention is one kernel, without its scores in memory. TensorRT has none for float32."""
        return self.on_tensorrt and self.form.fused_attention and self.precision != "fp32"

    @property
    def logit_rows(self) -> int:
        """Maximum rows through the LM head in one pass; TensorRT has room for those that its engine was built for."""
        return LOGIT_ROWS * (max(self.conversations, PLACES) if self.on_tensorrt else self.conversations)

    @property
    def slots(self) -> int:
        """Slots of a KV cache at its largest."""
        if self.on_tensorrt:
            return engine_slots(self.context, self.max_candidates)
        slots = self.context + spare_slots(self.max_candidates)
        if self.target != "cuda":
            return slots
        from mara_runtime.engines.ort_memory import rounded  # NumPy comes with it, which --help does not need

        return rounded(slots)


@dataclass(frozen=True)
class Memory:
    """Bytes while decoding, by purpose."""

    engine_bytes: int
    """the engine's weights and code"""
    kv_bytes: int
    """the KV caches at their largest"""
    workspace_bytes: int
    """activations of the widest pass, with agents, other inputs and outputs"""
    host_bytes: int
    """the process around it"""

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.engine_bytes + self.kv_bytes + self.workspace_bytes + self.host_bytes

    def left_bytes(self, gigabytes: int) -> int:
        """Memory left for everything else on a Jetson; negative: it does not fit."""
        return gigabytes * 10**9 - self.total_bytes

    def fits(self, gigabytes: int) -> bool:
        """Whether enough is left for the system."""
        return self.left_bytes(gigabytes) >= SYSTEM_BYTES

    def cells(self) -> list[str]:
        """A row of a table: engine, KV cache, workspace, host and sum in MB; GB left on each Jetson, or no."""
        parts = (self.engine_bytes, self.kv_bytes, self.workspace_bytes, self.host_bytes, self.total_bytes)
        left = (f"{self.left_bytes(gb) / 1e9:.1f}" if self.fits(gb) else "no" for gb in JETSONS_GB)
        return [*(f"{part / 1e6:.0f}" for part in parts), *left]

    def to_json(self) -> dict[str, Any]:
        """With the sum, and what is left on each Jetson."""
        boards = {f"{gb} GB": {"left_bytes": self.left_bytes(gb), "fits": self.fits(gb)} for gb in JETSONS_GB}
        return {**asdict(self), "total_bytes": self.total_bytes, "jetson": boards}


def estimate(model: Decoder, setting: Setting, engine_bytes: int | None = None) -> Memory:
    """The memory of a model in a setting. engine_bytes: of an existing engine, instead of the estimate."""
    return Memory(
        engine_memory_bytes(model, setting) if engine_bytes is None else engine_bytes,
        kv_bytes(model, setting),
        workspace_bytes(model, setting),
        TENSORRT_HOST_BYTES if setting.on_tensorrt else ORT_HOST_BYTES + outgrown_bytes(model, setting),
    )


def weight_bytes(model: Decoder, setting: Setting) -> int:
    """Size of the weights in a bundle: step.onnx.data without its alignment."""
    matrices = sum(count * _matrix_bytes(k, n, setting) for count, k, n in model.matrices)
    plain = setting.number_bytes
    stored = 2 if setting.precision == "fp16" else plain  # on the CPU it is widened when it is loaded
    positions = setting.context + spare_slots(setting.max_candidates)
    return (
        matrices
        + _vocabulary_bytes(model, setting)
        + model.small * plain
        + positions * sum({layer.head_dim for layer in model.layers}) * stored  # cosines and sines
    )


def engine_memory_bytes(model: Decoder, setting: Setting) -> int:
    """Size of the engine's weights and code."""
    weights = weight_bytes(model, setting)
    if setting.on_tensorrt:
        return weights + PLAN_BYTES + PLAN_BYTES_A_LAYER * model.num_layers
    if setting.target == "cpu" and setting.precision == "fp16":  # widened when it is loaded
        return weights + 2 * (model.parameters - model.small)
    if setting.target == "cpu" and model.tied:  # the LM head multiplies by a reordered copy; the lookup keeps the table
        return weights + _matrix_bytes(model.hidden_size, model.vocab_size, setting)
    return weights


def kv_bytes(model: Decoder, setting: Setting) -> int:
    """Size of all KV caches. Of a decomposed graph in TensorRT each is two, used alternately."""
    copies = 2 if setting.on_tensorrt and not setting.form.in_place else 1
    return copies * setting.conversations * setting.slots * _slot_bytes(model, setting)


def workspace_bytes(model: Decoder, setting: Setting) -> int:
    """Peak of the widest pass, with inputs and outputs; of the inputs, only agents are large."""
    agents = (MOST_AGENTS if setting.on_tensorrt else 1) * _agent_bytes(model.hidden_size)
    outputs = 4 * (setting.logit_rows * model.vocab_size + PREFILL_ROWS * model.hidden_size)
    return agents + outputs + activation_bytes(model, setting)


def activation_bytes(model: Decoder, setting: Setting) -> int:
    """Peak of activations in the widest pass: in an MLP, an attention, or the LM head."""
    rows, b, d = PREFILL_ROWS, setting.number_bytes, model.hidden_size
    width = model.num_heads * max(layer.head_dim for layer in model.layers)
    intermediate = max(layer.intermediate_size if setting.chooses else layer.width for layer in model.layers)
    mask = rows * setting.slots
    inner = 4 if setting.form.fused_projections else 3  # gate and up come as one there, and are taken apart
    mlp = rows * (inner * intermediate + 4 * d) * b + mask
    attention = rows * (2 * d + 4 * width) * b + 4 * mask
    if setting.form.grouped_attention:
        groups = max(model.num_heads // layer.kv_heads for layer in model.layers)
        # The mask of every query of a group, and the scores, twice: ONNX Runtime plans the memory of a shape when it
        # has run once, and keeps what that run took beside the plan's.
        attention += mask * (2 * model.num_heads + groups) * b
    elif not setting.fused or model.family.written_out:  # scores, their softmax; keys and values, for every head
        attention += 2 * mask * model.num_heads * b + 2 * setting.slots * width * b
    head = setting.logit_rows * model.vocab_size * (b if setting.on_tensorrt else 12) + rows * d * 16
    if not setting.on_tensorrt:
        return max(mlp, attention, head)
    # a pass of several: the mask, and keys and values of every head; unless fused, scores and their softmax instead
    masks = 2 * SHARED_ROWS * (1 if setting.fused else model.num_heads * b)
    shared = max(setting.conversations, PLACES) * setting.slots * (masks + 2 * width * b)
    return max(max(mlp, attention, head) + SCRATCH_BYTES, shared)


def _matrix_bytes(inputs: int, outputs: int, setting: Setting) -> int:
    """Size of a matrix and its scales."""
    bits = BITS.get(setting.precision)
    if bits is None:
        return inputs * outputs * (4 if setting.precision == "fp32" else 2)
    size = inputs if setting.block_size in (None, COLUMN) else int(setting.block_size)
    blocks = -(-inputs // size)
    return outputs * blocks * (size * bits // 8 + setting.number_bytes)


def _vocabulary_bytes(model: Decoder, setting: Setting) -> int:
    """Size of the embedding table and the LM head."""
    head = _matrix_bytes(model.hidden_size, model.vocab_size, setting)
    whole_blocks = model.hidden_size % (setting.block_size or 1) == 0
    if setting.precision in BITS and not (setting.form.quantised_table and whole_blocks):
        return head + (model.table + model.own_table) * setting.number_bytes  # tables are not quantised
    own = _matrix_bytes(model.own_input * model.num_layers, model.own_vocab, setting) if model.own_input else 0
    return (head if model.tied else 2 * head) + own


def _slot_bytes(model: Decoder, setting: Setting) -> int:
    return 2 * sum(each.count * each.kv_heads * each.head_dim for each in model.shape.caches) * setting.number_bytes


def outgrown_bytes(model: Decoder, setting: Setting) -> int:
    """Size of the smaller KV cache that ONNX Runtime's engine keeps while it fills the last, larger one."""
    from mara_runtime.engines.ort_memory import FIRST_SLOTS, grown  # NumPy comes with it, which --help does not need

    before, size = 0, FIRST_SLOTS
    while size < setting.slots:
        before, size = size, grown(setting.target, size, size + 1)
    return before * setting.conversations * _slot_bytes(model, setting)


def _agent_bytes(hidden: int) -> int:
    first, second = AGENT_WIDTHS
    return 4 * ((hidden + 1) * first + (first + 1) * second + second + 1)
