"""Who answers the prompts: the bundle, aligned or plain, or another checkpoint.

Every answer depends on its prompt and the contestant's settings alone: neither on the prompts before it nor on where an
interrupted run was taken up again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mara_runtime.bundle import sha256
from mara_runtime.config import DecodeConfig
from mara_runtime.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from mara_runtime.decoder import AlignedDecoder


@dataclass(frozen=True)
class Answer:
    """One answer of one contestant."""

    text: str
    """without special tokens"""
    tokens: int
    """end-of-sequence included; ≥ 1"""
    finish_reason: str
    """"stop" or "length" """
    stats: dict[str, Any] | None = None
    """counters of the decoding, as `mara_runtime.stats.Stats.to_json` has them; None: not a bundle's answer"""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `Answer(**values)` reads them."""
        return asdict(self)


class Contestant(Protocol):
    """One side of a comparison."""

    @property
    def name(self) -> str:
        """For reports and file names."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything but the prompt that its answers depend on; plain JSON values."""

    def check(self, prompt: str) -> None:
        """Raise PromptError for a prompt that it cannot answer."""

    def __call__(self, prompt: str) -> list[Answer]:
        """Answers to a user message: one, or several, of which the one with the best combined score competes."""

    def close(self) -> None:
        """Free what it holds in memory; a later call may load it again."""


@dataclass(frozen=True)
class Asking:
    """How a prompt is put to a bundle or a checkpoint."""

    raw: bool = False
    """plain text, without the chat template"""
    template: Mapping[str, Any] | None = None
    """variables for the chat template"""


class BundleAnswers:
    """Answers of a bundle: aligned, or plain with `config.align` false.

    samples: answers per prompt, ≥ 1, each with its own seed; more than one is for plain sampling (best-of-N).
    """

    def __init__(
        self, name: str, decoder: AlignedDecoder, config: DecodeConfig, asking: Asking, samples: int = 1
    ) -> None:
        self.name = name
        self._decoder, self._config, self._asking, self._samples = decoder, config, asking, samples

    @property
    def settings(self) -> dict[str, Any]:
        """See `Contestant`. The manifest's checksum stands for all files of the bundle. Schedule, drafts and the
        engine's memory are left out, as no answer depends on them."""
        config = self._config.to_json()
        del config["schedule"], config["draft"]
        engine = {key: value for key, value in self._decoder.engine.describe().items() if key != "memory"}
        return {
            "bundle": sha256(self._decoder.bundle.path(MANIFEST_FILE)),
            "samples": self._samples,
            "raw": self._asking.raw,
            "template": dict(self._asking.template or {}),
            **config,
            **{f"engine {key}": value for key, value in engine.items()},
        }

    def check(self, prompt: str) -> None:
        """See `Contestant`."""
        self._decoder.encode(prompt, raw=self._asking.raw, template=self._asking.template)

    def __call__(self, prompt: str) -> list[Answer]:
        """See `Contestant`."""
        return [self._answer(prompt, seed_of(self._config.seed, prompt, n)) for n in range(self._samples)]

    def close(self) -> None:
        """Nothing: the decoder is the caller's, and several contestants share it."""

    def _answer(self, prompt: str, seed: int) -> Answer:
        # what the cache holds of the prompt before, and what was learned from it, would change last bits
        self._decoder.forget()
        config = replace(self._config, seed=seed)
        result = self._decoder.generate(prompt, config, raw=self._asking.raw, template=self._asking.template)
        assert result.text is not None  # the command has seen to it that the bundle has a tokenizer
        return Answer(result.text, result.stats.tokens, result.finish_reason, result.stats.to_json())


def seed_of(seed: int, prompt: str, sample: int = 0) -> int:
    """A seed for one answer, 0 … 2**63 - 1: different for each prompt and sample, whatever the order of the prompts."""
    digest = hashlib.sha256(f"{seed}\n{sample}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def total_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Counters of several answers together: sums, the least margin, and the decoding speed over all, in which the first
    token of each has no part: it comes with the prompt."""
    total: dict[str, Any] = {}
    for one in stats:
        for name, value in one.items():
            if isinstance(value, dict):
                histogram = total.setdefault(name, {})
                for key, count in value.items():
                    histogram[key] = histogram.get(key, 0) + count
            elif name == "smallest_margin":
                known = [x for x in (total.get(name), value) if x is not None]
                total[name] = min(known, default=None)
            else:
                total[name] = total.get(name, 0) + value
    for name, value in total.items():
        if isinstance(value, dict):
            total[name] = {key: value[key] for key in sorted(value, key=int)}
        elif name.endswith("_ms"):
            total[name] = round(value, 3)
    if total.get("decode_ms"):
        total["tokens_per_second"] = round((total["tokens"] - len(stats)) / total["decode_ms"] * 1e3, 2)
    return total
