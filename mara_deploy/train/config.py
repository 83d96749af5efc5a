"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from mara_runtime.config import FALLBACKS
from mara_runtime.errors import OptionError

ALPHA_FORMS = ("log", "direct")


@dataclass(frozen=True)
class TrainConfig:
    """Discrete soft actor-critic. Defaults: MARA's settings for LLMs of 7 to 8 billion parameters (arXiv 2505.19743),
    except for `n_step`, which is 1 there: docs/training.md says why. Small models have their own (`RECIPES`).
    """

    # rollouts
    episodes: int = 21_000
    """answers to train on, ≥ 1; an episode is one answer"""
    prompts_at_once: int = 16
    """answers in progress at the same time, ≥ 1; the agent learns after each such round"""
    max_new_tokens: int = 512
    """longest answer, in tokens; ≥ 1"""
    top_k: int = 40
    """most candidates at a position, ≥ 2"""
    top_p: float = 0.95
    """nucleus of the candidates, in (0, 1]"""

    # the agent
    widths: tuple[int, int] = (1024, 256)
    """of the two hidden layers of the actor and of both critics; ≥ 1"""
    fallback: str = "last"
    """recorded with the agent: what is emitted when it rejects everything; first, last. Rollouts take the last"""

    # the objective
    kl_weight: float = 0.1
    """price of a nat of divergence from the LLM, in units of the score; ≥ 0"""
    score_baseline: float = 0.0
    """subtracted from every score; finite"""
    discount: float = 0.99
    """γ, per transition; in (0, 1]"""
    n_step: int = 80
    """n of the n-step return, in transitions; ≥ 1"""
    target_entropy: float = 0.6
    """entropy of the policy that α is tuned for, as a fraction of ln 2; in [0, 1]"""

    # learning
    batch: int = 1024
    """batch size, in transitions; ≥ 1"""
    updates_per_episode: float = 10.0
    """gradient steps, > 0"""
    start_transitions: int = 64 * 1024
    """transitions collected before learning begins, ≥ 1"""
    replay_transitions: int = 1_000_000
    """replay capacity, in transitions; ≥ start_transitions"""
    learning_rate: float = 3e-4
    """of actor and critics (Adam); > 0"""
    clip_norm: float = 0.5
    """largest gradient norm, of actor and critics each; > 0"""
    target_rate: float = 0.005
    """τ: how far an update moves the target critics towards the critics; in (0, 1]"""
    alpha: float = 0.01
    """entropy temperature at the start, > 0"""
    alpha_rate: float = 3e-4
    """learning rate of α (Adam); ≥ 0, and 0 keeps α fixed"""
    alpha_form: str = "log"
    """log: ln α is learned; direct: α itself, not below 0. In a few thousand updates ln α hardly moves"""

    seed: int = 0
    """of weights, prompts, actions and batches; 0 … 2**63 - 1"""
    checkpoint_minutes: float = 10.0
    """minutes between checkpoints, ≥ 0; a run that ends or is interrupted leaves one in any case"""

    def __post_init__(self) -> None:
        for name in ("episodes", "prompts_at_once", "max_new_tokens", "n_step", "batch", "start_transitions"):
            self._check(name, "a whole number of at least 1", getattr(self, name) >= 1)
        self._check("top_k", "a whole number of at least 2", self.top_k >= 2)
        self._check("top_p", "in (0, 1]", 0.0 < self.top_p <= 1.0)
        self._check("widths", "two whole numbers of at least 1", len(self.widths) == 2 and min(self.widths) >= 1)
        self._check("fallback", f"one of {', '.join(FALLBACKS)}", self.fallback in FALLBACKS)
        self._check("kl_weight", "a finite number of at least 0", 0.0 <= self.kl_weight < math.inf)
        self._check("score_baseline", "a finite number", math.isfinite(self.score_baseline))
        self._check("discount", "in (0, 1]", 0.0 < self.discount <= 1.0)
        self._check("target_entropy", "in [0, 1]", 0.0 <= self.target_entropy <= 1.0)
        for name in ("updates_per_episode", "learning_rate", "clip_norm", "alpha"):
            self._check(name, "a finite number above 0", 0.0 < getattr(self, name) < math.inf)
        self._check(
            "replay_transitions",
            f"at least start_transitions ({self.start_transitions})",
            self.replay_transitions >= self.start_transitions,
        )
        self._check("target_rate", "in (0, 1]", 0.0 < self.target_rate <= 1.0)
        self._check("alpha_rate", "a finite number of at least 0", 0.0 <= self.alpha_rate < math.inf)
        self._check("alpha_form", f"one of {', '.join(ALPHA_FORMS)}", self.alpha_form in ALPHA_FORMS)
        self._check("seed", "a whole number from 0 to 2**63 - 1", 0 <= self.seed < 1 << 63)
        self._check("checkpoint_minutes", "a finite number of at least 0", 0.0 <= self.checkpoint_minutes < math.inf)

    def _check(self, name: str, allowed: str, within: bool) -> None:
        if not within:
            raise OptionError(f"{flag(name)} is {getattr(self, name)!r}; it must be {allowed}")

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

    def to_json(self) -> dict[str, Any]:
        """Plain values by field."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`, also after a round trip through JSON."""
        return cls(**{**values, "widths": tuple(values["widths"])})


_RESERVE_DIVISOR = 8


def reserve(capacity: int) -> int:
    """Transitions that a replay buffer takes between two checkpoints: 1/8 of its capacity, in addition to it."""
    return -(-capacity // _RESERVE_DIVISOR)


def capacity_for(transitions: int) -> int:
    """The least capacity whose reserve takes a round of so many transitions, ≥ 1."""
    return (transitions - 1) * _RESERVE_DIVISOR + 1


def flag(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


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
