"""LoRA adapters, folders of peft: read completely or refused, and merged into the weights that they change."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mara_export.errors import ModelError
from mara_export.hf.checkpoint import read_json, read_packing, some
from mara_export.hf.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, is_hub_id
from mara_export.hf.tokenizer import TEMPLATE_FILE
from mara_export.hf.weights import empty_model
from mara_runtime.bundle import sha256
from mara_runtime.errors import first_line
from mara_runtime.manifest import AdapterFacts

_PREFIX = "base_model.model."
"""Of every name in an adapter's file."""
_A, _B = ".lora_A.weight", ".lora_B.weight"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MERGE = "merge it with PEFT (merge_and_unload), and export the folder that this saves"
_HINTS = {
    "lora_embedding_": f"LoRA of an embedding is not merged here: {_MERGE}",
    ".experts.": "transformers keeps the experts of a layer in one tensor: train the adapter without them",
}
_READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save", "base_model_name_or_path"}
_CHECKED = {"peft_type", "task_type", "bias", "init_lora_weights"}
_TARGETS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
"""What is adapted; so say the names of the tensors, and peft is asked whether that is the same."""
_WITHOUT_EFFECT = {
    *("auto_mapping", "revision", "peft_version", "inference_mode", "lora_dropout", "runtime_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    "fan_in_fan_out",  # of Conv1D, which is refused
}
_MOST_LETTERS = 200
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""How an adapter may have begun: not with a change of the model's own weights."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that fits a model, on this machine."""

    source: ModelSource
    facts: AdapterFacts
    scales: Mapping[str, float]
    """by the names of weights to which scale · B A is added"""
    whole: frozenset[str]
    """names of parameters that it replaces"""

    @property
    def identity(self) -> str:
        """What tells it from others, for fingerprints of the models that it makes."""
        return " ".join([self.facts.sha256, *(f"{name} {scale!r}" for name, scale in sorted(self.scales.items()))])

    def doubts(self, model: str, tokenizer: Any) -> Iterator[str]:
        """What may be wrong with it for the model of that name, one sentence each."""
        base = self.facts.base
        if base is not None and base.rpartition("/")[2].lower() != model.rpartition("/")[2].lower():
            yield f"the adapter {self.source.name} was trained on {base}, which may have other weights than {model}"
        settings = read_json(self.source.folder / "tokenizer_config.json")
        own = settings.get("chat_template") if isinstance(settings, dict) else None
        if (path := self.source.folder / TEMPLATE_FILE).is_file():
            own = path.read_text(encoding="utf-8", errors="replace")
        if isinstance(own, str) and own.strip() != str(getattr(tokenizer, "chat_template", "")).strip():
            yield (
                f"the adapter {self.source.name} brings a chat template that {model} does not have, which is left out: "
                f"if it was trained with it, make that the {TEMPLATE_FILE} of a copy of {model}"
            )

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A parameter of the model, float32, as the adapter makes it: W + scale · B A, rounded as peft rounds it."""
        if name in self.whole:
            return self._read(name).to(weight.device)
        if name not in self.scales:
            return weight
        a, b = (self._read(_module(name) + end).to(weight.device) for end in (_A, _B))  # (R, K), (N, R)
        return (b @ a).mul_(self.scales[name]).add_(weight)

    @torch.no_grad()
    def merge_into(self, model: Any) -> None:
        """Change the weights of a model in memory, of whatever type and on whatever device."""
        for name, weight in model.named_parameters():
            if name in self.scales or name in self.whole:
                weight.copy_(self.merged(name, weight.float()))

    def inject(self, model: Any) -> None:
        """Put peft's own layers into a model, whose weights may stay in their files. It then runs unmerged.

        Raises ModelError where peft adapts other modules than those that the file has matrices for.
        """
        state = {
            f"{_PREFIX}{_module(name)}{end.replace('.weight', '.default.weight')}": self._read(_module(name) + end)
            for name in self.scales
            for end in (_A, _B)
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from peft import PeftConfig, PeftModel

                config = PeftConfig.from_pretrained(str(self.source.folder))
                config.inference_mode, config.init_lora_weights, config.modules_to_save = True, False, None
                wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
                # not by peft, which would move them to where the weight is: nowhere, if it stays in its file
                found = wrapped.load_state_dict(state, strict=False, assign=True)
        except Exception as error:  # whatever an adapter_config.json may provoke
            raise ModelError(f"{self.source.name} cannot be loaded by peft: {first_line(error)}") from error
        for keys, what in (
            (found.unexpected_keys, "has matrices of {}, which its configuration does not target"),
            ([key for key in found.missing_keys if ".lora_" in key], "targets {}, and has no matrices of it"),
        ):
            if keys:
                modules = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in keys}
                raise ModelError(f"{self.source.name} {what.format(some(sorted(modules)))}: fetch or copy it again")
        for name in self.whole:
            path, _, own = name.rpartition(".")
            module = model.get_submodule(path)
            remove_hook_from_module(module)  # which would read the model's own
            module._parameters[own] = torch.nn.Parameter(self._read(name), requires_grad=False)
        wrapped.eval()

    def _read(self, name: str) -> Tensor:
        with _opened(self.source) as file:
            tensor: Tensor = file.get_tensor(_PREFIX + name)
        return tensor.float()


def read_adapter(source: ModelSource, base: ModelSource, base_config: Any) -> Adapter:
    """The adapter in a folder, if it is one of a model and can be merged exactly.

    base, base_config: the model, of which only the configuration is read. Raises ModelError.
    """
    name, model = base.name, empty_model(base_config)
    if (packing := read_packing(base)) is not None:
        raise ModelError(
            f"{name} is quantised ({packing.method}), and the adapter {source.name} is merged into floats: name the "
            "checkpoint that it was made from"
        )
    config = read_json(source.folder / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise ModelError(f"{source.name}: its {ADAPTER_CONFIG} is not a JSON object: fetch or copy it again")
    _check_config(config, source.name)
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    whole: set[str] = set()
    for key, tensor in _tensors(source):
        path = key.removeprefix(_PREFIX)
        end = next((end for end in (_A, _B) if path.endswith(end)), "")
        weight = f"{path.removesuffix(end)}.weight" if end else path
        if path == key or weight not in (linear if end else parameters):
            why = next((hint for part, hint in _HINTS.items() if part in key), f"name the base model of {source.name}")
            raise ModelError(f"{source.name} has {key}, which {name} has no place for: {why}")
        expected = [*parameters[weight].shape]
        if uses[id(parameters[weight])] > 1:
            raise ModelError(
                f"{source.name} changes {_module(weight)}, but embedding and LM head of {name} are one matrix: train "
                "the adapter without it"
            )
        if end:
            ranks[weight], scales[weight] = _rank_and_scale(config, _module(weight), source.name)
            expected[0 if end == _A else 1] = ranks[weight]
        else:
            whole.add(weight)
        if [*tensor.shape] != expected:
            raise ModelError(f"{source.name}: its {key} is {[*tensor.shape]}; {name} takes {expected} there")
    if not scales:
        raise ModelError(f"{source.name}: its {ADAPTER_WEIGHTS} has no lora_A and lora_B, so it changes no matrix")
    replaced = {*map(_module, whole)}
    for saved in config.get("modules_to_save") or ():
        if not any(f".{module}".endswith(f".{saved}") for module in replaced):
            raise ModelError(f"{source.name} is to replace {saved}, and has no weights of it: fetch or copy it again")
    for weight in parameters:
        if _module(weight) in replaced and (weight not in whole or weight in scales):
            raise ModelError(f"{source.name} replaces a part of {_module(weight)}, and {weight} is not that: {_MERGE}")
    facts = AdapterFacts(
        source=source.name,
        revision=source.revision,
        base=_base(config),
        rank=max(ranks.values()),
        weights=len(scales) + len(whole),
        sha256=sha256(source.folder / ADAPTER_WEIGHTS),
    )
    adapter = Adapter(source, facts, scales, frozenset(whole))
    adapter.inject(model)  # peft adapts the same modules
    return adapter


def _check_config(config: Mapping[str, Any], mine: str) -> None:
    """Raise ModelError, naming the setting, unless it is plain LoRA. Unknown settings must be unset."""
    for name, allowed, remedy in (
        ("peft_type", ("LORA",), "only LoRA is merged"),
        ("task_type", ("CAUSAL_LM", None), "only adapters of causal LMs are merged"),
        ("bias", ("none", None), _MERGE),
        ("init_lora_weights", _INITS, f"it belongs to a model whose own weights were changed: {_MERGE}"),
    ):
        if config.get(name) not in allowed:
            raise ModelError(f"{mine} cannot be merged here: its {name} is {config.get(name)!r}; {remedy}")
    if not isinstance(config.get("modules_to_save") or [], list):
        raise ModelError(
            f"{mine}: modules_to_save of its {ADAPTER_CONFIG} is not a list: {config['modules_to_save']!r}"
        )
    for name in sorted(config.keys() - _CHECKED - _READ - _TARGETS - _WITHOUT_EFFECT):
        if config[name]:
            raise ModelError(f"{mine} cannot be merged here: it has {name}; {_MERGE}")


def _rank_and_scale(config: Mapping[str, Any], module: str, mine: str) -> tuple[int, float]:
    """R, and what B A is multiplied by, of one module. A pattern is for modules whose names end so, as in peft."""

    def value(name: str, patterns: str) -> Any:
        for pattern, own in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return own
        return config.get(name)

    try:
        rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if type(rank) is not int or not math.isfinite(scale):
            raise ValueError(f"they are {rank} and {alpha}")
        return rank, scale
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise ModelError(f"{mine}: its {ADAPTER_CONFIG} has no rank and alpha of {module}: {error}") from error


def _base(config: Mapping[str, Any]) -> str | None:
    """The model that an adapter says it was trained on; never a path."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.isprintable() or len(base) > _MOST_LETTERS:
        return None
    return (base if is_hub_id(base) else Path(base).name) or None


def _tensors(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an adapter, one at a time. Raises ModelError for damaged ones."""
    with _opened(source) as file:
        for key in sorted(file.keys()):
            tensor = file.get_tensor(key)
            if tensor.dtype not in _FLOATS:
                raise ModelError(f"{source.name}: its {key} is stored as {tensor.dtype}, which is not floating point")
            if not tensor.isfinite().all():
                raise ModelError(f"{source.name}: its {key} has values that are not finite: the adapter is damaged")
            yield key, tensor


@contextmanager
def _opened(source: ModelSource) -> Iterator[Any]:
    try:
        with safe_open(source.folder / ADAPTER_WEIGHTS, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise ModelError(f"{source.name}: its {ADAPTER_WEIGHTS} cannot be read ({reason}): copy it again") from error


def _module(weight: str) -> str:
    return weight.rpartition(".")[0]
