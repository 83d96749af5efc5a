"""`manifest.json` of a bundle as dataclasses; manifest_reader.py reads it, docs/reference/bundle.md specifies it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mara_runtime.errors import OptionError
from mara_runtime.json_reader import shortened
from mara_runtime.tensors import ModelShape, spare_slots
from mara_runtime.training import Training

SCHEMA_VERSION = 4
MANIFEST_FILE = "manifest.json"
_AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets with engine files in the bundle; the others load its graph."""
MESSAGE_RULES = ("leave_out_null", "alias_reasoning")
"""What versions of transformers do to messages before a chat template sees them, in this order."""


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of one file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class AdapterFacts:
    """A LoRA adapter that was merged into the LLM."""

    source: str
    revision: str | None
    base: str | None
    """the model that it says it was trained on"""
    rank: int
    """its largest"""
    weights: int
    """how many it changes"""
    sha256: str
    """of its file"""


@dataclass(frozen=True)
class ModelFacts:
    """The frozen LLM: its source and sizes."""

    source: str
    revision: str | None
    adapter: AdapterFacts | None
    architecture: str
    tested: bool
    """its family is on the exporter's list; False: it was tried, and judged by the gates alone"""
    shape: ModelShape
    intermediate_size: int
    """width of the MLP, or of each expert"""
    experts: int
    """in a layer; 0: it has one MLP"""
    tied: bool
    """the LM head is the embedding's table"""
    eos_token_ids: tuple[int, ...]
    weights: str
    """fingerprint, to be compared with that of the model an agent was trained for"""
    ignored_weights: tuple[str, ...]
    """patterns of weights that lay in the checkpoint and were left out"""

    @property
    def name(self) -> str:
        """Of the model as it decodes."""
        return self.source if self.adapter is None else adapted_name(self.source, self.adapter.source)


def adapted_name(model: str, adapter: str) -> str:
    """What a model with an adapter is called."""
    return f"{model} + {adapter}"


@dataclass(frozen=True)
class AgentFacts:
    """An accept/reject agent."""

    name: str
    file: str
    """agents/<name>.safetensors, as it was trained; of one that replaced another, with its checksum after the name"""
    source: str
    hidden_size: int
    widths: tuple[int, int]
    fallback: str
    """emitted when all candidates are rejected: "first" or "last", by LM rank"""
    state: str
    """which hidden state it takes"""
    training: Training | None
    """None: not known, as of released agents"""
    parity: dict[str, Any] | None
    """report of its gate; None when it was skipped"""
    noise: float | None
    """of its margins between pass widths, as the gate measured it, ≥ 0; None when not measured"""


def is_agent_name(name: str) -> bool:
    """May an agent be called so? Names are parts of file names and of options."""
    return _AGENT_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class GraphFacts:
    """The ONNX graph: file, lowering, precision."""

    file: str
    lowering: str
    precision: str
    quantisation: dict[str, Any] | None
    """bits, block_size, quantiser, keep; None when not quantised"""
    cache: str
    """type of KV entries and of the LLM's activations: one of CACHE_BYTES"""


@dataclass(frozen=True)
class EngineFacts:
    """One TensorRT engine file of the bundle's graph, for one size of the KV cache."""

    target: str
    """tensorrt or tensorrt-rtx"""
    file: str
    slots: int
    """size of the KV cache, C, which is fixed in the file"""
    decode_rows: int
    """most rows of a pass in the first optimisation profile, which is for one conversation"""
    prefill_rows: int
    """most rows of a pass in the second, likewise"""
    head_rows: int
    """most rows of a conversation that go through the LM head in one pass"""
    places: int
    """most conversations in one pass; of more than one, in a third profile"""
    shared_rows: int
    """most rows of one of them there; of all, so many and `decode_rows`"""
    agents: int
    """most agents at once"""
    agent_widths: tuple[int, int]
    """of their hidden layers; narrower ones are padded"""
    in_place: bool
    """present is written over past; False: into a second copy, and the two swap roles after each pass"""
    version: str
    """of the TensorRT that built it; the same must run it, unless `options` has version_compatible"""
    compute_capability: str
    """of the GPU it was built for, like 8.7; 8.0+ includes later ones"""
    platform: str
    """operating system and processor, like linux-aarch64"""
    options: dict[str, Any]
    """how it was built, for information"""


@dataclass(frozen=True)
class TokenizerFacts:
    """Tokenizer and chat template; a bundle without a tokenizer decodes token ids only."""

    file: str
    chat_template: str | None
    special_tokens: dict[str, str | list[str]]
    """by the names that chat templates use: bos_token, eos_token, …"""
    message_rules: list[str]
    """of MESSAGE_RULES: what the transformers that exported it does to messages before the template sees them"""


@dataclass(frozen=True)
class Noise:
    """Differences between pass widths, as the parity gates measured them for this bundle; ≥ 0."""

    margins: float
    """of a mix of agents"""
    logits: float
    """nats"""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    model: ModelFacts
    agents: tuple[AgentFacts, ...]
    """by name, the default first; may be empty"""
    max_context: int
    """tokens of prompt and answer together"""
    max_candidates: int
    """most candidates of a position"""
    targets: tuple[str, ...]
    """engines that the bundle was exported for"""
    step: GraphFacts
    engines: tuple[EngineFacts, ...]
    """TensorRT engine files of that graph; may be empty"""
    tokenizer: TokenizerFacts | None
    made_with: dict[str, str]
    """{package: version}"""
    parity: dict[str, Any] | None
    """report of the parity gate; None when it was skipped"""
    structure: dict[str, Any] | None
    """report of the structural gate: of a miniature of the model, in this lowering; None when it was skipped"""
    noise: float | None
    """of logits between pass widths, in nats; None when not measured"""
    files: dict[str, FileEntry]
    """every file except the manifest, by its path in the bundle"""

    @property
    def slots(self) -> int:
        """KV slots that decoding may need: of a full context, and of one more decision."""
        return self.max_context + spare_slots(self.max_candidates)

    def agent(self, name: str) -> AgentFacts:
        """The agent of that name. Raises OptionError."""
        for agent in self.agents:
            if agent.name == name:
                return agent
        known = ", ".join(agent.name for agent in self.agents)
        raise OptionError(f"--agent is {shortened(name)}; the bundle has {known or 'none: add one with mara-agent'}")

    def mixed_noise(self, mix: Mapping[str, float]) -> Noise | None:
        """The noise of decoding with a mix of agents; None: not known."""
        noises = [self.agent(name).noise for name in mix]
        if self.noise is None or None in noises:
            return None
        return Noise(
            sum(abs(part) * (noise or 0.0) for part, noise in zip(mix.values(), noises, strict=True)), self.noise
        )

    def doubts(self, name: str) -> list[str]:
        """Why an agent may not align this model, one clause each."""
        training = self.agent(name).training
        if training is None:
            return []
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        checksum = None if template is None else self.files[template].sha256
        return list(training.doubts(self.model.name, self.model.weights, checksum))

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": checksum(content)}, indent=1, ensure_ascii=False) + "\n"


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, `sha256` itself left out, however it is laid out."""
    said = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
