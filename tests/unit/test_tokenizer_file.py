"""A tokenizer.json that would take any time or memory, or that panics, ends with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mara_deploy import demo
from mara_runtime import tokenizer
from mara_runtime.bundle import Bundle
from mara_runtime.errors import BundleError, PromptError
from mara_runtime.text import TextSide
from tests.unit import helpers, tiny_tokenizers

GROWS = [{"type": "Replace", "pattern": {"String": "o"}, "content": "o" * 100}]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def charsmap(text: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def template(*pieces: dict[str, Any]) -> dict[str, Any]:
    pair = [SEQUENCE, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"post_processor": {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": {}}}


REFUSED = {
    "charsmap larger than the file": charsmap("/////w=="),
    "charsmap of three bytes": charsmap("AAAA"),
    "charsmap that is not base64": charsmap("?"),
    "normaliser that multiplies": {"normalizer": {"type": "Sequence", "normalizers": GROWS}},
    "decoder that multiplies": {"decoder": {"type": "Sequence", "decoders": GROWS}},
    "text repeated by the template": template(*[SEQUENCE] * 100),
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "o" * 1000}},
    "another format": {"model": {"type": "Unheard"}},
}
PANICS = {
    "chunks of length 0": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a template with an unknown token": template({"SpecialToken": {"id": "[X]", "type_id": 0}}, SEQUENCE),
    "a pattern that backtracks": {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    },
}


def written(folder: Path, **changes: Any) -> Path:
    """The demo's tokenizer with some of its parts replaced."""
    content = json.loads((demo.MODEL_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return path


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_refused_when_it_is_opened(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        tokenizer.open_tokenizer(written(tmp_path, **changes))


def test_refused_for_too_many_added_tokens_dropout_and_hidden_names(tmp_path: Path) -> None:
    added = [{"id": 9999 + i, "content": f"<{i}>", **SPECIAL} for i in range(tokenizer.MOST_ADDED_TOKENS + 1)]
    with pytest.raises(BundleError, match="added tokens"):
        tokenizer.open_tokenizer(written(tmp_path, added_tokens=added))
    path = written(tmp_path, **charsmap("/////w=="))
    path.write_text(path.read_text(encoding="utf-8").replace("precompiled_", "precompil\\u0065d_"), encoding="utf-8")
    with pytest.raises(BundleError, match=r"\\u"):
        tokenizer.open_tokenizer(path)
    path = written(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"dropout": null', '"dropout": 0.1'), encoding="utf-8")
    with pytest.raises(BundleError, match="dropout"):
        tokenizer.open_tokenizer(path)


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match="regular file"):
        tokenizer.open_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_panic_of_the_library_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    opened = tokenizer.open_tokenizer(written(tmp_path, **changes))
    with pytest.raises(PromptError, match="cannot encode"), tokenizer.one_line(PromptError, "cannot encode"):
        opened.encode("a" * 40 + "!")


def test_what_was_verified_at_opening_is_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another working directory nor a file changed since then alters a bundle's prompts."""
    folder = helpers.make_bundle(
        tmp_path, tokenizer=tiny_tokenizers.byte_level_tokenizer(), chat_template="{{ 'hello' }}"
    )
    monkeypatch.chdir(folder.parent)
    bundle = Bundle.open(folder.name)
    side = TextSide(bundle)
    monkeypatch.chdir("/")
    (folder / "chat_template.jinja").write_text("changed", encoding="utf-8")
    assert bundle.path("manifest.json").is_file()
    assert side.template.render([{"role": "user", "content": "x"}]) == "hello"
