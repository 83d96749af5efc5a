"""The device that a PyTorch model runs on."""

from __future__ import annotations

import torch

from mara_runtime.errors import OptionError


def torch_device(flag: str, name: str, alternatives: str) -> torch.device:
    """The device of that name. Raises OptionError, naming the flag and alternatives, if it cannot be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"{flag} is {name!r}, which cannot be used here ({reason}): use {alternatives}") from None
    return device
