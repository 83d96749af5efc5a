"""The device of a PyTorch model, and its free memory."""

from __future__ import annotations

import torch

from mara_runtime.engines.machine import free_memory
from mara_runtime.errors import OptionError


def device_name(name: str) -> str:
    """The name, but CUDA if available, else the CPU, for auto."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_device(flag: str, name: str, alternatives: str = "auto or cpu") -> torch.device:
    """The device of that name, or of auto. Raises OptionError, naming flag and alternatives, if it is of no use."""
    name = device_name(name)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"{flag} is {name!r}, which cannot be used here ({reason}): use {alternatives}") from None
    return device


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None if it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()
