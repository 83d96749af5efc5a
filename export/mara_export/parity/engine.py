"""The engine's side of the parity gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mara_export.parity.rows import Case, Rows, Side
from mara_runtime.engines.base import Engine, Pass

if TYPE_CHECKING:
    from mara_runtime.engines.ort import CpuEngine

PERTURBATION = 1e-4
"""Relative standard deviation of what `perturber` adds to KV entries. A level of int8 is 8e-3 of the largest activation
of its block: a hundredth of that flips no level in most rows, and by itself moves the results far less than a flip."""
PERTURBED_ROWS = 8
"""Rows per pass of the perturbed run; later passes see the changed entries of earlier ones."""


def perturber(engine: CpuEngine) -> Callable[[int], None]:
    """A function that perturbs the entries of a KV slot, by the same random numbers in every export."""
    generator = np.random.default_rng(0)

    def perturb(slot: int) -> None:
        entries = engine.memory.entries[:, :, :, slot]
        entries[...] = entries * (1 + PERTURBATION * generator.standard_normal(entries.shape, np.float32))

    return perturb


def run_engine(engine: Engine, case: Case, agents: int, perturb: Callable[[int], None] | None = None) -> Side:
    """Run an engine over a case; see `run_rows`."""
    return run_rows(engine, case.tokens, case.siblings, agents, perturb)


def run_rows(
    engine: Engine,
    prompt: Sequence[int],
    candidates: Sequence[int],
    agents: int,
    perturb: Callable[[int], None] | None = None,
) -> Side:
    """Run an engine over a prompt and candidates after it.

    agents: number of those in use. perturb: changes a slot of its KV cache; None: nothing rounds activations.
    """

    def rows(tokens: Sequence[int], positions: Sequence[int], slot: int) -> Rows:
        out = engine.run(Pass.full_outputs(tokens, positions, slot, agents))
        assert out.hidden is not None
        assert out.logits is not None
        margins = out.margins.reshape(agents, len(tokens)).T
        return Rows(out.hidden.copy(), out.logits.copy(), margins.copy())

    def siblings() -> Rows:
        return rows(candidates, [length] * len(candidates), length)

    length = len(prompt)
    straight = Rows.concatenate([rows(prompt, range(length), 0), siblings()])
    recomputed = [rows([token], [i], i) for i, token in enumerate(prompt)]
    recomputed += [rows([token], [length], length + i) for i, token in enumerate(candidates)]
    if perturb is None:
        return Side(straight, Rows.concatenate(recomputed))

    perturbed = []
    for start in range(0, length, PERTURBED_ROWS):
        slots = range(start, min(start + PERTURBED_ROWS, length))
        perturbed.append(rows(prompt[slots.start : slots.stop], slots, start))
        for slot in slots:
            perturb(slot)
    return Side(straight, Rows.concatenate(recomputed), Rows.concatenate([*perturbed, siblings()]))
