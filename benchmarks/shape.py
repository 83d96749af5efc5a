"""A checkpoint of a real shape with random weights, and an agent for it: speed depends on shapes, not on values.

    python benchmarks/shape.py qwen2-0.5b OUT

writes OUT/checkpoint, a Hugging Face folder with the demo's tokenizer, and OUT/agent.safetensors.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from mara_deploy import agent as agents
from mara_deploy.demo import MODEL_FOLDER

SHAPES = {
    "qwen2-0.5b": {
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
    "tiny": {
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


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPES[args.shape], bos_token_id=0, eos_token_id=0))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.02)  # zeros would be left out of a graph
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter /= (2 * model.config.num_hidden_layers) ** 0.5  # as GPT-2
        if name.endswith("embed_tokens.weight"):
            parameter *= 10  # so large that each token says something, and rounding does not drown it
    model.save_pretrained(args.out / "checkpoint")
    for name in TOKENIZER:
        shutil.copy(MODEL_FOLDER / name, args.out / "checkpoint" / name)
    agents.untrained(model.config.hidden_size, seed=0).save(args.out / "agent.safetensors")


if __name__ == "__main__":
    main()
