"""Tiny random Hugging Face checkpoints and agents, on which every schedule of the decoder can be compared.

Nothing is trained. A random transformer with strong attention and a random head is a chaotic map of its
whole context: greedy text does not fall into a loop, and a cache that holds one wrong entry changes the ids
within a few tokens (tests/export/test_tiny_models.py proves it for each architecture). What a random model lacks
is a peaked next-token distribution; one number, the scale of the final norm, is set by bisection so that
half of the positions have a single candidate. Random signs in the final norm keep a tied head from
preferring the token that was just read.

Ids 0-255 stand for bytes, 256 for BOS, 257 and 258 for the two EOS ids, 259 for padding; the rest are merges.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mara_export.export import NamedAgent
from tests import families

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
"""What most tests run on; `make` knows those of tests/families.py, too."""

BOS_ID, EOS_ID, SECOND_EOS_ID, PAD_ID = 256, 257, 258, 259
EOS_IDS = (EOS_ID, SECOND_EOS_ID)
SPECIAL_TOKENS = {"<s>": BOS_ID, "</s>": EOS_ID, "<|end|>": SECOND_EOS_ID, "<pad>": PAD_ID}

_HIDDEN = 64
_SINGLE_SHARE = 0.5  # of the positions of greedy text, those with one candidate at top_k=40, top_p=0.95
_EOS_EVERY = 160  # greedy tokens for each of the two EOS ids: about half of all texts end within 64 tokens
_EOS_NOT_BEFORE = 6  # greedy tokens


def make(architecture: str, folder: Path, *, seed: int = 0, tie: bool | None = None) -> Path:
    """Write a tiny checkpoint (config, generation config, safetensors weights) and return its folder.

    `tie` overrides whether head and embedding share one matrix (default: as in the family's small models).
    The generation config lists two EOS ids; config.json, as released models often do, names only the first.
    """
    generator = torch.Generator().manual_seed(seed)
    config = _config(architecture, tie)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    _randomise(model, generator)
    rolled, logits = _greedy_rollouts(model, generator)
    _move_special_ids(model, rolled)
    # Greedy text does not depend on the scale, so the recorded logits serve for the search.
    scale = _scale_for_single_share(logits, _SINGLE_SHARE)
    norm = _final_norm(model)
    offset = _offset(norm)
    with torch.no_grad():
        norm.weight.copy_((norm.weight + offset) * scale - offset)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=list(EOS_IDS), pad_token_id=PAD_ID, do_sample=False
    )
    folder = Path(folder)
    model.save_pretrained(folder)
    as_saved_by_4(folder)
    return folder


def as_saved_by_4(folder: Path) -> None:
    """Write the rotary settings of a configuration as transformers 4 does: most released models have them so."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if (rope := config.pop("rope_parameters", None)) is not None and "rope_theta" not in rope:
        config["rope_parameters"] = rope  # of each kind of layer: version 4 has no words for it
    elif rope is not None:
        config |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> PreTrainedModel:
    """Load a checkpoint the way the oracle wants it: float32, eager attention and experts, eval."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):  # of transformers 5
        model.set_experts_implementation("eager")
    return model


def named(agent: torch.nn.Module, name: str = "agent") -> list[NamedAgent]:
    """An agent as exports take it."""
    return [NamedAgent(name, name, agent)]


def random_prompts(n: int, *, seed: int = 0, length: int = 8) -> list[list[int]]:
    """`n` prompts of `length` random byte ids (no special ids)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, length), generator=generator).tolist()


