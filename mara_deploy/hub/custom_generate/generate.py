"""Aligned decoding in PyTorch: agents accept or reject each token of a frozen LLM (MARA, arXiv 2505.19743).

    model.generate(**inputs, custom_generate="FOLDER", agent="agent.safetensors", trust_remote_code=True)

FOLDER, or a repository on the Hub, has this file as custom_generate/generate.py; it needs nothing else of mara-deploy.
Prompts are decoded side by side: in each pass every row runs one token, its next candidate or the one it has picked,
and the entries of that pass are cropped from the KV cache until all rows have run their pick.
"""

from __future__ import annotations

import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DynamicCache

CHOICES = {
    "strategy": ("top1", "max_prob", "random"),
    "order": ("ranked", "best_last", "reversed"),
    "fallback": ("first", "last"),
}


def candidates(logits: Tensor, top_k: int, top_p: float) -> list[int]:
    """(V,) logits → token ids, best first: top-k, of equal logits the lower id, then top-p from the low end."""
    if not logits.max().isfinite():
        raise ValueError("a logit is not finite")
    (ids,) = torch.where(logits >= logits.topk(min(top_k, len(logits))).values[-1])
    ids = ids[logits[ids].sort(descending=True, stable=True).indices][:top_k]
    tails = logits[ids].double().softmax(0).flip(0).cumsum(0).flip(0)
    return ids[: max(1, int((tails > 1 - top_p).sum()))].tolist()


class Row:
    """The next token of one prompt: its candidates, the margins seen so far, and the pick."""

    def __init__(self, ids: list[int], rng: np.random.Generator, rule: Mapping[str, Any]) -> None:
        """ids: by rank; rule: strategy, order, fallback, threshold."""
        self.rng, self.rule, self.margins = rng, rule, list[float]()
        self.order = {"ranked": ids, "best_last": [*ids[1:], ids[0]], "reversed": ids[::-1]}[rule["order"]]
        self.fallback = ids[0] if rule["fallback"] == "first" else ids[-1]
        self.pick = ids[0] if len(ids) == 1 else None

    @property
    def token(self) -> int:
        """The one to run: the pick, before there is one the next candidate."""
        return self.order[len(self.margins)] if self.pick is None else self.pick

    def examine(self, margin: float) -> None:
        """Take the margin of `token`, and pick as soon as the rule can."""
        if self.pick is not None:
            return
        if not math.isfinite(margin):
            raise ValueError(f"the hidden state or the margin of token {self.token} is not finite")
        self.margins.append(margin)
        accepted = [i for i, each in enumerate(self.margins) if each > self.rule["threshold"]]
        if len(self.margins) < len(self.order) and not (accepted and self.rule["strategy"] == "top1"):
            return
        if not accepted:
            self.pick = self.fallback
        elif self.rule["strategy"] == "max_prob":
            self.pick = self.order[max(accepted, key=lambda i: self.margins[i])]
        else:
            draw = self.rng.integers(len(accepted)) if self.rule["strategy"] == "random" else 0
            self.pick = self.order[accepted[draw]]


