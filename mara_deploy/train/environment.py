"""Rollouts: the LLM answers prompts, several at once, and the agent accepts or rejects each candidate.

All candidates of a position share a pass (mara_deploy.train.packed), as siblings that see the prefix and themselves.
Which tokens are candidates is decided by the runtime's own function, so training sees what decoding sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mara_deploy.train.packed import PackedLM
from mara_deploy.train.policy import reference_logits
from mara_runtime.candidates import Candidates, select
from mara_runtime.errors import NumericsError
from mara_runtime.tensors import TOP_SPARE

Policy = Callable[[Tensor, NDArray[np.float32]], NDArray[np.float32]]
"""(R, D) states and (R,) reference logits of candidates → (R,) margins. An agent looks at the states alone; the LLM
itself is the policy that returns the references."""


def reference_policy(states: Tensor, reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """The LLM's own choice: sampled from, it is plain sampling with top-k and top-p."""
    return reference


@dataclass(frozen=True)
class Chain:
    """The candidates that an episode visited, in order: T states, each of which the next one follows."""

    states: NDArray[np.float16]
    """(T, D) last hidden states after the final norm"""
    accepted: NDArray[np.bool_]
    """(T,) the action; a candidate that is emitted because all were rejected counts as accepted"""
    margins: NDArray[np.float32]
    """(T,) of the policy that acted"""
    reference: NDArray[np.float32]
    """(T,) logits of q"""
    forced: NDArray[np.bool_]
    """(T,) last candidates: once reached, they are emitted whatever the policy says"""


@dataclass(frozen=True)
class Episode:
    """One answer."""

    token_ids: list[int]
    """emitted, end-of-sequence not included"""
    finished: bool
    """an end-of-sequence id was emitted"""
    chain: Chain
    """empty if nothing was recorded, or there was nothing to decide"""
    decisions: int
    """positions with several candidates"""
    examined: int
    """candidates that the agent was asked about, one after the other"""
    interventions: int
    """decisions in which a candidate other than the LLM's best was emitted"""
    forced: int
    """decisions in which all candidates were rejected"""


