"""Prompts: where they come from, and their token ids for a PyTorch model.

A file holds plain lines, JSON lines, or a JSON list as the MARA paper's prompt sets do. Those sets (SafeRLHF,
BeaverTails, HarmfulQA, HH-RLHF, UltraFeedback in IAAR-Shanghai/MARA, `data/`) are JSON lists of objects with the prompt
under `instruction`; some repeat a prompt, and what else they hold differs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_deploy.demo.prompts import SETS, demo_prompts
from mara_runtime.errors import OptionError, PromptError, first_line

TEXT_KEYS = ("instruction", "prompt", "question")
"""Keys under which an object may keep its prompt; the first one present counts."""
GROUP_KEY = "group"
_JSON, _JSON_LINES = ".json", (".jsonl", ".ndjson")
_PLAIN = ("", ".txt", ".text", ".md", ".markdown", ".rst", ".list", ".lst", ".prompts")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")


@dataclass(frozen=True)
class Prompt:
    """A user message."""

    text: str
    """not blank, no white space around it"""
    group: str | None = None
    """shared by prompts that belong together, such as paraphrases of a question; None: the prompt stands alone"""


@dataclass(frozen=True)
class PromptSet:
    """The different prompts of a file, in its order."""

    name: str
    """of the file, without its folder"""
    prompts: tuple[Prompt, ...]
    """at least one; no two are the same but for white space"""
    duplicates: int
    """number left out because an earlier one is the same; ≥ 0"""

    @property
    def grouped(self) -> bool:
        """Whether the file names groups."""
        return self.prompts[0].group is not None


def same_key(text: str) -> str:
    """Equal for prompts that count as the same, which differ in white space only."""
    return " ".join(text.split())


def find_prompts(name: str, group_key: str | None = None) -> PromptSet:
    """A set of the demo by its name, or a file, see `read_prompts`. Raises PromptError, OptionError."""
    if name not in SETS:
        return read_prompts(name, group_key)
    if group_key is not None:
        raise OptionError(f"--group-by is {group_key!r}, but {name} has groups of its own: leave it out")
    return PromptSet(name, tuple(Prompt(p.text, ": ".join(p.group)) for p in demo_prompts(name)), 0)


def read_prompts(path: str | Path, group_key: str | None = None) -> PromptSet:
    """Read a prompt file.

    `.json`: a list of texts or of objects (or one object per line); `.jsonl`, `.ndjson`: a text or an object per line;
    `.txt` and other names of text, or no suffix: one prompt per line. Blank lines are skipped. An object keeps its
    prompt under one of `TEXT_KEYS`, its group under `group_key` (default `group`, if it is there); in a file either
    every prompt has a group or none.
    Raises PromptError, naming the entry, when the file cannot be read this way or holds no prompt.
    """
    path = Path(path)
    prompts: dict[str, Prompt] = {}
    count = 0
    for where, entry in _entries(path):
        prompt = _prompt(entry, f"{path}: {where}", group_key)
        first = next(iter(prompts.values()), prompt)
        if (prompt.group is None) != (first.group is None):
            raise PromptError(
                f"{path}: {where} names {'no' if prompt.group is None else 'a'} {GROUP_KEY!r}, unlike the entries "
                "before it: give all of them a group, or none"
            )
        prompts.setdefault(same_key(prompt.text), prompt)
        count += 1
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one per line, or a JSON list of objects with `instruction`")
    return PromptSet(path.name, tuple(prompts.values()), count - len(prompts))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Every entry of the file and where it stands, in words."""
    _refuse_other_formats(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error.reason})"
        raise PromptError(f"the prompt file {path} cannot be read: {reason}") from None
    except ValueError:  # a NUL in its name
        raise PromptError(f"the prompt file {ascii(str(path))[:200]} cannot be read: no file has such a name") from None
    suffix = path.suffix.lower()
    if suffix == _JSON:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):  # which is what a second JSON line is
                raise PromptError(f"{path} is not valid JSON: {error}") from None
        else:
            if not isinstance(value, list):
                raise PromptError(f"{path} is a JSON {_kind(value)}; a prompt file is a list of texts or of objects")
            yield from ((f"entry {number}", entry) for number, entry in enumerate(value, 1))
            return
    as_json = suffix in (_JSON, *_JSON_LINES)
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold the other characters that end a line
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line) if as_json else line
        except (ValueError, RecursionError) as error:
            # the decoder sees one line alone, which it calls line 1
            said = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise PromptError(f"{path}: line {number} is not valid JSON: {said}") from None


def _refuse_other_formats(path: Path) -> None:
    """Raise PromptError for a file whose lines are not prompts: a header, or the rest of a table, would become some."""
    suffix = path.suffix.lower()
    if suffix in (_JSON, *_JSON_LINES, *_PLAIN):
        return
    if suffix in _TABLES:
        raise PromptError(
            f"the prompt file {path} is a table ({suffix}), which is not read: write its prompts to a .txt file, one "
            "per line, or to a .jsonl file, an object with `prompt` per line"
        )
    if suffix in _PACKED:
        raise PromptError(f"the prompt file {path} is packed ({suffix}): unpack it first")
    raise PromptError(
        f"the prompt file {ascii(str(path))[1:-1][:200]} has the suffix {suffix!r}, which says nothing about its form: "
        "rename it to .txt if it has one prompt per line, .jsonl if it has an object per line, .json if it is one list"
    )


def _prompt(entry: Any, where: str, group_key: str | None) -> Prompt:
    group = None
    if isinstance(entry, dict):
        key = next((key for key in TEXT_KEYS if key in entry), None)
        if key is None:
            found = ", ".join(map(repr, entry)) or "nothing"
            raise PromptError(f"{where} has none of {', '.join(map(repr, TEXT_KEYS))}; it has {found}"[:400])
        text = entry[key]
        group = _group(entry, where, group_key)
    elif group_key is not None:
        raise PromptError(f"{where} is a {_kind(entry)}; to group by {group_key!r} it must be an object that has it")
    else:
        text = entry
    if not isinstance(text, str):
        raise PromptError(f"{where} is a {_kind(text)} where its prompt should be a text")
    if not text.strip():
        raise PromptError(f"{where} is a blank prompt: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character, which JSON can spell
        raise PromptError(f"{where} is not Unicode text: {error}") from None
    return Prompt(text.strip(), group)


def _group(entry: dict[str, Any], where: str, group_key: str | None) -> str | None:
    value = entry.get(group_key or GROUP_KEY)
    if value is None:
        if group_key is not None:
            raise PromptError(f"{where} has no {group_key!r} to group by; it has {', '.join(map(repr, entry))}"[:400])
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def shared(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[str]:
    """The texts of `prompts` that also occur among `others`."""
    known = {same_key(prompt.text) for prompt in others}
    return [prompt.text for prompt in prompts if same_key(prompt.text) in known]


def drawn(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts, in their order, chosen independently of it; a larger count keeps those of a smaller."""
    if count is None:
        return list(prompts)
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest())
    chosen = {prompt.text for prompt in by_hash[:count]}
    return [prompt for prompt in prompts if prompt.text in chosen]


def encode(
    prompt: str, tokenizer: Any, model: str, *, raw: bool = False, template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a user message by a Hugging Face tokenizer, ready for the assistant's answer.

    The message goes through the chat template, which alone adds special tokens, unless `raw` or there is none.
    template: its variables; model: name for errors.
    Raises PromptError where there is no token, or the template refuses the message; OptionError for variables without a
    template, or that are not the template's own.
    """
    raw = raw or not tokenizer.chat_template
    if raw and template:
        raise OptionError(f"variables of the chat template are given, but {model} reads plain text: leave them out")
    text = prompt if raw else _rendered(prompt, tokenizer, model, template or {})
    ids: list[int] = tokenizer(text, add_special_tokens=raw)["input_ids"]
    if not ids:
        raise PromptError(f"the prompt {prompt[:60]!r} has no token")
    return ids


def _rendered(prompt: str, tokenizer: Any, model: str, template: Mapping[str, Any]) -> str:
    own = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages", "self"} - {"tools", "documents"}
    if taken := sorted(own & template.keys()):
        raise OptionError(f"the chat template's variable {taken[0]!r} is set by the code itself: leave it out")
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **template
        )
    except Exception as error:  # a template is a program: it may fail in any way a program can
        raise PromptError(
            f"the chat template of {model} refuses the prompt {prompt[:60]!r}: {first_line(error)}"
        ) from None
    return text
