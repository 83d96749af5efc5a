"""The LLM's choice as accepting and rejecting, and the reward terms, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mara_deploy.train.policy import divergence, entropy, kl_terms, log_choice, reference_logits

P = np.array([0.5, 0.3, 0.2])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def tensors(*columns):
    return tuple(torch.tensor(column) for column in columns)


def test_the_reference_draws_the_candidates_with_their_probabilities() -> None:
    reference = reference_logits(np.log(P))
    # q_1(1) = 0.5, q_2(1) = 0.3 / 0.5, and the last cannot be rejected
    assert reference[:2] == pytest.approx([logit(0.5), logit(0.6)], abs=1e-6)
    assert reference[2] == np.inf
    accept = 1 / (1 + np.exp(-reference.astype(float)))
    reach = np.concatenate([[1.0], np.cumprod(1 - accept)[:-1]])
    assert accept * reach == pytest.approx(P)


def test_the_reference_needs_no_normaliser_and_survives_extremes() -> None:
    assert reference_logits(np.log(P) - 1000) == pytest.approx(reference_logits(np.log(P)))
    steep = reference_logits(np.array([0.0, -500.0, -1000.0]))
    assert steep[:2] == pytest.approx([500.0, 500.0])


def test_the_price_of_a_position_is_the_log_ratio_of_the_emitted_candidate() -> None:
    """Rejecting 1, accepting 2: log P_2 - log p_2 with P_2 = (1 - π_1) π_2."""
    pi = [0.8, 0.4]
    margin, reference = tensors([logit(x) for x in pi], reference_logits(np.log(P))[:2])
    terms = kl_terms(margin, reference, torch.tensor([False, True]), torch.tensor([False, False]))
    assert float(terms[0]) == pytest.approx(math.log(0.2) - math.log(0.5), abs=1e-5)
    assert float(terms[1]) == pytest.approx(math.log(0.4) - math.log(0.6), abs=1e-5)
    assert float(terms.sum()) == pytest.approx(math.log(0.2 * 0.4) - math.log(0.3), abs=1e-5)


def test_forced_acceptance_is_free_and_the_position_still_telescopes() -> None:
    """Rejecting 1 and 2 leaves the last: P_3 = (1 - π_1)(1 - π_2), whatever the policy says of the last."""
    pi = [0.8, 0.4, 0.01]
    margin, reference = tensors([logit(x) for x in pi], reference_logits(np.log(P)))
    terms = kl_terms(margin, reference, torch.tensor([False, False, True]), torch.tensor([False, False, True]))
    assert float(terms[2]) == 0.0
    assert float(terms.sum()) == pytest.approx(math.log(0.2 * 0.6) - math.log(0.2), abs=1e-5)


def test_the_expected_price_is_the_divergence_of_the_two_distributions() -> None:
    pi = np.array([0.8, 0.4, 1.0])
    emitted = pi * np.array([1.0, 0.2, 0.2 * 0.6])
    expected = float((emitted * np.log(emitted / P)).sum())
    margin, reference = tensors([logit(0.8), logit(0.4), 3.0], reference_logits(np.log(P)))
    states = divergence(margin, reference, torch.tensor([False, False, True]))
    assert float(states[2]) == 0.0
    reach = torch.tensor([1.0, 0.2, 0.12])
    assert float((reach * states).sum()) == pytest.approx(expected, abs=1e-6)


def test_the_llms_own_choice_costs_nothing() -> None:
    reference = torch.tensor(reference_logits(np.log(P)))
    forced = torch.tensor([False, False, True])
    for accepted in (True, False):
        assert kl_terms(reference, reference, torch.full((3,), accepted), forced).tolist() == [0.0] * 3
    assert divergence(reference, reference, forced).tolist() == [0.0] * 3


@pytest.mark.parametrize("margin", [-40.0, -1.0, 0.0, 2.5, 40.0])
def test_logs_and_entropy_against_their_definitions(margin) -> None:
    p = 1 / (1 + math.exp(-margin))
    yes, no = (float(log_choice(torch.tensor(margin), torch.tensor(a))) for a in (True, False))
    assert yes == pytest.approx(-math.log1p(math.exp(-margin)), abs=1e-6)
    assert no == pytest.approx(yes - margin, abs=1e-5)
    h = float(entropy(torch.tensor(margin)))
    assert h == pytest.approx(-(p * yes + (1 - p) * no), abs=1e-5)
    assert h >= -1e-6
    assert h <= math.log(2) + 1e-6


def test_the_released_reward_would_pay_for_rejecting() -> None:
    """What the released code does, and why it is not done here: docs/internals/method.md, "Training".

    It takes log_softmax over the probabilities P instead of log P, and pays both actions of a candidate alike. With
    three candidates that P spreads from 0.08 to 0.8, the softmax of P is nearly flat, so the term hardly depends on P.
    """
    emitted = torch.tensor([0.8, 0.08, 0.12])
    released = torch.log_softmax(emitted, 0) - torch.log(torch.tensor(P, dtype=torch.float32))
    ours = torch.log(emitted) - torch.log(torch.tensor(P, dtype=torch.float32))
    assert float(released[0] - released[1]) == pytest.approx(0.72 - math.log(0.5 / 0.3), abs=1e-5)
    assert float(ours[0] - ours[1]) == pytest.approx(math.log(10) - math.log(0.5 / 0.3), abs=1e-5)