@dataclass(frozen=True)
class Environment:
    """What answers are made with. See `TrainConfig` for ranges."""

    lm: PackedLM
    eos_token_ids: frozenset[int]
    top_k: int
    top_p: float
    max_new_tokens: int

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policy,
        rng: np.random.Generator | None,
        *,
        fallback: str = "last",
        record: bool = True,
    ) -> list[Episode]:
        """Answer B prompts, given as token ids. rng: draws actions from the policy; None: takes its likelier action.

        fallback: emitted when all are rejected, first or last. Raises NumericsError naming prompt and position where a
        state is not finite.
        """
        makings = [_Making(i, len(prompt)) for i, prompt in enumerate(prompts)]
        alive = makings
        cache, states = self.lm.prefill(prompts, self.max_new_tokens)
        while alive:
            lists = self._candidates(states, alive)
            counts = np.array([len(found) for found in lists])
            owner = np.repeat(np.arange(len(lists)), counts)
            first = counts.cumsum() - counts  # row of each one's best candidate
            tokens = np.concatenate([found.ids for found in lists])
            reference = np.concatenate([reference_logits(found.log_probabilities) for found in lists])
            hidden, siblings = self.lm.candidates(cache, torch.from_numpy(tokens), torch.from_numpy(counts))
            self._check_finite(hidden, owner, alive)

            margins = policy(hidden, reference)
            if rng is None:
                accepted = margins > 0
            else:
                accepted = rng.random(len(margins)) < 1 / (1 + np.exp(-margins.astype(np.float64)))
            place = np.arange(len(owner)) - first[owner]
            earliest = np.full(len(lists), len(owner))  # the first accepted of each, by place
            np.minimum.at(earliest, owner[accepted], place[accepted])
            rejected_all = earliest == len(owner)
            pick = np.where(rejected_all, counts - 1 if fallback == "last" else 0, earliest)
            pick[counts == 1] = 0

            chosen = first + pick
            visited = (counts[owner] > 1) & (place <= np.where(rejected_all, counts - 1, pick)[owner])
            forced = place == counts[owner] - 1
            if record:
                rows = np.flatnonzero(visited)
                kept = hidden[torch.from_numpy(rows).to(hidden.device)].half().cpu().numpy()
                parts = (kept, (place == pick[owner])[rows], margins[rows], reference[rows], forced[rows])
                for making, mine in zip(alive, _split(parts, owner[rows], len(lists)), strict=True):
                    making.links.append(mine)
            asked = np.bincount(owner, visited, len(lists)).astype(int)
            for making, n, p, r, a, t in zip(alive, counts, pick, rejected_all, asked, tokens[chosen], strict=True):
                making.emit(int(t), self, n > 1, int(p), bool(r), int(a))

            self.lm.settle(siblings, torch.from_numpy(chosen))
            going = np.array([not making.done for making in alive])
            on = torch.from_numpy(np.flatnonzero(going)).to(hidden.device)
            states = hidden[torch.from_numpy(chosen[going]).to(hidden.device)]
            if not going.all():
                cache.keep(on)
                alive = [making for making in alive if not making.done]
        return [making.episode(self.lm.hidden_size) for making in makings]

    def _candidates(self, states: Tensor, alive: Sequence[_Making]) -> list[Candidates]:
        """The candidates that follow each of B states."""
        logits = self.lm.head(states).float()
        best = logits.topk(min(self.top_k + TOP_SPARE, logits.shape[-1]))
        ids, values = best.indices.cpu().numpy(), best.values.cpu().numpy()
        for making, row in zip(alive, values, strict=True):
            if not np.isfinite(row[0]):
                raise NumericsError(f"prompt {making.index}: the logits at position {making.position} are not finite")
        return [select(i, v, 0.0, self.top_k, self.top_p) for i, v in zip(ids, values, strict=True)]

    def _check_finite(self, hidden: Tensor, owner: NDArray[np.int64], alive: Sequence[_Making]) -> None:
        sound = hidden.half().isfinite().all(-1).cpu().numpy()
        if not sound.all():
            making = alive[owner[int(np.flatnonzero(~sound)[0])]]
            raise NumericsError(
                f"prompt {making.index}: a hidden state at position {making.position} is not finite as float16"
            )


class _Making:
    """An episode in the making."""

    def __init__(self, index: int, prompt_tokens: int) -> None:
        self.index, self.prompt_tokens = index, prompt_tokens
        self.tokens: list[int] = []
        self.links: list[tuple[NDArray[np.generic], ...]] = []
        self.finished = self.done = False
        self.decisions = self.examined = self.interventions = self.forced = 0

    @property
    def position(self) -> int:
        return self.prompt_tokens + len(self.tokens)

    def emit(self, token: int, environment: Environment, decision: bool, pick: int, forced: bool, asked: int) -> None:
        self.examined += asked
        if decision:
            self.decisions += 1
            self.interventions += pick > 0
            self.forced += forced
        if token in environment.eos_token_ids:
            self.finished = self.done = True
        else:
            self.tokens.append(token)
            self.done = len(self.tokens) == environment.max_new_tokens

    def episode(self, hidden_size: int) -> Episode:
        if sum(len(link[0]) for link in self.links):
            chain = Chain(*(np.concatenate(column) for column in zip(*self.links, strict=True)))
        else:
            none = np.empty(0, np.float32)
            chain = Chain(np.empty((0, hidden_size), np.float16), none > 0, none, none, none > 0)
        return Episode(
            self.tokens, self.finished, chain, self.decisions, self.examined, self.interventions, self.forced
        )


def _split(
    parts: tuple[NDArray[np.generic], ...], owner: NDArray[np.int64], count: int
) -> list[tuple[NDArray[np.generic], ...]]:
    """Rows of several arrays, sorted by owner → one tuple of arrays per owner."""
    ends = np.bincount(owner, minlength=count).cumsum()[:-1]
    return list(zip(*(np.split(part, ends) for part in parts), strict=True))
