"""Checkpoints of models that take images or sound, too: their text part is a causal LM of its own, and that is read.

Listed are those whose forward pass without an image is that of their text part alone; the gates compare with that part
and could not tell. PaliGemma, say, reads a prompt in both directions, and Qwen2-VL has positions of three axes.

Imports neither torch nor onnx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TEXT_PARTS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",  # of transformers 5
    "mistral3": "mistral",
}
"""`model_type` of such models, and of their text part where config.json does not say."""
TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
"""How the names of the text part's weights begin in files, and in the causal LM. Most files have the first two, as
transformers saves them; Gemma 4 has the third, and its head under its own name."""
_OTHERS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|embed_vision|audio_tower|embed_audio)\.")
"""How the names of all other weights begin."""
_OF_BOTH = ("eos_token_id", "tie_word_embeddings", "quantization", "quantization_config")
"""What config.json may say of the whole model and mean its text part, too."""


def has_text_part(said: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of the listed models."""
    whole, text = said.get("model_type"), said.get("text_config")
    if not isinstance(whole, str) or whole not in TEXT_PARTS or not isinstance(text, Mapping):
        return False
    return isinstance(text.get("model_type", ""), str)


def text_settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the text part of a listed model; of any other, all of it."""
    if not has_text_part(said):
        return dict(said)
    of_both = {key: said[key] for key in _OF_BOTH if said.get(key) is not None}
    return {"model_type": TEXT_PARTS[said["model_type"]], **of_both, **said["text_config"]}


def text_config(config: Any, settings: Mapping[str, Any]) -> Any:
    """The configuration object of the text part, from that of a listed model. settings: as of `text_settings`."""
    text = config.text_config
    for key in ("eos_token_id", "tie_word_embeddings"):
        if key in settings:
            setattr(text, key, settings[key])
    if text.dtype is None:
        text.dtype = config.dtype
    return text


def text_name(name: str) -> str | None:
    """A weight's name in the causal LM, by that in a listed model's files; None: it is not of the text part."""
    if _OTHERS.match(name):
        return None
    for stored, own in TEXT_NAMES.items():
        name, found = re.subn(stored, own, name)
        if found:
            break
    return name
