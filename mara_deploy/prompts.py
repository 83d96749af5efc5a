"""Prompts: reading them from files, and encoding them for a PyTorch model.

A prompt is what `AlignedDecoder.encode` takes: a text, or a conversation as a list of messages. A prompt file contains
plain lines, JSON lines, or a JSON list. The MARA paper's prompt sets (SafeRLHF, BeaverTails, HarmfulQA, HH-RLHF,
UltraFeedback in IAAR-Shanghai/MARA, `data/`) are JSON lists of objects with the prompt under `instruction`; some repeat
a prompt, and their other keys differ.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mara_deploy.demo.prompts import SETS, demo_prompts
from mara_runtime.chat import Message, reject_unknown, variables_of
from mara_runtime.errors import OptionError, PromptError, first_line
from mara_runtime.json_reader import load_object

Asked = str | list[Message]
"""What the LLM is asked: the text of a user message, or a conversation that the user's side ends."""
PROMPT_KEYS = ("instruction", "prompt", "question", "messages")
"""Keys of an object that may hold its prompt, a text or a list of messages."""
GROUP_KEY = "group"
_BESIDES = ("system", "history", "input")
"""Keys of an object that belong to its prompt: what comes before it, and what is appended to its text."""
_JSON, _JSON_LINES = ".json", (".jsonl", ".ndjson")
_PLAIN = ("", ".txt", ".text", ".md", ".markdown", ".rst", ".list", ".lst", ".prompts")


@dataclass(frozen=True)
class Prompt:
    """What the LLM is asked, and what the scores read besides."""

    asked: Asked
    """not blank"""
    group: str | None = None
    """shared by related prompts, such as paraphrases of a question; None: no group"""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """the columns that the scores read, such as a reference answer; JSON values"""

    @property
    def text(self) -> str:
        """For people: the text, or the messages with their roles."""
        if isinstance(self.asked, str):
            return self.asked
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.asked)

    def to_json(self) -> Any:
        """An entry of a prompt file, without the group."""
        key = "prompt" if isinstance(self.asked, str) else "messages"
        return {key: self.asked, **self.columns} if self.columns else self.asked


@dataclass(frozen=True)
class PromptSet:
    """The distinct prompts of a file, in file order."""

    name: str
    """file name without its folder"""
    prompts: tuple[Prompt, ...]
    """at least one; no two with the same question and columns"""
    duplicates: int = 0
    """repeated prompts that were dropped, ≥ 0"""
    remarks: tuple[str, ...] = ()
    """what the file says that is not read"""


def find_prompts(name: str, group_key: str | None = None, columns: Sequence[str] = ()) -> PromptSet:
    """A demo prompt set by name, or a file, see `read_prompts`. Raises PromptError, OptionError."""
    if name not in SETS:
        return read_prompts(name, group_key, columns)
    if group_key is not None:
        raise OptionError(f"--group-by is {group_key!r}, but the prompts of {name} are already grouped: omit it")
    if columns:
        raise PromptError(f"a score reads the column {columns[0]!r}, and the prompts of {name} have no columns")
    return PromptSet(name, tuple(Prompt(p.text, ": ".join(p.group)) for p in demo_prompts(name)))


def read_prompts(path: str | Path, group_key: str | None = None, columns: Sequence[str] = ()) -> PromptSet:
    """Read a prompt file.

    `.json`: a list of entries (or one per line); `.jsonl`, `.ndjson`: an entry per line; `.txt` and other text
    suffixes, or no suffix: one prompt per line. Blank lines are skipped; nothing else is changed. An entry is a text, a
    list of messages, or an object with one of these under one of `PROMPT_KEYS`. `system` and `history` of an object
    come before that, `input` is a further line of its text. Its group is under `group_key` (default: `group`, if
    present). Either all prompts of a file have a group or none has. columns: to keep with each prompt, for the scores.
    Of prompts that are equal in all this the first is kept; the set's remarks name what is not read.
    Raises PromptError for a file that cannot be read or has no prompt, naming the entry.
    """
    path = Path(path)
    if taken := [column for column in columns if column in (*PROMPT_KEYS, *_BESIDES)]:
        raise PromptError(f"a score reads the column {taken[0]!r}, which is part of the prompt: rename it in {path}")
    prompts: dict[str, tuple[Prompt, Any]] = {}
    unread: dict[str, None] = {}
    dropped: list[set[str]] = []
    for where, entry in _entries(path):
        prompt, others = _prompt(entry, f"{path}: {where}", group_key, columns)
        first, _ = next(iter(prompts.values()), (prompt, None))
        if (prompt.group is None) != (first.group is None):
            raise PromptError(
                f"{path}: {where} has {'no' if prompt.group is None else 'a'} {GROUP_KEY!r}, unlike the entries "
                "before it: give every prompt a group, or none"
            )
        key = key_of([prompt.asked, prompt.columns])
        if key in prompts:
            dropped.append(_difference(entry, prompts[key][1]))
        else:
            prompts[key] = prompt, entry
        unread |= dict.fromkeys(others)
    if not prompts:
        raise PromptError(f"{path} has no prompts: write one per line, or a JSON list of objects with `instruction`")
    remarks = [f"{path.name} has columns that are not read: {_listed(unread)}"] if unread else []
    if differing := [keys for keys in dropped if keys]:
        remarks.append(
            f"{path.name} repeats {len(differing)} prompt{'s' * (len(differing) > 1)} with another "
            f"{_listed(sorted(set().union(*differing)))}: only the first of each is asked"
        )
    return PromptSet(path.name, tuple(prompt for prompt, _ in prompts.values()), len(dropped), tuple(remarks))


