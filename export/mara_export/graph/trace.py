"""Tracing a Hugging Face decoder with Optimum: attention and KV cache update become one custom node per layer.

`mara::CachedAttention` (q, k, v, past_key, past_value, mask, write_indices → out, present_key, present_value;
attribute `scale`) is what every lowering rewrites for its engine (mara_export.graph.pipeline).
It enters through two public interfaces: an attention implementation registered with transformers, which receives the
cache as an argument of the model's forward; and an Optimum export configuration with its own inputs, outputs and model
patcher.

Two more nodes stand for what engines have operators for: `mara::Rotary` (q, k → q, k), whose angles the lowered graph
looks up by position, and `mara::RMSNorm` (x, weight → y; attribute `epsilon`). For them, the rotary function and
`RMSNorm.forward` of the architecture's module are replaced while the model is traced.

This is the only module that uses Optimum.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optimum.exporters.onnx.convert as optimum_convert
import torch
from numpy.typing import NDArray
from optimum.exporters.onnx.base import OnnxConfig
from optimum.exporters.onnx.model_patcher import ModelPatcher
from optimum.utils import NormalizedTextConfig
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_export.errors import ModelError
from mara_export.graph.nodes import ATTENTION, DOMAIN, NORM, ROTARY
from mara_export.hf.families import model_shape
from mara_export.progress import no_logs
from mara_runtime import tensors
from mara_runtime.agents import EPSILON

IMPLEMENTATION = "mara"
"""Name of the attention implementation in transformers."""
OPSET = 18


def _node(g: Any, op: str, inputs: Sequence[Any], like: Sequence[Any], **attributes: float) -> Any:
    """A custom node, whose outputs have the types of `like`."""
    outputs = g.op(f"{DOMAIN}::{op}", *inputs, outputs=len(like), **attributes)
    for output, source in zip(outputs if len(like) > 1 else (outputs,), like, strict=True):
        output.setType(source.type())
    return outputs


class _CachedAttention(torch.autograd.Function):
    """Write the new entries into the cache, then attend over all of it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # (1, heads, S, head_dim)
        k: Tensor,  # (1, kv_heads, S, head_dim)
        v: Tensor,
        past_k: Tensor,  # (1, kv_heads, C, head_dim)
        past_v: Tensor,
        mask: Tensor,  # (1, 1, S, C), additive
        write: Tensor,  # (1,)
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        start, rows, groups = int(write[0]), q.shape[2], q.shape[1] // k.shape[1]
        keys, values = past_k.clone(), past_v.clone()
        keys[:, :, start : start + rows], values[:, :, start : start + rows] = k, v
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), mask, scale=scale
        )
        return out, keys, values

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, v: Any, past_k: Any, past_v: Any, mask: Any, write: Any, scale: float) -> Any:
        return _node(g, ATTENTION, (q, k, v, past_k, past_v, mask, write), like=(q, past_k, past_v), scale_f=scale)


