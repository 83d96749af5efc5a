"""The product against the sequential oracle on Hugging Face eager: identical token ids, identical counters.

following.py says what is compared, and what is excused.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.engines.ort_cuda import CudaEngine, CudaMemory
from mara_runtime.schedule.base import PassContext, PassPlan
from tests import checkpoints
from tests.export.following import OPTIONS, WAYS, follow, follow_all

MODELS = (*checkpoints.ARCHITECTURES, "demo")
LOWERINGS = ("ort", "portable")


def pairs(*chosen):
    """These pairs of model and lowering; all others are `long`."""
    others = (pair for pair in product(MODELS, LOWERINGS) if pair not in chosen)
    return pytest.mark.parametrize(
        ("name", "lowering"), [*chosen, *(pytest.param(*pair, marks=pytest.mark.long) for pair in others)]
    )


class Erratic:
    """A schedule that takes any number of candidates and of drafted tokens, another at every pass."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def plan(self, context: PassContext) -> PassPlan:
        left = len(context.probabilities) - len(context.margins)
        candidates = int(self._rng.integers(1, left + 1)) if left else 0
        return PassPlan(candidates, int(self._rng.integers(0, len(context.draft.tokens) + 1)))

    def update(self, probabilities, margins, threshold) -> None:
        pass


DEFAULT_PAIRS = [
    ("demo", "ort"), ("qwen2", "portable"), ("qwen3", "ort"), ("mistral", "portable"), ("llama", "ort"),
]  # fmt: skip
"""Each model once, each lowering with several."""


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.long)])
@pairs(*DEFAULT_PAIRS, ("llama", "decomposed"))
def test_64_tokens_of_each_prompt_are_the_oracle_s(name, lowering, every, answers, decoder, tally):
    """By default, and in another way for each prompt."""
    product, cases = decoder(name, lowering), answers(name, every=every, **OPTIONS)
    others = tally(name, f"{lowering}, other ways")
    follow_all(product, DecodeConfig(**OPTIONS), cases, tally(name, f"{lowering}, default"))
    for index, (prompt, truth) in enumerate(cases):
        follow(product, DecodeConfig(**OPTIONS, **WAYS[index % len(WAYS)]), prompt, truth, others)
    others.settle()


@pairs(*DEFAULT_PAIRS)
def test_any_schedule_gives_the_oracle_s_tokens(name, lowering, answers, decoder, tally, monkeypatch):
    schedule = Erratic(seed=len(name))
    monkeypatch.setattr("mara_runtime.decoder.Fixed", lambda *_: schedule)
    config = DecodeConfig(**OPTIONS, schedule="together", draft=16)
    follow_all(decoder(name, lowering), config, answers(name, 20, **OPTIONS), tally(name, f"{lowering}, erratic"))


@pairs(("llama", "ort"))
def test_every_strategy_order_and_fallback(name, lowering, answers, decoder, tally):
    checked = tally(name, f"{lowering}, every strategy, order and fallback")
    for index, (strategy, order, fallback) in enumerate(product(STRATEGIES, ORDERS, FALLBACKS)):
        chosen = {"strategy": strategy, "order": order, "fallback": fallback}
        options = {**chosen, "top_k": 6, "max_new_tokens": 12, "seed": 3}
        for prompt, truth in answers(name, 3, **options):
            config = DecodeConfig(**WAYS[(index + index // 6) % len(WAYS)], **options)
            follow(decoder(name, lowering), config, prompt, truth, checked)
    checked.settle()


def test_the_cuda_engine_recomputes_entries_and_moves_none(answers, bundle, tally, monkeypatch):
    """On the CPU provider."""
    monkeypatch.setitem(ort_engine.PROVIDERS, "cuda", "CPUExecutionProvider")
    monkeypatch.setattr(CudaMemory, "device", "cpu")
    opened = Bundle.open(bundle("llama", "ort"))
    decoder = AlignedDecoder(opened, engine=CudaEngine(opened, 1))
    config = DecodeConfig(**OPTIONS, schedule="together")
    follow_all(decoder, config, answers("llama", 10, **OPTIONS), tally("llama", "recomputed entries"))


def test_the_comparison_notices_siblings_that_attend_to_each_other(answers, decoder, tally, monkeypatch):
    honest = CpuEngine.run

    def leaky(engine, work, place=0):
        if len(set(work.positions)) == 1:  # siblings, run as a chain
            work = replace(work, positions=range(work.positions[0], work.positions[0] + len(work.tokens)))
        return honest(engine, work, place)

    product, cases = decoder("llama", "ort"), answers("llama", **OPTIONS)
    monkeypatch.setattr(CpuEngine, "run", leaky)
    with pytest.raises(AssertionError, match="position"):
        follow_all(product, DecodeConfig(**OPTIONS, schedule="together"), cases, tally("llama", "leaky"))
