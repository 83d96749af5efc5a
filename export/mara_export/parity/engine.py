"""The engine's side of the parity gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mara_export.parity.rows import Case, Rows, Side
from mara_runtime.engines.base import Engine, Pass, StepOutput

if TYPE_CHECKING:
    from mara_runtime.engines.ort_cpu import CpuEngine

PERTURBATION = 1e-4
"""Relative standard deviation of what `perturber` adds to KV entries. A level of int8 is 8e-3 of the largest activation
of its block: a hundredth of that flips no level in most rows, and by itself moves the results far less than a flip."""
PERTURBED_ROWS = 8
"""Rows per pass of the perturbed run; later passes see the changed entries of earlier ones."""

Text = tuple[Sequence[int], Sequence[int]]
"""A prompt, and candidates after it."""


def perturber(engine: CpuEngine) -> Callable[[int], None]:
    """A function that perturbs the entries of a KV slot, by the same random numbers in every export."""
    generator = np.random.default_rng(0)

    def perturb(slot: int) -> None:
        for group in engine.memory.places[0].entries:
            entries = group[:, :, slot]
            entries[...] = entries * (1 + PERTURBATION * generator.standard_normal(entries.shape, np.float32))

    return perturb


def run_engine(
    engine: Engine, cases: Sequence[Case], agents: int, perturb: Callable[[int], None] | None = None
) -> Iterator[Side]:
    """Run an engine over cases, the recomputed rows as conversations side by side; see `run_rows`."""
    return _sides(engine, [(case.tokens, case.siblings) for case in cases], agents, perturb)


def run_rows(
    engine: Engine,
    prompt: Sequence[int],
    candidates: Sequence[int],
    agents: int,
    perturb: Callable[[int], None] | None = None,
) -> Side:
    """Run an engine over a prompt and candidates after it.

    agents: number of those in use. perturb: changes a slot of its first KV cache; None: nothing rounds activations.
    """
    return next(_sides(engine, [(prompt, candidates)], agents, perturb))


def run_parts(engine: Engine, cases: Sequence[Case], width: int) -> Iterator[Rows]:
    """Run an engine without agents over cases, prompts in parts of `width` rows: the rows of each case."""
    for case in cases:
        yield _in_parts(engine, (case.tokens, case.siblings), 0, width, lambda slot: None)


def _sides(engine: Engine, texts: Sequence[Text], agents: int, perturb: Callable[[int], None] | None) -> Iterator[Side]:

    def work(tokens: Sequence[int], positions: Sequence[int], slot: int) -> Pass:
        return Pass.full_outputs(tokens, positions, slot, agents)

    def recomputed(group: Sequence[Text]) -> list[Rows]:
        """Row by row, those of several texts in one pass, each text a row behind the one before."""
        parts: list[list[Rows]] = [[] for _ in group]
        for step in range(max(len(prompt) + len(candidates) for prompt, candidates in group) + len(group) - 1):
            works = []
            for place, (prompt, candidates) in enumerate(group):
                slot, text = step - place, [*prompt, *candidates]
                if 0 <= slot < len(text):
                    works.append((place, work([text[slot]], [min(slot, len(prompt))], slot)))
            for (place, _), out in zip(works, engine.run_together(works), strict=True):
                parts[place].append(_rows(out, agents))
        return [Rows.concatenate(part) for part in parts]

    def perturbed(text: Text) -> Rows | None:
        return None if perturb is None else _in_parts(engine, text, agents, PERTURBED_ROWS, perturb)

    count = min(len(texts), engine.places.most)
    engine.places.open(count)
    again = [rows for start in range(0, len(texts), count) for rows in recomputed(texts[start : start + count])]
    for text, other in zip(texts, again, strict=True):
        straight = _in_parts(engine, text, agents, len(text[0]), lambda slot: None)
        yield Side(straight, other, perturbed(text))


def _in_parts(engine: Engine, text: Text, agents: int, width: int, then: Callable[[int], None]) -> Rows:
    """A prompt in passes of `width` rows, then its candidates in one. then: called with each slot of the prompt."""
    (prompt, candidates), parts = text, []
    for start in range(0, len(prompt), width):
        slots = range(start, min(start + width, len(prompt)))
        part = Pass.full_outputs(prompt[slots.start : slots.stop], slots, start, agents)
        parts.append(_rows(engine.run(part), agents))
        for slot in slots:
            then(slot)
    siblings = Pass.full_outputs(candidates, [len(prompt)] * len(candidates), len(prompt), agents)
    return Rows.concatenate([*parts, _rows(engine.run(siblings), agents)])


def _rows(out: StepOutput, agents: int) -> Rows:
    assert out.hidden is not None
    assert out.logits is not None
    return Rows(out.hidden.copy(), out.logits.copy(), out.margins.reshape(agents, len(out.hidden)).T.copy())
