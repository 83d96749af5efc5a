"""Shared by the unit tests: bundles of dummy files, small tokenizers, tables for TableEngine."""

import hashlib
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import Pass, StepOutput, Works
from mara_runtime.manifest import MANIFEST_FILE, Noise, checksum
from mara_runtime.schedule.cost import Cost
from mara_runtime.tensors import CacheGroup, ModelShape, step_inputs
from tests import reference
from tests.table_engine import TableEngine
from tests.unit import manifests

F32 = NDArray[np.float32]
Lookup = Callable[[tuple[int, ...]], tuple[F32, F32]]
Judge = Callable[[F32], F32]
"""An agent: hidden states (N, D) to margins (N,)."""

# ── bundles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


TRAINING: dict[str, Any] = {
    "model": "example/tiny",
    "architecture": "qwen2",
    "weights": "0123",
    "chat_template": "4567",
    "template": {},
    "top_k": 3,
    "top_p": 0.4,
    "max_new_tokens": 64,
    "score": "scores:politeness",
    "episodes": 100,
    "updates": 1000,
    "transitions": 5000,
}
"""What an agent was trained under."""


def message(number: int, content: bytes) -> bytes:
    """A field of up to 127 bytes in protobuf's encoding."""
    return bytes([number << 3 | 2, len(content)]) + content


GRAPH = message(7, len(step_inputs(ModelShape(0, 0, 1, 0, (CacheGroup(1, 0, 0),)))) * message(11, b""))
"""With the inputs of one layer, and nothing else."""
OTHER_GRAPH = GRAPH + message(2, b"another producer")


def agent_file(vector: Sequence[float] | F32, scale: float = 1.0) -> bytes:
    """A trained agent's file, of widths 3 and 2; without the LayerNorm its margin is `vector @ state * scale ** 2`."""
    row = np.asarray(vector, np.float32)
    first, second, output = np.stack([row, -row, 0 * row]), np.eye(2, 3), np.array([[0, 0], [1, -1]])
    layers = {"linear1": (first, 3), "linear2": (scale * second, 2), "output_linear": (scale * output, 2)}
    state = {"ln.weight": np.ones(row.shape), "ln.bias": np.zeros(row.shape)}
    for name, (weight, width) in layers.items():
        state |= {f"{name}.weight": weight, f"{name}.bias": np.zeros(width)}
    content: bytes = safetensors.numpy.save({name: array.astype(np.float32) for name, array in state.items()})
    return content


AGENT = "agent"
"""The agent of a bundle that does not say otherwise."""


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
    agents: Mapping[str, bytes] | None = None,
    fallback: str = "first",
    training: dict[str, Any] | None = None,
    targets: Sequence[str] = ("cpu",),
    noise: Noise | None = None,
    graph: bytes = GRAPH,
    shape: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle whose manifest is valid and whose graph is a dummy: no engine can run it. Returns `folder`.

    agents: their files by name; default one, AGENT. fallback, training: of the first. shape: other sizes.
    """
    files = {"step.onnx": graph, "step.onnx.data": bytes(range(256))}
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer.to_str().encode()
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    for name, content in ({AGENT: agent_file([1.0] * hidden_size)} if agents is None else agents).items():
        files[f"agents/{name}.safetensors"] = content
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = manifests.manifest_json(files, has_tokenizer=tokenizer is not None, special_tokens=special_tokens or {})
    manifest["model"]["shape"].update({"vocab_size": vocab_size, "hidden_size": hidden_size, **(shape or {})})
    manifest["model"]["eos_token_ids"] = list(eos_token_ids)
    for agent in manifest["agents"]:
        agent.update(hidden_size=hidden_size, noise=noise and noise.margins)
    for agent in manifest["agents"][:1]:
        agent.update(fallback=fallback, training=training)
    manifest.update(max_context=max_context, max_candidates=max_candidates, targets=list(targets))
    manifest["noise"] = noise and noise.logits
    write_manifest(folder, manifest)
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum of what it says."""
    (folder / MANIFEST_FILE).write_text(signed(manifest), encoding="utf-8")


def signed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with its checksum."""
    return json.dumps({**manifest, "sha256": checksum(manifest)})


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Write a file and enter it in the manifest."""
    manifest = read_manifest(folder)
    manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(folder, manifest)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


# ── a language model and an agent out of a hash ──────────────────────────────────────────────────────────────────────

COST = Cost(
    contexts=(16, 64), widths=(1, 2, 8), body_ms=((1.0, 1.5, 3.0), (1.5, 2.0, 4.0)), heads=(1, 4), head_ms=(0.25, 0.5)
)
"""Made up: the adaptive schedule needs one over a table, where nothing can be measured."""


def hash_table(seed: int, vocab_size: int, levels: int, peak: float, memory: int | None = None) -> Lookup:
    """A language model of its own for every seed: logits (V,) and a hidden state (2,) by prefix, from a hash.

    levels: number of values that logits take; few mean ties. peak: their spread; a large one means positions with a
    single candidate. memory: only so many last tokens matter; few mean a repetitive text. Hidden states are multiples
    of 1/4, so margins are exact, and may equal a threshold.
    """

    @cache
    def lookup(prefix: tuple[int, ...]) -> tuple[F32, F32]:
        seen = prefix if memory is None else prefix[-memory:]
        digest = hashlib.shake_128(f"{seed}:{seen}".encode()).digest(vocab_size + 2)
        logits = [peak * (byte % levels) / levels for byte in digest[:vocab_size]]
        hidden = [(byte % 8 - 4) / 4 for byte in digest[vocab_size:]]
        return np.array(logits, np.float32), np.array(hidden, np.float32)

    return lookup


