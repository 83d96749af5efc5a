"""Prompts: reading them from files, and encoding them for a PyTorch model.

A prompt file contains plain lines, JSON lines, or a JSON list. The MARA paper's prompt sets (SafeRLHF, BeaverTails,
HarmfulQA, HH-RLHF, UltraFeedback in IAAR-Shanghai/MARA, `data/`) are JSON lists of objects with the prompt under
`instruction`; some repeat a prompt, and their other keys differ.
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
from mara_runtime.chat import reject_unknown, variables_of
from mara_runtime.errors import OptionError, PromptError, first_line

TEXT_KEYS = ("instruction", "prompt", "question")
"""Keys of an object that may hold its prompt; the first one present is used."""
GROUP_KEY = "group"
_JSON, _JSON_LINES = ".json", (".jsonl", ".ndjson")
_PLAIN = ("", ".txt", ".text", ".md", ".markdown", ".rst", ".list", ".lst", ".prompts")


@dataclass(frozen=True)
class Prompt:
    """A user message."""

    text: str
    """not blank; leading and trailing white space removed"""
    group: str | None = None
    """shared by related prompts, such as paraphrases of a question; None: no group"""


@dataclass(frozen=True)
class PromptSet:
    """The unique prompts of a file, in file order."""

    name: str
    """file name without its folder"""
    prompts: tuple[Prompt, ...]
    """at least one; unique up to white space"""
    duplicates: int
    """repeated prompts that were dropped, ≥ 0"""


def _normalised(text: str) -> str:
    """Prompts with equal normalised texts are duplicates."""
    return " ".join(text.split())


def find_prompts(name: str, group_key: str | None = None) -> PromptSet:
    """A demo prompt set by name, or a file, see `read_prompts`. Raises PromptError, OptionError."""
    if name not in SETS:
        return read_prompts(name, group_key)
    if group_key is not None:
        raise OptionError(f"--group-by is {group_key!r}, but the prompts of {name} are already grouped: omit it")
    return PromptSet(name, tuple(Prompt(p.text, ": ".join(p.group)) for p in demo_prompts(name)), 0)


def read_prompts(path: str | Path, group_key: str | None = None) -> PromptSet:
    """Read a prompt file.

    `.json`: a list of strings or objects (or one object per line); `.jsonl`, `.ndjson`: a string or an object per
    line; `.txt` and other text suffixes, or no suffix: one prompt per line. Blank lines are skipped. An object has its
    prompt under one of `TEXT_KEYS`, and its group under `group_key` (default: `group`, if present). Either all prompts
    of a file have a group or none has.
    Raises PromptError for a file that cannot be read or has no prompt, naming the entry.
    """
    path = Path(path)
    prompts: dict[str, Prompt] = {}
    count = 0
    for where, entry in _entries(path):
        prompt = _prompt(entry, f"{path}: {where}", group_key)
        first = next(iter(prompts.values()), prompt)
        if (prompt.group is None) != (first.group is None):
            raise PromptError(
                f"{path}: {where} has {'no' if prompt.group is None else 'a'} {GROUP_KEY!r}, unlike the entries "
                "before it: give every prompt a group, or none"
            )
        prompts.setdefault(_normalised(prompt.text), prompt)
        count += 1
    if not prompts:
        raise PromptError(f"{path} has no prompts: write one per line, or a JSON list of objects with `instruction`")
    return PromptSet(path.name, tuple(prompts.values()), count - len(prompts))


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(location for error messages, value) of every entry."""
    suffix = path.suffix.lower()
    if suffix not in (_JSON, *_JSON_LINES, *_PLAIN):  # such as CSV, whose lines are not prompts
        raise PromptError(
            f"the prompt file {ascii(str(path))[1:-1][:200]} has the suffix {suffix!r}, which is not read: convert "
            "or rename it to .txt (one prompt per line), .jsonl (one object per line) or .json (one list)"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text ({error.reason})"
        raise PromptError(f"the prompt file {path} cannot be read: {reason}") from None
    except ValueError:  # a NUL in the path
        raise PromptError(f"the prompt file {ascii(str(path))[:200]} cannot be read: invalid path") from None
    if suffix == _JSON:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not str(error).startswith("Extra data"):  # a second line: read as JSON lines below
                raise PromptError(f"{path} is not valid JSON: {error}") from None
        else:
            if not isinstance(value, list):
                raise PromptError(f"{path} is a JSON {_kind(value)}; expected a list of strings or objects")
            yield from ((f"entry {number}", entry) for number, entry in enumerate(value, 1))
            return
    as_json = suffix in (_JSON, *_JSON_LINES)
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a JSON string may contain U+2028
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line) if as_json else line
        except (ValueError, RecursionError) as error:
            # the decoder's own line number is always 1
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise PromptError(f"{path}: line {number} is not valid JSON: {reason}") from None