def load_agent(name: str, hidden_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """An agent by its file or hub-id:file, .safetensors or a released .pth; and what it records. Raises ValueError."""
    path, recorded, repository = name, {}, name.rpartition(":")[0]
    if not Path(name).is_file():
        if not repository:
            raise ValueError(f"no agent file found at {name}: pass a .safetensors or .pth file, or hub-id:file")
        path = hf_hub_download(repository, name.rpartition(":")[2])
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as tensors:
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
            recorded = json.loads((tensors.metadata() or {}).get("mara", "{}"))
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    layers: OrderedDict[str, nn.Module] = OrderedDict(ln=nn.LayerNorm(hidden_size, eps=1e-5))
    try:
        for layer in ("linear1", "linear2", "output_linear"):
            layers[layer] = nn.Linear(*reversed(state[f"{layer}.weight"].shape))
            layers[f"{layer}_relu"] = nn.ReLU()
        layers.popitem()
        agent = nn.Sequential(layers)
        agent.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{name} is not a MARA agent for a hidden size of {hidden_size}: {error}") from None
    return agent.eval(), recorded


@torch.no_grad()
def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    agent: str | Mapping[str, float],
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    generation_config: Any = None,
    max_new_tokens: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Any = None,
    top_k: int | None = None,
    top_p: float | None = None,
    fallback: str | None = None,
    strategy: str = "top1",
    order: str = "ranked",
    threshold: float = 0.0,
    seed: int = 0,
    **others: Any,
) -> Tensor:
    """(B, T) prompts, padded on the left if at all → (B, T + N) prompts and answers, padded behind their end.

    agent: file or hub-id:file; of a mix each with its part, {"polite.safetensors": 1.0, …}. Of a generation config the
    length and the special tokens count, nothing else. Raises ValueError for what it cannot do.
    """
    ids = inputs if input_ids is None else input_ids
    if ids is None or model.config.is_encoder_decoder or model._is_stateful:
        raise ValueError("aligned decoding takes input_ids, of a decoder whose KV cache can be cropped")
    asked = {name: bool(value.any()) if isinstance(value, Tensor) else value for name, value in others.items()}
    if given := sorted(name for name, value in asked.items() if value):
        raise ValueError(f"aligned decoding has no {', '.join(given)}")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    if not (mask[:, -1].all() and (mask.diff(dim=1) >= 0).all()):
        raise ValueError("a prompt is padded behind its end: set the tokenizer's padding_side to 'left'")
    names = {agent: 1.0} if isinstance(agent, str) else agent
    loaded = {name: load_agent(name, model.get_output_embeddings().weight.shape[-1]) for name in names}
    agents = [(part, loaded[name][0].to(ids.device)) for name, part in names.items() if part]
    if not agents:
        raise ValueError("aligned decoding needs an agent whose part of the mix is not 0")
    first = next(iter(loaded.values()))[1]
    trained = first.get("training") or {"top_k": 40, "top_p": 0.95}
    filters = trained["top_k"] if top_k is None else top_k, trained["top_p"] if top_p is None else top_p
    rule: dict[str, Any] = {
        "strategy": strategy,
        "order": order,
        "fallback": fallback or first.get("fallback", "first"),
    }
    for name, known in CHOICES.items():
        if rule[name] not in known:
            raise ValueError(f"{name} is {rule[name]!r}: choose {', '.join(known)}")
    rule |= {"threshold": threshold}

    def setting(name: str, value: Any, default: Any) -> Any:
        values = (value, *(getattr(config, name, None) for config in (generation_config, model.generation_config)))
        return next((each for each in values if each is not None), default)

    eos = setting("eos_token_id", eos_token_id, [])
    ends = eos if isinstance(eos, list) else [eos]
    pad = setting("pad_token_id", pad_token_id, min(ends, default=0))
    limit = setting("max_new_tokens", max_new_tokens, 512)
    parameters = inspect.signature(model.forward).parameters
    cache = DynamicCache()  # without a configuration, layers with a window keep all entries: any pass can be taken back
    options = {"cache" if "cache" in parameters else "past_key_values": cache, "output_hidden_states": True}
    options |= {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def run(tokens: Tensor) -> tuple[Tensor, list[float]]:
        """(B, S) tokens → (B, V) logits and B margins of the last ones."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **options)
        judged = [(part, each(out.hidden_states[-1][:, -1].float())) for part, each in agents]
        return out.logits[:, -1].float(), sum(part * (z[:, 1] - z[:, 0]) for part, z in judged).tolist()

    sequences, ended, draws = ids, [False] * len(ids), [np.random.default_rng(seed) for _ in ids]
    if streamer is not None:
        streamer.put(ids.cpu())
    logits, _ = run(ids)
    for step in range(limit):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        choices = [[pad] if end else candidates(each, *filters) for each, end in zip(logits, ended, strict=True)]
        rows = [Row(choice, rng, rule) for choice, rng in zip(choices, draws, strict=True)]
        before: list[int] = []
        while (tokens := [row.token for row in rows]) != before:
            if step + 1 == limit and all(row.pick is not None for row in rows):
                break  # nothing follows
            if before:
                cache.crop(-1)
            logits, margins = run(torch.tensor(tokens, device=ids.device)[:, None])
            for row, margin in zip(rows, margins, strict=True):
                row.examine(margin)
            before = tokens
        ended = [end or token in ends for end, token in zip(ended, tokens, strict=True)]
        sequences = torch.cat([sequences, torch.tensor(tokens, device=ids.device)[:, None]], dim=1)
        if streamer is not None:
            streamer.put(sequences[:, -1].cpu())
        if all(ended):
            break
    if streamer is not None:
        streamer.end()
    return sequences