class _Rotary(torch.autograd.Function):
    """Rotate q (1, heads, S, head_dim) and k by the angles of their positions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def rotated(x: Tensor) -> Tensor:
            low, high = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)

        return rotated(q), rotated(k)

    @staticmethod
    def symbolic(g: Any, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return _node(g, ROTARY, (q, k), like=(q, k))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    rotated: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Norm(torch.autograd.Function):
    """RMS normalisation of x (…, D) over its last axis, times weight (D,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

    @staticmethod
    def symbolic(g: Any, x: Any, weight: Any, epsilon: float) -> Any:
        return _node(g, NORM, (x, weight), like=(x,), epsilon_f=epsilon)


def _normalise(module: Any, x: Tensor) -> Tensor:
    result: Tensor = _Norm.apply(x, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def rotary_tables(model: Any, positions: int, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines (positions, head_dim / 2) of the model's rotary embedding, its scaling applied.

    name: of the model, for messages. Raises ModelError for an embedding that rotates only part of each head.
    """
    angles = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(positions)[None])
    tables = []
    for table in angles:
        low, high = table[0].float().chunk(2, dim=-1)
        if not torch.equal(low, high) or 2 * low.shape[-1] != model_shape(model.config).head_dim:
            raise ModelError(f"{name}: partial rotary embeddings are not supported")
        tables.append(low.numpy())
    return tables[0], tables[1]


@dataclass
class _CacheArgument:
    """The KV cache of one forward: what attention reads, and what it returns."""

    past: Sequence[tuple[Tensor, Tensor]]
    """per layer: keys and values, (1, kv_heads, C, head_dim)"""
    write: Tensor
    """(1,) slot of the first row"""
    present: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    mara_cache: _CacheArgument,
    **_: Any,
) -> tuple[Tensor, None]:
    out, keys, values = _CachedAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, *mara_cache.past[module.layer_idx], attention_mask, mara_cache.write, float(scaling)
    )
    mara_cache.present.append((keys, values))
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)


class _Patcher(ModelPatcher):  # type: ignore[misc]
    """Replaces the model's forward by one with the inputs and outputs of mara_runtime.tensors."""

    def __init__(self, config: Any, model: Any, model_kwargs: Any = None) -> None:
        super().__init__(config, model, model_kwargs)

        def forward(
            input_ids: Tensor,
            position_ids: Tensor,
            attention_mask: Tensor,
            write_indices: Tensor,
            rows: Tensor,
            past_key_values: Any,
        ) -> dict[str, Any]:
            cache = _CacheArgument(past_key_values, write_indices)
            hidden = model.model(
                input_ids=input_ids,
                attention_mask=attention_mask,  # four dimensions: transformers passes it on unchanged
                position_ids=position_ids,
                use_cache=False,
                mara_cache=cache,
            ).last_hidden_state
            return {
                tensors.LOGITS: model.lm_head(hidden[0].index_select(0, rows)),
                tensors.LAST_HIDDEN_STATE: hidden,
                "past_key_values": cache.present,
            }

        self.patched_forward = forward


class _Config(OnnxConfig):  # type: ignore[misc]
    """The inputs and outputs of mara_runtime.tensors, as Optimum asks for them."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    _MODEL_PATCHER = _Patcher

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return tensors.dynamic_axes(tensors.llm_inputs(model_shape(self._config)))

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return tensors.dynamic_axes(tensors.llm_outputs(model_shape(self._config)))

    def ordered_inputs(self, _: Any) -> dict[str, dict[int, str]]:
        return self.inputs

    def generate_dummy_inputs(self, *_: Any, **__: Any) -> dict[str, Any]:
        shape = model_shape(self._config)
        sizes = {"S": 16, "C": 16, "R": 2}
        examples: dict[str, Any] = {
            t.name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in t.shape], dtype=getattr(torch, t.dtype))
            for t in tensors.llm_inputs(shape)
        }
        past = [examples.pop(name) for name, _ in tensors.kv_names(shape.num_layers)]
        return {**examples, "past_key_values": [*zip(past[::2], past[1::2], strict=True)]}


def trace_llm(model: Any, folder: Path) -> Path:
    """Trace `model` into `folder` and return the path of the graph.

    model: a Hugging Face causal LM in eval mode, float32; its attention implementation is changed.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    module = sys.modules[type(model).__module__]
    (norm,) = (value for name, value in vars(module).items() if name.endswith("RMSNorm"))
    path = folder / "model.onnx"
    with (
        _quiet(),
        _replaced(module, "apply_rotary_pos_emb", _rotate),
        _replaced(norm, "forward", _normalise),
        # it looks up the names in the signature of the model's own forward
        _replaced(optimum_convert, "check_dummy_inputs_are_allowed", lambda *_: None),
        # it would read external data back and write them to one file: a second copy of the model in memory
        _replaced(optimum_convert, "check_model_uses_external_data", lambda *_: False),
    ):
        optimum_convert.export_pytorch(model, _Config(model.config, "text-generation"), OPSET, path)
    return path


class _Margins(torch.nn.Module):
    """The margins of stacked agents, mixed: LayerNorm → linear → ReLU → linear → ReLU → linear.

    The weights stand on the left: a stack is one matrix for ONNX Runtime, which need not be packed for each pass.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden_size, EPSILON, elementwise_affine=False)

    def forward(self, states: Tensor, mix: Tensor, *weights: Tensor) -> Tensor:
        """(N, D), (A, N), and tensors.agent_weights → (N,)."""
        (w1, b1), (w2, b2), (w3, b3) = zip(weights[::2], weights[1::2], strict=True)
        x = self.norm(states).T
        x = torch.relu(w1 @ x + b1)
        x = torch.relu(w2 @ x + b2)
        margins = (w3 @ x + b3).squeeze(1)
        return torch.where(mix == 0, 0.0, mix * margins).sum(0)  # one that is left out may have any margin


def trace_agents(hidden_size: int, path: Path) -> None:
    """Write the graph of the agents' mixed margins, for any agents of that hidden size."""
    inputs, outputs = tensors.agent_inputs(hidden_size), tensors.agent_outputs()
    sizes = {"N": 2, "A": 3, "W1": 5, "W2": 4}
    with _quiet():
        torch.onnx.export(
            _Margins(hidden_size).eval(),
            tuple(torch.ones([sizes[d] if isinstance(d, str) else d for d in t.shape]) for t in inputs),
            str(path),
            input_names=[t.name for t in inputs],
            output_names=[t.name for t in outputs],
            dynamic_axes=tensors.dynamic_axes([*inputs, *outputs]),
            opset_version=OPSET,
            dynamo=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer, which warns of every shape it reads."""
    with no_logs(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _replaced(holder: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(holder, name)
    setattr(holder, name, stand_in)
    try:
        yield
    finally:
        setattr(holder, name, original)
