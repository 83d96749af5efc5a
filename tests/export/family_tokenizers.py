"""Tokenizers as the families have them, trained here on a few lines: splitting, flags, classes, configurations.

The vocabularies are trained without splitting texts: their ids show where and how a family splits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Split
from tokenizers.trainers import BpeTrainer

ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
UNK, BOS, _ = ROLES.values()
LINES = (
    "How do I cook rice? It's 20 minutes, isn't it? I'LL try; we've got 12345 bags; 1,234.5 each, 2024.",
    "def parseHTTP(x):\n    if x:\n\t\treturn  x ** 2\n\n\nprint(f(10))",
    "Das Brötchen kostet 3 Euro. 日本語のテキスト。 naïve café — “quoted” … 👩‍👩‍👧 🇩🇪",
)
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{letters}{CONTRACTED}?" for letters in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")
)
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPACES = normalizers.Replace(" ", "▁")
UNDO = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


@cache
def trained(by_bytes: bool) -> str:
    """A tokenizer.json: byte-level BPE, or pieces with ▁ for spaces and a token for each byte of other characters."""
    if by_bytes:
        tokenizer, byte_tokens, alphabet = Tokenizer(models.BPE()), [], ByteLevel.alphabet()
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True))
        byte_tokens, alphabet = [f"<0x{byte:02X}>" for byte in range(256)], []
        tokenizer.normalizer = SPACES
        tokenizer.decoder = decoders.Sequence(UNDO)
    words = {"special_tokens": [*ROLES.values(), *byte_tokens], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(LINES, BpeTrainer(vocab_size=900, show_progress=False, **words))
    content = json.loads(tokenizer.to_str())
    del content["added_tokens"][len(ROLES) :]  # those of the bytes
    return json.dumps(content)


def byte_level(*splits: str | Any, **parts: Any) -> Tokenizer:
    """splits: patterns; GPT-2's follows other ones."""
    steps = [Split(Regex(split), behavior="isolated") if isinstance(split, str) else split for split in splits]
    last = ByteLevel(add_prefix_space=False, use_regex=not isinstance(splits[-1], str))
    return assembled(by_bytes=True, pre_tokenizer=pre_tokenizers.Sequence([*steps, last]), **parts)


def pieces(first: tuple[str, ...] = (BOS,), **parts: Any) -> Tokenizer:
    return assembled(by_bytes=False, first=first, **parts)


def assembled(by_bytes: bool, first: tuple[str, ...] = (), ignore_merges: bool = False, **parts: Any) -> Tokenizer:
    """first: tokens before each text."""
    tokenizer = Tokenizer.from_str(trained(by_bytes))
    tokenizer.model.ignore_merges = ignore_merges
    tokenizer.add_special_tokens([*first])
    if first:
        ids = [(token, tokenizer.token_to_id(token)) for token in first]
        tokenizer.post_processor = processors.TemplateProcessing(single=[*first, "$A"], special_tokens=ids)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def tokens(*texts: str, special: bool = True, **flags: bool) -> tuple[AddedToken, ...]:
    return tuple(AddedToken(text, special=special, normalized=False, **flags) for text in texts)


@dataclass(frozen=True)
class FamilyTokenizer:
    """A tokenizer.json, and what the files beside it say."""

    model_type: str
    tokenizer_class: str
    tokens: tuple[AddedToken, ...]
    """added; the first begins a message, the second ends it"""
    tokenizer: Tokenizer
    more: dict[str, Any] = field(default_factory=dict)
    """in tokenizer_config.json"""

    def __post_init__(self) -> None:
        self.tokenizer.add_tokens([*self.tokens])

    @property
    def config(self) -> dict[str, Any]:
        """Of tokenizer_config.json."""
        begin, end = (token.content for token in self.tokens[:2])
        message = f"{begin}{{{{ m.role ~ '\\n' ~ m.content }}}}{end}\n{{{{ '\\n' }}}}"
        template = f"{{{{ bos_token }}}}{{% for m in messages %}}{message}{{% endfor %}}{begin}assistant"
        return {**ROLES, "tokenizer_class": self.tokenizer_class, "chat_template": template, **self.more}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        self.tokenizer.save(str(folder / "tokenizer.json"))
        added = {i: token.__getstate__() for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        config = {**self.config, "added_tokens_decoder": added}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "config.json").write_text(json.dumps({"model_type": self.model_type}), encoding="utf-8")


