"""How a model is exported and how TensorRT engines are built: frozen dataclasses, validated on construction.

Nothing heavy is imported: the commands' help texts are made from these fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_export.targets import (
    BITS,
    BLOCK_SIZES,
    COLUMN,
    CPU_DTYPES,
    DEFAULT_TARGET,
    LOWERINGS,
    MAX_CANDIDATES,
    MOST_PLACES,
    PLACES,
    PRECISIONS,
    QUANTISERS,
    TARGETS,
    TRACERS,
    engine_slots,
)
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

if TYPE_CHECKING:
    from mara_runtime.manifest import Manifest


@dataclass(frozen=True)
class Quantisation:
    """How int8 and int4 weights are quantised."""

    bits: int
    """4 or 8"""
    block_size: int = BLOCK_SIZES[0]
    """weights along the input dimension that share a scale"""
    quantiser: str = QUANTISERS[0]
    keep: tuple[str, ...] = ()
    """names of nodes whose weights stay in floating point; * matches anything"""
    packed: str = ""
    """method by which the checkpoint's matrices were quantised, whose integers stay; the quantiser is for the others"""

    def keeps(self, name: str) -> bool:
        """Whether the weights of this node stay in floating point."""
        return any(fnmatchcase(name, pattern) for pattern in self.keep)

    def check_keep(self, names: Sequence[str]) -> None:
        """Raise OptionError where a pattern matches none of the names."""
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(f"--keep is {pattern!r}, which matches no matrix; a name is, for example, {names[0]}")

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        facts = {**asdict(self), "quantiser": self.packed or self.quantiser, "keep": list(self.keep)}
        del facts["packed"]
        return facts


@dataclass(frozen=True)
class ExportOptions(Options):
    """How a model is exported. What is left out becomes the target's default."""

    target: str = option(
        DEFAULT_TARGET,
        "engine to export for; cuda is ONNX Runtime on a GPU. TensorRT engines are built right away where that is "
        "possible, else by mara-build on the device",
        choices=tuple(TARGETS),
    )
    precision: str = option(
        "",
        "data type of the stored LLM weights. Targets other than cpu compute in float16, with bf16 (TensorRT only) in "
        "bfloat16",
        choices=PRECISIONS,
        unset="fp32 on cpu, else fp16; of an AWQ, GPTQ or compressed-tensors checkpoint its own int4 or int8, where the"
        " target takes it",
    )
    lowering: str = option(
        "",
        "; ".join(f"{name}: {lowering.summary}" for name, lowering in LOWERINGS.items()),
        choices=tuple(LOWERINGS),
        unset="ort on cpu and cuda, portable for TensorRT",
    )
    block_size: int | None = option(
        None,
        "int8, int4: number of weights that share a scale",
        unset="32; tensorrt: 64 for int4, one scale per column for int8; the checkpoint's own if its integers are kept",
    )
    quantiser: str = option(
        "",
        "int8, int4: rtn rounds to nearest; hqq (int4) and k-quant choose the scales that minimise the error",
        choices=QUANTISERS,
        unset="rtn",
    )
    keep: tuple[str, ...] = option(
        (),
        "int8, int4: keep the weights of this node in floating point; * matches anything, as in */lm_head/*",
        metavar="NODE",
    )
    max_context: int | None = option(
        None, "maximum number of tokens, prompt and answer", least=2, unset="4096, or the model's own limit if smaller"
    )
    max_candidates: int = option(64, "maximum number of candidates per position", least=1, most=MAX_CANDIDATES)
    eos: tuple[str, ...] = option(
        (),
        "end answers at this token of the tokenizer, too, in addition to the model's own end tokens",
        metavar="TOKEN",
    )
    ignore_weights: tuple[str, ...] = option(
        (),
        "leave out weights of the checkpoint that the model has no place for, as in 'v_head.*'; recorded",
        metavar="PATTERN",
    )
    tracer: str = option(
        TRACERS[0],
        "what traces the model: optimum, with transformers 4.57; or torch, PyTorch's own exporter, with any version. "
        "Both give the same graph",
        choices=TRACERS,
        unset="optimum where it is installed",
    )
    gate: bool = option(True, "skip the gates, which compare the bundle with Hugging Face; recorded in the manifest")

    def __post_init__(self) -> None:
        super().__post_init__()
        target = TARGETS[self.target]
        self._complete("lowering", target.lowerings[0])
        if self.lowering not in target.lowerings:
            supported = " or ".join(target.lowerings)
            raise OptionError(f"--lowering is {self.lowering!r}; --target {self.target} supports {supported}")
        self._complete("precision", target.precisions[0])
        if self.precision not in target.precisions:
            supported = ", ".join(target.precisions)
            raise OptionError(f"--precision is {self.precision!r}; --target {self.target} supports {supported}")
        if self.precision in BITS:
            self._check_quantisation()
        elif self.block_size is not None or self.quantiser or self.keep:
            raise OptionError("--block-size, --quantiser and --keep are for --precision int8 and int4")
        if self.gate and self.cache not in CPU_DTYPES:
            raise OptionError(
                "--precision is 'bf16', which ONNX Runtime on a CPU cannot run, so the parity gate cannot either: "
                "take fp16, or give --no-gate and compare on the device (benchmarks/gpu.sh)"
            )

    def _check_quantisation(self) -> None:
        lowering, target = LOWERINGS[self.lowering], TARGETS[self.target]
        for choice, quantisers in (
            (f"--lowering {self.lowering}", lowering.quantisers),
            (f"--target {self.target}", target.quantisers),
        ):
            if self.quantiser and self.quantiser not in quantisers:
                supported = ", ".join(quantisers)
                raise OptionError(f"--quantiser is {self.quantiser!r}; {choice} supports {supported}")
        if self.quantiser == "hqq" and self.precision != "int4":
            raise OptionError(f"--quantiser is 'hqq', which is for --precision int4, not {self.precision}")
        sizes = target.block_sizes[self.precision]
        if self.block_size is not None and self.block_size not in sizes:
            supported = f"blocks of {' or '.join(map(str, sorted(sizes)))}"
            if sizes == (COLUMN,):
                supported = "one scale per column: leave it out"
            raise OptionError(
                f"--block-size is {self.block_size}; {self.precision} for --target {self.target} supports {supported}"
            )
        if self.quantiser == "k-quant" and self.block_size not in (None, 32):
            raise OptionError(f"--block-size is {self.block_size}; --quantiser k-quant supports blocks of 32")

    def _complete(self, name: str, value: str) -> None:
        if not getattr(self, name):
            object.__setattr__(self, name, value)

    @property
    def quantisation(self) -> Quantisation | None:
        """How the weights of a checkpoint of floats are quantised; None: not at all."""
        if self.precision not in BITS:
            return None
        size = TARGETS[self.target].block_sizes[self.precision][0] if self.block_size is None else self.block_size
        return Quantisation(BITS[self.precision], size, self.quantiser or QUANTISERS[0], self.keep)

    @property
    def cache(self) -> str:
        """Data type of the LLM's activations and KV cache."""
        return TARGETS[self.target].compute[self.precision]

    @property
    def runs_on(self) -> tuple[str, ...]:
        """The target, and cpu unless ONNX Runtime has no kernels there, as for bfloat16."""
        others = (DEFAULT_TARGET,) if self.cache in CPU_DTYPES else ()
        return tuple(dict.fromkeys((self.target, *others)))


