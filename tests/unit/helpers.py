"""What several unit tests share: bundles of dummy files, tokenizers made on the spot, tables for TableEngine."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mara_runtime.manifest import MANIFEST_FILE
from mara_runtime.table_engine import TableEngine

Lookup = Callable[[tuple[int, ...]], tuple[NDArray[np.float32], NDArray[np.float32]]]

# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_bundle(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    special_tokens: dict[str, str] | None = None,
    vocab_size: int = 12,
    hidden_size: int = 2,
    eos_token_ids: Sequence[int] = (0,),
    max_context: int = 32,
    max_candidates: int = 8,
    fallback: str = "first",
    targets: Sequence[str] = ("cpu",),
) -> Path:
    """Write a bundle whose manifest is valid and whose graphs are dummies: no engine can run it. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"llm.onnx": b"a graph", "llm.onnx.data": bytes(range(256)), "agent.onnx": b"another graph"}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_str().encode()
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    manifest = manifest_json(files, has_tokenizer=tokenizer is not None, special_tokens=special_tokens or {})
    manifest["model"]["shape"].update(vocab_size=vocab_size, hidden_size=hidden_size)
    manifest["model"]["eos_token_ids"] = list(eos_token_ids)
    manifest["agent"].update(hidden_size=hidden_size, fallback=fallback)
    manifest.update(max_context=max_context, max_candidates=max_candidates, targets=list(targets))
    write_manifest(folder, manifest)
    return folder


def manifest_json(
    files: dict[str, bytes], *, has_tokenizer: bool = False, special_tokens: dict[str, str] | None = None
) -> dict[str, Any]:
    """A valid manifest of these files, as the JSON value that docs/bundle.md specifies."""
    tokenizer = {
        "file": "tokenizer.json",
        "chat_template": "chat_template.jinja" if "chat_template.jinja" in files else None,
        "special_tokens": special_tokens or {},
    }
    return {
        "schema_version": 1,
        "model": {
            "source": "example/tiny",
            "revision": "0123abc",
            "architecture": "qwen2",
            "shape": {
                "hidden_size": 2,
                "vocab_size": 12,
                "num_layers": 1,
                "num_heads": 2,
                "num_kv_heads": 1,
                "head_dim": 4,
            },
            "eos_token_ids": [0],
        },
        "agent": {"source": "agent.pth", "hidden_size": 2, "widths": [8, 4], "fallback": "first", "state": "final"},
        "max_context": 32,
        "max_candidates": 8,
        "targets": ["cpu"],
        "llm": {"file": "llm.onnx", "lowering": "ort", "precision": "fp32"},
        "agent_graph": {"file": "agent.onnx", "lowering": "portable", "precision": "fp32"},
        "tokenizer": tokenizer if has_tokenizer else None,
        "made_with": {"mara-deploy": "0.1.0"},
        "parity": {"prompts": 2, "rows": 40},
        "files": {
            name: {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "io": {"llm": {"inputs": [], "outputs": []}},
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, manifest: object) -> None:
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Enter a file in the manifest and, where its name allows that, write it."""
    manifest = read_manifest(folder)
    manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, manifest)
    (folder / name).write_bytes(content)


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────────────────────────

SPECIAL_TOKENS = ("<eos>", "<bos>", "<user>", "<assistant>")
EOS, BOS, USER, ASSISTANT = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE of every byte and a few merges, one of which ends inside a character; it adds <bos> by itself."""
    merges = [("h", "e"), ("l", "l"), ("Ġ", "t"), ("ä", "¸")]  # the last: the first two of the three bytes of 中
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece style, as Llama 2 and Mistral have it: ▁ for spaces, a token a byte for what it does not know."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁▁", "é", "中"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)}, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


# ── a language model and an agent out of a hash ──────────────────────────────────────────────────────────────────────


def hash_table(seed: int, vocab_size: int, levels: int, peak: float) -> Lookup:
    """A language model of its own for every seed: logits (V,) and a hidden state (2,) by prefix, from a hash.

    levels: the logits take so many values, so few levels mean ties; peak: their spread, so a large one means
    positions with a single candidate. Hidden states are multiples of 1/4: margins are exact, and meet thresholds.
    """

    @cache
    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        digest = hashlib.shake_128(f"{seed}:{prefix}".encode()).digest(vocab_size + 2)
        logits = [peak * (byte % levels) / levels for byte in digest[:vocab_size]]
        hidden = [(byte % 8 - 4) / 4 for byte in digest[vocab_size:]]
        return np.array(logits, np.float32), np.array(hidden, np.float32)

    return lookup


def sum_agent(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, 2) hidden states to (N,) margins: their sum."""
    return hidden[:, 0] + hidden[:, 1]


class CountingEngine(TableEngine):
    """A TableEngine that records its calls, and that overwrites what it returned as soon as it is called again."""

    def __init__(
        self, lookup: Lookup, agent: Callable[[NDArray[np.float32]], NDArray[np.float32]] = sum_agent, slots: int = 512
    ) -> None:
        super().__init__(lookup, agent, slots)
        self.calls: list[tuple[list[int], list[int], int, list[int]]] = []
        """(tokens, positions, slot, logits_rows) of every forward pass"""
        self.asked: list[int] = []
        """number of hidden states of every call of the agent"""
        self.moves: list[tuple[int, int]] = []
        self._given: list[NDArray[np.float32]] = []

    def forward(self, tokens: Sequence[int], positions: Sequence[int], slot: int, logits_rows: Sequence[int]) -> Any:
        self.calls.append((list(tokens), list(positions), slot, list(logits_rows)))
        for array in self._given:
            array.fill(np.nan)
        out = super().forward(tokens, positions, slot, logits_rows)
        self._given = [out.hidden, out.logits]
        return out

    def margins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        self.asked.append(len(hidden))
        return super().margins(hidden)

    def move(self, source: int, target: int) -> None:
        self.moves.append((source, target))
        super().move(source, target)


def scripted(
    logits: dict[tuple[int, ...], dict[int, float]], margins: dict[tuple[int, ...], float], vocab_size: int = 8
) -> Lookup:
    """A table written out by hand: {prefix: {token: logit}}, the other tokens at -inf, and {prefix: margin}.

    A prefix without logits goes on with token 7 alone; one without a margin is rejected (-1).
    """

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        row = np.full(vocab_size, -np.inf, np.float32)
        for token, logit in logits.get(prefix, {7: 0.0}).items():
            row[token] = logit
        return row, np.array([margins.get(prefix, -1.0), 0.0], np.float32)

    return lookup
