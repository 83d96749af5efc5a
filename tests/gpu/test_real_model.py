"""A real transformer on the GPU against the same graph in ONNX Runtime on the CPU, and its memory over many steps.

The parity gate compared the same CPU engine with Hugging Face eager at export, so the two comparisons together reach
from Hugging Face to the GPU, and this one needs no PyTorch on the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks import board, soak
from mara_deploy.bench.worker import Subject
from mara_export import parity
from mara_runtime.bundle import Bundle
from mara_runtime.engines import open_engine
from mara_runtime.engines.base import NEVER, Engine, Pass, StepOutput
from mara_runtime.engines.ort import CpuEngine
from mara_runtime.tensors import spare_slots
from tests.gpu.conftest import close

PROMPT_TOKENS = (1, 48, 200)
"""The last goes through the engine's profile for prompts."""
LONG_TOKENS = 1300
"""Of a context long enough for what a fused attention loses when it sums in float16 (mara_export/graph/narrow.py)."""
PIECE = 32
"""Rows of a pass while a cache is filled until it grows."""
HEADS = 16
"""Rows of a pass that go through the LM head; engines allow so many at least."""


class InPieces:
    """Returns everything of passes that are wider than the engine's, or have more rows for the LM head."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def run(self, work: Pass) -> StepOutput:
        """Hidden states, logits and margins of all rows."""
        count, memory = len(work.tokens), self.engine.memory
        most = memory.rows(work.slot + count) if hasattr(memory, "rows") else count
        hidden, logits, margins = [], [], []
        for start in range(0, count, most):
            tokens, positions = work.tokens[start : start + most], work.positions[start : start + most]
            rows = range(len(tokens))
            for first in range(0, len(rows), HEADS):  # the same entries again, other rows through the head
                heads = rows[first : first + HEADS]
                out = self.engine.run(
                    Pass(tokens, positions, work.slot + start, heads, rows, [NEVER] * len(rows), full=True)
                )
                logits.append(out.logits.copy())
            hidden.append(out.hidden.copy())
            margins.append(out.margins.copy())
        return replace(
            out,
            hidden=np.concatenate(hidden),
            logits=np.concatenate(logits),
            margins=np.concatenate(margins),
        )


def on_the_cpu(bundle: Bundle) -> Bundle:
    """The bundle itself; of one that no CPU runs, bfloat16, the bundle `cpu` that is given along with it."""
    if "cpu" in bundle.manifest.targets:
        return bundle
    given = bundle.folder.parent / "cpu"
    if not given.is_dir():
        pytest.skip(f"a CPU cannot run {bundle.folder}, and there is no bundle {given} of the same model for it")
    return Bundle.open(given)


@pytest.fixture(scope="module")
def cases(bundle: Bundle) -> list[parity.Case]:
    """Random prompts, their best next tokens, and what the CPU makes of both."""
    reference = CpuEngine(on_the_cpu(bundle))
    rng, vocab_size = np.random.default_rng(0), bundle.manifest.model.shape.vocab_size
    found = []
    for length in PROMPT_TOKENS:
        tokens = rng.integers(0, vocab_size, length).tolist()
        best = reference.run(Pass(tokens, range(length), 0, [length - 1])).top_ids[0, : parity.SIBLINGS].tolist()
        case = parity.Case(tokens, best, None, is_text=False)
        found.append(replace(case, reference=parity.engine_side(reference, case)))
    return found


def test_the_gpu_computes_what_the_cpu_computes(engine: Engine, bundle: Bundle, cases: list[parity.Case]) -> None:
    gate = parity.GATES[bundle.manifest.step.precision]
    report = parity.compare(cases, [parity.engine_side(InPieces(engine), case) for case in cases], gate)
    assert report.failures == []
    assert report.outcomes["first"]["compared"] > 0


def after_growth(engine: Engine, tokens: list[int]) -> parity.Side:
    """What the last of many small passes gives, and its last row once more."""
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        rows = evaluated(engine, piece, range(start, start + len(piece)), start)
    return parity.Side(rows, evaluated(engine, tokens[-1:], [len(tokens) - 1], len(tokens) - 1))


def siblings_after(engine: Engine, tokens: list[int], siblings: list[int]) -> parity.Side:
    """What candidates of the next position give in one pass, and one at a time."""
    length = len(tokens)
    for start in range(0, length, PIECE):
        piece = tokens[start : start + PIECE]
        engine.run(Pass(piece, range(start, start + len(piece)), start))
    together = evaluated(engine, siblings, [length] * len(siblings), length)
    alone = [evaluated(engine, [token], [length], length + i) for i, token in enumerate(siblings)]
    return parity.Side(together, parity.Rows.join(alone))


def evaluated(engine: Engine, tokens: list[int], positions: Sequence[int], slot: int) -> parity.Rows:
    out = InPieces(engine).run(Pass.full_outputs(tokens, positions, slot))
    return parity.Rows(out.hidden, out.logits, out.margins)


def test_siblings_after_a_long_context(engine: Engine, bundle: Bundle) -> None:
    manifest, rng = bundle.manifest, np.random.default_rng(2)
    length = min(LONG_TOKENS, manifest.max_context)
    tokens = rng.integers(0, manifest.model.shape.vocab_size, length).tolist()
    siblings = rng.choice(manifest.model.shape.vocab_size, parity.SIBLINGS, replace=False).tolist()
    reference = siblings_after(CpuEngine(on_the_cpu(bundle)), tokens, siblings)
    case = parity.Case(tokens, siblings, reference, is_text=False)
    gate = parity.GATES[manifest.step.precision]
    assert parity.compare([case], [siblings_after(engine, tokens, siblings)], gate).failures == []


def test_growth_keeps_the_entries(bundle: Bundle, target: str) -> None:
    manifest = bundle.manifest
    reference = CpuEngine(on_the_cpu(bundle))
    engine: Any = open_engine(bundle, target)[0]
    smallest = engine.memory.slots
    if smallest == engine.cache.capacity:
        close(engine)
        pytest.skip(f"{bundle.folder} has an engine of one size: give it another with mara-build --capacity")
    length = min(smallest + PIECE, manifest.max_context + spare_slots(manifest.max_candidates))
    tokens = np.random.default_rng(1).integers(0, manifest.model.shape.vocab_size, length).tolist()
    case = parity.Case(tokens, [], after_growth(reference, tokens), is_text=False)
    found = after_growth(engine, tokens)
    assert engine.memory.slots > smallest
    close(engine)
    assert parity.compare([case], [found], parity.GATES[manifest.step.precision]).failures == []


def test_memory_does_not_grow_over_two_thousand_steps(bundle: Bundle, target: str) -> None:
    subject = Subject(str(bundle.folder), target, None)
    subject.width()
    where = soak.whose_memory(target, board.find())
    for way in soak.WAYS:
        found = soak.soak(subject, way, 2000)
        assert soak.too_much(found["memory"], where) == []
