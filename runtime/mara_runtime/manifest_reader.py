"""The only reader of `manifest.json`: every field is checked, and an unknown one is refused."""

from __future__ import annotations

import re
from typing import Any

from mara_runtime.config import ENGINES, FALLBACKS
from mara_runtime.errors import BundleError
from mara_runtime.json_reader import JsonReader, load_object, shortened
from mara_runtime.manifest import (
    ENGINE_TARGETS,
    MESSAGE_RULES,
    SCHEMA_VERSION,
    AdapterFacts,
    AgentFacts,
    EngineFacts,
    FileEntry,
    GraphFacts,
    Manifest,
    ModelFacts,
    TokenizerFacts,
    checksum,
    is_agent_name,
)
from mara_runtime.reports import (
    AGENT_NUMBERS,
    AGENT_OUTCOMES,
    MODEL_NUMBERS,
    MODEL_OUTCOMES,
    read_build,
    read_parity,
    read_quantisation,
    read_structure,
)
from mara_runtime.tensors import CACHE_BYTES, CacheGroup, ModelShape
from mara_runtime.training import Training

MOST_NAME = 255
"""Characters of a file's name, with its folders."""


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
                adapter=self._adapter("model.adapter"),
                architecture=self.text("model.architecture"),
                tested=self.get("model.tested", bool),
                shape=self._shape("model.shape"),
                intermediate_size=self.count("model.intermediate_size"),
                experts=self.count("model.experts", least=0),
                tied=self.get("model.tied", bool),
                eos_token_ids=self.counts("model.eos_token_ids", least=0),
                weights=self.text("model.weights"),
                ignored_weights=tuple(self.texts("model.ignored_weights")),
            ),
            agents=self._agents(),
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
                message_rules=self._message_rules("tokenizer.message_rules"),
            ),
            made_with=self.dict_of(str, "made_with", shown=True),
            parity=read_parity(self, "parity", MODEL_NUMBERS, MODEL_OUTCOMES),
            structure=read_structure(self, "structure"),
            noise=self._noise("noise"),
            files={
                name: FileEntry(entry["size_bytes"], entry["sha256"])
                for name, entry in self.dict_of(dict, "files").items()
                if self._is_file_entry(name, entry)
            },
        )

    def _shape(self, path: str) -> ModelShape:
        caches = tuple(
            CacheGroup(**{name: self.count(f"{path}.caches.{i}.{name}") for name in CacheGroup.__dataclass_fields__})
            for i in range(len(self.get(f"{path}.caches", list)))
        )
        sizes = ("hidden_size", "vocab_size", "num_layers", "num_heads")
        shape = ModelShape(**{name: self.count(f"{path}.{name}") for name in sizes}, caches=caches)
        if not 0 < shape.num_caches <= shape.num_layers:
            raise self.wrong(f"{path}.caches", f"has {shape.num_caches} caches for {shape.num_layers} layers")
        if len({(group.kv_heads, group.head_dim) for group in caches}) < len(caches):
            raise self.wrong(f"{path}.caches", "has two groups of the same size")
        return shape

    def _adapter(self, path: str) -> AdapterFacts | None:
        if self.get(path, dict, type(None)) is None:
            return None
        return AdapterFacts(
            source=self.text(f"{path}.source"),
            revision=self.get(f"{path}.revision", str, type(None)),
            base=None if self.get(f"{path}.base", str, type(None)) is None else self.text(f"{path}.base"),
            rank=self.count(f"{path}.rank"),
            weights=self.count(f"{path}.weights"),
            sha256=self.text(f"{path}.sha256"),
        )

    def _targets(self) -> tuple[str, ...]:
        targets = self.texts("targets")
        if not targets or not {*targets} <= {*ENGINES}:
            raise self.wrong("targets", f"is {shortened(targets)}, not a list of {', '.join(ENGINES)}")
        return tuple(targets)

    def _agents(self) -> tuple[AgentFacts, ...]:
        agents: dict[str, AgentFacts] = {}
        for i in range(len(self.get("agents", list))):
            agent = self._agent(f"agents.{i}")
            if agent.name in agents:
                raise self.wrong(f"agents.{i}.name", f"is {agent.name}, as that of another agent")
            agents[agent.name] = agent
        return tuple(agents.values())

    def _agent(self, path: str) -> AgentFacts:
        name, file = self.text(f"{path}.name"), self._file(f"{path}.file")
        known = rf"agents/{re.escape(name)}(-[0-9a-f]{{12}})?\.safetensors"
        if not is_agent_name(name) or not re.fullmatch(known, file):
            raise self.wrong(f"{path}.name", f"is {shortened(name)}, which does not go with the file {shortened(file)}")
        hidden_size, expected = self.count(f"{path}.hidden_size"), self.count("model.shape.hidden_size")
        if hidden_size != expected:
            raise self.wrong(f"{path}.hidden_size", f"is {hidden_size}, and that of the model is {expected}")
        return AgentFacts(
            name=name,
            file=file,
            source=self.text(f"{path}.source"),
            hidden_size=hidden_size,
            widths=self._widths(f"{path}.widths"),
            fallback=self.text(f"{path}.fallback", FALLBACKS),
            state=self.text(f"{path}.state"),
            training=Training.read(self, f"{path}.training"),
            parity=read_parity(self, f"{path}.parity", AGENT_NUMBERS, AGENT_OUTCOMES),
            noise=self._noise(f"{path}.noise"),
        )

    def _widths(self, path: str) -> tuple[int, int]:
        widths = self.counts(path)
        if len(widths) != 2:
            raise self.wrong(path, f"is {shortened(list(widths))}, not two widths")
        return widths[0], widths[1]

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
            places=self.count(f"{path}.places"),
            shared_rows=self.count(f"{path}.shared_rows"),
            agents=self.count(f"{path}.agents"),
            agent_widths=self._widths(f"{path}.agent_widths"),
            in_place=self.get(f"{path}.in_place", bool),
            version=self.text(f"{path}.version"),
            compute_capability=self.text(f"{path}.compute_capability"),
            platform=self.text(f"{path}.platform"),
            options=read_build(self, f"{path}.options"),
        )

    def _noise(self, path: str) -> float | None:
        return None if self.get(path, int, float, type(None)) is None else self.number(path)

    def _special_tokens(self, path: str) -> dict[str, str | list[str]]:
        tokens: dict[str, str | list[str]] = self.get(path, dict)
        for token in tokens.values():
            if not isinstance(token, str) and not (isinstance(token, list) and all(isinstance(t, str) for t in token)):
                raise self.wrong(path, f"has {shortened(token)}, which is neither a text nor a list of texts")
        return tokens

    def _message_rules(self, path: str) -> list[str]:
        rules = self.texts(path)
        if unknown := sorted({*rules} - {*MESSAGE_RULES}):
            raise self.wrong(path, f"has {shortened(unknown[0])}, not one of {', '.join(MESSAGE_RULES)}")
        return rules

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
