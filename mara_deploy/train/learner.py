"""Discrete soft actor-critic over accepting and rejecting.

Sources: Haarnoja et al., "Soft Actor-Critic" (arXiv 1801.01290) with learned temperature (arXiv 1812.05905);
Christodoulou, "Soft Actor-Critic for Discrete Action Settings" (arXiv 1910.07207); MARA (arXiv 2505.19743).
docs/training.md states the objective, and what is special about forced acceptance.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mara_deploy.agent import Agent
from mara_deploy.train.config import TrainConfig
from mara_deploy.train.policy import divergence, entropy
from mara_deploy.train.replay import Batch
from mara_runtime.errors import NumericsError

LN2 = math.log(2)


class TwinCritic(nn.Module):
    """Two values for each action, behind one LayerNorm, with the parameter names of MARA's released critics."""

    def __init__(self, hidden_size: int, widths: tuple[int, int]) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(hidden_size, eps=1e-5)
        for twin in "12":
            self.add_module(f"linear{twin}1", nn.Linear(hidden_size, widths[0]))
            self.add_module(f"linear{twin}2", nn.Linear(widths[0], widths[1]))
            self.add_module(f"linear{twin}3", nn.Linear(widths[1], 2))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) → twice (N, 2): the values of rejecting and of accepting."""
        x = self.ln(states)
        values = []
        for twin in "12":
            y = torch.relu(self.get_submodule(f"linear{twin}1")(x))
            y = torch.relu(self.get_submodule(f"linear{twin}2")(y))
            values.append(self.get_submodule(f"linear{twin}3")(y))
        return values[0], values[1]


class Learner:
    """Actor, critics, their targets, the temperature α, and one update of them all."""

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
        """Entropy temperature, ≥ 0."""
        value = float(self._alpha.detach())
        return math.exp(value) if self.config.alpha_form == "log" else value

    def update(self, batch: Batch) -> dict[str, float]:
        """One gradient step of critics, actor and α. Returns figures to watch.

        Raises NumericsError when a loss is not finite.
        """
        on = _Tensors(batch, self._device)
        targets = self.returns(on)
        critic_loss = self.critic_loss(on, targets)
        actor_loss, mean_entropy = self.actor_loss(on)
        self._step("critic", self.critic, critic_loss)
        self._step("actor", self.actor, actor_loss)
        if not batch.forced[:, 0].all():  # else there is no entropy to judge α by
            self._step_alpha(mean_entropy)
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                old.lerp_(new, self.config.target_rate)
        watched = {
            "critic_loss": float(critic_loss.detach()),
            "actor_loss": float(actor_loss.detach()),
            "batch_entropy": mean_entropy,
            "return": float(targets.mean()),
        }
        if not all(map(math.isfinite, watched.values())):
            raise NumericsError(f"training has diverged ({watched}): lower --learning-rate or --kl-weight")
        return watched

    @torch.no_grad()
    def returns(self, batch: _Tensors) -> Tensor:
        """(B,) n-step returns of the action taken: what is paid along the chain, then the value where it leads.

        Entropy and price of the first state are not in it, as they do not depend on the action: see `actor_loss`.
        """
        config = self.config
        bonus = torch.where(batch.forced, 0.0, self.alpha * entropy(batch.margins))  # (B, n)
        bonus -= config.kl_weight * divergence(batch.margins, batch.reference, batch.forced)
        bonus[:, 0] = 0.0
        steps = bonus.shape[1]
        discounts = config.discount ** torch.arange(steps, device=bonus.device)
        paid = torch.where(batch.inside, batch.scores + bonus, 0.0)
        later = config.discount**steps * self.value(batch.next_states, batch.next_reference, batch.next_forced)
        return (paid * discounts).sum(1) + torch.where(batch.ended, 0.0, later)

    @torch.no_grad()
    def value(self, states: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
        """(N,) soft values by the target critics; a forced state has the value of accepting, and neither entropy nor
        price.
        """
        worse = torch.minimum(*self.target(states))  # (N, 2)
        return torch.where(forced, worse[:, 1], self._gain(self.actor.margin(states), worse, reference, forced))

    def _gain(self, margin: Tensor, worse: Tensor, reference: Tensor, forced: Tensor) -> Tensor:
        """(N,) what a policy earns: the expected value, and entropy, less the price of leaving the LLM's choice."""
        accept = torch.sigmoid(margin)
        value = (1 - accept) * worse[:, 0] + accept * worse[:, 1]
        price = self.config.kl_weight * divergence(margin, reference, forced)
        return value + self.alpha * entropy(margin) - price

    def critic_loss(self, batch: _Tensors, targets: Tensor) -> Tensor:
        """Half the mean squared error of each critic, summed."""
        action = batch.accepted[:, None].long()
        errors = [values.gather(1, action)[:, 0] - targets for values in self.critic(batch.states)]
        return sum((0.5 * error.square().mean() for error in errors), torch.zeros((), device=targets.device))

    def actor_loss(self, batch: _Tensors) -> tuple[Tensor, float]:
        """-mean(Σ_a π·min(Q1, Q2) + α·H - kl_weight·KL(π ‖ q)) over the states that are not forced, and their mean
        entropy in nats.
        """
        forced = batch.forced[:, 0]
        count = (~forced).sum().clamp(min=1)
        with torch.no_grad():
            worse = torch.minimum(*self.critic(batch.states))
        margin = self.actor.margin(batch.states)
        gain = self._gain(margin, worse, batch.reference[:, 0], forced)
        mean_entropy = float((entropy(margin.detach()) * ~forced).sum() / count)
        return -(gain * ~forced).sum() / count, mean_entropy

    def _step(self, name: str, module: nn.Module, loss: Tensor) -> None:
        optimizer = self._optimizers[name]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), self.config.clip_norm)
        optimizer.step()

    def _step_alpha(self, mean_entropy: float) -> None:
        """Lower α where the policy is more random than wanted, raise it where less."""
        excess = mean_entropy - self.config.target_entropy * LN2
        loss = excess * (self._alpha.exp() if self.config.alpha_form == "log" else self._alpha)
        self._optimizers["alpha"].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizers["alpha"].step()
        if self.config.alpha_form == "direct":
            with torch.no_grad():
                self._alpha.clamp_(min=0.0)

    def state(self) -> dict[str, Any]:
        """Everything an update depends on, for a checkpoint."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "alpha": self._alpha.detach(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state`."""
        for name in ("actor", "critic", "target"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self._alpha.copy_(state["alpha"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


class _Tensors:
    """A Batch on the learner's device."""

    def __init__(self, batch: Batch, device: torch.device | str) -> None:
        def put(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        self.states, self.next_states = put(batch.states), put(batch.next_states)
        self.accepted, self.forced, self.inside = put(batch.accepted), put(batch.forced), put(batch.inside)
        self.margins, self.reference, self.scores = put(batch.margins), put(batch.reference), put(batch.scores)
        self.next_reference, self.next_forced = put(batch.next_reference), put(batch.next_forced)
        self.ended = put(batch.ended)
