"""What a manifest tells people: how weights were quantised, how an engine was built, what the parity gate found.

Decoding uses none of it; docs/reference/bundle.md specifies it. All functions raise BundleError, naming the field.
"""

from __future__ import annotations

from typing import Any

from mara_runtime.json_reader import JsonReader

MODEL_NUMBERS, AGENT_NUMBERS = ("hidden", "logits"), ("margins",)
"""What the parity gates of LLM and agent compare as numbers, by their names in their reports."""
MODEL_OUTCOMES, AGENT_OUTCOMES = ("first", "ranks"), ("decisions",)
"""What they compare as outcomes."""

Facts = dict[str, Any]


def read_quantisation(reader: JsonReader, path: str) -> Facts | None:
    """How the weights were quantised; None: they were not."""
    facts: Facts | None = reader.get(path, dict, type(None))
    if facts is not None:
        reader.count(f"{path}.bits")
        if reader.count(f"{path}.block_size", least=-1) == 0:
            raise reader.wrong(f"{path}.block_size", "is 0")
        reader.text(f"{path}.quantiser")
        reader.texts(f"{path}.keep")
    return facts


def read_build(reader: JsonReader, path: str) -> Facts:
    """How an engine was built; each of its facts may be missing."""
    facts: Facts = reader.get(path, dict)
    for name in facts:
        where = f"{path}.{name}"
        if name in ("weight_streaming", "version_compatible"):
            reader.get(where, bool)
        elif name in ("workspace_bytes", "optimisation_level", "seconds"):
            reader.get(where, int, float, type(None))
        elif name == "hardware" or (name == "decomposable" and facts[name] == "all"):
            reader.text(where)
        elif name == "decomposable":
            reader.texts(where)
        elif name == "layers":
            reader.dict_of(int, where)
    return facts


def read_parity(reader: JsonReader, path: str, names: tuple[str, ...], outcomes: tuple[str, ...]) -> Facts | None:
    """The report of a parity gate; None: it was not run. names, outcomes: what it compares."""
    report: Facts | None = reader.get(path, dict, type(None))
    if report is None:
        return None
    if not reader.get(f"{path}.passed", bool):
        raise reader.wrong(f"{path}.passed", "is false, and what fails the gate is not written")
    kinds = ("compared", "within_noise", "differing", "changed")
    for name in ("prompts", "rows", *(f"{outcome}.{kind}" for outcome in outcomes for kind in kinds)):
        reader.count(f"{path}.{name}", least=0)
    numbers = [f"{name}.greatest_difference" for name in names] + [f"noise.{name}" for name in names]
    numbers += [f"min_gap.{name}" for name in outcomes] + ["rerouted"]
    if names == MODEL_NUMBERS:
        reader.count(f"{path}.parts")
        numbers += [f"{name}.least_cosine" for name in names]
        if reader.get(f"{path}.perplexity", dict, type(None)) is not None:
            numbers += ["perplexity.reference", "perplexity.exported"]
        if reader.get(f"{path}.largest_activation", int, float, type(None)) is not None:
            numbers.append("largest_activation")
    for name in numbers:
        reader.number(f"{path}.{name}")
    return report


def read_structure(reader: JsonReader, path: str) -> Facts | None:
    """The report of the structural gate; None: it was not run."""
    report = read_parity(reader, path, MODEL_NUMBERS, MODEL_OUTCOMES)
    if report is not None:
        reader.count(f"{path}.layers")
        reader.counts(f"{path}.windows", least=0)
    return report
