"""Many conversations in one pass against the sequential oracle on Hugging Face eager: each as if it were alone.

They join when a place is free and leave when they end, each with a strategy, an order, a fallback, a threshold, a seed,
a schedule and drafts of its own. As in test_exactness.py a difference is excused only where the oracle's own gap is
below `EXCUSABLE`; what comes after it in that answer is another text, and is not compared.
"""

from __future__ import annotations

from itertools import product

import pytest

from mara_runtime import DecodeConfig
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES
from tests import checkpoints, oracle
from tests.export.test_exactness import EXCUSABLE, MARGIN_TOLERANCE, WAYS, Tally, agrees, decoder  # noqa: F401

PLACES = 8


def asked(index: int, tokens: int) -> dict:
    """How the conversation of that number is decoded; all combinations occur."""
    ways = [*product(STRATEGIES, ORDERS, FALLBACKS)]
    strategy, order, fallback = ways[index % len(ways)]
    return {
        "strategy": strategy,
        "order": order,
        "fallback": fallback,
        "threshold": (0.0, -0.4, 0.5)[index // len(ways) % 3],
        "top_k": (40, 6)[index % 2],
        "seed": index,
        "max_new_tokens": tokens - index % 7,
    }


@pytest.mark.parametrize(
    ("count", "tokens"),
    [(24, 40), pytest.param(300, 64, marks=pytest.mark.long)],
)
def test_each_of_many_conversations_is_answered_as_if_it_were_alone(
    count,
    tokens,
    reference,
    agent,
    decoder,  # noqa: F811
) -> None:
    """The oracle's answers are computed once for all lowerings."""
    name = "llama"
    model, judge = reference(name), agent(name)
    system = checkpoints.random_prompts(1, seed=99, length=24)[0]
    prompts, configs, truths = [], [], []
    for index in range(count):
        (own,) = checkpoints.random_prompts(1, seed=index, length=1 + 7 * index % 45)
        options = asked(index, tokens)
        prompts.append([*(system if index % 3 else []), *own])
        configs.append(DecodeConfig(**options, **WAYS[index % len(WAYS)]))
        truths.append(oracle.decode(model, judge, prompts[-1], eos_ids=model.generation_config.eos_token_id, **options))
    for lowering in ("ort", "portable", "decomposed"):
        tally = Tally(f"{count} conversations, {lowering}")
        steps: list[list] = [[] for _ in prompts]
        results: list = [None] * count
        for index, piece in decoder(name, lowering).generate_many(prompts, configs, places=PLACES):
            assert not isinstance(piece, Exception), piece
            steps[index].append(piece.step)
            results[index] = piece.result
        for index, truth in enumerate(truths):
            differs = compare(steps[index], truth, tally)
            if not differs:
                assert results[index].token_ids == truth.token_ids
                margin = pytest.approx(truth.counters["smallest_margin"], abs=MARGIN_TOLERANCE)
                assert results[index].stats.algorithm() == {**truth.counters, "smallest_margin": margin}
        tally.settle()


def compare(steps: list, truth: oracle.OracleResult, tally: Tally) -> bool:
    """Compare an answer up to a difference that may be excused; is there one?"""
    tally.decisions += truth.counters["decisions"]
    for step, expected in zip(steps, truth.positions, strict=False):
        tally.positions += 1
        if not agrees(step, expected):
            gap = min(expected["gap_parts"].values())
            assert gap < EXCUSABLE, f"position {step.position}: {step} against {expected}"
            tally.excused.append(f"position {step.position}: gap {gap:.1e}")
            return True
    assert len(steps) == len(truth.positions)
    return False