def key_of(value: Any) -> str:
    """The key of a prompt: the text itself, or the JSON of a conversation."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _difference(one: Any, other: Any) -> set[str]:
    """The keys in which two entries differ."""
    one, other = (entry if isinstance(entry, dict) else {} for entry in (one, other))
    return {key for key in {*one, *other} if one.get(key) != other.get(key)}


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys))[:200]


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
            value = load_object(text)
        except ValueError as error:
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
            yield f"line {number}", load_object(line) if as_json else line
        except ValueError as error:
            # the decoder's own line number is always 1
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise PromptError(f"{path}: line {number} is not valid JSON: {reason}") from None


def _prompt(entry: Any, where: str, group_key: str | None, columns: Sequence[str]) -> tuple[Prompt, list[str]]:
    """The prompt of an entry, and the keys that are not read."""
    if not isinstance(entry, dict):
        for name in (*columns, *([group_key] if group_key else ())):
            raise PromptError(f"{where} is a {_kind(entry)}, not an object with the column {name!r}")
        entry, key = {"": entry}, ""
        group = None
    else:
        key = _prompt_key(entry, where)
        group = _group(entry, where, group_key)
    asked = _asked(entry, key, where)
    values = {name: _column(entry, name, where) for name in columns}
    try:
        key_of([asked, group, values]).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON can express
        raise PromptError(f"{where} is not valid Unicode: {error}") from None
    read = {key, *_BESIDES, group_key or GROUP_KEY, *columns}
    return Prompt(asked, group, values), [name for name in entry if name not in read]


def _prompt_key(entry: dict[str, Any], where: str) -> str:
    """The key that holds the prompt. Raises PromptError if there is none, or several that differ."""
    present = [key for key in PROMPT_KEYS if key in entry]
    if not present:
        raise PromptError(f"{where} has none of the keys {_listed(PROMPT_KEYS)}; it has {_listed(entry) or 'nothing'}")
    filled = [key for key in present if entry[key] is not None] or present
    if other := next((key for key in filled if entry[key] != entry[filled[0]]), None):
        raise PromptError(f"{where} has a prompt under {filled[0]!r} and another under {other!r}: remove one of them")
    return filled[0]


def _asked(entry: dict[str, Any], key: str, where: str) -> Asked:
    """The prompt under `key`, after `system` and `history`, with `input`; null and empty ones count as absent."""
    said, besides = entry[key], (entry.get(name) for name in _BESIDES)
    system, history, addition = (None if value in ("", []) else value for value in besides)
    if isinstance(said, list):
        if addition is not None:
            raise PromptError(f"{where} has messages and an 'input', which is read with a text only: put it into them")
        turns = _messages(said, where)
    else:
        said = _text(said, where)
        if addition is not None:
            said += "\n" + _text(addition, f"{where}, 'input'")
        turns = messages(said)
    before = [] if history is None else _history(history, f"{where}, 'history'")
    if system is not None:
        if any(message["role"] == "system" for message in (*before, *turns)):
            raise PromptError(f"{where} has a system message under 'system' and another: remove one of them")
        before = [{"role": "system", "content": _text(system, f"{where}, 'system'")}, *before]
    if not before and isinstance(said, str):
        return said
    if not turns[-1]["content"].strip():
        raise PromptError(f"{where} is blank in its last message: remove it")
    if turns[-1]["role"] == "assistant":
        raise PromptError(f"{where} ends with a message of the assistant, not with one to answer: remove that")
    return [*before, *turns]


def _messages(value: Any, where: str) -> list[Message]:
    """A list of messages, unchanged."""
    if not isinstance(value, list) or not value:
        raise PromptError(f"{where} has {'no messages' if value == [] else f'a {_kind(value)} instead of messages'}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise PromptError(f"{where}: message {number} is not an object with the texts 'role' and 'content'")
    return value


def _history(value: Any, where: str) -> list[Message]:
    """Messages of the turns before: a list of messages, or of pairs of question and answer."""
    if not isinstance(value, list) or any(isinstance(turn, dict) for turn in value):
        return _messages(value, where)
    turns: list[Message] = []
    for turn in value:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise PromptError(f"{where} is not a list of messages, nor of pairs of question and answer")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    return turns


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise PromptError(f"{where} is a {_kind(value)}; expected the text of a prompt")
    if not value.strip():
        raise PromptError(f"{where} is blank: remove it")
    return value


def _column(entry: dict[str, Any], name: str, where: str) -> Any:
    if name not in entry:
        raise PromptError(f"{where} has no column {name!r}, which a score reads; it has {_listed(entry)}")
    return entry[name]


def _group(entry: dict[str, Any], where: str, group_key: str | None) -> str | None:
    value = entry.get(group_key or GROUP_KEY)
    if value is None:
        if group_key is not None:
            raise PromptError(f"{where} has no key {group_key!r} to group by; it has {_listed(entry)}")
        return None
    return key_of(value)


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def overlap(prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[str]:
    """The texts of `prompts` that also occur among `others`, whatever their white space."""

    def normalised(prompt: Prompt) -> str:
        return " ".join(prompt.text.split())

    known = set(map(normalised, others))
    return [prompt.text for prompt in prompts if normalised(prompt) in known]


def subset(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts, in order, selected by hash: a larger count includes the selection of a smaller one."""
    by_hash = sorted(range(len(prompts)), key=lambda i: hashlib.sha256(key_of(prompts[i].asked).encode()).digest())
    return [prompts[i] for i in sorted(by_hash[:count])]


