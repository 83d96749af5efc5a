"""The product against the sequential oracle on Hugging Face eager: identical token ids, identical counters.

At every position the candidates, the examined ones, the pick and whether it was forced must be the oracle's. A
difference is excused only where the oracle's own gap there is within rounding: between two logits, what float32 changes
in the oracle's own; from the top-p boundary, or of the agent's margin, `EXCUSABLE`. Decoding then goes on from the
oracle's token. Excused positions are counted, printed and bounded.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from examples.demo_lm import corpus
from mara_deploy.demo import MODEL_FOLDER, demo_agent
from mara_deploy.demo.prompts import prompts
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.engines.ort_cuda import CudaEngine, CudaMemory
from mara_runtime.schedule.base import PassContext, PassPlan
from mara_runtime.stats import Step
from tests import checkpoints, families, oracle

MODELS = (*checkpoints.ARCHITECTURES, "demo")
LOWERINGS = ("ort", "portable")
EXCUSABLE = 1e-5
"""Of numbers of the order of 1."""
MOST_EXCUSED = 0.001
MARGIN_TOLERANCE = 2e-3  # of smallest_margin, a number and not a decision; margins here are of the order of 1
OPTIONS = {"max_new_tokens": 64, "fallback": "first"}
WAYS = [  # pairwise over the ways to schedule and to draft
    {"draft": 0},
    {"draft": 8},
    {"schedule": "one-by-one", "draft": 0},
    {"schedule": "one-by-one", "draft": 3},
    {"schedule": "together"},
    {"schedule": "together", "draft": 16},
]


def pairs(*chosen):
    """These pairs of model and lowering; all others are `long`."""
    others = (pair for pair in product(MODELS, LOWERINGS) if pair not in chosen)
    return pytest.mark.parametrize(
        ("name", "lowering"), [*chosen, *(pytest.param(*pair, marks=pytest.mark.long) for pair in others)]
    )


@dataclass
class Tally:
    """Checked positions."""

    what: str
    rounding: float
    """of the oracle's logits"""
    positions: int = 0
    decisions: int = 0
    forced: int = 0
    excused: list[str] = field(default_factory=list)

    def excuse(self, step: Step, expected: dict) -> None:
        """Take a difference for rounding, or fail."""
        gaps = expected["gap_parts"]
        excusable = [name for name in gaps if gaps[name] < (self.rounding if name == "logit" else EXCUSABLE)]
        assert excusable, f"position {step.position}: {step} against {expected}"
        self.excused.append(f"position {step.position}: {excusable[0]} {gaps[excusable[0]]:.1e}")

    def settle(self) -> None:
        print(f"\n{self}")
        assert self.decisions > 0.1 * self.positions
        assert len(self.excused) <= MOST_EXCUSED * self.positions


@pytest.fixture(scope="session")
def subject(reference, agent):
    """name → (Hugging Face model, agent, prompts of token ids): 50 of the demo, 20 of a random model."""

    @cache
    def get(name: str):
        if name == "demo":
            texts = [corpus.chat(p.text) for p in prompts(50, 11, True)]
            ids = AutoTokenizer.from_pretrained(MODEL_FOLDER)(texts, add_special_tokens=False)["input_ids"]
            return checkpoints.load(MODEL_FOLDER), demo_agent(), ids
        lengths = (1, 2, 5, 17, 40)
        ids = [prompt for n in lengths for prompt in checkpoints.random_prompts(4, seed=n, length=n)]
        return reference(name), agent(name), ids

    return get


@pytest.fixture(scope="session")
def tally(subject):
    """(name, what is checked) → a tally. Rounding: the most that float32 changes in a logit of some prompts."""

    @cache
    def rounding(name: str) -> float:
        model, _, prompts = subject(name)
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            pairs = [(model(ids).logits, exact(ids).logits) for ids in map(torch.tensor, [[p] for p in prompts[-8:]])]
        return max(float((rounded - logits).abs().max()) for rounded, logits in pairs)

    return lambda name, what: Tally(f"{name}, {what}", rounding(name))


