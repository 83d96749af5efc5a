"""Many conversations in one pass against the sequential oracle on Hugging Face eager: each as if it were alone.

They join when a place is free and leave when they end, each with a strategy, an order, a fallback, a threshold, a seed,
a schedule and drafts of its own. Differences are excused as in test_exactness.py, where the answer without company is
one of the two: the widths of passes decide such a tie. What comes after it is another text, and is not compared.
"""

from __future__ import annotations

from itertools import product

import pytest

from mara_runtime import DecodeConfig
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES
from tests import checkpoints, oracle
from tests.export.following import MARGIN_TOLERANCE, WAYS, Tally, agrees

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
    [(24, 40), pytest.param(360, 64, marks=pytest.mark.long)],
)
def test_each_of_many_conversations_is_answered_as_if_it_were_alone(
    count,
    tokens,
    reference,
    agent,
    decoder,
    tally,
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
        checked, product = tally(name, f"{lowering}, {count} conversations"), decoder(name, lowering)
        steps: list[list] = [[] for _ in prompts]
        results: list = [None] * count
        for index, piece in product.generate_many(prompts, configs, places=PLACES):
            assert not isinstance(piece, Exception), piece
            steps[index].append(piece.step)
            results[index] = piece.result
        for index, truth in enumerate(truths):
            if differs(steps[index], truth, checked):
                alone = product.generate(prompts[index], configs[index]).token_ids
                assert alone in (results[index].token_ids, truth.token_ids)
            else:
                assert results[index].token_ids == truth.token_ids
                margin = pytest.approx(truth.counters["smallest_margin"], abs=MARGIN_TOLERANCE)
                assert results[index].stats.algorithm() == {**truth.counters, "smallest_margin": margin}
        checked.settle()


def differs(steps: list, truth: oracle.OracleResult, checked: Tally) -> bool:
    """Compare an answer up to a difference that may be excused; is there one?"""
    checked.decisions += truth.counters["decisions"]
    for step, expected in zip(steps, truth.positions, strict=False):
        checked.positions += 1
        if not agrees(step, expected):
            checked.excuse(step, expected)
            return True
    assert len(steps) == len(truth.positions)
    return False
