"""The LLM as an accept/reject policy, and the KL terms, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mara_deploy.train.policy import entropy, kl_divergence, kl_terms, log_probability, reference_logits

P = np.array([0.5, 0.3, 0.2])
REFERENCE = reference_logits(np.log(P))
LAST_FORCED = torch.tensor([False, False, True])


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p / (1 - p)) for p in probabilities])


def test_the_reference_draws_the_candidates_with_their_probabilities() -> None:
    """It needs no normaliser, and survives extremes."""
    # q_1(1) = 0.5, q_2(1) = 0.3 / 0.5, and the last cannot be rejected
    assert REFERENCE[:2] == pytest.approx(logits(0.5, 0.6).tolist(), abs=1e-6)
    assert REFERENCE[2] == np.inf
    accept = 1 / (1 + np.exp(-REFERENCE.astype(float)))
    reach = np.concatenate([[1.0], np.cumprod(1 - accept)[:-1]])
    assert accept * reach == pytest.approx(P)
    assert reference_logits(np.log(P) - 1000) == pytest.approx(REFERENCE)
    assert reference_logits(np.array([0.0, -500.0, -1000.0]))[:2] == pytest.approx([500.0, 500.0])


def test_kl_terms_of_a_position_sum_to_the_log_ratio_of_the_emitted_candidate() -> None:
    """Rejecting 1, accepting 2: log P_2 - log p_2 with P_2 = (1 - π_1) π_2. Forced acceptance of 3 costs nothing."""
    reference = torch.tensor(REFERENCE)
    two = kl_terms(logits(0.8, 0.4), reference[:2], torch.tensor([False, True]), torch.tensor([False, False]))
    assert two.tolist() == pytest.approx([math.log(0.2) - math.log(0.5), math.log(0.4) - math.log(0.6)], abs=1e-5)
    assert float(two.sum()) == pytest.approx(math.log(0.2 * 0.4) - math.log(0.3), abs=1e-5)
    three = kl_terms(logits(0.8, 0.4, 0.01), reference, LAST_FORCED, LAST_FORCED)
    assert float(three[2]) == 0.0
    assert float(three.sum()) == pytest.approx(math.log(0.2 * 0.6) - math.log(0.2), abs=1e-5)


def test_the_expected_kl_is_the_divergence_of_the_two_distributions() -> None:
    emitted = np.array([0.8, 0.2 * 0.4, 0.2 * 0.6])
    expected = float((emitted * np.log(emitted / P)).sum())
    states = kl_divergence(logits(0.8, 0.4, 0.95), torch.tensor(REFERENCE), LAST_FORCED)
    assert float(states[2]) == 0.0
    assert float((torch.tensor([1.0, 0.2, 0.12]) * states).sum()) == pytest.approx(expected, abs=1e-6)


def test_the_llms_own_policy_has_no_kl() -> None:
    reference = torch.tensor(REFERENCE)
    for accepted in (True, False):
        assert kl_terms(reference, reference, torch.full((3,), accepted), LAST_FORCED).tolist() == [0.0] * 3
    assert kl_divergence(reference, reference, LAST_FORCED).tolist() == [0.0] * 3


@pytest.mark.parametrize("margin", [-40.0, -1.0, 0.0, 2.5, 40.0])
def test_logs_and_entropy_against_their_definitions(margin) -> None:
    p = 1 / (1 + math.exp(-margin))
    accept, reject = (float(log_probability(torch.tensor(margin), torch.tensor(a))) for a in (True, False))
    assert accept == pytest.approx(-math.log1p(math.exp(-margin)), abs=1e-6)
    assert reject == pytest.approx(accept - margin, abs=1e-5)
    h = float(entropy(torch.tensor(margin)))
    assert h == pytest.approx(-(p * accept + (1 - p) * reject), abs=1e-5)
    assert -1e-6 <= h <= math.log(2) + 1e-6
