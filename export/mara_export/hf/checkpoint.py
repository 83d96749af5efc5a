"""A Hugging Face checkpoint on this machine, read whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from mara_export.errors import ModelError
from mara_export.hf.families import FAMILIES
from mara_export.hf.sources import ModelSource
from mara_runtime.errors import first_line

_GENERATION = "generation_config.json"
_MOST_LETTERS = 300
"""Of what others say in an error: some of it lists all models that there are."""


def silence_transformers() -> None:
    """Keep its remarks and progress bars off the screen, as long as this process runs."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def from_pretrained(kind: Any, source: ModelSource, *, part: str = "", **options: Any) -> Any:
    """Call `kind.from_pretrained`; why it fails, in one line. Code that a model brings along is not run.

    part: what of the model it is, for messages. Raises ModelError.
    """
    try:
        return kind.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        what = f"the {part} of {source.name}" if part else source.name
        raise ModelError(f"{what} cannot be loaded: {_why(error, source)}") from error


def _why(error: Exception, source: ModelSource) -> str:
    """One line: the file where one is damaged, else what the error says, cut to a length that can be read."""
    shards = sorted(source.folder.glob("*.safetensors")) if isinstance(error, SafetensorError) else []
    for path in shards:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{path.name} is damaged ({first_line(damage)}): fetch or copy it again"
    text = first_line(error)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} …"


def load_config(source: ModelSource) -> Any:
    """The model's configuration. Raises ModelError."""
    found = read_json(source.folder / "config.json")
    if isinstance(found, dict) and not found.get("model_type"):  # transformers would go by the folder's name
        raise ModelError(
            f"{source.name}: its config.json has no model_type, which says of what architecture it is; supported are "
            + ", ".join(FAMILIES)
        )
    return read_config(source)


def read_config(source: ModelSource) -> Any:
    """The configuration of a model of any architecture, also one that transformers 5 wrote. Raises ModelError."""
    config, found = from_pretrained(AutoConfig, source), read_json(source.folder / "config.json")
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:  # base and scaling, which transformers 4 keeps apart; it would take its defaults in silence
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ModelError(
                f"{source.name}: its config.json has rope_parameters that are not those of one rotary embedding for "
                "all layers; this is not supported"
            )
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                setattr(config, name, rope[name])
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        config.rope_scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    if (source.folder / _GENERATION).is_file() and isinstance(found, dict) and "eos_token_id" not in found:
        config.eos_token_id = None  # else the default of its class, which the model does not name
    return config


def load_model(source: ModelSource, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """The LLM, ready to run. attention: a name that transformers knows.

    A checkpoint that lacks weights is refused, as transformers fills the gaps at random; so is one with weights that
    the architecture has no place for, as they would be left out. Raises ModelError.
    """
    _check_generation_config(source)
    options: dict[str, Any] = {
        "config": read_config(source),
        "dtype": dtype,
        "attn_implementation": attention,
        "output_loading_info": True,
        "use_safetensors": True,  # else it takes a pickle where it does not find them
    }
    model, loading = from_pretrained(AutoModelForCausalLM, source, **options)
    unread = [name for name, weight in model.named_parameters() if weight.is_meta]  # tied to one that the file lacks
    if missing := sorted({*loading["missing_keys"], *unread}):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"{source.name} is not a whole causal LM: it lacks {', '.join(missing[:3])}{more}")
    unknown = sorted(key for key in loading["unexpected_keys"] if not key.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ModelError(
            f"{source.name} has weights that {model.config.model_type} has no place for: {', '.join(unknown[:3])}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        )
    return model.eval()


def _check_generation_config(source: ModelSource) -> None:
    """Transformers takes a file that it cannot read for none, and answers would not end where they should."""
    if (source.folder / _GENERATION).is_file() and not isinstance(read_json(source.folder / _GENERATION), dict):
        raise ModelError(
            f"{source.name}: its {_GENERATION}, which names the tokens that end an answer, is no JSON object: correct "
            "it, or remove it to take those of config.json"
        )


def read_json(path: Path) -> Any:
    """What a file holds; None if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: the generation config's list, else the model's, else the tokenizer's.

    Raises ModelError for what is no id of the vocabulary.
    """
    holders = (model.generation_config, model.config, tokenizer)
    found = next((ids for holder in holders if (ids := getattr(holder, "eos_token_id", None)) is not None), ())
    ids = tuple(found) if isinstance(found, (list, tuple)) else (found,)
    size = model.config.vocab_size
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            raise ModelError(
                f"the model's eos_token_id is {token!r}, which is not in its vocabulary, 0 to {size - 1}: correct its "
                "generation_config.json, or config.json where there is none"
            )
    return ids
