"""Synthetic acceptance: real passes of a real engine, with candidates and agent decisions drawn from a set profile.

How fast aligned decoding is depends on how often there is a decision and how often the agent rejects, which differ by
model, agent and text. To state a speed, both are set: every pass runs in full, agent, choice and LM head included; only
its results, which tokens compete and whether the agent accepts them, are replaced by those of the profile. Plain and
aligned decoding are measured in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_runtime.engines.base import Engine, Pass, StepOutput, Works
from mara_runtime.engines.kv_cache import KVCache, Places
from mara_runtime.schedule.cost import Cost
from mara_runtime.tensors import TOP_SPARE

MOST_CANDIDATES = 40
HIGH = 0.3
"""`foreseen`: candidates whose probability exceeds this are rejected."""


@dataclass(frozen=True)
class Profile:
    """What happens at the positions of a text."""

    decisions: float = 0.5
    """share of positions with several candidates, about eight"""
    accept: float = 0.9
    """probability that a candidate is accepted, independently of the others"""
    foreseen: bool = False
    """acceptance depends on the candidate's probability: as many are rejected, but predictably"""
    repeated: float = 0.0
    """share of tokens that continue an earlier phrase; below 0.9"""
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.decisions:.0%} decisions", f"accepted {self.accept:.0%}"]
        parts += ["predictable"] * self.foreseen
        parts += [f"{self.repeated:.0%} repeated"] * bool(self.repeated)
        return ", ".join(parts)


