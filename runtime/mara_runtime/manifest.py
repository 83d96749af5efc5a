"""`manifest.json` of a bundle as dataclasses, and its only reader; docs/reference/bundle.md specifies the format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mara_runtime.config import ENGINES, FALLBACKS
from mara_runtime.errors import BundleError
from mara_runtime.json_reader import JsonReader, load_object, shortened
from mara_runtime.reports import read_build, read_parity, read_quantisation
from mara_runtime.tensors import CACHE_BYTES, ModelShape, spare_slots
from mara_runtime.training import Training

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
MOST_NAME = 255
"""Characters of a file's name, with its folders."""
ENGINE_TARGETS = ("tensorrt", "tensorrt-rtx")
"""Targets with engine files in the bundle; the others load its graph."""


@dataclass(frozen=True)
class FileEntry:
    """Size and checksum of one file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModelFacts:
    """The frozen LLM: its source and sizes."""

    source: str
    revision: str | None
    architecture: str
    shape: ModelShape
    intermediate_size: int
    """width of the MLP"""
    tied: bool
    """the LM head is the embedding's table"""
    eos_token_ids: tuple[int, ...]
    weights: str
    """fingerprint, to be compared with that of the model an agent was trained for"""
    ignored_weights: tuple[str, ...]
    """patterns of weights that lay in the checkpoint and were left out"""


@dataclass(frozen=True)
class AgentFacts:
    """The accept/reject agent."""

    source: str
    hidden_size: int
    widths: tuple[int, ...]
    fallback: str
    """emitted when all candidates are rejected: "first" or "last", by LM rank"""
    state: str
    """which hidden state it takes"""
    training: Training | None
    """None: not known, as of released agents"""


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
    """most rows of a pass in the first optimisation profile"""
    prefill_rows: int
    """most rows of a pass in the second"""
    head_rows: int
    """most rows through the LM head in one pass, in both"""
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


@dataclass(frozen=True)
class Noise:
    """Differences between pass widths, as the parity gate measured them for this bundle; ≥ 0."""

    margins: float
    logits: float
    """nats"""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    model: ModelFacts
    agent: AgentFacts
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
    noise: Noise | None
    """None when not measured"""
    files: dict[str, FileEntry]
    """every file except the manifest, by its path in the bundle"""

    @property
    def slots(self) -> int:
        """KV slots that decoding may need: of a full context, and of one more decision."""
        return self.max_context + spare_slots(self.max_candidates)

    @property
    def doubts(self) -> list[str]:
        """Why the agent may not align this model, one clause each."""
        if self.agent.training is None:
            return []
        template = None if self.tokenizer is None else self.tokenizer.chat_template
        checksum = None if template is None else self.files[template].sha256
        return list(self.agent.training.doubts(self.model.source, self.model.weights, checksum))

    def to_json(self) -> str:
        """The text of manifest.json."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps({**content, "sha256": checksum(content)}, indent=1, ensure_ascii=False) + "\n"


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, `sha256` itself left out, however it is laid out."""
    said = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(text: str, where: str) -> Manifest:
    """Read the text of a manifest.json. Raises BundleError with the field that is wrong."""
    try:
        root = load_object(text)
    except ValueError as error:
        raise BundleError(f"{where} is not valid manifest JSON ({error}); export the bundle again") from None
    if not isinstance(root, dict) or "schema_version" not in root:
        raise BundleError(f"{where} is not a bundle manifest: it has no schema_version")
    version = root["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema version {shortened(version)}; this release reads version {SCHEMA_VERSION}: "
            "export the bundle again, or install the release that made it"
        )
    reader = _Reader(where, root)
    manifest = reader.manifest()
    reader.count("schema_version")
    stated = reader.text("sha256")
    reader.reject_unknown()
    if stated != checksum(root):
        raise BundleError(
            f"{where} was changed: its content differs from its checksum; copy or export the bundle again"
        )
    return manifest