@torch.no_grad()
def sample_states(model: PreTrainedModel, *, seed: int = 0, n: int = 256) -> torch.Tensor:
    """Hidden states (n, D) after the final norm, of tokens of rank 1 to 3 on prefixes of the model's own text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (32, 8), generator=generator)
    states: list[torch.Tensor] = []
    while sum(len(s) for s in states) < n:
        out = model(input_ids=ids, output_hidden_states=True)
        states.append(out.hidden_states[-1][:, -1])  # (32, D)
        best = out.logits[:, -1].topk(3).indices  # a decoder asks about ranks 1, 2, 3 and hardly more
        pick = torch.randint(0, 3, (len(ids), 1), generator=generator)
        ids = torch.cat([ids, best.gather(1, pick)], dim=1)
    return torch.cat(states[1:] + states[:1])[:n]  # the first batch ends in a random token: use it last


class Agent(torch.nn.Module):
    """The agent under the released parameter names: (N, D) -> logits (N, 2), index 1 accepts."""

    def __init__(self, hidden_size: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.ln = torch.nn.LayerNorm(hidden_size, eps=1e-5)
        self.linear1 = torch.nn.Linear(hidden_size, widths[0])
        self.linear2 = torch.nn.Linear(widths[0], widths[1])
        self.output_linear = torch.nn.Linear(widths[1], 2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        x = self.ln(states)
        x = torch.relu(self.linear1(x))
        x = torch.relu(self.linear2(x))
        return self.output_linear(x)


@torch.no_grad()
def make_agent(
    hidden_size: int,
    *,
    seed: int,
    widths: tuple[int, int] = (32, 16),
    sample_states: torch.Tensor | None = None,
) -> torch.nn.Module:
    """A random agent that accepts 60 % of `sample_states` (N, D), margins of standard deviation 1.

    Without `sample_states` it is calibrated on standard normal states.
    """
    generator = torch.Generator().manual_seed(seed)
    agent = Agent(hidden_size, widths).eval()
    for name, parameter in sorted(agent.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "ln.weight":
            parameter.copy_(1.0 + 0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(0.1 * noise)
        else:
            parameter.copy_(noise * (2.0 / parameter.shape[1]) ** 0.5)
    if sample_states is None:
        sample_states = torch.randn((512, hidden_size), generator=generator)

    def margins() -> torch.Tensor:  # (N,)
        z = agent(sample_states.float())
        return z[:, 1] - z[:, 0]

    agent.output_linear.weight.div_(float(margins().std()))
    ranked = margins().sort(descending=True).values
    accepted = round(0.6 * len(ranked))  # half-way between two states, so that none of them is a tie
    agent.output_linear.bias[1] -= float(ranked[accepted - 1] + ranked[accepted]) / 2
    return agent


def shard(folder: Path, state: dict[str, torch.Tensor], count: int) -> list[Path]:
    """Write weights as `count` files, each of which has a part."""
    (folder / "model.safetensors").unlink()
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = {}
    for i, path in enumerate(paths):
        part = dict(sorted(state.items())[i::count])
        save_file(part, path, metadata={"format": "pt"})
        index |= dict.fromkeys(part, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def add_tokenizer(folder: Path, vocab_size: int) -> None:
    """Save a byte-level BPE tokenizer of `vocab_size` tokens whose post-processor adds BOS.

    Its chat template starts with BOS too: encoding templated text with special tokens gives a double BOS (§4).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "etaoinshrdlucm"
    pairs = [("Ġ", c) for c in letters] + [(a, b) for a in letters for b in letters]
    pairs = pairs[: vocab_size - 256 - len(SPECIAL_TOKENS)]
    if vocab_size < 256 + len(SPECIAL_TOKENS) or len(pairs) < vocab_size - 256 - len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size: {vocab_size}, must be in [260, {260 + 15 * len(letters)}]")
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | SPECIAL_TOKENS
    vocab |= {a + b: 260 + i for i, (a, b) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    # transformers renders with trim_blocks: of the two line ends after `endif` only the quoted one is printed.
    template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(architecture: str, tie: bool | None) -> PretrainedConfig:
    def common(vocab_size: int, layers: int, tied: bool) -> dict[str, object]:
        return {
            "vocab_size": vocab_size,
            "hidden_size": _HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "tie_word_embeddings": tied if tie is None else tie,
        }

    if architecture == "qwen2":
        return Qwen2Config(**common(320, 2, True))
    if architecture == "qwen3":
        return Qwen3Config(**common(304, 2, True), head_dim=24)  # 4 heads of 24 are 96, not 64
    if architecture == "llama":
        # Wavelengths are 6 to 20,000 tokens: here some stay, one is smoothed, the long ones are divided.
        rope = {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
        return LlamaConfig(**common(384, 3, False), head_dim=16, rope_scaling=rope)
    if architecture == "mistral":
        return MistralConfig(**common(272, 2, False), head_dim=16, sliding_window=None)
    return families.config(architecture, common(320, 4, False))


def _final_norm(model: PreTrainedModel) -> torch.nn.Module:
    decoder = model.get_decoder()
    return decoder.norm if hasattr(decoder, "norm") else decoder.final_layernorm


def _offset(norm: torch.nn.Module) -> float:
    """Of a norm that multiplies by 1 + weight."""
    return float("Gemma" in type(norm).__name__ and "Gemma4" not in type(norm).__name__)


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Fill every parameter so that attention, MLP and embedding are all audible in the last hidden state."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is _final_norm(model).weight:
            parameter.copy_((1.0 + 0.2 * noise.abs()) * noise.sign())
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1.3 + 0.2 * noise)
        elif name.endswith("sinks"):
            parameter.copy_(2.0 + noise)
        elif name.endswith("norm.weight"):
            parameter.copy_(1.0 + 0.2 * noise)
        elif name.endswith(".bias"):
            parameter.copy_(0.3 * noise)
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.copy_(noise)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)
        else:  # v, o, gate, up, down
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():  # of a checkpoint: a factor
            buffer.fill_(0.8)


