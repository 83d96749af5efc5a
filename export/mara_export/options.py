"""How a model is exported: one frozen dataclass, checked against what its target has."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from mara_export.targets import (
    BITS,
    BLOCK_SIZES,
    COLUMN,
    CPU_DTYPES,
    DEFAULT_TARGET,
    LOWERINGS,
    MAX_CANDIDATES,
    PRECISIONS,
    QUANTISERS,
    TARGETS,
)
from mara_runtime.errors import OptionError


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

    target: str = DEFAULT_TARGET
    """one of TARGETS"""
    lowering: str = ""
    """one of the target's lowerings"""
    precision: str = ""
    """one of the target's precisions"""
    block_size: int | None = None
    """int8, int4: one of the target's block_sizes; stays None in other precisions"""
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
        _one_of("--target", self.target, tuple(TARGETS))
        target = TARGETS[self.target]
        self._complete("lowering", target.lowerings[0])
        _one_of("--lowering", self.lowering, tuple(LOWERINGS))
        if self.lowering not in target.lowerings:
            takes = " or ".join(target.lowerings)
            raise OptionError(f"--lowering is {self.lowering!r}; for --target {target.name} take {takes}")
        self._complete("precision", target.precisions[0])
        _one_of("--precision", self.precision, PRECISIONS)
        if self.precision not in target.precisions:
            takes = ", ".join(target.precisions)
            raise OptionError(f"--precision is {self.precision!r}; for --target {target.name} take {takes}")
        if self.precision in BITS:
            self._check_quantisation()
        elif self.block_size is not None or self.quantiser or self.keep:
            raise OptionError("--block-size, --quantiser and --keep are for --precision int8 and int4")
        if self.max_context is not None and self.max_context < 2:
            raise OptionError(f"--max-context is {self.max_context}; it must be at least 2")
        if not 1 <= self.max_candidates <= MAX_CANDIDATES:
            raise OptionError(f"--max-candidates is {self.max_candidates}; it must lie between 1 and {MAX_CANDIDATES}")
        if self.gate and self.cache not in CPU_DTYPES:
            raise OptionError(
                "--precision is 'bf16', which ONNX Runtime on a CPU cannot run, so the parity gate cannot either: "
                "take fp16, or give --no-gate and compare on the device (benchmarks/gpu.sh)"
            )

    def _check_quantisation(self) -> None:
        self._complete("quantiser", QUANTISERS[0])
        _one_of("--quantiser", self.quantiser, QUANTISERS)
        quantisers = LOWERINGS[self.lowering].quantisers
        if self.quantiser not in quantisers:
            has = ", ".join(quantisers)
            raise OptionError(f"--quantiser is {self.quantiser!r}; --lowering {self.lowering} has {has}")
        if self.quantiser == "hqq" and self.precision != "int4":
            raise OptionError("--quantiser hqq is for --precision int4")
        sizes = TARGETS[self.target].block_sizes[self.precision]
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
        return TARGETS[self.target].compute[self.precision]

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The target, and a CPU unless ONNX Runtime lacks the kernels there, as it does for bfloat16."""
        others = (DEFAULT_TARGET,) if self.cache in CPU_DTYPES else ()
        return tuple(dict.fromkeys((self.target, *others)))


def _one_of(flag: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise OptionError(f"{flag} is {value!r}; it must be one of {', '.join(map(str, choices))}")
