"""What an agent was trained under: it lies in the agent's file, and in the manifest of every bundle with the agent.

Decoding does the same by default: an agent knows neither candidates that it never saw nor the states of another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mara_runtime.config import DecodeConfig
from mara_runtime.json_reader import JsonReader


@dataclass(frozen=True)
class Training:
    """A run of mara-train, as far as its agent depends on it."""

    model: str
    """the LLM's source"""
    architecture: str
    weights: str
    """fingerprint of the LLM's weights"""
    chat_template: str | None
    """SHA-256 of its text; None: prompts were plain text"""
    template: dict[str, Any]
    """variables for it"""
    top_k: int
    top_p: float
    max_new_tokens: int
    """longest answer"""
    score: str
    episodes: int
    updates: int
    """gradient steps; 0: the agent is as it was initialised"""
    transitions: int

    @classmethod
    def read(cls, reader: JsonReader, path: str) -> Training | None:
        """The object at `path`, or None for null. Raises BundleError with the field that is wrong."""
        if reader.get(path, dict, type(None)) is None:
            return None
        top_p = reader.number(f"{path}.top_p")
        if not 0 < top_p <= 1:
            raise reader.wrong(f"{path}.top_p", f"is {top_p}, which is not above 0 and at most 1")
        episodes, updates, transitions = (
            reader.count(f"{path}.{name}", least=0) for name in ("episodes", "updates", "transitions")
        )
        return cls(
            model=reader.text(f"{path}.model"),
            architecture=reader.text(f"{path}.architecture"),
            weights=reader.text(f"{path}.weights"),
            chat_template=reader.get(f"{path}.chat_template", str, type(None)),
            template=reader.get(f"{path}.template", dict),
            top_k=reader.count(f"{path}.top_k"),
            top_p=top_p,
            max_new_tokens=reader.count(f"{path}.max_new_tokens"),
            score=reader.text(f"{path}.score"),
            episodes=episodes,
            updates=updates,
            transitions=transitions,
        )

    def doubts(self, model: str, weights: str, chat_template: str | None) -> Iterator[str]:
        """Why the agent may not align a model, one clause each. model: its source; the others: as the fields above."""
        if not self.updates:
            yield "it has learned nothing: its training ended before the first update"
        if weights != self.weights:
            yield f"it was trained for {self.model} ({self.architecture}), whose weights are not those of {model}"
        if chat_template != self.chat_template:
            then = "as plain text" if self.chat_template is None else "with a chat template"
            now = "has none" if chat_template is None else "has one" if self.chat_template is None else "has another"
            yield f"it was trained on prompts {then}, and {model} {now}"

    def departures(self, config: DecodeConfig, template: Mapping[str, Any]) -> Iterator[str]:
        """How decoding differs from training, one clause each. template: variables of the chat template."""
        top_k, top_p = config.candidates
        for flag, value, then in (("--top-k", top_k, self.top_k), ("--top-p", top_p, self.top_p)):
            if value != then:
                yield f"{flag} is {value}, and was {then} when the agent was trained"
        for name in sorted(template.keys() | self.template.keys()):
            now, before = (json.dumps(v[name]) if name in v else "unset" for v in (template, self.template))
            if now != before:
                yield f"the template's {name} is {now}, and was {before} when the agent was trained"
