"""Decoding a prompt beside the sequential oracle on Hugging Face eager.

At every position the candidates, the examined ones, the pick and whether it was forced must be the oracle's. A
difference is excused only where the oracle's own gap there is within rounding: between two logits, what float32 changes
in the oracle's own; from the top-p boundary, or of the agent's margin, `EXCUSABLE`. Decoding then goes on from the
oracle's token. Excused positions are counted, printed and bounded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from transformers import PreTrainedModel

from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.stats import Step
from tests import oracle

EXCUSABLE = 1e-5
"""Of numbers of the order of 1."""
MOST_EXCUSED = 0.001
MARGIN_TOLERANCE = 2e-3  # of smallest_margin, a number and not a decision; margins here are of the order of 1
WAYS = [  # pairwise over the ways to schedule and to draft
    {"draft": 0},
    {"draft": 8},
    {"schedule": "one-by-one", "draft": 0},
    {"schedule": "one-by-one", "draft": 3},
    {"schedule": "together"},
    {"schedule": "together", "draft": 16},
]
OPTIONS = {"max_new_tokens": 64, "fallback": "first"}


def rounding_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> float:
    """The most that float32 changes in a logit of a Hugging Face model, over prompts."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        pairs = [(model(ids).logits, exact(ids).logits) for ids in map(torch.tensor, [[p] for p in prompts])]
    return max(float((rounded - logits).abs().max()) for rounded, logits in pairs)


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
