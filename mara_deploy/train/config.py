"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from mara_runtime.config import FALLBACKS
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

ALPHA_FORMS = ("log", "direct")


@dataclass(frozen=True)
class TrainConfig(Options):
    """Discrete soft actor-critic. Defaults: MARA's settings for LLMs of 7 to 8 billion parameters (arXiv 2505.19743),
    except for `n_step`, which is 1 there: docs/guide/train.md says why. Small models have their own (`RECIPES`).
    """

    # rollouts
    episodes: int = option(21_000, "number of episodes, one answer each", least=1)
    prompts_at_once: int = option(16, "episodes per rollout batch; the agent learns after each batch", least=1)
    max_new_tokens: int = option(512, "maximum length of an answer, in tokens", least=1)
    top_k: int = option(40, "maximum number of candidates per position", least=2)
    top_p: float = option(0.95, "nucleus of the candidates, applied after --top-k", above=0, most=1)

    # the agent
    widths: tuple[int, int] = option((1024, 256), "widths of the two hidden layers of actor and critics", least=1)
    fallback: str = option(
        "last",
        "recorded with the agent: the candidate to emit when it rejects all; rollouts always take the last",
        choices=FALLBACKS,
    )

    # the objective
    kl_weight: float = option(0.1, "penalty per nat of divergence from the LLM, in units of the score", least=0)
    score_baseline: float = option(0.0, "constant subtracted from every score")
    discount: float = option(0.99, "discount factor γ per transition", above=0, most=1)
    n_step: int = option(80, "n of the n-step return, in transitions", least=1)
    target_entropy: float = option(0.6, "policy entropy that α is tuned for, as a fraction of ln 2", least=0, most=1)

    # learning
    batch: int = option(1024, "batch size, in transitions", least=1)
    updates_per_episode: float = option(10.0, "gradient steps per episode", above=0)
    start_transitions: int = option(64 * 1024, "transitions to collect before learning starts", least=1)
    replay_transitions: int = option(
        1_000_000, "capacity of the replay buffer, in transitions; at least --start-transitions", least=1
    )
    learning_rate: float = option(3e-4, "Adam learning rate of actor and critics", above=0)
    clip_norm: float = option(0.5, "maximum gradient norm, of actor and critics each", above=0)
    target_rate: float = option(
        0.005, "τ, the fraction by which an update moves the target critics towards the critics", above=0, most=1
    )
    alpha: float = option(0.01, "initial entropy coefficient α", above=0)
    alpha_rate: float = option(3e-4, "Adam learning rate of α; 0 keeps it fixed", least=0)
    alpha_form: str = option(
        "log",
        "log: learn ln α, which hardly moves in a few thousand updates; direct: learn α itself, clipped at 0",
        choices=ALPHA_FORMS,
    )

    seed: int = option(0, "random seed of weights, prompts, actions and batches", least=0, most=(1 << 63) - 1)
    checkpoint_minutes: float = option(
        10.0, "minutes between checkpoints; a run that ends or is interrupted always writes one", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_transitions < self.start_transitions:
            raise OptionError(
                f"--replay-transitions is {self.replay_transitions}; it must be at least --start-transitions, "
                f"{self.start_transitions}"
            )

    def check_replay(self) -> None:
        """Raise OptionError if a round of answers of full length could exceed the replay buffer's reserve."""
        at_once = min(self.prompts_at_once, self.episodes)
        needed, room = at_once * self.max_new_tokens, reserve(self.replay_transitions)
        if needed > room:
            raise OptionError(
                f"--replay-transitions is {self.replay_transitions}, which takes {room} transitions between "
                f"checkpoints, but {at_once} --prompts-at-once of {self.max_new_tokens} --max-new-tokens can have "
                f"{needed} at one candidate per token: raise --replay-transitions to {capacity_for(needed)} or more, "
                "or lower --prompts-at-once or --max-new-tokens"
            )


_RESERVE_DIVISOR = 8


def reserve(capacity: int) -> int:
    """Transitions that a replay buffer takes between two checkpoints: 1/8 of its capacity, in addition to it."""
    return -(-capacity // _RESERVE_DIVISOR)


def capacity_for(transitions: int) -> int:
    """The least capacity whose reserve takes a round of so many transitions, ≥ 1."""
    return (transitions - 1) * _RESERVE_DIVISOR + 1


RECIPES = {
    "paper": TrainConfig(),
    "demo": TrainConfig(
        episodes=1600,
        prompts_at_once=64,
        max_new_tokens=112,
        widths=(256, 128),
        fallback="first",
        kl_weight=0.02,
        discount=1.0,
        target_entropy=0.25,
        batch=256,
        updates_per_episode=2.0,
        start_transitions=4096,
        replay_transitions=60_000,
        learning_rate=1e-3,
        target_rate=0.02,
        alpha_form="direct",
    ),
}
"""By name. `demo` fits an LLM of a million parameters: about a minute on one CPU core."""
