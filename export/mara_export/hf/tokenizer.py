"""The text side of a bundle: `tokenizer.json`, a chat template, and the special tokens that templates use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mara_export.errors import ModelError
from mara_export.hf.checkpoint import from_pretrained, read_json
from mara_export.hf.sources import ModelSource
from mara_runtime.chat import ChatTemplate, follow
from mara_runtime.errors import OptionError, PromptError
from mara_runtime.manifest import MESSAGE_RULES, TokenizerFacts

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"
_PROCESSOR_TEMPLATE = "chat_template.json"
"""Where models that take images, such as Mistral 3, kept the template that their tokenizer lacks."""
_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_BACKEND = "TokenizersBackend"
_MADE_ANEW = hasattr(transformers, _BACKEND)
"""Whether classes of tokenizers put parts of their own in place of those of a tokenizer.json: see `_load`."""
_QUESTION = {"role": "user", "content": "How do I cook rice?"}
_CONVERSATIONS = ([_QUESTION], [{"role": "system", "content": "Be brief."}, _QUESTION])
"""A template may want a system message, or not take any."""
_MAX_MESSAGE = 200
"""Length at which a template's error message is cut."""


def load_tokenizer(source: ModelSource) -> Any | None:
    """The tokenizer of a Hugging Face model, or None when it has none. Raises ModelError."""
    if (source.folder / "tekken.json").is_file() and not (source.folder / TOKENIZER_FILE).is_file():
        raise ModelError(
            f"the tokenizer of {source.name} is in tekken.json, which is not read: add its {TOKENIZER_FILE}"
        )
    if not any((source.folder / name).is_file() for name in _SOURCES):
        return None
    try:
        tokenizer = _load(source)
    except ModelError:
        if (source.folder / TOKENIZER_FILE).is_file():
            raise
        present = ", ".join(name for name in _SOURCES if (source.folder / name).is_file())
        raise ModelError(
            f"the tokenizer of {source.name} cannot be loaded: {TOKENIZER_FILE} is missing, and cannot be "
            f"made from the files there ({present}): add it"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(f"{source.name} has no fast tokenizer, which the runtime needs: add its tokenizer.json")
    if tokenizer.split_special_tokens:  # the runtime's tokenizer does not
        raise ModelError(f"the tokenizer of {source.name} has split_special_tokens, which is not supported: remove it")
    return tokenizer


def _load(source: ModelSource) -> Any:
    """The tokenizer, saved by any transformers.

    Version 4 keeps what tokenizer.json says, whatever class the configuration names, but does not know the name that 5
    gives to that file alone. In 5 the class of a model, Qwen2's say, puts its own splitting and normalisation in place.
    """
    config = read_json(source.folder / "tokenizer_config.json")
    config = config if isinstance(config, dict) else {}
    named = str(config.get("tokenizer_class"))
    own_code = "auto_map" in config and not hasattr(transformers, named)  # which AutoTokenizer refuses
    as_it_is = (source.folder / TOKENIZER_FILE).is_file() and not own_code if _MADE_ANEW else named == _BACKEND
    kind: Any = PreTrainedTokenizerFast if as_it_is else AutoTokenizer
    options: dict[str, Any] = {}
    if not _MADE_ANEW and isinstance(extra := config.get("extra_special_tokens"), list):
        options = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    tokenizer = from_pretrained(kind, source, part="tokenizer", **options)
    files = {*getattr(tokenizer, "vocab_files_names", {}).values()} - {TOKENIZER_FILE}
    if not (source.folder / TOKENIZER_FILE).is_file() and not all((source.folder / name).is_file() for name in files):
        raise ModelError("its vocabulary is missing")  # of which transformers 5 makes an empty tokenizer
    processor = read_json(source.folder / _PROCESSOR_TEMPLATE)
    if tokenizer.chat_template is None and isinstance(processor, dict):
        template = processor.get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> TokenizerFacts:
    """Write the files of a tokenizer into `folder`."""
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER_FILE))
    template = _chat_template(tokenizer)
    if template:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return TokenizerFacts(
        TOKENIZER_FILE, TEMPLATE_FILE if template else None, _special_tokens(tokenizer), _message_rules(tokenizer)
    )


def check_chat_template(tokenizer: Any, name: str) -> str | None:
    """Reject a chat template that the runtime does not render as transformers does.

    name: of the model, for messages. Returns why it rejects a user message without a system message; None: it does not.
    Raises ModelError.
    """
    template = _chat_template(tokenizer)
    if not template:
        return None
    rejections = [_compare(tokenizer, template, messages, name) for messages in _CONVERSATIONS]
    if None not in rejections:
        raise _template_error(name, f"cannot render a user message, with or without a system message: {rejections[0]}")
    return rejections[0]


