"""LoRA adapters of tiny checkpoints, made by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests import checkpoints


def make_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """Write an adapter that changes what its model says. config: of peft's LoraConfig."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "init_lora_weights": False, **config}
    model = get_peft_model(checkpoints.load(base), LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn(weight.shape)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder
