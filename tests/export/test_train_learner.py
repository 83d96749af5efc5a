"""The learner: losses worked by hand, and a small decision process whose optimal policy is known."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mara_deploy.train.config import TrainConfig
from mara_deploy.train.environment import Trajectory
from mara_deploy.train.learner import Learner, TwinCritic
from mara_deploy.train.replay import Batch, ReplayBuffer
from mara_runtime.errors import NumericsError

State = tuple[int, ...]
Policy = dict[State, float]

D = 4
CONFIG = TrainConfig(
    widths=(8, 4), kl_weight=0.1, discount=0.5, n_step=2, alpha=0.2, batch=3, start_transitions=1, learning_rate=1e-3
)
ACTOR_MARGIN = math.log(3)  # accepts with probability 3/4
Q = ((1.0, 2.0), (0.5, 2.5))  # of rejecting, of accepting; two critics
Q_TARGET = ((3.0, 4.0), (3.5, 3.0))


def constant(critic: TwinCritic, values) -> None:
    with torch.no_grad():
        for twin, (reject, accept) in zip("12", values, strict=True):
            layer = critic.get_submodule(f"linear{twin}3")
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([reject, accept]))


@pytest.fixture
def learner() -> Learner:
    """Every state has the margin and the values above."""
    made = Learner(D, CONFIG)
    with torch.no_grad():
        made.actor.output_linear.weight.zero_()
        made.actor.output_linear.bias.copy_(torch.tensor([0.5, 0.5 + ACTOR_MARGIN]))
    constant(made.critic, Q)
    constant(made.target, Q_TARGET)
    return made


@pytest.fixture
def batch() -> Batch:
    """Three transitions: rejected, not the end; accepted, the answer ends; forced, and a forced state after two."""
    generator = torch.Generator().manual_seed(0)
    inf = math.inf
    return Batch(
        states=torch.randn(3, D, generator=generator),
        accepted=torch.tensor([False, True, True]),
        margins=torch.tensor([[9.0, 0.0], [9.0, 9.0], [9.0, math.log(4)]]),
        reference=torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [inf, 0.0]]),
        forced=torch.tensor([[False, False], [False, False], [True, False]]),
        scores=torch.tensor([[0.0, 0.0], [5.0, 7.0], [0.0, 0.0]]),
        inside=torch.tensor([[True, True], [True, False], [True, True]]),
        next_states=torch.randn(3, D, generator=generator),
        next_reference=torch.tensor([0.0, 0.0, inf]),
        next_forced=torch.tensor([False, False, True]),
        ended=torch.tensor([False, True, False]),
    )


def kl(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


H = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # of the actor everywhere
# min(Q1', Q2') = (3, 3): 1/4 · 3 + 3/4 · 3 + α·H - kl_weight · KL(3/4 ‖ 1/2)
VALUE = 3.0 + 0.2 * H - 0.1 * kl(0.75, 0.5)
RETURNS = [
    # nothing at the first transition; entropy and KL of the second, discounted; then the value of the next state
    0.5 * (0.2 * math.log(2) - 0.1 * kl(0.5, 0.75)) + 0.25 * VALUE,
    5.0,  # the score; after the end come other episodes
    0.5 * (-0.2 * (0.8 * math.log(0.8) + 0.2 * math.log(0.2)) - 0.1 * kl(0.8, 0.5))
    + 0.25 * 3.0,  # a forced state has the value of accepting: no entropy, no KL
]


def test_returns(learner, batch) -> None:
    assert learner.returns(batch).tolist() == pytest.approx(RETURNS, abs=1e-6)


def test_losses_by_hand(learner, batch) -> None:
    """The actor's leaves forced states out."""
    taken = [(1.0, 0.5), (2.0, 2.5), (2.0, 2.5)]  # of both critics, for the actions 0, 1, 1
    expected = sum(
        0.5 * (value - target) ** 2 / 3 for pair, target in zip(taken, RETURNS, strict=True) for value in pair
    )
    assert float(learner.critic_loss(batch, learner.returns(batch)).detach()) == pytest.approx(expected, abs=1e-6)
    loss, entropy = learner.actor_loss(batch)
    # min(Q1, Q2) = (0.5, 2); the two free states have the reference 1/2
    gain = 0.25 * 0.5 + 0.75 * 2.0 + 0.2 * H - 0.1 * kl(0.75, 0.5)
    assert float(loss.detach()) == pytest.approx(-gain, abs=1e-6)
    assert entropy == pytest.approx(H, abs=1e-6)


def test_actor_gradient_against_finite_differences(learner, batch) -> None:
    """Of the objective in closed form, by the bias that shifts every margin."""
    bias = learner.actor.output_linear.bias
    learner.actor_loss(batch)[0].backward()

    def loss(shift: float) -> float:
        with torch.no_grad():
            bias[1] += shift
            value = float(learner.actor_loss(batch)[0])
            bias[1] -= shift
        return value

    assert float(bias.grad[1]) == pytest.approx((loss(1e-2) - loss(-1e-2)) / 2e-2, abs=1e-4)


def test_forced_states_alone_change_neither_actor_nor_alpha(learner, batch) -> None:
    forced = replace(batch, forced=torch.ones_like(batch.forced), reference=torch.full_like(batch.reference, math.inf))
    before, alpha = copy.deepcopy(learner.actor.state_dict()), learner.alpha
    learner.update(forced)
    assert learner.alpha == alpha
    assert all(torch.equal(before[name], value) for name, value in learner.actor.state_dict().items())


def test_alpha_falls_while_entropy_exceeds_the_target(learner, batch) -> None:
    assert CONFIG.target_entropy * math.log(2) < H
    learner.update(batch)
    assert learner.alpha == pytest.approx(0.2 * math.exp(-CONFIG.alpha_rate), rel=1e-4)  # Adam's first step: the rate
    direct = Learner(D, replace(CONFIG, alpha_form="direct", alpha=1e-5, target_entropy=0.0))
    direct.update(batch)
    assert direct.alpha == 0.0  # not below
    eager = Learner(D, replace(CONFIG, alpha_form="direct"))
    object.__setattr__(eager.config, "target_entropy", 1.0)  # beyond any policy's
    eager.update(batch)
    assert eager.alpha > 0.2


def test_target_critics_move_by_the_target_rate(learner, batch) -> None:
    before = [p.clone() for p in learner.target.parameters()]
    learner.update(batch)
    for old, target, new in zip(before, learner.target.parameters(), learner.critic.parameters(), strict=True):
        assert torch.allclose(target, old + CONFIG.target_rate * (new - old), atol=1e-7)


def test_gradients_are_clipped_and_divergence_is_an_error(learner, batch) -> None:
    learner.update(replace(batch, scores=1000 * batch.scores))
    norm = torch.stack([p.grad.norm() for p in learner.critic.parameters()]).norm()
    assert float(norm) == pytest.approx(CONFIG.clip_norm, rel=1e-4)
    with pytest.raises(NumericsError, match="training has diverged"):
        learner.update(replace(batch, scores=torch.full_like(batch.scores, math.inf)))


