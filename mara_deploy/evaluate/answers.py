"""Where answers come from: the bundle, aligned or plain, or another checkpoint.

An answer depends on its prompt and the source's settings alone: not on other prompts, their order or interruptions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mara_deploy.prompts import Asked, key_of
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import MaraError
from mara_runtime.manifest import Manifest

if TYPE_CHECKING:
    from mara_runtime.decoder import AlignedDecoder


@dataclass(frozen=True)
class Answer:
    """One answer to one prompt."""

    text: str
    """without special tokens"""
    tokens: int
    """including end-of-sequence, ≥ 1"""
    finish_reason: str
    """"stop" or "length" """
    stats: dict[str, Any] | None = None
    """decoding counters, see `mara_runtime.stats.Stats.to_json`; None: not decoded by a bundle"""


class AnswerSource(Protocol):
    """One side of a comparison: anything that answers prompts."""

    @property
    def name(self) -> str:
        """For reports and file names."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything besides the prompt that the answers depend on; plain JSON values. `raw` says whether texts are
        asked without a chat template."""

    def check(self, prompt: Asked) -> None:
        """Raise PromptError for a prompt that cannot be answered."""

    def __call__(self, prompts: Sequence[Asked]) -> Iterator[tuple[int, list[Answer]]]:
        """Answer prompts: (index of the prompt, its answer), in the order in which they are finished.

        Several answers to a prompt are samples, of which the one with the best score is compared.
        """

    def close(self) -> None:
        """Free memory; a later call may load again what it needs."""


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is turned into the LLM's input."""

    raw: bool = False
    """plain text, without the chat template"""
    template: Mapping[str, Any] | None = None
    """variables for the chat template"""


class BundleAnswers:
    """Answers of a bundle: aligned, or plain with `config.align` false.

    samples: answers per prompt, ≥ 1, each with its own seed; more than one is for plain sampling (best-of-N).
    conversations: answers decoded at once, ≥ 1. With 1, an answer repeats to the last bit; several share passes, whose
    width can tip a decision within the noise that the bundle records.
    """

    def __init__(
        self,
        name: str,
        decoder: AlignedDecoder,
        config: DecodeConfig,
        prompt_format: PromptFormat,
        samples: int = 1,
        conversations: int = 1,
    ) -> None:
        self.name = name
        self._decoder, self._config, self._samples, self.conversations = decoder, config, samples, conversations
        self._encoding: dict[str, Any] = {"raw": prompt_format.raw, "template": prompt_format.template}

    @property
    def template(self) -> Mapping[str, Any] | None:
        """Variables for the chat template, as given."""
        template: Mapping[str, Any] | None = self._encoding["template"]
        return template

    @property
    def settings(self) -> dict[str, Any]:
        """See `AnswerSource`. The manifest's checksum stands for all files of the bundle. Left out are schedule,
        drafts, the engine's memory, and agents that are not asked: no answer depends on them."""
        config = self._config.to_json()
        del config["schedule"], config["draft"]
        side = self._decoder.text_side
        engine = {key: value for key, value in self._decoder.engine.describe().items() if key != "memory"}
        return {
            "bundle": _checksum(self._decoder.bundle.manifest, self._config),
            "samples": self._samples,
            "raw": self._encoding["raw"] or side is None or not side.has_template,
            "template": dict(self._encoding["template"] or {}),
            **config,
            **{f"engine {key}": value for key, value in engine.items()},
        }

    def check(self, prompt: Asked) -> None:
        """See `AnswerSource`."""
        self._decoder.encode(prompt, **self._encoding)

    def __call__(self, prompts: Sequence[Asked]) -> Iterator[tuple[int, list[Answer]]]:
        """See `AnswerSource`."""
        asked = [(index, sample) for index in range(len(prompts)) for sample in range(self._samples)]
        found: dict[int, dict[int, Answer]] = {}
        for (index, sample), answer in self._answers(prompts, asked):
            samples = found.setdefault(index, {})
            samples[sample] = answer
            if len(samples) == self._samples:
                yield index, [answer for _, answer in sorted(found.pop(index).items())]

    def close(self) -> None:
        """Do nothing: the decoder belongs to the caller, and several sources share it."""

    def _answers(
        self, prompts: Sequence[Asked], asked: list[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], Answer]]:
        """The answer to each (prompt, sample). Raises the error of the first that fails."""
        for together in [asked] if self.conversations > 1 else [[one] for one in asked]:
            self._decoder.forget()  # cached tokens and learned acceptance rates change last bits
            seeds = [answer_seed(self._config.seed, prompts[index], sample) for index, sample in together]
            pieces = self._decoder.generate_many(
                [prompts[index] for index, _ in together],
                [replace(self._config, seed=seed) for seed in seeds],
                places=self.conversations,
                share=False,
                **self._encoding,
            )
            for number, piece in pieces:
                if isinstance(piece, MaraError):
                    raise piece
                if (result := piece.result) is not None:
                    assert result.text is not None  # the command requires a bundle with a tokenizer
                    stats = result.stats
                    yield together[number], Answer(result.text, stats.tokens, result.finish_reason, stats.to_json())


def _checksum(manifest: Manifest, config: DecodeConfig) -> str:
    """SHA-256 of what a manifest says, without the agents that are not asked."""
    asked = [manifest.agent(name) for name in config.agents or ()] if config.align else []
    others = {agent.file for agent in manifest.agents if agent not in asked}
    files = {name: entry for name, entry in manifest.files.items() if name not in others}
    return hashlib.sha256(replace(manifest, agents=tuple(asked), files=files).to_json().encode()).hexdigest()


def answer_seed(seed: int, prompt: Asked, sample: int = 0) -> int:
    """The seed of one answer, 0 … 2**63 - 1: independent of the order of the prompts."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{key_of(prompt)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def total_stats(stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counters of several answers: sums, the smallest margin, and the decoding speed over all, which excludes the first
    token of each answer, as that comes from the prefill."""
    total: dict[str, Any] = {}
    for name in stats[0]:
        values = [answer[name] for answer in stats]
        if isinstance(values[0], Mapping):
            histogram = sum(map(Counter, values), Counter[str]())
            total[name] = {key: histogram[key] for key in sorted(histogram, key=int)}
        elif name == "smallest_margin":
            total[name] = min((margin for margin in values if margin is not None), default=None)
        else:
            total[name] = round(sum(values), 3)
    if total["decode_ms"]:
        total["tokens_per_second"] = round((total["tokens"] - len(stats)) / total["decode_ms"] * 1e3, 2)
    return total