def messages(prompt: Asked) -> list[Message]:
    """The conversation that a prompt is."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def encode(
    prompt: Asked, tokenizer: Any, model: str, *, raw: bool = False, template: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt, followed by the generation prompt, by a Hugging Face tokenizer.

    Uses the chat template, which then adds all special tokens, unless `raw` is set or the tokenizer has none.
    template: variables for the chat template; model: name for error messages.
    Raises PromptError for an empty result, a conversation without a template, or one that the template rejects;
    OptionError for variables without a template, or with reserved names.
    """
    shown = repr(key_of(prompt)[:60])
    raw = raw or not tokenizer.chat_template
    if raw and template:
        raise OptionError(f"chat template variables are given, but {model} gets plain text: omit --template")
    if raw and not isinstance(prompt, str):
        raise PromptError(f"the prompt {shown} is a conversation, but {model} gets plain text, without a chat template")
    text = prompt if raw else _rendered(prompt, tokenizer, model, template or {}, shown)
    ids: list[int] = tokenizer(text, add_special_tokens=raw)["input_ids"]
    if not ids:
        raise PromptError(f"the prompt {shown} has no tokens")
    return ids


def _rendered(prompt: Asked, tokenizer: Any, model: str, template: Mapping[str, Any], shown: str) -> str:
    from mara_export.hf.tokenizer import render_chat  # where a tokenizer of transformers is, so is transformers

    signature = inspect.signature(tokenizer.apply_chat_template)
    reserved = {*signature.parameters, "messages", "self"} - {"tools", "documents"}
    if conflicts := sorted(reserved & template.keys()):
        raise OptionError(f"the chat template variable {conflicts[0]!r} is reserved: omit it from --template")
    try:
        if template:
            reject_unknown(variables_of(tokenizer.chat_template), template)
        text = render_chat(tokenizer, messages(prompt), add_generation_prompt=True, **template)
    except OptionError:
        raise
    except Exception as error:  # a template is a program and can raise anything
        raise PromptError(f"the chat template of {model} rejects the prompt {shown}: {first_line(error)}") from None
    return text
