"""A real transformer on the GPU against the same graph in ONNX Runtime on the CPU, and its memory over many steps.

The parity gate compared the same CPU engine with Hugging Face eager at export, so the two comparisons together reach
from Hugging Face to the GPU, and this one needs no PyTorch on the device.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import board, soak
from benchmarks.gpu_work import gate, judging
from mara_deploy.bench.worker import Subject
from mara_export import parity
from mara_export.targets import HEAD_ROWS
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Engine, Pass, StepOutput, Works
from mara_runtime.engines.kv_cache import Places
from mara_runtime.engines.ort_cpu import CpuEngine
from tests.gpu.conftest import GRAPHS

PROMPT_TOKENS = (1, 48, 200)
"""The last one uses the engine's prefill profile."""
LONG_TOKENS = 1300
"""A context long enough to show what fused attention loses when it accumulates in float16."""
PIECE = 32
"""Rows per pass while a cache is filled."""


class Parts:
    """An engine that runs full passes in parts, as many LM head rows at a time as a TensorRT engine is built for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def places(self) -> Places:
        return self._engine.places

    def run_together(self, works: Works) -> list[StepOutput]:
        return [self.run(work, place) for place, work in works]

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        logits = []
        for start in range(0, len(work.head_rows), HEAD_ROWS):
            heads = work.head_rows[start : start + HEAD_ROWS]
            out = self._engine.run(replace(work, head_rows=heads), place)
            assert out.logits is not None
            logits.append(out.logits[: len(heads)].copy())
        return replace(out, logits=np.concatenate(logits))

    def side(self, case: parity.Case) -> parity.Side:
        return next(parity.run_engine(self, [case], 1))  # type: ignore[arg-type]  # it has no more of an engine

    def rows(self, tokens: list[int], positions: Sequence[int], slot: int) -> parity.Rows:
        out = self.run(Pass.full_outputs(tokens, positions, slot))
        assert out.hidden is not None
        assert out.logits is not None
        return parity.Rows(out.hidden.copy(), out.logits.copy(), out.margins[:, None].copy())


def on_the_cpu(bundle: Bundle) -> Bundle:
    """The bundle itself; for bfloat16, which no CPU runs, the bundle `cpu` next to it."""
    if "cpu" in bundle.manifest.targets:
        return bundle
    given = bundle.folder.parent / "cpu"
    if not given.is_dir():
        pytest.skip(f"a CPU cannot run {bundle.folder}, and there is no bundle {given} of the same model for it")
    return Bundle.open(given)


@pytest.fixture(scope="module")
def cases(bundle: Bundle) -> list[parity.Case]:
    """Random prompts, their best next tokens, and the CPU's results."""
    reference = judging(CpuEngine(on_the_cpu(bundle)), bundle)
    rng, vocab_size = np.random.default_rng(0), bundle.manifest.model.shape.vocab_size
    cases = []
    for length in PROMPT_TOKENS:
        tokens = rng.integers(0, vocab_size, length).tolist()
        best = reference.run(Pass.prefill(tokens, 0, last=True)).top_ids[0, : parity.SIBLINGS].tolist()
        case = parity.Case(tokens, best, None, is_text=False)
        cases.append(replace(case, reference=Parts(reference).side(case)))
    return cases


def test_the_gpu_computes_what_the_cpu_computes(engine: Engine, bundle: Bundle, cases: list[parity.Case]) -> None:
    sides = [Parts(judging(engine, bundle)).side(case) for case in cases]
    model, agent = parity.compare(cases, sides, gate(bundle)), parity.compare_agent(cases, sides, 0, gate(bundle))
    assert model.failures == agent.failures == []
    assert min(model.outcomes["first"].compared, agent.outcomes["decisions"].compared) > 0


def siblings_after(engine: Engine, tokens: list[int], siblings: list[int]) -> parity.Side:
    """Results of candidates of the next position in one pass, and one at a time."""
    length = len(tokens)
    for start in range(0, length, PIECE):
        piece = tokens[start : start + PIECE]
        engine.run(Pass.prefill(piece, start, last=False))
    together = Parts(engine).rows(siblings, [length] * len(siblings), length)
    alone = [Parts(engine).rows([token], [length], length + i) for i, token in enumerate(siblings)]
    return parity.Side(together, parity.Rows.concatenate(alone))


def test_siblings_after_a_long_context(engine: Engine, bundle: Bundle) -> None:
    manifest, rng = bundle.manifest, np.random.default_rng(2)
    length = min(LONG_TOKENS, manifest.max_context)
    tokens = rng.integers(0, manifest.model.shape.vocab_size, length).tolist()
    siblings = rng.choice(manifest.model.shape.vocab_size, parity.SIBLINGS, replace=False).tolist()
    reference = siblings_after(judging(CpuEngine(on_the_cpu(bundle)), bundle), tokens, siblings)
    cases = [parity.Case(tokens, siblings, reference, is_text=False)]
    sides = [siblings_after(judging(engine, bundle), tokens, siblings)]
    assert parity.compare(cases, sides, gate(bundle)).failures == []
    assert parity.compare_agent(cases, sides, 0, gate(bundle)).failures == []


def test_memory_does_not_grow_over_two_thousand_steps(bundle: Bundle, target: str) -> None:
    if target == GRAPHS:
        pytest.skip("mara-bench has no option for ONNX Runtime's CUDA graphs")
    subject = Subject(str(bundle.folder), target, None)
    subject.width()
    where = soak.whose_memory(target, board.find())
    for way in soak.WAYS:
        found = soak.soak(subject, way, 2000)
        assert soak.too_much(found["memory"], where) == []