CHATML, THINK = tokens("<|im_start|>", "<|im_end|>"), tokens("<think>", special=False)
INST = tokens("[INST]", "[/INST]")
STRIPPED = {"decoder": decoders.Sequence([*UNDO, decoders.Strip(" ", 1, 0)])}
PREPENDED = {"normalizer": normalizers.Sequence([normalizers.Prepend("▁"), SPACES]), **STRIPPED}
METASPACE = {"normalizer": None, "pre_tokenizer": Metaspace(prepend_scheme="first", split=False), **STRIPPED}
SPLIT = {"pre_tokenizer": Split(" ", behavior="merged_with_previous")}
NFC = {"normalizer": normalizers.NFC()}
DIGITS = Digits(individual_digits=True)
GPT2 = {"add_prefix_space": False, "add_bos_token": False}
FAMILIES = {
    "Llama 3, OLMo 2 and 3": FamilyTokenizer(
        "llama",
        "PreTrainedTokenizerFast",
        (*CHATML, *tokens("|||IP|||", special=False, single_word=True)),
        byte_level(rf"{WORDS}|\p{{N}}{{1,3}}{REST}", first=(BOS,), ignore_merges=True),
        {"clean_up_tokenization_spaces": True},
    ),
    "Qwen 2 and 3, SmolLM 3": FamilyTokenizer(
        "qwen3",
        "Qwen2Tokenizer",
        CHATML + THINK,
        byte_level(rf"{WORDS}|\p{{N}}{REST}", **NFC),
        {"bos_token": None, "add_bos_token": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
    ),
    "Mistral 0.1, Mixtral": FamilyTokenizer(
        "mistral", "LlamaTokenizer", INST, pieces(**PREPENDED), {"legacy": True, "add_bos_token": True}
    ),
    "Mistral 0.3": FamilyTokenizer(
        "mistral", "LlamaTokenizer", INST, pieces(**METASPACE), {"legacy": False, "add_prefix_space": None}
    ),
    "Ministral 3": FamilyTokenizer(
        "ministral3", "TokenizersBackend", INST, byte_level(rf"{CASED}|\p{{N}}{REST}", first=(BOS,), ignore_merges=True)
    ),
    "Phi 3": FamilyTokenizer(
        "phi3",
        "LlamaTokenizer",
        tokens("<|user|>", "<|end|>", rstrip=True),
        pieces(first=(), **PREPENDED),
        {"legacy": False, "add_bos_token": False},
    ),
    "Phi 4 mini, gpt-oss": FamilyTokenizer(
        "phi3",
        "GPT2Tokenizer",
        tokens("<|user|>", "<|end|>", lstrip=True, rstrip=True),
        byte_level(rf"{CASED}|\p{{N}}{{1,3}}{REST}"),
        GPT2,
    ),
    "Gemma 1 to 3": FamilyTokenizer(
        "gemma2",
        "GemmaTokenizer",
        tokens("<start_of_turn>", "<end_of_turn>", "<pad>", "<mask>") + tokens("\n\n", "▁▁", special=False),
        pieces(**SPLIT),
        {"add_bos_token": True, "extra_special_tokens": {"image_token": "<image>"}},
    ),
    "Gemma 4": FamilyTokenizer(
        "gemma4", "GemmaTokenizer", tokens("<|turn>", "<turn|>"), pieces(**SPLIT), {"extra_special_tokens": ["<|turn>"]}
    ),
    "SmolLM 2, Granite, StarCoder 2": FamilyTokenizer("llama", "GPT2Tokenizer", CHATML, byte_level(DIGITS), GPT2),
    "EXAONE 4": FamilyTokenizer(
        "exaone4",
        "GPT2Tokenizer",
        tokens("[|user|]", "[|endofturn|]"),
        byte_level(rf"{CASED}|\p{{N}}{REST}", **NFC),
        GPT2,
    ),
    "Hunyuan": FamilyTokenizer(
        "hunyuan_v1_dense",
        "PreTrainedTokenizerFast",
        tokens("<｜user｜>", "<｜end▁of▁turn｜>"),
        byte_level(r"\p{N}{1,3}", r"[一-龥\u3040-ゟ゠-ヿ]+", rf"{WORDS}|\p{{N}}{REST}"),
    ),
    "GLM 4": FamilyTokenizer(
        "glm4",
        "PreTrainedTokenizer",
        tokens("<|user|>", "<|observation|>") + THINK,
        byte_level(rf"{WORDS}|\p{{N}}{{1,3}}{REST}", first=("[gMASK]", "<sop>")),
        {"bos_token": None, "do_lower_case": False, "remove_space": False},
    ),
    "Cohere 2": FamilyTokenizer(
        "cohere2",
        "CohereTokenizer",
        CHATML,
        byte_level(DIGITS, first=(BOS,), **NFC),
        {"add_bos_token": True, "add_prefix_space": False, "legacy": True},
    ),
}
