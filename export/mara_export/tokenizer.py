"""The text side of a bundle: one `tokenizer.json`, a chat template, and the special tokens that templates name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mara_export.checkpoint import from_pretrained
from mara_export.errors import ModelError
from mara_export.sources import ModelSource
from mara_runtime.manifest import TokenizerFacts

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_tokenizer(source: ModelSource) -> Any | None:
    """The tokenizer of a Hugging Face model, or None when it has none. Raises ModelError."""
    if not any((source.folder / name).is_file() for name in _SOURCES):
        return None
    tokenizer = from_pretrained(AutoTokenizer, source, part="tokenizer")
    if not tokenizer.is_fast:
        raise ModelError(f"{source.name} has no fast tokenizer, which the runtime needs: add its tokenizer.json")
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> TokenizerFacts:
    """Write the files into the bundle's folder."""
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return TokenizerFacts(TOKENIZER_FILE, TEMPLATE_FILE if template else None, special)
