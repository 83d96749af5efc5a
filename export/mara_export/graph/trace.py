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
import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
import torch
from numpy.typing import NDArray
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_patcher import ModelPatcher
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DummyInputGenerator
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mara_export.errors import ModelError
from mara_export.graph.nodes import ATTENTION, DOMAIN, NORM, ROTARY
from mara_export.hf.families import model_shape
from mara_runtime import tensors

IMPLEMENTATION = "mara"
"""Name of the attention implementation in transformers."""
OPSET = 18
_ROWS, _SLOTS = 16, 16
"""Sizes of the traced example; both stay symbolic in the graph."""


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
        out, keys, values = g.op(
            f"{DOMAIN}::{ATTENTION}", q, k, v, past_k, past_v, mask, write, scale_f=scale, outputs=3
        )
        for result, like in ((out, q), (keys, past_k), (values, past_v)):
            result.setType(like.type())
        return out, keys, values


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
        results = g.op(f"{DOMAIN}::{ROTARY}", q, k, outputs=2)
        for result, like in zip(results, (q, k), strict=True):
            result.setType(like.type())
        return results


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
        result = g.op(f"{DOMAIN}::{NORM}", x, weight, epsilon_f=epsilon)
        result.setType(x.type())
        return result


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


class _ExampleInputs(DummyInputGenerator):  # type: ignore[misc]
    """Example values of inputs that Optimum does not have, or has in another shape."""

    SUPPORTED_INPUT_NAMES = (
        tensors.POSITION_IDS,
        tensors.ATTENTION_MASK,
        tensors.WRITE_INDICES,
        tensors.ROWS,
    )

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def generate(self, input_name: str, *_: Any, **__: Any) -> Tensor:
        return {
            tensors.POSITION_IDS: torch.arange(_ROWS)[None],
            tensors.ATTENTION_MASK: torch.zeros(1, 1, _ROWS, _SLOTS),
            tensors.WRITE_INDICES: torch.zeros(1, dtype=torch.long),
            tensors.ROWS: torch.tensor([0, _ROWS - 1]),
        }[input_name]


def _export_config(model: Any) -> Any:
    """Optimum's configuration of the model's architecture with our inputs and outputs in place of its own."""
    base: Any = TasksManager.get_exporter_config_constructor(
        "onnx", model=model, task="text-generation", library_name="transformers"
    ).func
    shape = model_shape(model.config)

    class Config(base):  # type: ignore[misc]
        PAD_ATTENTION_MASK_TO_PAST = False
        _MODEL_PATCHER = _Patcher
        DUMMY_INPUT_GENERATOR_CLASSES = (_ExampleInputs, *base.DUMMY_INPUT_GENERATOR_CLASSES)

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            return tensors.dynamic_axes(tensors.llm_inputs(shape))

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return tensors.dynamic_axes(tensors.llm_outputs(shape))

        def ordered_inputs(self, _: Any) -> dict[str, dict[int, str]]:
            return self.inputs

        def fix_dynamic_axes(self, *_: Any, **__: Any) -> None:
            """Nothing to fix."""

        def overwrite_shape_and_generate_input(self, generator: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            if name in _ExampleInputs.SUPPORTED_INPUT_NAMES:
                return generator.generate(name)
            return super().overwrite_shape_and_generate_input(generator, name, *args, **kwargs)

    return Config(model.config, task="text-generation", use_past=True, use_past_in_inputs=True)


def trace_llm(model: Any, folder: Path) -> Path:
    """Trace `model` into `folder` and return the path of the graph.

    model: a Hugging Face causal LM in eval mode, float32; its attention implementation is changed.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    module = sys.modules[type(model).__module__]
    (norm,) = (value for name, value in vars(module).items() if name.endswith("RMSNorm"))
    with (
        _quiet(),
        _replaced(module, {"apply_rotary_pos_emb": _rotate}),
        _replaced(norm, {"forward": _normalise}),
    ):
        onnx_export_from_model(
            model,
            folder,
            task="text-generation-with-past",
            custom_onnx_configs={"model": _export_config(model)},
            opset=OPSET,
            do_validation=False,  # the parity gate validates the finished graph in the real engine
            no_post_process=True,
            batch_size=1,
            sequence_length=_ROWS,
        )
    return folder / "model.onnx"


class _Margin(torch.nn.Module):
    def __init__(self, agent: torch.nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, states: Tensor) -> Tensor:
        scores = self.agent(states)
        margin: Tensor = scores[:, 1] - scores[:, 0]
        return margin


def trace_agent(agent: torch.nn.Module, hidden_size: int, path: Path) -> None:
    """Write the agent's graph: hidden states (N, D) to margins (N,), accept score minus reject score."""
    inputs, outputs = tensors.agent_inputs(hidden_size), tensors.agent_outputs()
    with _quiet():
        torch.onnx.export(
            _Margin(agent).eval(),
            (torch.zeros(2, hidden_size),),
            str(path),
            input_names=[t.name for t in inputs],
            output_names=[t.name for t in outputs],
            dynamic_axes=tensors.dynamic_axes([*inputs, *outputs]),
            opset_version=OPSET,
            dynamo=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Restrict Optimum to tracing, and silence the tracer, which warns of every shape it reads."""
    stand_ins = {
        # it looks up the names in the signature of the model's own forward
        "check_dummy_inputs_are_allowed": lambda *_: None,
        # it would read external data back and write them to one file: a second copy of the model in memory
        "check_model_uses_external_data": lambda *_: False,
    }
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with _replaced(optimum_convert, stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _replaced(holder: Any, stand_ins: dict[str, Any]) -> Iterator[None]:
    originals = {name: getattr(holder, name) for name in stand_ins}
    try:
        for name, stand_in in stand_ins.items():
            setattr(holder, name, stand_in)
        yield
    finally:
        for name, original in originals.items():
            setattr(holder, name, original)