@pytest.fixture(scope="session")
def answers(subject):
    """(name, count, every, options) → [(prompt, the oracle's answer)] of so many prompts, computed once.

    every: take each prompt (1) or each second one (2).
    """

    @cache
    def answer(name: str, index: int, **options):
        model, agent, prompts = subject(name)
        return oracle.decode(model, agent, prompts[index], eos_ids=model.generation_config.eos_token_id, **options)

    def get(name: str, count: int | None = None, every: int = 2, **options):
        chosen = list(enumerate(subject(name)[2]))[::every][:count]
        return [(prompt, answer(name, index, **options)) for index, prompt in chosen]

    return get


@pytest.fixture(scope="session")
def decoder(bundle):
    """(name, lowering) → the product, on one thread."""
    return cache(lambda name, lowering: AlignedDecoder(bundle(name, lowering), threads=1))


def agrees(step: Step, expected: dict) -> bool:
    return (
        step.position == expected["position"]
        and step.candidates.ids.tolist() == expected["candidates"]
        and [int(step.candidates.ids[r - 1]) for r in step.margins] == expected["examined"]
        and (step.token, step.rank, step.forced) == (expected["token"], expected["rank"], expected["forced"])
    )


def follow(decoder: AlignedDecoder, config: DecodeConfig, prompt: list[int], truth: oracle.OracleResult, tally: Tally):
    """Decode one prompt beside the oracle, excusing what may be excused."""
    done = 0  # oracle positions that are settled
    excused_before = len(tally.excused)
    while done < len(truth.positions):
        rest = replace(config, max_new_tokens=config.max_new_tokens - done)
        result = None
        for piece in decoder.stream([*prompt, *truth.token_ids[:done]], rest):
            expected, step, result = truth.positions[done], piece.step, piece.result
            done += 1
            if not agrees(step, expected):
                tally.excuse(step, expected)
                assert config.strategy != "random", "a new start would draw other numbers"
                if step.token != expected["token"]:
                    result = None
                    break  # on from the oracle's token
            if done == len(truth.positions):
                break
        if result is not None:
            assert result.finish_reason == truth.finish_reason
        else:
            assert len(tally.excused) > excused_before, "the product went on where the oracle had ended"
    tally.positions += len(truth.positions)
    tally.decisions += truth.counters["decisions"]
    tally.forced += truth.counters["forced"]
    if len(tally.excused) == excused_before:
        assert result is not None
        assert result.token_ids == truth.token_ids
        margin = pytest.approx(truth.counters["smallest_margin"], abs=MARGIN_TOLERANCE)
        assert result.stats.algorithm() == {**truth.counters, "smallest_margin": margin}


def follow_all(decoder: AlignedDecoder, config: DecodeConfig, cases, tally: Tally) -> None:
    """The same for (prompt, the oracle's answer) of `cases`, and settle."""
    for prompt, truth in cases:
        follow(decoder, config, prompt, truth, tally)
    tally.settle()


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


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.long)])
@pairs(*DEFAULT_PAIRS, ("llama", "decomposed"))
def test_64_tokens_of_each_prompt_are_the_oracle_s(name, lowering, every, answers, decoder, tally):
    """By default, and in another way for each prompt."""
    product, cases = decoder(name, lowering), answers(name, every=every, **OPTIONS)
    others = tally(name, f"{lowering}, other ways")
    follow_all(product, DecodeConfig(**OPTIONS), cases, tally(name, f"{lowering}, default"))
    for index, (prompt, truth) in enumerate(cases):
        follow(product, DecodeConfig(**OPTIONS, **WAYS[index % len(WAYS)]), prompt, truth, others)
    others.settle()


QUICK_FAMILIES = {("gemma2", "ort"), ("gemma3_text", "portable"), ("cohere2", "decomposed")}
"""Windows, soft caps, two rotary tables, neighbours that turn, layers without."""


@pytest.mark.parametrize(
    ("family", "lowering"),
    [
        pytest.param(*pair, marks=() if pair in QUICK_FAMILIES else pytest.mark.long)
        for pair in product(families.NAMES, ("ort", "portable", "decomposed"))
    ],
)
def test_48_tokens_of_every_family_are_the_oracle_s(family, lowering, answers, decoder, tally):
    """Texts that are longer than the windows, of 16 tokens. The bundle has passed its gate."""
    options = {**OPTIONS, "max_new_tokens": 48}
    cases = answers(family, 8, **options)
    follow_all(decoder(family, lowering), DecodeConfig(**options), cases, tally(family, lowering))


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
