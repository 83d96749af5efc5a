"""The LLM's own choice written as accepting and rejecting, and what a policy pays for leaving it.

docs/training.md, "What is learned": over a list of candidates with probabilities p, best first, the LLM draws like a
policy that accepts candidate i, once all before it were rejected, with q_i(1) = p_i / Σ_{m≥i} p_m. Both policies are
kept as logits: a *margin* is log π(1) - log π(0), and the *reference* is log q(1) - log q(0) = log p_i -
log Σ_{m>i} p_m, +inf for the last candidate, which cannot be rejected.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def reference_logits(log_probabilities: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) log-probabilities of the candidates up to a constant, best first → (n,) logits of q, the last +inf."""
    backwards = np.logaddexp.accumulate(log_probabilities[::-1])[::-1]  # log Σ_{m≥i} p_m
    reference = np.full(len(log_probabilities), np.inf)
    reference[:-1] = log_probabilities[:-1] - backwards[1:]
    return reference.astype(np.float32)


def log_choice(logit: Tensor, accepted: Tensor) -> Tensor:
    """Log-probability of the action under a Bernoulli policy. logit (…) of accepting, accepted (…) bool → (…)."""
    return F.logsigmoid(torch.where(accepted, logit, -logit))


def kl_terms(margin: Tensor, reference: Tensor, accepted: Tensor, forced: Tensor) -> Tensor:
    """log π(a) - log q(a) of each transition, in nats, all (…); 0 where acceptance was forced."""
    safe = torch.where(forced, torch.zeros_like(reference), reference)
    terms = log_choice(margin, accepted) - log_choice(safe, accepted)
    return torch.where(forced, torch.zeros_like(terms), terms)


def divergence(margin: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
    """KL(π ‖ q) at each state, in nats: the expectation of `kl_terms` under π."""
    yes, no = (kl_terms(margin, reference, torch.full_like(forced, a), forced) for a in (True, False))
    return torch.sigmoid(margin) * yes + torch.sigmoid(-margin) * no


def entropy(margin: Tensor) -> Tensor:
    """Entropy of a Bernoulli policy, in nats."""
    return F.softplus(margin) - margin * torch.sigmoid(margin)
