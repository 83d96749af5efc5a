"""The seam: while a Hugging Face decoder is traced, what engines have operators for becomes single `mara` nodes.

| node | inputs → outputs | attributes | takes the place of |
|---|---|---|---|
| Attention | q, k, v (1, heads, S, H), sinks? → like q | layer, cache, scale, window, softcap, sizes | attention |
| RotaryTable | positions (1, S) → cos, sin (1, S, W) | module, layer_type | modules named *RotaryEmbedding |
| Rotary | x, cos, sin → x | interleaved, layout, head_dim | functions apply_*rotary* that a probe recognises |
| RMSNorm | x, weight (D,)? → x | size, epsilon, offset | modules that a probe recognises |
| Linear | x, weight (N, K), bias? → x | | torch.nn.Linear |
| Experts | x (S, D), ids and weights (S, k), matrices → x | k, layout, activation | transformers 5's experts |

RMSNorm, Linear and Experts have the attribute `name`, of the module in the model. An attention's sizes are heads,
kv_heads and head_dim; its sinks (heads,) are scores without a row. seam_experts.py says what Experts computes.
Attention, RotaryTable and Experts are needed; the others are recognised, and what a probe does not recognise stays
basic operators. No family is named here.

The model runs once before it is traced, on a few rows: how far each layer sees, which layers attend to the same keys
and values, and how rotary functions turn are observed then, on numbers. Attention has only the rows at hand; traced.py
adds the KV caches.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_export.errors import ModelError
from mara_export.graph.nodes import ATTENTION, LINEAR, NORM, ROTARY, TABLE, Tables
from mara_export.graph.probes import (
    Attributes,
    Make,
    Window,
    check_attention,
    group_caches,
    probe_norm,
    probe_rotary,
    probe_window,
)
from mara_export.graph.seam_experts import ExpertNodes
from mara_export.hf.rope import rotated_part
from mara_runtime import tensors

IMPLEMENTATION = "mara"
"""Name of the attention implementation in transformers."""
REHEARSED_ROWS = 3
_ROTARY_FUNCTION = re.compile(r"apply_\w*rotary|apply_rotary")
INPUTS = {tensors.INPUT_IDS: {1: "S"}, tensors.POSITION_IDS: {1: "S"}, tensors.ROWS: {0: "R"}}
OUTPUTS = {tensors.LOGITS: {0: "R"}, tensors.LAST_HIDDEN_STATE: {1: "S"}}
"""Of a trace, with their symbolic axes."""


class Traceable(torch.nn.Module):
    """A causal LM as it is traced: its own forward, whatever that does to the logits, and the decoder's result."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.forward_of_model = model.forward
        """as it is now: a tracer may put this module's in its place"""

    def forward(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(1, S), (1, S), (R,) → logits (R, V), last hidden state (1, S, D)."""
        kept: list[Tensor] = []
        hook = self.model.get_decoder().register_forward_hook(lambda *call: kept.append(call[-1][0]))
        try:
            out = self.forward_of_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, logits_to_keep=rows, return_dict=True
            )
        finally:
            hook.remove()
        return out.logits.reshape(-1, self.model.config.vocab_size), kept[0]


def examples(rows: int = REHEARSED_ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a Traceable."""
    return torch.zeros(1, rows, dtype=torch.long), torch.arange(rows)[None], torch.tensor([0, rows - 1])


class Seam:
    """What a model asks its parts for, observed once, and their stand-ins while it is traced."""

    def __init__(self, model: Any, name: str) -> None:
        """model: a causal LM in eval mode, float32. name: of it, for messages. Raises ModelError."""
        self._model, self._name = model, name
        self._windows: dict[int, int] = {}
        self._attended: dict[int, tuple[Tensor, Tensor]] = {}
        self._turns: dict[tuple[str, int, int], Attributes | None] = {}
        self._tables: set[tuple[str, str]] = set()
        self._experts = ExpertNodes(model, name)
        self._make: Make | None = None
        with torch.no_grad(), self._in_place():
            Traceable(model)(*examples())
        if not self._windows:
            raise ModelError(f"{name}: its attention does not go through transformers' interface, and cannot be traced")
        self.caches, self._cache_of = group_caches(self._attended)
        self._attended.clear()

    def rotary_tables(self, positions: NDArray[np.int64]) -> Tables:
        """Cosines and sines of the RotaryTables of a trace at some positions (P,)."""
        modules = dict(self._model.named_modules())
        return {(name, kind): rotary_angles(modules[name], positions, kind) for name, kind in sorted(self._tables)}

    @contextlib.contextmanager
    def tracing(self, make: Make) -> Iterator[None]:
        """Within, the model computes with nodes that `make` makes."""
        self._make = make
        try:
            with self._in_place():
                yield
        finally:
            self._make = None

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        model, undo = self._model, contextlib.ExitStack()
        with undo:
            for name, module in model.named_modules():
                if (stand_in := self._stand_in(name, module)) is not None:
                    undo.enter_context(replaced(module, "forward", stand_in))
            for code in {sys.modules[type(module).__module__] for module in model.modules()}:
                for name, value in list(vars(code).items()):
                    if code.__name__.startswith("transformers.") and _turns(name, value):
                        undo.enter_context(replaced(code, name, self._rotating(value)))
            # a text without others beside it
            undo.enter_context(replaced(masking_utils, "find_packed_sequence_indices", lambda *_: None))
            _in_use.append(self)
            undo.callback(_in_use.remove, self)
            before = model.config._attn_implementation
            model.set_attn_implementation(IMPLEMENTATION)
            undo.callback(model.set_attn_implementation, before)
            undo.enter_context(self._experts.in_place(self._make))
            yield

    def _stand_in(self, name: str, module: Any) -> Callable[..., Any] | None:
        """What computes in a module's place."""
        if self._make is None:  # of which only attention and rotary functions are observed
            return _no_product(module) if type(module) is torch.nn.Linear else None
        if type(module).__name__.endswith("RotaryEmbedding"):
            return self._table(name, module)
        if type(module) is torch.nn.Linear:
            return self._linear(name, module)
        found = probe_norm(module)
        return None if found is None else self._norm(name, module, found)

    # ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────

    def mask(self, *_: Any, mask_function: Callable[..., Tensor], **__: Any) -> Window:
        """transformers wants a mask for a function (batch, head, row, column) → visible."""
        if self._make is not None:
            return Window(0)  # observed already
        return probe_window(mask_function, self._name)

    def attend(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Any,
        *_: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,  # the mask has it
        **more: Any,
    ) -> tuple[Tensor, None]:
        """transformers' attention function: q, k, v (1, heads, S, H) → (1, S, heads, H)."""
        layer = int(module.layer_idx)
        shape = (*q.shape[:3], v.shape[-1])
        if self._make is None:
            window = check_attention(attention_mask, more, layer, self._name)
            if v.shape != k.shape:
                sizes = k.shape[-1], v.shape[-1]
                raise ModelError(f"{self._name}: keys and values of different sizes, {sizes}, are not supported")
            self._windows[layer], self._attended[layer] = window.size, (k, v)
            out = q.new_zeros(shape)
        else:
            attributes = {
                "layer": layer,
                "cache": self._cache_of[layer],
                "scale": float(q.shape[-1] ** -0.5 if scaling is None else scaling),
                "window": self._windows[layer],
                "softcap": float(softcap or 0),
                "heads": int(q.shape[1]),
                "kv_heads": int(k.shape[1]),
                "head_dim": int(q.shape[-1]),
            }
            (out,) = self._make(ATTENTION, (q, k, v, s_aux), attributes, [shape])
        return out.transpose(1, 2).contiguous(), None

    # ── rotary embedding ─────────────────────────────────────────────────────────────────────────────────────────────

    def _table(self, name: str, module: Any) -> Callable[..., tuple[Tensor, ...]]:
        plain, widths = module.forward, {}
        kinds = [""]
        if "layer_type" in inspect.signature(plain).parameters:
            kinds = sorted(set(module.config.layer_types))
        for kind in kinds:
            widths[kind] = rotary_angles(module, np.arange(1), kind)[0].shape[-1]

        def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
            kind = layer_type or ""
            shape = (*position_ids.shape, widths[kind])
            assert self._make is not None
            self._tables.add((name, kind))
            return self._make(TABLE, (position_ids,), {"module": name, "layer_type": kind}, [shape, shape])

        return forward

    def _rotating(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function like `function`, whose turns are observed, then nodes, which want heads before rows."""
        parameters = inspect.signature(function).parameters
        count = 2 if "q" in parameters else 1

        def forward(*args: Any, unsqueeze_dim: int = 1, **kwargs: Any) -> Any:
            given = inspect.signature(function).bind(*args, **kwargs)
            values = [*given.arguments.values()]
            turning, (cos, sin) = values[:count], values[count : count + 2]
            keys = [
                (f"{function.__module__}.{function.__name__}", int(cos.shape[-1]), int(x.shape[-1])) for x in turning
            ]
            if self._make is None:
                for key in keys:
                    if key not in self._turns:
                        self._turns[key] = probe_rotary(function, *key[1:])
            found = [self._turns.get(key) for key in keys]
            if self._make is None or None in found or unsqueeze_dim not in (1, 2):
                return function(*args, unsqueeze_dim=unsqueeze_dim, **kwargs)
            part = rotated_part(self._model.config)
            for (_, width, head), turn in zip(keys, found, strict=True):
                if part != 1 and width * (2 if (turn or {})["layout"] == "once" else 1) == head:
                    raise ModelError(
                        f"{self._name}: its config.json has partial_rotary_factor = {part!r}, which transformers does "
                        f"not read for {self._model.config.model_type!r}: remove it"
                    )
            made = []
            for x, turn in zip(turning, found, strict=True):
                heads_first = x.transpose(1, unsqueeze_dim)
                attributes = {**(turn or {}), "head_dim": int(x.shape[-1])}
                (turned,) = self._make(ROTARY, (heads_first, cos, sin), attributes, [heads_first.shape])
                made.append(turned.transpose(1, unsqueeze_dim))
            return tuple(made) if count == 2 else made[0]

        return forward

    # ── norms and linear maps ────────────────────────────────────────────────────────────────────────────────────────

    def _norm(self, name: str, module: Any, found: Attributes) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            assert self._make is not None
            weight = getattr(module, "weight", None)
            return self._make(NORM, (x, weight), {"name": name, "size": int(x.shape[-1]), **found}, [x.shape])[0]

        return forward

    def _linear(self, name: str, module: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            assert self._make is not None
            shape = (*x.shape[:-1], module.weight.shape[0])
            return self._make(LINEAR, (x, module.weight, module.bias), {"name": name}, [shape])[0]

        return forward


def _no_product(module: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: x.new_zeros((*x.shape[:-1], module.out_features))


_in_use: list[Seam] = []
"""What is registered with transformers stays registered, and must not keep a model in memory."""
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lambda *args, **kwargs: _in_use[-1].attend(*args, **kwargs))
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, lambda *args, **kwargs: _in_use[-1].mask(*args, **kwargs))


@contextlib.contextmanager
def replaced(holder: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Within, an attribute of a module or an object is another."""
    own = name in vars(holder)
    original = getattr(holder, name)
    setattr(holder, name, stand_in)
    try:
        yield
    finally:
        setattr(holder, name, original) if own else delattr(holder, name)


@torch.no_grad()
def rotary_angles(
    module: Any, positions: NDArray[np.int64], layer_type: str = ""
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines (P, W) of a rotary module at positions (P,), by its own code."""
    kind = (layer_type,) if layer_type else ()
    cos, sin = module.forward(torch.zeros(1, 1), torch.from_numpy(positions)[None], *kind)
    return cos[0].float().numpy(), sin[0].float().numpy()


def _turns(name: str, value: Any) -> bool:
    """Is this a function that turns heads by tables of angles?"""
    return (
        _ROTARY_FUNCTION.match(name) is not None
        and callable(value)
        and {"cos", "sin"} <= set(inspect.signature(value).parameters)
    )