def _compare(tokenizer: Any, template: str, messages: list[dict[str, str]], name: str) -> str | None:
    """None where both sides render the same text, their reason where both reject the messages. Raises ModelError."""
    for _ in range(2):  # a template may print the time, and the second may change in between
        theirs, why_not_theirs = _rendered(lambda: render_chat(tokenizer, messages, add_generation_prompt=True))
        ours, why_not_ours = _rendered(lambda: ChatTemplate(template, _special_tokens(tokenizer)).render(messages))
        if ours is not None and ours == theirs:
            return None
    if ours is None and theirs is None:
        return why_not_theirs
    if ours is None:
        problem = f"fails where the bundle runs, though not in transformers: {why_not_ours}"
    elif theirs is None:
        problem = f"fails in transformers: {why_not_theirs}"
    else:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        problem = (
            f"gives another text where the bundle runs than in transformers, from character {at} on: "
            f"{ours[at : at + 20]!r}, not {theirs[at : at + 20]!r}"
        )
    raise _template_error(name, problem)


def _template_error(name: str, problem: str) -> ModelError:
    return ModelError(
        f"the chat template of {name} {problem}; correct or remove it ({TEMPLATE_FILE}, tokenizer_config.json)"
    )


def end_tokens(tokenizer: Any | None, tokens: Sequence[str], vocab_size: int, name: str) -> list[int]:
    """Ids of the tokens of --eos. name: of the model, for messages. Raises OptionError."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    for token in tokens:
        if not vocabulary.get(token, vocab_size) < vocab_size:
            why = f"{name} has no tokenizer" if tokenizer is None else f"{name} has no such token"
            raise OptionError(f"--eos is {token!r}; {why}")
    return [vocabulary[token] for token in tokens]


def end_of_turn(tokenizer: Any) -> tuple[int, str] | None:
    """The special token that the chat template puts after an answer, as (id, text); None without one."""
    answer = {"role": "assistant", "content": "Boil it."}
    texts = [
        _rendered(lambda m=messages: render_chat(tokenizer, [*m, answer]))[0]  # type: ignore[misc]
        for messages in _CONVERSATIONS
    ]
    _, found, rest = next(filter(None, texts), "").rpartition(answer["content"])
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    following = [token for token in special if found and rest.strip().startswith(token)]
    return (special[longest], longest) if (longest := max(following, key=len, default=None)) is not None else None


def _rendered(render: Callable[[], str]) -> tuple[str | None, str]:
    """The text, or None and the error."""
    try:
        return render(), ""
    except Exception as error:  # a template is a program and may raise anything
        cause = error.__context__ if isinstance(error, PromptError) and error.__context__ else error
        why = " ".join(str(cause).split()) or type(cause).__name__
        return None, why if len(why) <= _MAX_MESSAGE else f"{why[:_MAX_MESSAGE]} …"


def _chat_template(tokenizer: Any) -> str | None:
    """The template that goes into a bundle."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template or None


def template_checksum(tokenizer: Any | None) -> str | None:
    """SHA-256 of the template that goes into a bundle; None without one."""
    template = None if tokenizer is None else _chat_template(tokenizer)
    return template and hashlib.sha256(template.encode()).hexdigest()


def _special_tokens(tokenizer: Any) -> dict[str, str | list[str]]:
    """By role; additional_special_tokens is a list."""
    every = dict(tokenizer.special_tokens_map)
    more = getattr(tokenizer, "extra_special_tokens", None)  # as transformers 5 calls them
    if isinstance(more, list) and more:
        every["additional_special_tokens"] = more
    return {role: [str(t) for t in token] if isinstance(token, list) else str(token) for role, token in every.items()}


def _message_rules(tokenizer: Any) -> list[str]:
    """What the installed transformers does to messages before a template sees them, of MESSAGE_RULES."""
    message = {"role": "user", "name": None, "content": [{"text": None}], "reasoning": "so"}
    seen = render_chat(tokenizer, [message], chat_template="{{ messages | tojson }}")
    for count in range(len(MESSAGE_RULES) + 1):
        for rules in combinations(MESSAGE_RULES, count):
            if json.dumps(follow(rules, [message])) == seen:
                return [*rules]
    raise ModelError(
        f"transformers {transformers.__version__} hands other messages to a chat template than it is given, in a way "
        "that bundles do not know: install a version that the exporter has been tested with"
    )


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation as transformers renders it: the same in its versions 4 and 5.

    options: of `apply_chat_template`, and variables of the template. Raises whatever the template raises.
    """
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **{**_special_tokens(tokenizer), **options}))
