"""One position with several candidates: the passes that examine them, and the rule that picks one.

A candidate is accepted when its margin exceeds the threshold. By default the first accepted one, in LM rank, is
emitted, and the fallback when all are rejected. Strategies and orders have the names of MARA's released code
(IAAR-Shanghai/MARA); docs/internals/method.md lists where it and the paper differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mara_runtime.candidates import Candidates
from mara_runtime.config import DecodeConfig
from mara_runtime.engines.base import NEVER, Pass, StepOutput, sibling_row
from mara_runtime.schedule.base import Company, PassContext
from mara_runtime.schedule.drafts import Draft
from mara_runtime.stats import Step


@dataclass
class Examined:
    """A token that a pass has run."""

    rank: int
    """by the LM, from 0; a drafted token is run as the first candidate of its position"""
    token: int
    margin: float
    slot: int
    """of its KV entry"""
    next_candidates: Candidates | None
    """None: its row did not go through the LM head"""
    state: NDArray[np.float32] | None = None
    """(D,) hidden state; None where it was not asked for"""


def states_of(out: StepOutput, count: int) -> list[NDArray[np.float32] | None]:
    """Copies of a pass's hidden states, those of its `count` judged rows; None where they were not asked for."""
    return [None] * count if out.hidden is None else [state.copy() for state in out.hidden]


class Decision:
    """Examines the candidates of one position, some in each pass, until the rule can pick one.

    examined: candidates that a draft has examined already, at most the first.
    """

    def __init__(
        self, candidates: Candidates, config: DecodeConfig, fallback: str, position: int, examined: Sequence[Examined]
    ) -> None:
        self._candidates, self._config, self._position = candidates, config, position
        self._exhaustive = config.strategy != "top1"  # every candidate is examined
        self._order = examination_order(config.order, len(candidates))
        ranked = config.order == "ranked"
        self.probabilities = candidates.probabilities if ranked else candidates.probabilities[self._order]
        """in the order of examination"""
        self._fallback = 0 if fallback == "first" else len(candidates) - 1
        self._slot = position + len(examined)  # the next free one
        self.examined = list(examined)
        self.margins = [candidate.margin for candidate in examined]
        """of the examined candidates, in that order"""
        self._accepted = False  # any of them; a draft hands over rejected ones only
        self.draft: list[Examined] = []
        """run under the first candidate"""

    @property
    def complete(self) -> bool:
        """Whether the rule can pick a candidate."""
        return len(self.examined) == len(self._candidates) or (self._accepted and not self._exhaustive)

    def context(self, draft: Draft, company: Company) -> PassContext:
        """What the schedule is asked with. draft: a guess of what follows the first candidate."""
        return PassContext(
            self._position,
            self.probabilities,
            tuple(self.margins),
            self._config.threshold,
            self._exhaustive,
            rerun_fallback=self._order[0] == self._fallback and self._config.strategy != "random",
            draft=draft,
            company=company,
        )

    def next_pass(self, count: int, draft: Sequence[int]) -> tuple[Pass, list[int]]:
        """The pass of the next `count` candidates, a draft under the first; and the LM ranks of its candidates.

        Where it may be the last, the fallback's successors must come from it: an earlier fallback runs once more.
        """
        config, start = self._config, len(self.examined)
        ranks = list(self._order[start : start + count])
        priorities = [-float(i) if config.strategy == "top1" else 0.0 for i in range(len(ranks))]
        fallback = self._elected_fallback(ranks)
        if fallback is not None and fallback not in ranks:
            ranks.append(fallback)
        work = Pass.siblings(
            [int(self._candidates.ids[rank]) for rank in ranks],
            draft,
            self._position,
            self._slot,
            mix=config.mix,
            # the host draws the token of "random", which then runs again
            priorities=[NEVER] * count if config.strategy == "random" else priorities,
            margin_weight=float(config.strategy == "max_prob"),
            threshold=config.threshold,
            fallback=None if fallback is None else ranks.index(fallback),
        )
        return work, ranks

    def _elected_fallback(self, ranks: Sequence[int]) -> int | None:
        """LM rank of the fallback, if a pass of these candidates may end the decision without one accepted."""
        unfinished = len(self.examined) + len(ranks) < len(self._candidates)
        if unfinished or self._accepted or self._config.strategy == "random":
            return None
        known = any(e.rank == self._fallback and e.next_candidates is not None for e in self.examined)
        return None if known else self._fallback

    def add(self, work: Pass, ranks: Sequence[int], out: StepOutput, following: Mapping[int, Candidates]) -> None:
        """Take over what a pass of `next_pass` returned. following: {row: candidates after it}, of the head rows."""
        drafted, margins = len(work.tokens) - len(ranks), out.margins.tolist()
        states = states_of(out, len(margins))
        for i, rank in enumerate(ranks):
            row = sibling_row(i, drafted)
            slot, next_candidates = work.slot + row, following.get(row)
            if row == len(margins):  # not judged: the fallback, once more
                fallback = next(candidate for candidate in self.examined if candidate.rank == rank)
                fallback.slot, fallback.next_candidates = slot, next_candidates
            else:
                examined = Examined(rank, work.tokens[row], margins[row], slot, next_candidates, states[row])
                self.examined.append(examined)
                self.margins.append(margins[row])
                self._accepted = self._accepted or margins[row] > self._config.threshold
        for row in range(1, 1 + drafted):
            slot = work.slot + row
            self.draft.append(Examined(0, work.tokens[row], margins[row], slot, following[row], states[row]))
        self._slot += len(work.tokens)

    def pick(self, rng: np.random.Generator) -> tuple[Step, Examined]:
        """The step of the picked candidate, and that candidate."""
        examined = self.examined
        index = choose(self._config.strategy, self.margins, self._config.threshold, rng)
        if index is None:
            picked = next(candidate for candidate in examined if candidate.rank == self._fallback)
        else:
            picked = examined[index]
            if not self._exhaustive:
                examined = examined[: index + 1]  # the sequential procedure stops here
        margins = {candidate.rank + 1: candidate.margin for candidate in examined}
        step = Step(
            picked.token,
            self._position,
            self._candidates,
            picked.rank + 1,
            margins,
            forced=index is None,
            states={c.rank + 1: c.state for c in examined if c.state is not None} or None,
        )
        return step, picked


def examination_order(order: str, count: int) -> list[int]:
    """LM ranks, from 0, in the order in which they are examined."""
    ranks = list(range(count))
    if order == "ranked":
        return ranks
    if order == "best_last":
        return [*ranks[1:], 0]
    if order == "reversed":
        return ranks[::-1]
    raise ValueError(order)


def choose(strategy: str, margins: Sequence[float], threshold: float, rng: np.random.Generator) -> int | None:
    """Index into `margins` (examination order) of the candidate to emit; None when all are rejected.

    A margin equal to the threshold rejects. `random` draws from `rng` once per decision with an accepted candidate.
    """
    accepted = [i for i, margin in enumerate(margins) if margin > threshold]
    if not accepted:
        return None
    if strategy == "top1":
        return accepted[0]
    if strategy == "max_prob":
        return max(accepted, key=lambda i: margins[i])
    if strategy == "random":
        return accepted[int(rng.integers(len(accepted)))]
    raise ValueError(strategy)
