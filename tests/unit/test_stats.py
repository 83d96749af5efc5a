"""Which positions lie within the noise, and the counters as JSON. test_decode.py has what the algorithm counts."""

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


NOISE = Noise(margins=0.25, logits=0.25)


@pytest.mark.parametrize(
    ("seen", "config", "noise", "within"),
    [
        (step({1: 0.5}, gap=1.0), ALIGNED, NOISE, 0),
        (step({1: 0.125}, gap=1.0), ALIGNED, NOISE, 1),  # a margin might flip
        (step({1: -0.125, 2: 3.0}, rank=2, gap=1.0), ALIGNED, NOISE, 1),  # also that of a rejected candidate
        (step({1: 0.5}, gap=0.125), ALIGNED, NOISE, 1),  # the list of candidates might be another
        (step({}, count=1, gap=0.125), ALIGNED, NOISE, 1),
        (step({}, rank=3, gap=0.125), DecodeConfig(align=False), NOISE, 1),
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
