"""Discrete soft actor-critic over accepting and rejecting.

Sources: Haarnoja et al., "Soft Actor-Critic" (arXiv 1801.01290), with a learned entropy coefficient (arXiv 1812.05905);
Christodoulou, "Soft Actor-Critic for Discrete Action Settings" (arXiv 1910.07207); MARA (arXiv 2505.19743).
docs/guide/train.md states the objective and the treatment of forced acceptance.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mara_deploy.agent import Agent
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.policy import entropy, kl_divergence
from mara_deploy.train.replay import Batch
from mara_runtime.errors import NumericsError

LN2 = math.log(2)


class TwinCritic(nn.Module):
    """Two Q networks with a shared LayerNorm and the parameter names of MARA's released critics."""

    def __init__(self, hidden_size: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size, eps=1e-5)
        for twin in "12":
            self.add_module(f"linear{twin}1", nn.Linear(hidden_size, widths[0]))
            self.add_module(f"linear{twin}2", nn.Linear(widths[0], widths[1]))
            self.add_module(f"linear{twin}3", nn.Linear(widths[1], 2))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → Q1 and Q2, (N, 2) each: the values of rejecting and accepting."""
        x = self.ln(states)
        values = []
        for twin in "12":
            y = torch.relu(self.get_submodule(f"linear{twin}1")(x))
            y = torch.relu(self.get_submodule(f"linear{twin}2")(y))
            values.append(self.get_submodule(f"linear{twin}3")(y))
        return values[0], values[1]


class Learner:
    """Actor, critics, target critics and entropy coefficient α, with their optimisers."""

    def __init__(self, hidden_size: int, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.actor = Agent(hidden_size, config.widths)
            self.critic = TwinCritic(hidden_size, config.widths)
        self.actor.fallback = config.fallback
        self.actor.to(device)
        self.critic.to(device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        start = math.log(config.alpha) if config.alpha_form == "log" else config.alpha
        self._alpha = torch.tensor(start, requires_grad=True)  # a scalar: stays on the CPU
        self._optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), config.learning_rate),
            "critic": torch.optim.Adam(self.critic.parameters(), config.learning_rate),
            "alpha": torch.optim.Adam([self._alpha], config.alpha_rate),
        }
        self._device = device

    @property
    def alpha(self) -> float:
        """Entropy coefficient, ≥ 0."""
        value = float(self._alpha.detach())
        return math.exp(value) if self.config.alpha_form == "log" else value

    def update(self, batch: Batch) -> dict[str, float]:
        """One gradient step of critics, actor and α. Returns metrics. Raises NumericsError for a non-finite loss."""
        batch = batch.to(self._device)
        targets = self.returns(batch)
        critic_loss = self.critic_loss(batch, targets)
        actor_loss, mean_entropy = self.actor_loss(batch)
        self._step("critic", self.critic, critic_loss)
        self._step("actor", self.actor, actor_loss)
        if not batch.forced[:, 0].all():  # forced states have no entropy to adapt α to
            self._step_alpha(mean_entropy)
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                old.lerp_(new, self.config.target_rate)
        metrics = {
            "critic_loss": float(critic_loss.detach()),
            "actor_loss": float(actor_loss.detach()),
            "batch_entropy": mean_entropy,
            "return": float(targets.mean()),
        }
        if not all(map(math.isfinite, metrics.values())):
            lower = (
                "--target-entropy" if self.alpha > 1 else "--learning-rate or --kl-weight, or --weight of the scores"
            )
            raise NumericsError(
                f"training has diverged (α {self.alpha:.3g}, {metrics}): start a new run, lower {lower}"
            )
        return metrics

    @torch.no_grad()
    def returns(self, batch: Batch) -> Tensor:
        """(B,) n-step returns: discounted rewards along the trajectory, then the value of the state it leads to.

        They exclude entropy and KL of the first state, which do not depend on the action: see `actor_loss`.
        """
        config = self.config
        bonus = torch.where(batch.forced, 0.0, self.alpha * entropy(batch.margins))  # (B, n)
        bonus -= config.kl_weight * kl_divergence(batch.margins, batch.reference, batch.forced)
        bonus[:, 0] = 0.0
        steps = bonus.shape[1]
        discounts = config.discount ** torch.arange(steps, device=bonus.device)
        rewards = torch.where(batch.inside, batch.scores + bonus, 0.0)
        bootstrap = config.discount**steps * self.value(batch.next_states, batch.next_reference, batch.next_forced)
        return (rewards * discounts).sum(1) + torch.where(batch.ended, 0.0, bootstrap)

    @torch.no_grad()
    def value(self, states: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
        """(N,) soft values by the target critics; at a forced state the value of accepting, without entropy and KL."""
        q = torch.minimum(*self.target(states))  # (N, 2)
        return torch.where(forced, q[:, 1], self._soft_value(self.actor.margin(states), q, reference, forced))

    def _soft_value(self, margin: Tensor, q: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
        """(N,) Σ_a π(a)·Q(a) + α·H(π) - kl_weight·KL(π ‖ q_LLM). q: (N, 2) values of the actions."""
        accept = torch.sigmoid(margin)
        expected = (1 - accept) * q[:, 0] + accept * q[:, 1]
        kl = self.config.kl_weight * kl_divergence(margin, reference, forced)
        return expected + self.alpha * entropy(margin) - kl

    def critic_loss(self, batch: Batch, targets: Tensor) -> Tensor:
        """Half the mean squared error of each critic, summed."""
        action = batch.accepted[:, None].long()
        errors = [values.gather(1, action)[:, 0] - targets for values in self.critic(batch.states)]
        return sum((0.5 * error.square().mean() for error in errors), torch.zeros((), device=targets.device))

    def actor_loss(self, batch: Batch) -> tuple[Tensor, float]:
        """-mean(Σ_a π·min(Q1, Q2) + α·H - kl_weight·KL(π ‖ q)) over the states that are not forced, and their mean
        entropy, in nats.
        """
        forced = batch.forced[:, 0]
        count = (~forced).sum().clamp(min=1)
        with torch.no_grad():
            q = torch.minimum(*self.critic(batch.states))
        margin = self.actor.margin(batch.states)
        value = self._soft_value(margin, q, batch.reference[:, 0], forced)
        mean_entropy = float((entropy(margin.detach()) * ~forced).sum() / count)
        return -(value * ~forced).sum() / count, mean_entropy

    def _step(self, name: str, module: nn.Module, loss: Tensor) -> None:
        optimizer = self._optimizers[name]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), self.config.clip_norm)
        optimizer.step()

    def _step_alpha(self, mean_entropy: float) -> None:
        """Lower α while the policy's entropy exceeds the target, raise it below."""
        excess = mean_entropy - self.config.target_entropy * LN2
        loss = excess * (self._alpha.exp() if self.config.alpha_form == "log" else self._alpha)
        self._optimizers["alpha"].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizers["alpha"].step()
        if self.config.alpha_form == "direct":
            with torch.no_grad():
                self._alpha.clamp_(min=0.0)

    def state(self) -> dict[str, Any]:
        """Everything an update depends on, for checkpoints."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "alpha": self._alpha.detach(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load a `state`."""
        for name in ("actor", "critic", "target"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self._alpha.copy_(state["alpha"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
