"""What an export can be asked for: targets, and the lowerings, precisions and blocks that each of them has; and what is
the same in every TensorRT engine.

Imports nothing heavy, as the help texts and the memory model (mara_deploy/memory.py) read it without PyTorch and onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from mara_runtime.errors import OptionError
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


@dataclass(frozen=True)
class Quantisation:
    """How int8 and int4 weights are made."""

    bits: int
    """4 or 8"""
    block_size: int = BLOCK_SIZES[0]
    """weights along the input dimension that share a scale"""
    quantiser: str = QUANTISERS[0]
    keep: tuple[str, ...] = ()
    """names of nodes, with * for anything, whose weights stay float32, as in */lm_head/*"""

    def keeps(self, name: str) -> bool:
        """Do the weights of the node of that name stay float32?"""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def check_keep(self, names: Sequence[str]) -> None:
        """Raise OptionError for a pattern that matches none of the `names`."""
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(f"--keep is {pattern!r}, which matches no matrix; names are like {names[0]}")

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "keep": list(self.keep)}


@dataclass(frozen=True)
class ExportOptions:
    """How a model is exported. What is left out is filled in with the target's default. Raises OptionError."""

    target: str = TARGETS[0]
    """one of TARGETS"""
    lowering: str = ""
    """one of LOWERINGS_OF the target"""
    precision: str = ""
    """one of PRECISIONS_OF the target"""
    block_size: int | None = None
    """int8, int4: one of BLOCK_SIZES_OF the target; stays None in other precisions"""
    quantiser: str = ""
    """int8, int4: one of QUANTISERS, rtn if left out; in standard operators rtn alone"""
    keep: tuple[str, ...] = ()
    """int8, int4: as in Quantisation"""
    max_context: int | None = None
    """tokens of prompt and answer, ≥ 2; None: 4096, or the model's own if smaller"""
    max_candidates: int = 64
    """of a position; 1 … MAX_CANDIDATES"""
    gate: bool = True
    """compare with Hugging Face eager before anything is kept"""

    def __post_init__(self) -> None:
        target = self.target
        _one_of("--target", target, TARGETS)
        self._complete("lowering", LOWERINGS_OF[target][0])
        _one_of("--lowering", self.lowering, LOWERINGS)
        if self.lowering not in LOWERINGS_OF[target]:
            takes = " or ".join(LOWERINGS_OF[target])
            raise OptionError(f"--lowering is {self.lowering!r}; for --target {target} take {takes}")
        self._complete("precision", PRECISIONS_OF[target][0])
        _one_of("--precision", self.precision, PRECISIONS)
        if self.precision not in PRECISIONS_OF[target]:
            takes = ", ".join(PRECISIONS_OF[target])
            raise OptionError(f"--precision is {self.precision!r}; for --target {target} take {takes}")
        if self.precision in BITS:
            self._check_quantisation()
        elif self.block_size is not None or self.quantiser or self.keep:
            raise OptionError("--block-size, --quantiser and --keep are for --precision int8 and int4")
        if self.max_context is not None and self.max_context < 2:
            raise OptionError(f"--max-context is {self.max_context}; it must be at least 2")
        if not 1 <= self.max_candidates <= MAX_CANDIDATES:
            raise OptionError(f"--max-candidates is {self.max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")
        if self.gate and "cpu" not in self.runs_on:
            raise OptionError(
                "--precision is 'bf16', which ONNX Runtime on a CPU cannot run, so the parity gate cannot either: "
                "take fp16, or give --no-gate and compare on the device (benchmarks/gpu.sh)"
            )

    def _check_quantisation(self) -> None:
        self._complete("quantiser", QUANTISERS[0])
        _one_of("--quantiser", self.quantiser, QUANTISERS)
        if self.quantiser != "rtn" and self.lowering != "ort":
            raise OptionError(f"--quantiser is {self.quantiser!r}; --lowering {self.lowering} has rtn")
        if self.quantiser == "hqq" and self.precision != "int4":
            raise OptionError("--quantiser hqq is for --precision int4")
        sizes = BLOCK_SIZES_OF[self.target][self.precision]
        self._complete("block_size", sizes[0])
        if sizes == BLOCK_SIZES:
            _one_of("--block-size", self.block_size, sorted(sizes))
        elif self.block_size not in sizes:
            column = sizes == (COLUMN,)
            takes = "int8 has a scale a column: leave it out" if column else f"take {' or '.join(map(str, sizes))}"
            raise OptionError(f"--block-size is {self.block_size}; for --target {self.target} {takes}")
        if self.quantiser == "k-quant" and self.block_size != 32:
            raise OptionError(f"--block-size is {self.block_size}; --quantiser k-quant has blocks of 32")

    def _complete(self, name: str, value: str | int) -> None:
        if getattr(self, name) in (None, ""):
            object.__setattr__(self, name, value)

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights are made; None: they stay floats."""
        if self.block_size is None:
            return None
        return Quantisation(BITS[self.precision], self.block_size, self.quantiser, self.keep)

    @property
    def cache(self) -> str:
        """Type that the LLM computes in, and of its KV cache."""
        if self.target == "cpu":
            return "float32"
        return {"fp32": "float32", "bf16": "bfloat16"}.get(self.precision, "float16")

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The target, and a CPU unless ONNX Runtime lacks the kernels there, as it does for bfloat16."""
        return (self.target,) if self.target == "cpu" or self.cache == "bfloat16" else (self.target, "cpu")


def _one_of(flag: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise OptionError(f"{flag} is {value!r}; it must be one of {', '.join(map(str, choices))}")
