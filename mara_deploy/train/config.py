"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from mara_runtime.config import FALLBACKS
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

RUN_FILE = "run.json"
"""In the folder of a run."""
ALPHA_FORMS = ("log", "direct")


@dataclass(frozen=True)
class TrainConfig(Options):
    """Discrete soft actor-critic. Defaults: MARA's settings for LLMs of 7 to 8 billion parameters (arXiv 2505.19743),
    except for `n_step`, which is 1 there: docs/guide/train.md says why. Small models have their own (`RECIPES`).
    """

    # rollouts
    episodes: int = option(21_000, "number of episodes, one answer each", least=1)
    prompts_at_once: int = option(16, "episodes per rollout batch; the agent learns after each batch", least=1)
    max_new_tokens: int = option(512, "maximum length of an answer, in tokens; the context ends it earlier", least=1)
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
    target_entropy: float = option(
        0.6,
        "policy entropy that α is tuned for, as a fraction of a fair coin's, ln 2",
        least=0,
        most=0.98,
    )

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


CHANGEABLE = ("episodes", "prompts_at_once", "max_new_tokens", "replay_transitions", "checkpoint_minutes")
"""Settings that may change when a run is resumed: how much it does at a time, and when it ends."""


def fit(config: TrainConfig, given: Collection[str], *, room: int, disk: int, sequences: int) -> TrainConfig:
    """Lower what the user has not `given` to what fits; a run that collects little begins to learn early.

    room: tokens of the longest answer possible; disk: transitions that its free space takes; sequences: answers that
    memory takes at once. Raises OptionError for a given --replay-transitions that does not fit.
    """
    if "replay_transitions" in given and config.replay_transitions > disk:
        raise OptionError(
            f"--replay-transitions is {config.replay_transitions}, but the free space for --out takes {disk}: lower "
            "it, or free some"
        )
    least = config.start_transitions if "start_transitions" in given else 1
    fitting: dict[str, Any] = {
        "max_new_tokens": (tokens := min(config.max_new_tokens, room)),
        "prompts_at_once": min(config.prompts_at_once, max(1, sequences)),
        "replay_transitions": (replay := min(config.replay_transitions, max(least, disk // 2))),
        "start_transitions": min(config.start_transitions, replay, max(1, config.episodes * tokens // 8)),
    }
    return replace(config, **{name: value for name, value in fitting.items() if name not in given})


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