@torch.no_grad()
def _greedy_rollouts(
    model: PreTrainedModel, generator: torch.Generator, *, n: int = 32, steps: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy continuations (n, steps) of random prompts, and the logits (n * steps, V) behind them."""
    ids = torch.randint(0, 256, (n, 8), generator=generator)
    cache, rolled, logits = None, [], []
    for _ in range(steps):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[:, -1])
        ids = logits[-1].argmax(dim=-1, keepdim=True)
        rolled.append(ids)
    return torch.cat(rolled, dim=1), torch.cat(logits)


@torch.no_grad()
def _move_special_ids(model: PreTrainedModel, rolled: torch.Tensor) -> None:
    """Permute the vocabulary: EOS ids fall on tokens of a fit frequency, BOS and padding on rare ones."""
    vocab_size = model.config.vocab_size
    counts = torch.bincount(rolled.flatten(), minlength=vocab_size)
    early = torch.bincount(rolled[:, :_EOS_NOT_BEFORE].flatten(), minlength=vocab_size)
    wanted = rolled.numel() / _EOS_EVERY
    by_fit = sorted(range(vocab_size), key=lambda i: (early[i].item() > 0, abs(counts[i].item() - wanted), i))
    by_rarity = sorted(range(vocab_size), key=lambda i: (counts[i].item(), i))
    rare = [i for i in by_rarity if i not in by_fit[:2]]
    order = list(range(vocab_size))  # order[new id] = old id
    chosen_for = {EOS_ID: by_fit[0], SECOND_EOS_ID: by_fit[1], BOS_ID: rare[0], PAD_ID: rare[1]}
    for special, chosen in chosen_for.items():
        other = order.index(chosen)
        order[special], order[other] = order[other], order[special]
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for table in {id(each): each for each in (*tables, model.get_output_embeddings().weight)}.values():
        table.copy_(table[order].clone())


def _scale_for_single_share(logits: torch.Tensor, share: float) -> float:
    """The factor on `logits` (N, V) at which `share` of the rows have one candidate (top_k 40, top_p 0.95)."""
    top = logits.double().topk(40).values
    low, high = 0.01, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        single = (middle * top).softmax(dim=-1)[:, 0] >= 0.95
        low, high = (low, middle) if single.double().mean() > share else (middle, high)
    return round(high, 2)  # rounded: the file does not depend on a machine's last bits
