"""Checkpoints as AutoAWQ, GPTQModel and compressed-tensors write them: packers by their published layouts.

Each number is put into its word by itself, so nothing here shares a trick with what reads it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import shard

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is packed."""

    method: str
    symmetric: bool = False
    group: int = 32
    """-1: one scale per row"""
    bits: int = 4
    layout: str = ""
    """of GPTQ: gptq (if not said) or gptq_v2"""
    scales: torch.dtype = torch.float16

    def config(self) -> dict[str, Any]:
        """Its quantization_config."""
        if self.method == "awq":
            said = {"version": "gemm", "zero_point": not self.symmetric, "modules_to_not_convert": None}
        elif self.method == "gptq":
            said = {"sym": self.symmetric, "desc_act": False, "damp_percent": 0.1}
            said |= {"checkpoint_format": self.layout} if self.layout else {}
        else:
            how = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "actorder": None}
            how |= {"strategy": "channel"} if self.group == -1 else {"strategy": "group", "group_size": self.group}
            group = {"targets": ["Linear"], "weights": how, "input_activations": None, "output_activations": None}
            return {
                "quant_method": self.method,
                "format": "pack-quantized",
                "config_groups": {"group_0": group},
                "ignore": ["lm_head"],
                "quantization_status": "compressed",
            }
        return {"quant_method": self.method, "bits": self.bits, "group_size": self.group, **said}


@dataclass(frozen=True)
class Numbers:
    """A matrix (N, K) before it is packed."""

    integers: NDArray[np.int64]
    scales: Tensor
    """(N, groups)"""
    zeros: NDArray[np.int64]
    """(N, groups)"""

    def floats(self) -> Tensor:
        """(N, K), what they stand for, in float32."""
        rows, groups = self.zeros.shape
        centred = self.integers.reshape(rows, groups, -1) - self.zeros[:, :, None]
        return (torch.from_numpy(centred).float() * self.scales.float()[:, :, None]).reshape(rows, -1)


def rounded(matrix: Tensor, kind: Kind) -> Numbers:
    """A matrix (N, K) rounded to nearest."""
    rows, columns = matrix.shape
    blocks = matrix.double().reshape(rows, -1, columns if kind.group == -1 else kind.group)
    top, middle = 2**kind.bits - 1, 2 ** (kind.bits - 1)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    span = 2 * torch.maximum(-low, high) if kind.symmetric else high - low
    scales = (span / top).to(kind.scales)
    exact = scales.double()
    zeros = torch.full_like(low, middle) if kind.symmetric else (-low / exact).round().clamp(0, top)
    integers = ((blocks / exact[:, :, None]).round() + zeros[:, :, None]).clamp(0, top).reshape(rows, columns)
    return Numbers(integers.long().numpy(), scales, zeros.long().numpy())


def words(numbers: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """(R, C) → int32 (R, C · bits / 32): n numbers to a word, the first lowest. order: which one is where."""
    count = 32 // bits
    rows, columns = numbers.shape
    packed = np.zeros((rows, -(-columns // count)), np.uint32)
    for column in range(columns):
        place = column % count if order is None else order.index(column % count)
        packed[:, column // count] |= numbers[:, column].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32))


def tensors(module: str, numbers: Numbers, kind: Kind) -> dict[str, Tensor]:
    """What a checkpoint has of a matrix."""
    integers, zeros, bits = numbers.integers, numbers.zeros, kind.bits
    rows, columns = integers.shape
    groups = zeros.shape[1]
    if kind.method == "awq":  # WQLinear_GEMM.from_linear
        parts = {
            "qweight": words(integers.T, bits, _AWQ_ORDER),
            "qzeros": words(zeros.T, bits, _AWQ_ORDER),
            "scales": numbers.scales.T.contiguous(),
        }
    elif kind.method == "gptq":  # convert_gptq_v2_to_v1_format takes one off every number of a word, with borrows
        stored = words(zeros.T, bits)
        if kind.layout != "gptq_v2":
            ones = sum(1 << bits * place for place in range(32 // bits))
            stored = torch.from_numpy(((stored.long().numpy() - ones) & 0xFFFFFFFF).astype(np.uint32).view(np.int32))
        parts = {
            "qweight": words(integers, bits).T.contiguous(),
            "qzeros": stored,
            "scales": numbers.scales.T.contiguous(),
            "g_idx": (torch.arange(columns) // (columns // groups)).int(),
        }
    else:  # pack_to_int32 of numbers that are signed until then
        parts = {
            "weight_packed": words(integers, bits),
            "weight_scale": numbers.scales,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not kind.symmetric:
            parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


def pack(source: Path, folder: Path, kind: Kind, *, shards: int = 1) -> Path:
    """A packed copy of a checkpoint in `folder`; beside it, in `<folder>-floats`, what its weights stand for.

    The matrices of the layers are packed; the rest is stored in the type of the scales.
    """
    state = load_file(source / "model.safetensors")
    packed: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for name, weight in state.items():
        if ".layers." in name and weight.dim() == 2:
            numbers = rounded(weight, kind)
            packed |= tensors(name.removesuffix(".weight"), numbers, kind)
            floats[name] = numbers.floats()
        else:
            packed[name] = weight.to(kind.scales)
            floats[name] = packed[name].float()
    plain = folder.with_name(f"{folder.name}-floats")
    for path, tensors_of, said in ((folder, packed, kind.config()), (plain, floats, None)):
        shutil.copytree(source, path)
        save_file(tensors_of, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps(config if said is None else config | {"quantization_config": said})
        )
    if shards > 1:
        shard(folder, packed, shards)
    return folder
