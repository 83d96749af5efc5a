"""What is counted of an emitted token, and which positions lie within the noise."""

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from mara_runtime.candidates import Candidates
from mara_runtime.config import DecodeConfig
from mara_runtime.manifest import Noise
from mara_runtime.stats import Stats, Step

ALIGNED = DecodeConfig()
MAX_PROB = DecodeConfig(strategy="max_prob")


def step(margins: dict[int, float], *, rank: int = 1, count: int = 3, gap: float = 5.0, **options: Any) -> Step:
    """An emitted token among so many candidates."""
    probabilities = np.full(count, 1 / count)
    candidates = Candidates(np.arange(count), probabilities, np.log(probabilities), gap)
    return Step(rank - 1, 7, candidates, rank, margins, **{"forced": False, **options})


def counted(*steps: Step, config: DecodeConfig = ALIGNED, noise: Noise | None = None) -> Stats:
    stats = Stats()
    for each in steps:
        stats.record(each, config, noise)
    return stats


def test_the_counters_of_the_algorithm():
    stats = counted(
        step({1: -2.0, 2: 0.75}, rank=2),
        step({}, count=1),
        step({1: 3.0}, count=2),
        step({1: -0.5, 2: -4.0, 3: -1.0}, forced=True),
    )
    assert stats.algorithm() == {
        "tokens": 4,
        "decisions": 3,
        "examined": 6,
        "forced": 1,
        "accepted_rank": {"1": 1, "2": 1},
        "candidate_counts": {"1": 1, "2": 1, "3": 2},
        "smallest_margin": 0.5,
    }


def test_the_smallest_margin_is_a_distance_from_the_threshold():
    config = DecodeConfig(threshold=2.0)
    assert counted(step({1: 1.5, 2: 2.25}, rank=2), config=config).smallest_margin == 0.25
    assert counted(step({1: 2.0}, forced=True), config=config).smallest_margin == 0.0
    assert counted(step({}, count=1), config=config).smallest_margin is None


def test_emitted_drafted_tokens_are_confirmed_and_change_nothing_of_the_algorithm():
    stats = counted(step({1: 1.0}, drafted=True), step({1: 1.0}), step({}, count=1, drafted=True))
    assert stats.confirmed == 2
    stats.rows = stats.forwards = stats.drafted = stats.reused_tokens = 5
    assert stats.algorithm() == counted(step({1: 1.0}), step({1: 1.0}), step({}, count=1)).algorithm()


def test_plain_decoding_counts_tokens_and_near_ties():
    steps = step({}, count=1, gap=1.0), step({}, count=3, rank=3, gap=0.125)
    stats = counted(*steps, config=DecodeConfig(align=False), noise=Noise(9, 0.25))
    assert (stats.tokens, stats.within_noise) == (2, 1)
    assert stats.algorithm() == {**Stats().algorithm(), "tokens": 2}


NOISE = Noise(margins=0.25, logits=0.25)


@pytest.mark.parametrize(
    ("seen", "config", "noise", "within"),
    [
        (step({1: 0.5}, gap=1.0), ALIGNED, NOISE, 0),
        (step({1: 0.125}, gap=1.0), ALIGNED, NOISE, 1),  # a margin might flip
        (step({1: -0.125, 2: 3.0}, rank=2, gap=1.0), ALIGNED, NOISE, 1),  # also that of a rejected candidate
        (step({1: 0.5}, gap=0.125), ALIGNED, NOISE, 1),  # the list of candidates might be another
        (step({}, count=1, gap=0.125), ALIGNED, NOISE, 1),
        (step({1: 0.25}, gap=0.25), ALIGNED, NOISE, 0),  # the noise is less than that
        (step({1: 0.0}, gap=0.0, forced=True), ALIGNED, None, 0),  # unknown
        (step({1: 3.0, 2: 3.125, 3: 1.0}, rank=2), MAX_PROB, NOISE, 1),  # the best two compete …
        (step({1: 3.0, 2: 3.125, 3: 1.0}, rank=2), DecodeConfig(strategy="random"), NOISE, 0),
        (step({1: 3.0, 2: 1.0, 3: 1.125}), MAX_PROB, NOISE, 0),  # … not the others
        (step({1: -3.0, 2: -3.125}, forced=True), MAX_PROB, NOISE, 0),  # … nor rejected ones
    ],
)
def test_a_position_is_within_the_noise_where_a_distance_is_smaller(seen, config, noise, within):
    assert counted(seen, config=config, noise=noise).within_noise == within
    assert counted(seen, step({1: 9.0}, gap=math.inf), seen, config=config, noise=noise).within_noise == 2 * within


def test_all_counters_are_in_the_json():
    stats = counted(step({1: 1.0}), step({1: 1.0}))
    stats.decode_ms = 2000.0
    values = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    assert set(values) == {f.name for f in fields(Stats)} | {"tokens_per_second"}
    assert list(values)[: len(stats.algorithm())] == list(stats.algorithm())
    assert values["tokens_per_second"] == 0.5
    assert Stats().tokens_per_second == 0.0
