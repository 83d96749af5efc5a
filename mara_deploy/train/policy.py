"""Policies over candidates, and the KL divergence between a policy and the LLM.

For a list of candidates with probabilities p, best first, sampling from the LLM is the policy that accepts candidate i,
once all before it were rejected, with q_i(1) = p_i / Σ_{m≥i} p_m (docs/guide/train.md). Policies are represented by
logits: a *margin* is log π(1) - log π(0), and a *reference logit* is log q(1) - log q(0) = log p_i -
log Σ_{m>i} p_m, +inf for the last candidate, which cannot be rejected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mara_deploy.agent import Agent

Policy = Callable[[Tensor, NDArray[np.float32]], NDArray[np.float32]]
"""(R, D) states and (R,) reference logits of candidates → (R,) margins."""


def agent_policy(agent: Agent) -> Policy:
    """The policy of an agent, which depends on the states alone."""

    @torch.no_grad()
    def margins(states: Tensor, _: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = agent.margin(states.float()).cpu().numpy()
        return result

    return margins


def reference_policy(_: Tensor, reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """The LLM's own policy: sampling from it is plain sampling with top-k and top-p."""
    return reference


def reference_logits(log_probabilities: NDArray[np.float64]) -> NDArray[np.float32]:
    """(n,) unnormalised log-probabilities of the candidates, best first → (n,) logits of q, the last +inf."""
    tails = np.logaddexp.accumulate(log_probabilities[::-1])[::-1]  # log Σ_{m≥i} p_m
    reference = np.full(len(log_probabilities), np.inf)
    reference[:-1] = log_probabilities[:-1] - tails[1:]
    return reference.astype(np.float32)


def log_probability(logit: Tensor, accepted: Tensor) -> Tensor:
    """Log-probability of an action under a Bernoulli policy. logit (…) of accepting, accepted (…) bool → (…)."""
    return F.logsigmoid(torch.where(accepted, logit, -logit))


def kl_terms(margin: Tensor, reference: Tensor, accepted: Tensor, forced: Tensor) -> Tensor:
    """log π(a) - log q(a) of each transition, in nats, all (…); 0 for forced acceptance."""
    finite = torch.where(forced, torch.zeros_like(reference), reference)
    terms = log_probability(margin, accepted) - log_probability(finite, accepted)
    return torch.where(forced, torch.zeros_like(terms), terms)


def kl_divergence(margin: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
    """KL(π ‖ q) at each state, in nats: the expectation of `kl_terms` under π."""
    accept, reject = (kl_terms(margin, reference, torch.full_like(forced, a), forced) for a in (True, False))
    return torch.sigmoid(margin) * accept + torch.sigmoid(-margin) * reject


def entropy(margin: Tensor) -> Tensor:
    """Entropy of a Bernoulli policy, in nats."""
    return F.softplus(margin) - margin * torch.sigmoid(margin)