class Script:
    """A profile as candidates and verdicts for every position."""

    def __init__(self, profile: Profile, positions: int, vocab_size: int, top: int) -> None:
        rng = np.random.default_rng(profile.seed)
        self._text = _text(profile, positions + 1, vocab_size, rng)
        self._ids = np.empty((positions + 1, top), np.int64)
        self._logits = np.empty((positions + 1, top), np.float32)
        self._accepted: list[frozenset[int]] = []  # tokens, by position
        for position in range(positions + 1):
            self._ids[position] = _others(self._text[position], top, vocab_size, rng)
            logits, accepted = _position(profile, top, rng)
            self._logits[position] = logits
            self._accepted.append(frozenset(self._ids[position][accepted].tolist()))

    def prompt(self, length: int) -> list[int]:
        """The first `length` tokens of the text."""
        tokens: list[int] = self._text[:length].tolist()
        return tokens

    def candidates(self, position: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The best tokens of a position, and their logits, (K,) each."""
        return self._ids[position], self._logits[position]

    def best(self, positions: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The same for several positions, (R, K) each."""
        return self._ids[positions], self._logits[positions]

    def accepts(self, position: int, token: int) -> bool:
        """The agent's verdict on a token at a position; tokens that are not candidates are rejected."""
        return token in self._accepted[position]


PHRASE = 24
"""Tokens of a phrase. A repeated one can be recognised from its third token on."""


def _text(profile: Profile, length: int, vocab_size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A text of phrases, new and repeated ones."""
    phrases = [rng.integers(0, vocab_size, PHRASE)]
    text = phrases[0].tolist()
    while len(text) < length:
        if rng.random() >= profile.repeated * PHRASE / (PHRASE - 2):
            phrases.append(rng.integers(0, vocab_size, PHRASE))
            text += phrases[-1].tolist()
        else:
            text += phrases[int(rng.integers(len(phrases)))].tolist()
    return np.array(text[:length])


def _others(first: int, top: int, vocab_size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    ids = rng.permutation(min(vocab_size, 8 * top))[:top]
    ids = ids[ids != first]
    return np.concatenate([[first], ids, np.arange(8 * top, 9 * top)])[:top]


def _position(profile: Profile, top: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Logits that top-k 40 and top-p 0.95 reduce to one candidate or about eight, and the verdicts on them."""
    most = min(MOST_CANDIDATES, top - TOP_SPARE)
    probabilities = 1e-9 * np.linspace(1.0, 0.9, top)
    accepted = rng.random(top) < profile.accept
    if rng.random() >= profile.decisions:
        probabilities[0] = 1.0
    elif not profile.foreseen:
        count = min(2 + int(rng.geometric(1 / 7)), most)
        probabilities[:count] = np.sort(rng.dirichlet(np.ones(count)))[::-1] + 0.06
    else:
        rejected = min(int(rng.geometric(profile.accept)) - 1, 2, most - 1)
        count = min(4 + rejected + int(rng.geometric(1 / 4)), most)
        high = rng.uniform(HIGH + 0.02, 0.4, rejected)
        low = rng.uniform(0.5, 1.0, count - rejected)
        low *= (1.0 - high.sum()) / low.sum()
        probabilities[:count] = np.sort(np.concatenate([high, np.minimum(low, HIGH - 0.02)]))[::-1]
        accepted = probabilities <= HIGH
    return np.log(probabilities).astype(np.float32), accepted


class SyntheticEngine:
    """Runs every pass of `engine` in full and returns the candidates and decisions of a script. See `Engine`.

    scripts: of the conversation at each place.
    """

    def __init__(self, engine: Engine, scripts: Sequence[Script]) -> None:
        self._engine, self._scripts = engine, scripts
        self.passes: list[tuple[int, int]] = []
        """(rows, rows through the LM head) of each pass"""

    @property
    def cache(self) -> KVCache:
        """See `Engine`."""
        return self._engine.cache

    def use(self, agents: Sequence[str]) -> None:
        """See `Engine.use`."""
        self._engine.use(agents)

    @property
    def places(self) -> Places:
        """See `Engine`."""
        return self._engine.places

    def run(self, work: Pass, place: int = 0) -> StepOutput:
        """See `Engine.run`."""
        forced, verdicts = self._forced(work, place)
        out = self._replaced(work, place, verdicts, self._engine.run(forced, place))
        self.passes.append((len(work.tokens), len(out.rows)))
        return out

    def run_together(self, works: Works) -> list[StepOutput]:
        """See `Engine.run_together`."""
        forced = [self._forced(work, place) for place, work in works]
        outs = self._engine.run_together([(place, f) for (place, _), (f, _) in zip(works, forced, strict=True)])
        return [
            self._replaced(work, place, verdicts, out)
            for (place, work), (_, verdicts), out in zip(works, forced, outs, strict=True)
        ]

    def _forced(self, work: Pass, place: int) -> tuple[Pass, list[bool]]:
        """The pass with priorities that force the script's choice, so that the graph does all its work; verdicts."""
        script = self._scripts[place]
        verdicts = [script.accepts(work.positions[row], work.tokens[row]) for row in work.agent_rows]
        priorities = [p if ok else -np.inf for p, ok in zip(work.priorities, verdicts, strict=True)]
        return replace(work, priorities=priorities, margin_weight=0.0, threshold=-np.inf), verdicts

    def _replaced(self, work: Pass, place: int, verdicts: list[bool], out: StepOutput) -> StepOutput:
        """The output with the candidates and margins of the script."""
        margins = np.array([1.0 if ok else -1.0 for ok in verdicts], np.float32)
        ids, logits = self._scripts[place].best([work.positions[row] + 1 for row in out.rows.tolist()])
        return StepOutput(margins, out.rows, ids, logits, np.zeros(len(ids), np.float32))

    def expected_ms(self, cost: Cost, context: int, forwards: int) -> float:
        """What the last `forwards` passes, those after the prompt, should cost according to the measured curve."""
        rows, heads = cost.rows_ms(context), cost.heads_ms()
        return float(sum(rows[r] + heads[h] for r, h in self.passes[len(self.passes) - forwards :]))

    def describe(self) -> dict[str, Any]:
        """See `Engine.describe`."""
        return self._engine.describe()
