"""A miniature of a model: few and small layers, random weights, all of them audible.

Kept are one layer of each kind and one more, the size of heads and how many share keys, biases, norms, scales, rotary
settings, tied weights. Cut are widths, tables, and what a short text would not show: windows and soft caps. What makes
a layer a kind of its own is read off the modules that transformers makes of a configuration; no family is named.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mara_export.errors import ModelError
from mara_export.progress import no_logs
from mara_runtime.errors import first_line

WINDOW = 16
"""Tokens, of the shortest window that is cut; longer ones stay longer, by `_APART` tokens each."""
_APART = 3
_SOFT_CAP = 5.0
"""Here scores and logits come near it."""
_VOCABULARY, _WIDTH, _INNER, _KV_HEADS = 128, 64, 96, 2
_GAIN, _SPREAD = 1.3, 0.3
"""Standard deviations: of what a matrix makes of rows that have 1, and of what is added to vectors, which begin as
transformers makes them: weights of norms as ones, or zeros where one is added, biases as zeros."""
_MOST_PARAMETERS = 1 << 28
_LAYERS = "num_hidden_layers"
_COUNTS_LAYERS = re.compile(r"num_\w+_layers")
_KV = re.compile(r"num_\w*(key_value|kv)_heads")
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_CHOSEN = re.compile(r"\w*experts_per_tok|top_?k_experts|moe_(top_?)?k")
_WINDOWS = re.compile(r"\w*window(_size)?")
_NUMBERS_A_LAYER = re.compile(r"idx|index|layer_id")


def miniature(config: Any, name: str) -> Any:
    """A causal LM of a Hugging Face configuration in miniature: eager, float32, eval. Always the same weights.

    name: of the model, for messages. Raises ModelError for a configuration that transformers makes no model of.
    """
    why: Exception | None = None
    with no_logs(logging.ERROR), torch.random.fork_rng(devices=[]):
        for changes in _cuts(config):
            torch.manual_seed(0)
            try:
                shallow = _shallow(_changed(config, changes))
                if _parameters(shallow) > _MOST_PARAMETERS:
                    continue
                model = _make(shallow)
                if "head_dim" not in changes or _head_dims(model) == {changes["head_dim"]}:
                    _randomise(model)
                    return model
            except Exception as error:  # whatever the code of a configuration or a layer raises at odd sizes
                why = error
    reason = "its sizes depend on each other" if why is None else first_line(why)
    raise ModelError(
        f"{name} cannot be made smaller for the structural gate ({reason}); --no-gate exports without gates"
    )


def _cuts(config: Any) -> Iterator[dict[str, Any]]:
    """Changes that make a configuration narrow, the most first: not all sizes are independent in all families."""
    stated = config.to_dict()
    whole = {key: value for key, value in stated.items() if type(value) is int}
    heads, width = whole.get("num_attention_heads", 0), whole.get("hidden_size", 0)
    kv_heads = whole.get("num_key_value_heads", heads)
    windows = {key: value for key, value in whole.items() if _WINDOWS.fullmatch(key) and value > WINDOW}
    longer = sorted({*windows.values()})
    always = {
        **{key: None for key in stated if key.endswith("token_id")},
        **{key: min(value, _VOCABULARY) for key, value in whole.items() if key.startswith("vocab_size")},
        **{key: WINDOW + _APART * longer.index(value) for key, value in windows.items()},
        **{key: min(value, _SOFT_CAP) for key, value in stated.items() if "softcap" in key and value},
    }
    inner = {
        key: [min(one, _INNER) for one in value] if isinstance(value, list) else min(value, _INNER)
        for key, value in stated.items()
        if key.endswith("intermediate_size") and value
    }
    chosen = max((value for key, value in whole.items() if _CHOSEN.fullmatch(key)), default=1)
    experts = {key: min(value, 2 * chosen) for key, value in whole.items() if _EXPERTS.fullmatch(key)}

    def of_heads(said: Mapping[str, Any]) -> dict[str, Any]:
        return {key: min(value, _KV_HEADS) for key, value in said.items() if value and _KV.fullmatch(key)}

    odd = {
        key: {number: {**said, **of_heads(said)} for number, said in layers.items()}
        for key, layers in _odd_layers(stated).items()
    }
    for more in (experts, {}) if heads and width else ():
        count = min(kv_heads, _KV_HEADS) * (heads // kv_heads)
        narrow = {**always, **inner, **odd, **of_heads(stated), "num_attention_heads": count, **more}
        if stated.get("head_dim"):
            yield {**narrow, "hidden_size": min(width, _WIDTH)}
        else:
            yield {**narrow, "hidden_size": min(width, _WIDTH), "head_dim": width // heads}
            yield {**narrow, "hidden_size": count * (width // heads)}
    yield always


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    return type(config).from_dict({**config.to_dict(), **changes})


def _make(config: Any) -> Any:
    make: Any = AutoModelForCausalLM.from_config
    return make(config, attn_implementation="eager", dtype=torch.float32).eval()


def _unfilled(config: Any) -> Any:
    with torch.device("meta"):
        return _make(config)


def _parameters(config: Any) -> int:
    return sum(value.numel() for value in _unfilled(config).parameters())


@torch.no_grad()
def _head_dims(model: Any) -> set[int]:
    """Of all layers. Not every family reads `head_dim`."""
    cache = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
    return {int(layer.keys.shape[-1]) for layer in cache.layers}


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _shallow(config: Any) -> Any:
    """The configuration with as few layers as have all kinds, and one more."""
    kinds = _kinds(config)
    first = {kind: number for number, kind in reversed([*enumerate(kinds)])}.values()
    others = [*range(max(first) + 1, len(kinds)), *sorted({*range(max(first))} - {*first}, reverse=True)]
    for chosen, changes in _depths(config, sorted([*first, *others[:1]]), len(kinds)):
        with contextlib.suppress(Exception):  # settings that want more layers
            fewer = _changed(config, {**_of_layers(config, chosen), **changes, _LAYERS: len(chosen)})
            if {*_kinds(fewer)} == {*kinds}:
                return fewer
    return config


def _depths(config: Any, picked: Sequence[int], count: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Layers to keep, and changes that go with them. Where kinds depend on the number of a layer, the first ones."""
    yield [*picked], {}
    stated = config.to_dict().items()
    some = {key: value for key, value in stated if _COUNTS_LAYERS.fullmatch(key) and key != _LAYERS and value}
    for depth in range(len(picked), count):
        yield [*range(depth)], {}
        if some:
            yield [*range(depth)], {key: min(value, depth // 2) for key, value in some.items()}


def _of_layers(config: Any, chosen: Sequence[int]) -> dict[str, Any]:
    """What a configuration says by layer, of those chosen: lists of them all, and what is odd in some."""
    stated, count = config.to_dict(), getattr(config, _LAYERS)
    listed = {key: value for key, value in stated.items() if isinstance(value, list)}
    return {
        **{
            key: [value[number] for number in chosen]
            for key, value in listed.items()
            if len(value) == count or ("layer" in key and len(value) > count)
        },
        **{
            key: {new: value[old] for new, number in enumerate(chosen) for old in value if int(old) == number}
            for key, value in _odd_layers(stated).items()
        },
    }


def _odd_layers(stated: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a configuration says of single layers, by their numbers."""
    nested = {key: value for key, value in stated.items() if isinstance(value, dict) and value}
    return {
        key: value
        for key, value in nested.items()
        if all(str(number).isdecimal() and isinstance(said, dict) for number, said in value.items())
    }


def _kinds(config: Any) -> list[Hashable]:
    """What each layer is made of: equal where nothing but their numbers differ. Nothing is computed for it."""
    lists = [m for m in _unfilled(config).get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    layers = next((each for each in lists if len(each) == getattr(config, _LAYERS)), None)
    if layers is None:
        raise ModelError("its layers are not in a list")
    return [
        (_made_of(layer), *(str(values) for values in _of_layers(config, [number]).values()))
        for number, layer in enumerate(layers)
    ]


def _made_of(layer: torch.nn.Module) -> Hashable:
    plain = (bool, int, float, str, type(None))
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, plain) and not _NUMBERS_A_LAYER.search(key)
            ),
        )
        for name, module in layer.named_modules()
    )


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Fill weights and stored buffers so that each is heard in hidden states and logits."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    values = {id(value): value for _, value in sorted(model.state_dict(keep_vars=True).items())}  # tied ones once
    for key, value in values.items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key in tables:
            value.copy_(noise)
        elif value.dim() > 1:
            value.copy_(_GAIN * noise / value.shape[-1] ** 0.5)
        else:
            value.add_(_SPREAD * noise)
