"""What is counted of an emitted token, and what lies within the noise."""

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from mara_runtime.candidates import Candidates
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Step
from mara_runtime.manifest import Noise
from mara_runtime.stats import Stats

ALIGNED = DecodeConfig()


def step(margins: dict[int, float], *, rank: int = 1, count: int = 3, gap: float = 5.0, **options: Any) -> Step:
    """An emitted token among so many candidates."""
    probabilities = np.full(count, 1 / count)
    candidates = Candidates(np.arange(count), probabilities, np.log(probabilities), gap)
    return Step(rank - 1, 7, candidates, rank, margins, **{"forced": False, **options})


def counted(*steps: Step, config: DecodeConfig = ALIGNED, noise: Noise | None = None) -> Stats:
    stats = Stats()
    for each in steps:
        stats.saw(each, config, noise)
    return stats


def test_every_counter_of_the_algorithm() -> None:
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


def test_distances_are_those_from_the_threshold() -> None:
    config = DecodeConfig(threshold=2.0)
    assert counted(step({1: 1.5, 2: 2.25}, rank=2), config=config).smallest_margin == 0.25
    assert counted(step({1: 2.0}, forced=True), config=config).smallest_margin == 0.0
    assert counted(step({}, count=1), config=config).smallest_margin is None


def test_drafted_tokens_that_are_emitted_are_confirmed() -> None:
    stats = counted(step({1: 1.0}, drafted=True), step({1: 1.0}), step({}, count=1, drafted=True))
    assert stats.confirmed == 2
    assert counted(step({}, count=1, drafted=True), config=DecodeConfig(align=False)).confirmed == 1


def test_plain_decoding_counts_tokens_alone_and_near_ties() -> None:
    seen = step({}, count=1, gap=1.0), step({}, count=3, rank=3, gap=0.125)
    stats = counted(*seen, config=DecodeConfig(align=False), noise=Noise(9, 0.25))
    assert (stats.tokens, stats.within_noise) == (2, 1)
    assert stats.algorithm() == {**Stats().algorithm(), "tokens": 2}


# ── within the noise ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seen", "noise", "within"),
    [
        (step({1: 0.5}, gap=1.0), Noise(0.25, 0.25), 0),
        (step({1: 0.125}, gap=1.0), Noise(0.25, 0.25), 1),  # a margin might tip
        (step({1: -0.125, 2: 3.0}, rank=2, gap=1.0), Noise(0.25, 0.25), 1),  # also that of a rejected candidate
        (step({1: 0.5}, gap=0.125), Noise(0.25, 0.25), 1),  # another list of candidates
        (step({1: 0.125}, gap=0.125), Noise(0.25, 0.25), 1),  # once a position
        (step({}, count=1, gap=0.125), Noise(0.25, 0.25), 1),  # another single candidate
        (step({}, count=1, gap=1.0), Noise(0.25, 0.25), 0),
        (step({}, count=1, gap=math.inf), Noise(0.25, 1e30), 0),
        (step({1: 0.25}, gap=0.25), Noise(0.25, 0.25), 0),  # the noise is less than that
        (step({1: 0.0}, gap=0.0, forced=True), Noise(0.0, 0.0), 0),
        (step({1: 0.0}, gap=0.0, forced=True), None, 0),  # not known
    ],
)
def test_a_position_lies_within_the_noise_when_a_gap_is_smaller(seen: Step, noise: Noise | None, within: int) -> None:
    assert counted(seen, noise=noise).within_noise == within


@pytest.mark.parametrize(("strategy", "within"), [("max_prob", 1), ("top1", 0), ("random", 0)])
def test_the_two_best_margins_count_where_the_best_is_taken(strategy: str, within: int) -> None:
    seen = step({1: 3.0, 2: 3.125, 3: 1.0}, rank=2)
    assert counted(seen, config=DecodeConfig(strategy=strategy), noise=Noise(0.25, 0.25)).within_noise == within


def test_margins_of_the_others_are_no_matter_to_the_best() -> None:
    seen = step({1: 3.0, 2: 1.0, 3: 1.125})
    assert counted(seen, config=DecodeConfig(strategy="max_prob"), noise=Noise(0.25, 0.25)).within_noise == 0


def test_margins_of_rejected_candidates_do_not_compete() -> None:
    seen = step({1: -3.0, 2: -3.125}, forced=True)
    assert counted(seen, config=DecodeConfig(strategy="max_prob"), noise=Noise(0.25, 0.25)).within_noise == 0


def test_positions_within_the_noise_add_up() -> None:
    near, far = step({1: 0.125}), step({1: 2.0})
    assert counted(near, far, near, near, noise=Noise(0.25, 0.25)).within_noise == 3


# ── as plain values ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_is_in_the_json() -> None:
    stats = counted(step({1: 1.0}), step({1: 1.0}))
    stats.decode_ms = 2000.0
    values = json.loads(json.dumps(stats.to_json(), allow_nan=False))
    assert {f.name for f in fields(Stats)} | {"tokens_per_second"} == set(values)
    assert list(values)[: len(stats.algorithm())] == list(stats.algorithm())
    assert values["tokens_per_second"] == 0.5


def test_the_work_is_no_part_of_the_algorithm() -> None:
    stats = counted(step({1: 1.0}, drafted=True), noise=Noise(9.0, 9.0))
    stats.rows = stats.forwards = stats.drafted = stats.reused_tokens = 5
    stats.engine_ms = 3.0
    assert stats.algorithm() == counted(step({1: 1.0})).algorithm()