HARDWARE = ("none", "ampere-plus", "same-compute-capability")


@dataclass(frozen=True)
class BuildOptions(Options):
    """How TensorRT engines are built. What is left at its default is left to TensorRT."""

    capacities: tuple[int, ...] = option(
        (),
        "also build engines for these context lengths, below the bundle's own: decoding starts in the smallest one and "
        "moves to the next as the context grows, since the cost of attention depends on the capacity",
        flag="--capacity",
        metavar="N[,N…]",
        separator=",",
        least=1,
    )
    places: int = option(
        PLACES,
        "maximum number of conversations in one pass; memory for the context of each is taken when it begins",
        flag="--conversations",
        least=1,
        most=MOST_PLACES,
    )
    compute_capabilities: tuple[str, ...] = option(
        (),
        "tensorrt-rtx: compute capabilities of the GPUs to build for, as in 8.9",
        flag="--compute-capability",
        metavar="X[,X…]",
        separator=",",
        unset="8.0 and later",
    )
    hardware: str = option(
        "none", "tensorrt: other GPUs that can run the engine; not available on Jetson", choices=HARDWARE
    )
    version_compatible: bool = option(
        False, "tensorrt: later versions of the same major release can run the engine; slower"
    )
    weight_streaming: bool = option(
        False, "weights that do not fit in GPU memory can stay in host memory; disables CUDA graphs"
    )
    workspace_mib: int | None = option(
        None,
        "maximum memory that kernels use while an engine is built and run, in MiB",
        flag="--workspace",
        metavar="MIB",
        least=1,
        most=(1 << 43) - 1,
        unset="all of the GPU's",
    )
    optimisation_level: int | None = option(
        None, "how long to search for kernels", least=0, most=5, unset="TensorRT's own, 3"
    )
    timing_cache: Path | None = option(
        None,
        "tensorrt: file of kernel timings that later builds reuse",
        metavar="FILE",
        unset="in the user's cache folder",
    )

    @property
    def workspace_bytes(self) -> int | None:
        """--workspace in bytes."""
        return None if self.workspace_mib is None else self.workspace_mib << 20

    def slots(self, manifest: Manifest) -> tuple[int, ...]:
        """KV cache sizes to build for, in ascending order. Raises OptionError."""
        largest = manifest.max_context
        for capacity in self.capacities:
            if capacity > largest:
                raise OptionError(f"--capacity is {capacity}; the bundle was exported for {largest} tokens of context")
        return tuple(sorted({engine_slots(tokens, manifest.max_candidates) for tokens in (*self.capacities, largest)}))
