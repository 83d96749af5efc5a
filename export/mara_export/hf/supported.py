"""Which configurations can be exported, told from config.json alone, before weights are downloaded or loaded.

What the trace and the lowerings cannot keep is refused here by name, and so is a setting that transformers' own
implementation does not read: the model would not be what its configuration says. What a configuration does not show,
the seam refuses while the model is traced (graph/seam.py), and the parity gates judge the rest.

Imports neither torch nor onnx.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from mara_export.errors import ModelError
from mara_export.hf.families import EXPERTS, decoder_sizes
from mara_export.hf.rope import rope_kinds
from mara_runtime.errors import OptionError

DEFAULT_CONTEXT = 4096
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
"""kinds of layers whose state is a KV cache"""
_RECURRENT = ("mamba_", "ssm_")
"""how settings of layers with another state begin"""
_READ_OR_REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_softcapping",
    "attention_chunk_size",
    "sliding_window",
)
"""Settings that change a model's mathematics in some families and are passed over in silence in others."""
_LONG = "original_max_position_embeddings"
_ROPE = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": f"factor low_freq_factor high_freq_factor {_LONG}",
    "yarn": f"factor {_LONG} attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
    "longrope": f"factor {_LONG} attention_factor short_factor long_factor",
}
"""rope types whose angles do not depend on the length of the text, or only beyond a length at which the context is cut;
and what transformers reads for them"""
_ROPE_OF = {"ministral3": ("llama_4_scaling_beta",)}
"""and what an architecture reads beside that"""
_MORE_ROPE = {"gemma4_text": {"proportional": "factor"}}
"""rope types of one architecture"""


def check_supported(config: Any, name: str, max_context: int | None) -> int:
    """Reject what cannot be exported faithfully; return the context length to export with.

    name: of the model, for messages; max_context: as asked for, None for 4096 or the model's own if smaller.
    Raises ModelError.
    """
    decoder_sizes(config.to_dict(), name)
    own = getattr(config, "max_position_embeddings", None)
    if type(own) is not int or own < 1:
        raise ModelError(f"{name}: its config.json has max_position_embeddings = {own!r}; expected a positive integer")
    _check_layers(config, name)
    _check_read(config, name)
    _check_rope(config, name)
    longest = longest_context(config)
    assert longest is not None
    if longest < 2:
        raise ModelError(f"{name} has a context of {longest} token, which leaves no room for an answer")
    context = min(DEFAULT_CONTEXT, longest) if max_context is None else max_context
    if context > longest:
        why = "was made for at most" if longest == own else "changes its rotary angles (LongRoPE) beyond"
        raise ModelError(f"--max-context is {context}; {name} {why} {longest} tokens")
    return context


def longest_context(config: Any) -> int | None:
    """Tokens of prompt and answer that a model can be exported for at most; None if its configuration has no limit.

    LongRoPE has other angles for longer texts, from their first token on: a graph has one table.
    """
    own = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    if own is not None and scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        own = min(own, scaling.get(_LONG) or getattr(config, _LONG, None) or own)
    return None if own is None else int(own)


def check_traceable(config: Any, name: str, tracer: str) -> None:
    """Reject what a tracer would trace wrongly. tracer: "optimum" or "torch". Raises OptionError."""
    experts = next((key for key in EXPERTS if getattr(config, key, None) not in (None, 0, 1)), None)
    if experts is None:
        return
    calls_by_name = importlib.util.find_spec("transformers.integrations.moe") is not None  # of version 5
    if tracer == "optimum" or not calls_by_name:  # the graph would keep the experts of the example
        raise OptionError(
            f"--tracer is {tracer!r}; {name} is a mixture of experts ({experts} = {getattr(config, experts)}), which "
            "is traced with transformers 5 and --tracer torch only: pip install 'mara-deploy[export-torch]'"
        )


def _check_layers(config: Any, name: str) -> None:
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    state = next((key for key in config.to_dict() if key.startswith(_RECURRENT)), None)
    if state is not None:
        raise ModelError(f"{name} has layers with a recurrent state ({state}), which is not supported")
    if other := sorted({str(kind) for kind in kinds} - _ATTENTION_LAYERS):
        raise ModelError(
            f"{name} has layers of kind {other[0]!r}; supported are models whose layers all have attention over all "
            "tokens or a window of them"
        )


def _check_read(config: Any, name: str) -> None:
    read = inspect.signature(type(config).__init__).parameters
    for key in _READ_OR_REFUSED:
        if getattr(config, key, None) and key not in read:
            raise ModelError(
                f"{name}: its config.json has {key} = {getattr(config, key)!r}, which transformers does not read for "
                f"{config.model_type!r}: remove it"
            )
    window = getattr(config, "sliding_window", None)
    if window is not None and (type(window) is not int or window < 1):
        raise ModelError(f"{name}: its config.json has sliding_window = {window!r}; expected a positive integer")


def _check_rope(config: Any, name: str) -> None:
    for rope in rope_kinds(config):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        types = _ROPE | _MORE_ROPE.get(config.model_type, {})
        if rope_type not in types:
            raise ModelError(
                f"{name} has rope scaling {rope_type!r}, which is not supported; supported are {', '.join(types)}"
            )
        known = ("rope_type", "type", *types[rope_type].split(), *_ROPE_OF.get(config.model_type, ()))
        if unread := [key for key in rope if key not in known]:
            raise ModelError(
                f"{name}: its config.json has {unread[0]} in rope_scaling, which nothing reads for {rope_type!r}: "
                "remove it"
            )
