"""Models with a short name: their Hub ids and sizes. Imports neither torch nor onnx, for help texts read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mara_export.hf.families import FAMILIES, Decoder, decoder_of
from mara_runtime.tensors import CacheGroup, ModelShape


@dataclass(frozen=True)
class KnownModel:
    """A model on the Hub with a short name, its sizes from its config.json."""

    hub_id: str
    context: int
    """tokens: max_position_embeddings, but of LongRoPE the length up to which it does not change angles"""
    decoder: Decoder
    agents: bool = False
    """agents were released for it with MARA"""


def _row(
    model_type: str,
    hub_id: str,
    context: int,
    layers: int,
    hidden: int,
    mlp: int,
    heads: str,
    vocab: int,
    tied: bool | None = None,
    *,
    experts: int = 0,
    agents: bool = False,
    **biases: bool,
) -> KnownModel:
    """heads: "queries/keys×size", as 14/2×64. tied: default as in the family. biases: settings of `decoder_of`."""
    counts, _, size = heads.partition("×")
    num_heads, num_kv_heads = map(int, counts.split("/"))
    shape = ModelShape(hidden, vocab, layers, num_heads, (CacheGroup(layers, num_kv_heads, int(size)),))
    tied = FAMILIES[model_type].tied if tied is None else tied
    return KnownModel(hub_id, context, decoder_of(shape, model_type, mlp, tied, experts, **biases), agents)


ALIASES = {
    "qwen2": _row("qwen2", "Qwen/Qwen2-0.5B-Instruct", 32768, 24, 896, 4864, "14/2×64", 151936, True),
    "qwen2-1.5b": _row("qwen2", "Qwen/Qwen2-1.5B-Instruct", 32768, 28, 1536, 8960, "12/2×128", 151936, True),
    "qwen2-7b": _row("qwen2", "Qwen/Qwen2-7B-Instruct", 32768, 28, 3584, 18944, "28/4×128", 152064),
    "qwen2.5-0.5b": _row("qwen2", "Qwen/Qwen2.5-0.5B-Instruct", 32768, 24, 896, 4864, "14/2×64", 151936, True),
    "qwen2.5-1.5b": _row("qwen2", "Qwen/Qwen2.5-1.5B-Instruct", 32768, 28, 1536, 8960, "12/2×128", 151936, True),
    "qwen2.5-3b": _row("qwen2", "Qwen/Qwen2.5-3B-Instruct", 32768, 36, 2048, 11008, "16/2×128", 151936, True),
    "qwen2.5-7b": _row("qwen2", "Qwen/Qwen2.5-7B-Instruct", 32768, 28, 3584, 18944, "28/4×128", 152064),
    "qwen2.5-14b": _row("qwen2", "Qwen/Qwen2.5-14B-Instruct", 32768, 48, 5120, 13824, "40/8×128", 152064),
    "qwen3": _row("qwen3", "Qwen/Qwen3-0.6B", 40960, 28, 1024, 3072, "16/8×128", 151936, True),
    "qwen3-1.7b": _row("qwen3", "Qwen/Qwen3-1.7B", 40960, 28, 2048, 6144, "16/8×128", 151936, True),
    "qwen3-4b": _row("qwen3", "Qwen/Qwen3-4B", 40960, 36, 2560, 9728, "32/8×128", 151936, True),
    "qwen3-8b": _row("qwen3", "Qwen/Qwen3-8B", 40960, 36, 4096, 12288, "32/8×128", 151936),
    "qwen3-30b-a3b": _row("qwen3_moe", "Qwen/Qwen3-30B-A3B", 40960, 48, 2048, 768, "32/4×128", 151936, experts=128),
    "llama3": _row(
        "llama", "meta-llama/Meta-Llama-3-8B-Instruct", 8192, 32, 4096, 14336, "32/8×128", 128256, agents=True
    ),
    "llama3.1": _row(
        "llama", "meta-llama/Llama-3.1-8B-Instruct", 131072, 32, 4096, 14336, "32/8×128", 128256, agents=True
    ),
    "llama3.2-1b": _row(
        "llama", "meta-llama/Llama-3.2-1B-Instruct", 131072, 16, 2048, 8192, "32/8×64", 128256, True, agents=True
    ),
    "llama3.2-3b": _row(
        "llama", "meta-llama/Llama-3.2-3B-Instruct", 131072, 28, 3072, 8192, "24/8×128", 128256, True, agents=True
    ),
    "smollm2-135m": _row("llama", "HuggingFaceTB/SmolLM2-135M-Instruct", 8192, 30, 576, 1536, "9/3×64", 49152, True),
    "smollm2-360m": _row("llama", "HuggingFaceTB/SmolLM2-360M-Instruct", 8192, 32, 960, 2560, "15/5×64", 49152, True),
    "smollm2": _row("llama", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 8192, 24, 2048, 8192, "32/32×64", 49152, True),
    "smollm3": _row("smollm3", "HuggingFaceTB/SmolLM3-3B", 65536, 36, 2048, 11008, "16/4×128", 128256, True),
    "mistral": _row(
        "mistral", "mistralai/Mistral-7B-Instruct-v0.3", 32768, 32, 4096, 14336, "32/8×128", 32768, agents=True
    ),
    "mixtral": _row(
        "mixtral", "mistralai/Mixtral-8x7B-Instruct-v0.1", 32768, 32, 4096, 14336, "32/8×128", 32000, experts=8
    ),
    "phi3": _row("phi3", "microsoft/Phi-3-mini-4k-instruct", 4096, 32, 3072, 8192, "32/32×96", 32064),
    "phi3.5": _row("phi3", "microsoft/Phi-3.5-mini-instruct", 4096, 32, 3072, 8192, "32/32×96", 32064),
    "phi4-mini": _row("phi3", "microsoft/Phi-4-mini-instruct", 4096, 32, 3072, 8192, "24/8×128", 200064, True),
    "phi4": _row("phi3", "microsoft/phi-4", 16384, 40, 5120, 17920, "40/10×128", 100352),
    "gemma": _row("gemma", "google/gemma-2b-it", 8192, 18, 2048, 16384, "8/1×256", 256000),
    "gemma-7b": _row("gemma", "google/gemma-7b-it", 8192, 28, 3072, 24576, "16/16×256", 256000),
    "gemma2": _row("gemma2", "google/gemma-2-2b-it", 8192, 26, 2304, 9216, "8/4×256", 256000),
    "gemma2-9b": _row("gemma2", "google/gemma-2-9b-it", 8192, 42, 3584, 14336, "16/8×256", 256000),
    "gemma3-270m": _row("gemma3_text", "google/gemma-3-270m-it", 32768, 18, 640, 2048, "4/1×256", 262144),
    "gemma3": _row("gemma3_text", "google/gemma-3-1b-it", 32768, 26, 1152, 6912, "4/1×256", 262144),
    "gemma3-4b": _row("gemma3_text", "google/gemma-3-4b-it", 131072, 34, 2560, 10240, "8/4×256", 262208),
    "gemma3-12b": _row("gemma3_text", "google/gemma-3-12b-it", 131072, 48, 3840, 15360, "16/8×256", 262208),
    "gemma3-27b": _row("gemma3_text", "google/gemma-3-27b-it", 131072, 62, 5376, 21504, "32/16×128", 262208),
    "granite": _row("granite", "ibm-granite/granite-3.3-2b-instruct", 131072, 40, 2048, 8192, "32/8×64", 49159, True),
    "granite-8b": _row(
        "granite", "ibm-granite/granite-3.3-8b-instruct", 131072, 40, 4096, 12800, "32/8×128", 49159, True
    ),
    "granite-moe-1b": _row(
        *("granitemoe", "ibm-granite/granite-3.1-1b-a400m-instruct", 131072, 24, 1024, 512, "16/8×64", 49155, True),
        experts=32,
    ),
    "granite-moe-3b": _row(
        *("granitemoe", "ibm-granite/granite-3.1-3b-a800m-instruct", 131072, 32, 1536, 512, "24/8×64", 49155, True),
        experts=40,
    ),
    "olmo2": _row("olmo2", "allenai/OLMo-2-0425-1B-Instruct", 4096, 16, 2048, 8192, "16/16×128", 100352),
    "olmo2-7b": _row("olmo2", "allenai/OLMo-2-1124-7B-Instruct", 4096, 32, 4096, 11008, "32/32×128", 100352),
    "olmo3": _row("olmo3", "allenai/Olmo-3-7B-Instruct", 65536, 32, 4096, 11008, "32/32×128", 100278),
    "exaone4": _row("exaone4", "LGAI-EXAONE/EXAONE-4.0-1.2B", 65536, 30, 2048, 4096, "32/8×64", 102400, True),
    "hunyuan": _row(
        "hunyuan_v1_dense", "tencent/Hunyuan-1.8B-Instruct", 262144, 32, 2048, 6144, "16/4×128", 120818, True
    ),
    "glm4": _row("glm4", "zai-org/GLM-4-9B-0414", 32768, 40, 4096, 13696, "32/2×128", 151552, attention_bias=True),
    "starcoder2": _row("starcoder2", "bigcode/starcoder2-3b", 16384, 30, 3072, 12288, "24/2×128", 49152, use_bias=True),
    "command-r7b": _row("cohere2", "CohereLabs/c4ai-command-r7b-12-2024", 132096, 32, 4096, 14336, "32/8×128", 256000),
}
"""By short name. tests/unit/test_memory.py has the parameter counts that the Hub gives for these checkpoints."""
KNOWN_MODELS = {model.hub_id: model for model in ALIASES.values()}
"""By Hub id."""


def hub_id_of(name: str) -> str:
    """The Hub id of an alias; any other name as it is."""
    return ALIASES[name].hub_id if name in ALIASES else name


def listing() -> Iterator[str]:
    """Lines: every alias with its model's Hub id, sizes, longest context, and whether agents were released for it."""
    yield f"{'alias':<16}{'Hub id':<44}{'10⁹ parameters':>15}{'layers':>8}{'hidden':>8}{'context':>9}  released agents"
    for alias, known in ALIASES.items():
        sizes = known.decoder
        yield (
            f"{alias:<16}{known.hub_id:<44}{sizes.parameters / 1e9:>15.2f}{sizes.num_layers:>8}"
            f"{sizes.hidden_size:>8}{known.context:>9}  {'yes' if known.agents else '–'}"
        )
    yield ""
    yield "Any Hub id or folder of these architectures works, too:"
    yield f"{', '.join(FAMILIES)}."
    yield "Tested are tiny random models of each architecture. Another one is tried, and judged by its parity gate."