def _prompt(entry: Any, where: str, group_key: str | None) -> Prompt:
    group = None
    if isinstance(entry, dict):
        key = next((key for key in TEXT_KEYS if key in entry), None)
        if key is None:
            keys = ", ".join(map(repr, entry)) or "nothing"
            raise PromptError(f"{where} has none of the keys {', '.join(map(repr, TEXT_KEYS))}; it has {keys}"[:400])
        text = entry[key]
        group = _group(entry, where, group_key)
    elif group_key is not None:
        raise PromptError(f"{where} is a {_kind(entry)}; --group-by {group_key} requires objects with that key")
    else:
        text = entry
    if not isinstance(text, str):
        raise PromptError(f"{where} is a {_kind(text)}; expected the text of a prompt")
    if not text.strip():
        raise PromptError(f"{where} is blank: remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can express
        raise PromptError(f"{where} is not valid Unicode: {error}") from None
    return Prompt(text.strip(), group)


def _group(entry: dict[str, Any], where: str, group_key: str | None) -> str | None:
    value = entry.get(group_key or GROUP_KEY)
    if value is None:
        if group_key is not None:
            raise PromptError(
                f"{where} has no key {group_key!r} to group by; it has {', '.join(map(repr, entry))}"[:400]
            )
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def overlap(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[str]:
    """The texts of `prompts` that also occur among `others`."""
    known = {_normalised(prompt.text) for prompt in others}
    return [prompt.text for prompt in prompts if _normalised(prompt.text) in known]


def subset(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts, in order, selected by hash: a larger count includes the selection of a smaller one."""
    if count is None:
        return list(prompts)
    by_hash = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest())
    selected = {prompt.text for prompt in by_hash[:count]}
    return [prompt for prompt in prompts if prompt.text in selected]


def encode(
    prompt: str, tokenizer: Any, model: str, *, raw: bool = False, template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a user message, followed by the generation prompt, by a Hugging Face tokenizer.

    Uses the chat template, which then adds all special tokens, unless `raw` is set or the tokenizer has none.
    template: variables for the chat template; model: name for error messages.
    Raises PromptError for an empty result or a message that the template rejects; OptionError for variables without a
    template, or with reserved names.
    """
    raw = raw or not tokenizer.chat_template
    if raw and template:
        raise OptionError(f"chat template variables are given, but {model} gets plain text: omit --template")
    text = prompt if raw else _rendered(prompt, tokenizer, model, template or {})
    ids: list[int] = tokenizer(text, add_special_tokens=raw)["input_ids"]
    if not ids:
        raise PromptError(f"the prompt {prompt[:60]!r} has no tokens")
    return ids


def _rendered(prompt: str, tokenizer: Any, model: str, template: Mapping[str, Any]) -> str:
    signature = inspect.signature(tokenizer.apply_chat_template)
    reserved = {*signature.parameters, "messages", "self"} - {"tools", "documents"}
    if conflicts := sorted(reserved & template.keys()):
        raise OptionError(f"the chat template variable {conflicts[0]!r} is reserved: omit it from --template")
    try:
        if template:
            reject_unknown(variables_of(tokenizer.chat_template), template)
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **template
        )
    except OptionError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        raise PromptError(
            f"the chat template of {model} rejects the prompt {prompt[:60]!r}: {first_line(error)}"
        ) from None
    return text
