"""What config.json says of a checkpoint whose matrices are small integers, and what a bundle makes of them.

Read are AWQ (layout gemm), GPTQ and compressed-tensors (pack-quantized). The precision with as many bits keeps the
integers; any other is made of the floats that they stand for, as of any checkpoint.

Imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mara_export.errors import ModelError
from mara_export.hf.families import expert_count
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import BITS, COLUMN, TARGETS
from mara_runtime.errors import OptionError

METHODS = ("awq", "gptq", "compressed-tensors")
_PRECISIONS = {bits: precision for precision, bits in BITS.items()}
_FLOATS = "export the checkpoint that it was made from, in float16, bfloat16 or float32"


@dataclass(frozen=True)
class Packing:
    """How the matrices of a checkpoint are stored; those that it leaves out are floats."""

    model: str
    """its name, for messages"""
    method: str
    """one of METHODS"""
    bits: int
    """4 or 8"""
    block_size: int
    """weights of a row (N, K) that share a scale; COLUMN: the whole row"""
    symmetric: bool
    """no zero points: integers stand for themselves, less 2^(bits - 1)"""
    zeros_less_one: bool = False
    """zero points are stored less one, as GPTQ did at first"""

    @property
    def precision(self) -> str:
        """That which keeps the integers."""
        return _PRECISIONS[self.bits]

    def default_precision(self, target: str) -> str:
        """That of a bundle for a target where none is asked for: the integers as they are if it takes them."""
        own = TARGETS[target].precisions[0]
        if self.precision not in TARGETS[target].precisions:
            return own
        try:
            quantisation_of(ExportOptions(target, self.precision, gate=False), self)
        except OptionError:
            return own
        return self.precision


def packing_of(config: Mapping[str, Any], name: str) -> Packing | None:
    """How a checkpoint is packed, by its config.json; None: it is not. Raises ModelError for what is not read.

    name: of the model, for messages.
    """
    if config.get("quantization"):
        raise _refused(name, "quantization", "")  # MLX's
    said = config.get("quantization_config")
    if not said:
        return None
    method = str(said.get("quant_method", "")) if isinstance(said, Mapping) else ""
    if method not in METHODS:
        raise _refused(name, method or "quantization_config", f"; read as they are: {', '.join(METHODS)}")
    if expert_count(config):
        raise _refused(name, method, " and a mixture of experts")
    try:
        packing = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed}[method](said, name)
    except (AttributeError, TypeError, ValueError):
        raise _refused(name, method, " with settings of an unknown form") from None
    if type(packing.bits) is not int or packing.bits not in _PRECISIONS:
        raise _refused(name, method, f" in {packing.bits} bits; read are 4 and 8")
    if type(packing.block_size) is not int or (packing.block_size < 1 and packing.block_size != COLUMN):
        raise _refused(name, method, f" with group_size = {packing.block_size!r}")
    return packing


def _refused(name: str, method: str, why: str) -> ModelError:
    return ModelError(f"{name} is quantised already ({method}){why}: {_FLOATS}")


def _awq(said: Mapping[str, Any], name: str) -> Packing:
    layout = str(said.get("version") or said.get("format") or "gemm").lower()
    if layout != "gemm" or said.get("backend") == "llm-awq" or said.get("bits", 4) != 4:
        raise _refused(name, "awq", f" in the layout {layout}, {said.get('bits', 4)} bits; read is gemm with 4")
    symmetric = not said.get("zero_point", True)
    return Packing(name, "awq", 4, said.get("group_size", 128), symmetric)


def _gptq(said: Mapping[str, Any], name: str) -> Packing:
    layout = str(said.get("checkpoint_format") or said.get("format") or "gptq").lower()
    if layout not in ("gptq", "gptq_v2") or said.get("is_marlin_format"):
        raise _refused(name, "gptq", f" in the layout {layout}; read are gptq and gptq_v2")
    if any(not str(pattern).startswith("-") for pattern in said.get("dynamic") or ()):  # "-" leaves matrices as floats
        raise _refused(name, "gptq", " with settings by module (dynamic)")
    size = said.get("group_size", 128)
    if said.get("desc_act") and not said.get("static_groups") and size != COLUMN:
        raise _refused(name, "gptq", " with weights out of order (desc_act)")
    return Packing(name, "gptq", said.get("bits", 4), size, bool(said.get("sym", True)), layout == "gptq")


def _compressed(said: Mapping[str, Any], name: str) -> Packing:
    method = "compressed-tensors"
    if (layout := said.get("format")) != "pack-quantized":
        raise _refused(name, method, f" in the format {layout}; read is pack-quantized")
    for key in ("kv_cache_scheme", "transform_config"):
        if said.get(key):
            raise _refused(name, method, f" with {key}")
    if dict(said.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused(name, method, " with sparsity_config")
    groups = [*(said.get("config_groups") or {}).values()]
    for group in groups:
        if rounded := [key for key in ("input_activations", "output_activations") if group.get(key)]:
            raise _refused(name, method, f" with {rounded[0]}")
    weights = [group.get("weights") or {} for group in groups]
    if len(weights) != 1:
        raise _refused(name, method, f" with {len(weights)} groups of settings; read is one")
    (how,) = weights
    strategy = how.get("strategy") or ("group" if how.get("group_size") else "channel")
    if strategy not in ("group", "channel") or how.get("type", "int") != "int":
        raise _refused(name, method, f" by {how.get('type', 'int')}, {strategy}; read are int, group and channel")
    if how.get("actorder") in (True, "group", "dynamic"):
        raise _refused(name, method, " with weights out of order (actorder)")
    size: Any = COLUMN if strategy == "channel" else how.get("group_size")
    return Packing(name, method, how.get("num_bits", 8), size, bool(how.get("symmetric", True)))


def quantisation_of(options: ExportOptions, packing: Packing | None) -> Quantisation | None:
    """How a bundle's weights are quantised; None: not at all.

    packing: of the checkpoint. Raises OptionError for options that contradict it, and for a target that does not take
    its integers.
    """
    own = options.quantisation
    if packing is None or own is None or own.bits != packing.bits:
        return own
    name, target = packing.model, TARGETS[options.target]
    others = "fp16" if packing.precision == "int8" else "fp16, or int8 to requantise them"
    if options.quantiser:
        raise OptionError(
            f"--quantiser is {options.quantiser!r}, but {options.precision} keeps the integers of {name} "
            f"({packing.method}); leave it out"
        )
    if target.is_tensorrt and not packing.symmetric:
        raise OptionError(
            f"{name} has {options.precision} weights with zero points ({packing.method}), which TensorRT does not "
            f"read: take --precision {others}"
        )
    sizes = target.block_sizes[options.precision]
    if packing.block_size == COLUMN:
        return replace(own, packed=packing.method)
    fitting = [size for size in sizes if size != COLUMN and packing.block_size % size == 0]
    if not fitting:
        raise OptionError(
            f"{name} has {options.precision} weights in blocks of {packing.block_size} ({packing.method}), and "
            f"--target {options.target} takes {_in_words(sizes)}: take --precision {others}"
        )
    if options.block_size is not None and own.block_size not in fitting:
        raise OptionError(
            f"--block-size is {options.block_size}, but the weights of {name} share scales in blocks of "
            f"{packing.block_size} ({packing.method}); leave it out"
        )
    size = max(fitting) if options.block_size is None else own.block_size
    return replace(own, block_size=size, packed=packing.method)


def _in_words(sizes: tuple[int, ...]) -> str:
    return "one scale per column" if sizes == (COLUMN,) else f"blocks of {' or '.join(map(str, sorted(sizes)))}"
