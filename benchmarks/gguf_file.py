"""A checkpoint made by shape.py as the GGUF files that llama.cpp reads, without a vocabulary.

    python benchmarks/gguf_file.py OUT/checkpoint OUT

writes OUT/f32.gguf and OUT/q4_0.gguf. Runs in an environment with llama-cpp-python, gguf and safetensors. Real models
come with GGUF files of their own; this is for random weights, whose tokenizer llama.cpp does not know.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face → GGUF, without the layer and without `.weight`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text(encoding="utf-8"))
    whole, small = args.out / "f32.gguf", args.out / "q4_0.gguf"

    writer = gguf.GGUFWriter(whole, config["model_type"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, tensor in load_file(args.checkpoint / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            writer.add_tensor(f"blk.{layer}.{NAMES[inner]}.{kind}", tensor)
        else:
            writer.add_tensor(f"{NAMES[module]}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(small).encode(), options) != 0:
        raise SystemExit(f"llama.cpp could not quantise {whole}")


if __name__ == "__main__":
    main()