def sum_agent(hidden: F32) -> F32:
    """(N, 2) hidden states to (N,) margins: their sum."""
    return hidden[:, 0] + hidden[:, 1]


AGENTS: dict[str, Judge] = {AGENT: sum_agent, "other": lambda hidden: hidden[:, 0]}


def mixed(agents: Mapping[str, Judge], mix: Mapping[str, float]) -> Judge:
    """Agents that judge together."""
    parts = {name: np.float32(part) for name, part in mix.items() if part}
    return lambda hidden: sum((part * agents[name](hidden) for name, part in parts.items()), np.zeros(len(hidden)))


@dataclass(frozen=True)
class TableNode:
    """A prefix of a table; see `reference.Node`."""

    lookup: Lookup
    agent: Judge
    prefix: tuple[int, ...]

    @property
    def logits(self) -> list[float]:
        return list(map(float, self.lookup(self.prefix)[0]))

    @property
    def margin(self) -> float:
        return float(self.agent(self.lookup(self.prefix)[1][None])[0])

    def then(self, token: int) -> "TableNode":
        return TableNode(self.lookup, self.agent, (*self.prefix, token))


def sequential(
    lookup: Lookup,
    prompt: Sequence[int],
    config: DecodeConfig,
    fallback: str = "first",
    eos: Container[int] = (),
    limit: int | None = None,
    agents: Mapping[str, Judge] = AGENTS,
) -> reference.Answer:
    """The sequential procedure's answer. limit: default the config's."""
    node = TableNode(lookup, mixed(agents, config.agents or {AGENT: 1.0}), tuple(prompt))
    limit = config.max_new_tokens if limit is None else limit
    config = replace(config, **dict(zip(("top_k", "top_p"), config.candidates, strict=True)))
    return reference.decode(node, len(prompt), config, fallback=fallback, eos=eos, limit=limit)


class CountingEngine(TableEngine):
    """A TableEngine that records its calls, and does what the protocol allows any engine to do.

    It overwrites returned arrays in the next pass, and returns equal logits with the higher id first. Its first agent
    is in use from the start.
    """

    def __init__(
        self,
        lookup: Lookup,
        agents: Mapping[str, Judge] | None = None,
        slots: int = 512,
        max_candidates: int = 64,
        most_places: int = 8,
    ) -> None:
        agents = agents or AGENTS
        super().__init__(lookup, agents, slots, max_candidates, most_places)
        super().use([*agents][:1])
        self.uses: list[tuple[str, ...]] = []
        """the agents that were asked for since"""
        self.calls: list[Pass] = []
        """what every conversation asked for, but for a fault search; its sequences as lists"""
        self.headed: list[int] = []
        """rows that went through the LM head, by call"""
        self.together: list[list[tuple[int, int]]] = []
        """(place, rows) of the conversations of each pass"""
        self._given: list[NDArray[Any]] = []

    def use(self, agents: Sequence[str]) -> None:
        super().use(agents)
        self.uses.append(tuple(agents))

    def run_together(self, works: Works) -> list[StepOutput]:
        for array in self._given:
            array.fill(np.nan if array.dtype.kind == "f" else -1)
        self.together.append([(place, len(work.tokens)) for place, work in works])
        outs = [self._awkward(out) for out in super().run_together(works)]
        self._given = [
            array for o in outs for array in (o.margins, o.rows, o.top_ids, o.top_logits, o.log_normaliser)
        ] + [out.hidden for out in outs if out.hidden is not None]
        return outs

    def _run(self, work: Pass, place: int) -> StepOutput:
        if not work.logits:
            names = ("tokens", "positions", "head_rows", "agent_rows", "priorities")
            self.calls.append(replace(work, **{name: list(getattr(work, name)) for name in names}))
        assert len(self.calls) < 5000, "passes without end"
        out = super()._run(work, place)
        self.headed.append(len(out.rows))
        return out

    def _awkward(self, out: StepOutput) -> StepOutput:
        order = np.array([np.lexsort((-ids, -logits)) for ids, logits in zip(out.top_ids, out.top_logits, strict=True)])
        if not len(order):
            return out
        return replace(
            out,
            top_ids=np.take_along_axis(out.top_ids, order, 1),
            top_logits=np.take_along_axis(out.top_logits, order, 1),
        )

    @property
    def moves(self) -> list[tuple[int, int]]:
        """(source, target) of every entry that moved."""
        return self.memory.moves

    def extend_slots(self, slots: int) -> None:
        """Add slots to the first place, up to so many."""
        self.memory.entries += [None] * (slots - self.cache.capacity)

    def entries(self, count: int) -> list[tuple[int, int] | None]:
        """(token, position) of the first so many slots."""
        return self.memory.entries[:count]


def scripted(
    logits: dict[tuple[int, ...], dict[int, float]], margins: dict[tuple[int, ...], float], vocab_size: int = 8
) -> Lookup:
    """A table written out by hand: {prefix: {token: logit}}, the other tokens at -inf, and {prefix: margin}.

    A prefix without logits goes on with token 7 alone; one without a margin is rejected (-1).
    """

    def lookup(prefix: tuple[int, ...]) -> tuple[F32, F32]:
        row = np.full(vocab_size, -np.inf, np.float32)
        for token, logit in logits.get(prefix, {7: 0.0}).items():
            row[token] = logit
        return row, np.array([margins.get(prefix, -1.0), 0.0], np.float32)

    return lookup
