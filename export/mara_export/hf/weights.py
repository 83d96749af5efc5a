"""A model's weights by name, wherever they are: in memory, or in files, from which a module reads them when it runs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from accelerate.utils import PrefixedDataset, align_module_device
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM

from mara_export.hf.packed import PackedMatrix, StoredWeights
from mara_export.hf.packing import Packing

_SAMPLE = 256
"""Numbers of a weight in its model's fingerprint: training a weight changes nearly all of them."""


def empty_model(config: Any, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A causal LM of a configuration, in eval mode, whose weights are zeros that take no memory. Its buffers are real.

    What is traced.
    """
    with init_empty_weights():
        kind: Any = AutoModelForCausalLM
        model = kind.from_config(config, attn_implementation=attention, dtype=dtype)
    model.tie_weights()
    hollow: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in [*module._parameters.items()]:
            if weight is not None:
                if isinstance(module, torch.nn.Embedding):  # the system has pages for zeros that are read, not copied
                    zeros = torch.from_numpy(np.zeros(weight.shape, np.float32)).to(weight.dtype)
                else:
                    zeros = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
                module._parameters[name] = hollow.setdefault(id(weight), torch.nn.Parameter(zeros, requires_grad=False))
    return model.eval()


def placement(model: Any) -> dict[str, str]:
    """transformers' device map that leaves all weights in their files, apart from those that several modules share."""
    owners: dict[int, list[str]] = {}
    places = {}
    for name, module in model.named_modules():
        for weight in module.parameters(recurse=False):
            owners.setdefault(id(weight), []).append(name)
            places[name] = "disk"
        if module._buffers.keys() - module._non_persistent_buffers_set:  # not "cpu": what is below would go there, too
            places[name] = "disk"
    return places | {name: "cpu" for names in owners.values() if len(names) > 1 for name in names}


def fill_model(model: Any, stored: StoredWeights, in_memory: bool) -> None:
    """Give an `empty_model` its weights, as far as they are stored, in the model's own types.

    in_memory: at once; False: as transformers streams them, each module reads its own whenever it runs.
    """
    streamed = set() if in_memory else {path for path, place in placement(model).items() if place == "disk"}
    here = {
        name: stored[name].to(weight.dtype)
        for name, weight in model.state_dict().items()
        if name in stored and name.rpartition(".")[0] not in streamed
    }
    model.load_state_dict(here, strict=False, assign=True)
    model.tie_weights()
    for path in sorted(streamed):
        hook = AlignDevicesHook("cpu", offload=True, weights_map=PrefixedDataset(stored, f"{path}."))
        add_hook_to_module(model.get_submodule(path), hook, append=True)


class Adapted(Protocol):
    """What an adapter makes of a model's weights."""

    @property
    def identity(self) -> str:
        """What tells it from others."""

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight with the adapter in it, float32."""


class Weights:
    """Reads the weights and stored buffers of a causal LM, loaded in whatever way, one at a time.

    They are the model's as it is now: an adapter that is put into it later changes nothing here.
    """

    def __init__(self, model: Any, stored: StoredWeights | None = None, adapter: Adapted | None = None) -> None:
        """stored: the checkpoint, which is quicker for the first numbers of a weight, and knows packed matrices;
        adapter: to be merged.
        """
        named = model.named_modules(remove_duplicate=False)
        self._modules = {name: module for name, module in named if module._parameters or module._buffers}
        self._shapes = {name: [*weight.shape] for name, weight in sorted(model.named_parameters())}
        self._stored, self._adapter = stored, adapter

    @property
    def packing(self) -> Packing | None:
        """How matrices of the checkpoint are packed; None: they are not."""
        return None if self._stored is None else self._stored.packing

    def packed(self, name: str) -> Callable[[], PackedMatrix] | None:
        """What reads a matrix (N, K) as the checkpoint has it; None if it is floats."""
        stored = self._stored
        return partial(stored.packed, name) if stored is not None and stored.is_packed(name) else None

    def read(self, name: str) -> NDArray[Any]:
        """A weight by its name in the model; float32 if it is a floating-point one."""
        with self._here(name) as weight:
            weight = weight.float() if weight.is_floating_point() else weight
            return (weight if self._adapter is None else self._adapter.merged(name, weight)).numpy()

    @contextlib.contextmanager
    def _here(self, name: str) -> Iterator[Tensor]:
        path, _, own = name.rpartition(".")
        module = self._modules[path]
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, SequentialHook):  # below a module with a weight of its own, accelerate adds its hook twice
            module._hf_hook = hook.hooks[0]
        try:
            with align_module_device(module):
                yield getattr(module, own).detach()
        finally:
            if hook is not None:
                module._hf_hook = hook

    def fingerprint(self) -> str:
        """Of the parameters, in whatever files and precision: a hash of the first numbers of each, as bfloat16.

        With an adapter, of those without it and of the adapter: the sum would depend on the precision.
        """
        digest = hashlib.sha256()
        for name, shape in self._shapes.items():
            first = self._first(name).to("cpu", torch.bfloat16)
            digest.update(f"{name} {shape}".encode() + first.view(torch.int16).numpy().tobytes())
        if self._adapter is not None:
            digest.update(self._adapter.identity.encode())
        return digest.hexdigest()[:32]

    def _first(self, name: str) -> Tensor:
        if self._stored is not None and name in self._stored:
            return self._stored.first(name, _SAMPLE)
        with self._here(name) as weight:
            return weight.flatten()[:_SAMPLE]