class _Reader(JsonReader):
    """A manifest, field by field."""

    def manifest(self) -> Manifest:
        tokenizer = self.get("tokenizer", dict, type(None))
        return Manifest(
            model=ModelFacts(
                source=self.text("model.source"),
                revision=self.get("model.revision", str, type(None)),
                architecture=self.text("model.architecture"),
                shape=ModelShape(
                    **{name: self.count(f"model.shape.{name}") for name in ModelShape.__dataclass_fields__}
                ),
                intermediate_size=self.count("model.intermediate_size"),
                tied=self.get("model.tied", bool),
                eos_token_ids=self.counts("model.eos_token_ids", least=0),
                weights=self.text("model.weights"),
                ignored_weights=tuple(self.texts("model.ignored_weights")),
            ),
            agent=AgentFacts(
                source=self.text("agent.source"),
                hidden_size=self.count("agent.hidden_size"),
                widths=self.counts("agent.widths"),
                fallback=self.text("agent.fallback", FALLBACKS),
                state=self.text("agent.state"),
                training=Training.read(self, "agent.training"),
            ),
            max_context=self.count("max_context"),
            max_candidates=self.count("max_candidates"),
            targets=self._targets(),
            step=GraphFacts(
                self._file("step.file"),
                self.text("step.lowering"),
                self.text("step.precision"),
                read_quantisation(self, "step.quantisation"),
                self.text("step.cache", tuple(CACHE_BYTES)),
            ),
            engines=self._engines(),
            tokenizer=None
            if tokenizer is None
            else TokenizerFacts(
                file=self._file("tokenizer.file"),
                chat_template=None
                if self.get("tokenizer.chat_template", str, type(None)) is None
                else self._file("tokenizer.chat_template"),
                special_tokens=self._special_tokens("tokenizer.special_tokens"),
            ),
            made_with=self.dict_of(str, "made_with", shown=True),
            parity=read_parity(self, "parity"),
            noise=self._noise(),
            files={
                name: FileEntry(entry["size_bytes"], entry["sha256"])
                for name, entry in self.dict_of(dict, "files").items()
                if self._is_file_entry(name, entry)
            },
        )

    def _targets(self) -> tuple[str, ...]:
        targets = self.texts("targets")
        if not targets or not {*targets} <= {*ENGINES}:
            raise self.wrong("targets", f"is {shortened(targets)}, not a list of {', '.join(ENGINES)}")
        return tuple(targets)

    def _engines(self) -> tuple[EngineFacts, ...]:
        engines: dict[tuple[str, int], EngineFacts] = {}
        for i in range(len(self.get("engines", list))):
            engine = self._engine(f"engines.{i}")
            if (engine.target, engine.slots) in engines:
                raise self.wrong(
                    f"engines.{i}.slots", f"is {engine.slots}, as that of another engine for {engine.target}"
                )
            engines[engine.target, engine.slots] = engine
        return tuple(engines.values())

    def _engine(self, path: str) -> EngineFacts:
        target, file = self.text(f"{path}.target", ENGINE_TARGETS), self._file(f"{path}.file")
        if not file.startswith(f"engines/{target}/"):
            raise self.wrong(f"{path}.file", f"names {shortened(file)}, which does not lie in engines/{target}/")
        return EngineFacts(
            target=target,
            file=file,
            slots=self.count(f"{path}.slots"),
            decode_rows=self.count(f"{path}.decode_rows"),
            prefill_rows=self.count(f"{path}.prefill_rows"),
            head_rows=self.count(f"{path}.head_rows"),
            in_place=self.get(f"{path}.in_place", bool),
            version=self.text(f"{path}.version"),
            compute_capability=self.text(f"{path}.compute_capability"),
            platform=self.text(f"{path}.platform"),
            options=read_build(self, f"{path}.options"),
        )

    def _noise(self) -> Noise | None:
        if self.get("noise", dict, type(None)) is None:
            return None
        return Noise(margins=self.number("noise.margins"), logits=self.number("noise.logits"))

    def _special_tokens(self, path: str) -> dict[str, str | list[str]]:
        tokens: dict[str, str | list[str]] = self.get(path, dict)
        for token in tokens.values():
            if not isinstance(token, str) and not (isinstance(token, list) and all(isinstance(t, str) for t in token)):
                raise self.wrong(path, f"has {shortened(token)}, which is neither a text nor a list of texts")
        return tokens

    def _file(self, path: str) -> str:
        """The name of a file that `files` lists."""
        name = self.text(path)
        if name not in self.get("files", dict):
            raise self.wrong(path, f"names {shortened(name)}, which is not among the bundle's files")
        return name

    def _is_file_entry(self, name: str, entry: dict[str, Any]) -> bool:
        parts = name.split("/")
        if (
            len(name) > MOST_NAME
            or not name.isprintable()
            or "\\" in name
            or ":" in name
            or any(part in ("", ".", "..") for part in parts)
        ):
            raise self.wrong("files", f"names {shortened(name)}, which does not lie inside the bundle")
        if unknown := sorted(entry.keys() - {"size_bytes", "sha256"}):
            raise self.wrong(f"files[{shortened(name)}][{shortened(unknown[0])}]", "is not known to this release")
        size = entry.get("size_bytes")
        if type(size) is not int or not 0 <= size < 2**63:
            raise self.wrong(f"files[{shortened(name)}].size_bytes", f"is {shortened(size)}")
        if not isinstance(entry.get("sha256"), str):
            raise self.wrong(f"files[{shortened(name)}].sha256", f"is {shortened(entry.get('sha256'))}")
        return True
