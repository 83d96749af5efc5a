"""A checkpoint of a real shape with random weights, and an agent for it: speed depends on shapes, not on values.

    python benchmarks/shape.py qwen2-0.5b OUT

writes OUT/checkpoint, a Hugging Face folder with the demo's tokenizer, and OUT/agent.safetensors. Weights are made one
at a time, in bfloat16, so the largest shape takes no more memory than its embedding.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from mara_deploy import agent as agents
from mara_deploy.demo import MODEL_FOLDER
from mara_export.hf.weights import empty_model

_LLAMA32 = {
    "model_type": "llama",
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES = {
    "qwen2-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
    },
    "llama3.2-3b": {
        **_LLAMA32,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
    },
    "llama3.2-1b": {
        **_LLAMA32,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "smollm2-360m": {
        "model_type": "llama",
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}
"""From the published config.json of each model; the tiny one is nobody's, and tries the commands."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SHARD_BYTES = 4 << 30


def weight(name: str, shape: torch.Size, config: Any, generator: torch.Generator) -> torch.Tensor:
    """A weight as a model begins its training with, at any width: were it larger, each layer would amplify rounding."""
    if "norm" in name:
        return torch.ones(shape)
    std = 0.6 / config.hidden_size**0.5
    if name.endswith("embed_tokens.weight"):
        std = 0.2  # so large that each token says something, and rounding does not drown it
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= (2 * config.num_hidden_layers) ** 0.5  # as GPT-2
    return torch.empty(shape).normal_(std=std, generator=generator)


def write_weights(model: Any, folder: Path) -> None:
    """Write weights for an empty model as bfloat16 in files of at most SHARD_BYTES, unless one weight is larger."""
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        save_file(pending, folder / f"model-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append([*pending])
        pending.clear()
        size = 0

    for name, empty in model.named_parameters():
        values = weight(name, empty.shape, model.config, generator).bfloat16()
        if pending and size + values.nbytes > SHARD_BYTES:
            flush()
        pending[name] = values
        size += values.nbytes
    flush()
    index = {name: f"model-{i}.safetensors" for i, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    folder = args.out / "checkpoint"
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(**SHAPES[args.shape], bos_token_id=0, eos_token_id=0)
    model = empty_model(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    write_weights(model, folder)
    for name in TOKENIZER:
        shutil.copy(MODEL_FOLDER / name, folder / name)
    agents.untrained(config.hidden_size, seed=0).save(args.out / "agent.safetensors")


if __name__ == "__main__":
    main()