def test_the_seed_decides_the_weights() -> None:
    for part, name in (("actor", "linear1.weight"), ("critic", "linear11.weight")):
        one, again, other = (Learner(D, replace(CONFIG, seed=seed)).state()[part][name] for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_a_state_restores_everything(batch) -> None:
    one, other = Learner(D, CONFIG), Learner(D, replace(CONFIG, seed=1))
    one.update(batch)
    other.restore(copy.deepcopy(one.state()))  # a checkpoint goes through a file
    one.update(batch)
    other.update(batch)
    assert one.alpha == other.alpha
    for name in ("actor", "critic", "target"):
        pairs = zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


# ── a decision process with a known solution ─────────────────────────────────────────────────────────────────────────

P = np.array([0.6, 0.3, 0.1])
"""Three candidates at each of two positions, as the LLM weighs them."""
SCORES = {(0, 0): -1.0, (0, 1): 0.0, (0, 2): 1.0, (1, 0): 0.5, (1, 1): 0.8, (1, 2): -0.5}
SCORES |= {(2, second): 0.2 for second in range(3)}
"""By the choices; the LLM's favourite is the worst."""
STATES = [(i,) for i in range(3)] + [(first, i) for first in range(3) for i in range(3)]
REFERENCE = [math.log(0.6 / 0.4), math.log(0.3 / 0.1), math.inf]


def embed(state: State) -> np.ndarray:
    """One-hot."""
    return (np.arange(len(STATES)) == STATES.index(state)).astype(np.float16)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def value(policy: Policy, kl_weight: float, alpha: float, state: State = (0,), *, solve: bool = False) -> float:
    """What score - kl_weight·KL + α·H is worth from a state on, for a policy: {state: probability of accepting}.

    solve: fill the policy with the best probabilities, by induction: π ∝ exp((Q + kl_weight·log q) / (α + kl_weight))
    at a state with values Q of rejecting and accepting.
    """
    prefix, i = state[:-1], state[-1]
    accept = SCORES[state] if prefix else value(policy, kl_weight, alpha, (i, 0), solve=solve)
    if i == 2:
        return accept
    reject = value(policy, kl_weight, alpha, (*prefix, i + 1), solve=solve)
    if solve:
        policy[state] = sigmoid((accept - reject + kl_weight * REFERENCE[i]) / (alpha + kl_weight))
    p, q = policy[state], sigmoid(REFERENCE[i])
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    return p * accept + (1 - p) * reject - kl_weight * kl(p, q) + alpha * entropy


@pytest.mark.parametrize(
    ("n_step", "kl_weight", "alpha"),
    [(3, 0.2, 0.1), *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 0.2, 0.1), (6, 0.0, 0.3)))],
)
def test_the_optimal_policy_of_a_small_process_is_learned(tmp_path, n_step, kl_weight, alpha) -> None:
    config = TrainConfig(
        widths=(32, 32),
        kl_weight=kl_weight,
        alpha=alpha,
        alpha_rate=0.0,
        discount=1.0,
        n_step=n_step,
        batch=128,
        start_transitions=1,
        replay_transitions=600,
        learning_rate=8e-3,
        target_rate=0.05,
    )
    learner = Learner(len(STATES), config)
    rng = np.random.default_rng(0)
    replay = ReplayBuffer(tmp_path, config.replay_transitions, len(STATES))
    table = torch.from_numpy(np.stack([embed(s) for s in STATES])).float()
    for _ in range(150):
        with torch.no_grad():
            margins = dict(zip(STATES, learner.actor.margin(table).tolist(), strict=True))
        for _ in range(4):
            transitions, choices = [], ()
            for _ in range(2):
                for i in range(3):
                    state = (*choices, i)
                    accepted = i == 2 or rng.random() < sigmoid(margins[state])
                    transitions.append((embed(state), accepted, margins[state], REFERENCE[i], i == 2))
                    if accepted:
                        choices = state
                        break
            columns = zip(*transitions, strict=True)
            kinds = (np.float16, np.bool_, np.float32, np.float32, np.bool_)
            trajectory = Trajectory(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))
            replay.add(trajectory, SCORES[choices])
        for _ in range(2):
            learner.update(replay.sample(rng, config.batch, config.n_step))
    expected: Policy = {}
    value(expected, kl_weight, alpha, solve=True)
    with torch.no_grad():
        learned = dict(zip(STATES, torch.sigmoid(learner.actor.margin(table)).tolist(), strict=True))
    for state, p in expected.items():
        assert learned[state] == pytest.approx(p, abs=0.1), (state, expected, learned)


def test_the_solution_is_a_maximum() -> None:
    """The induction above: no neighbouring policy does better."""
    best: Policy = {}
    most = value(best, 0.2, 0.1, solve=True)
    for state, step in itertools.product(best, (-0.02, 0.02)):
        other = {**best, state: min(max(best[state] + step, 1e-6), 1 - 1e-6)}
        assert value(other, 0.2, 0.1) < most, state
