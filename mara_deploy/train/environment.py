"""Rollouts: the LLM answers a batch of prompts, and a policy accepts or rejects each candidate.

All candidates of a position share one pass (mara_deploy.train.packed), as siblings that see the prefix and themselves.
The runtime's own function selects the candidates, so training and decoding see the same lists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mara_deploy.train.packed import PackedLM
from mara_deploy.train.policy import Policy, reference_logits
from mara_runtime.candidates import Candidates, select
from mara_runtime.errors import NumericsError
from mara_runtime.tensors import TOP_SPARE


@dataclass(frozen=True)
class Trajectory:
    """The T candidates that an episode visited, in order; the next state of each is the state of the following one."""

    states: NDArray[np.float16]
    """(T, D) last hidden states after the final norm"""
    accepted: NDArray[np.bool_]
    """(T,) the action; also True for a candidate emitted because all were rejected"""
    margins: NDArray[np.float32]
    """(T,) of the behaviour policy"""
    reference: NDArray[np.float32]
    """(T,) logits of q"""
    forced: NDArray[np.bool_]
    """(T,) the last candidate of its list: emitted once reached, whatever the policy says"""

    def __len__(self) -> int:
        return len(self.accepted)


@dataclass(frozen=True)
class Episode:
    """One answer."""

    token_ids: list[int]
    """emitted tokens without end-of-sequence"""
    finished: bool
    """an end-of-sequence id was emitted"""
    trajectory: Trajectory
    """empty if it was not recorded, or there were no decisions"""
    decisions: int
    """positions with several candidates"""
    examined: int
    """candidates that sequential decoding would submit to the agent"""
    interventions: int
    """decisions that emitted a candidate other than the LLM's best"""
    forced: int
    """decisions in which all candidates were rejected"""


@dataclass(frozen=True)
class Environment:
    """The LLM and the decoding settings. See `TrainConfig` for ranges."""

    lm: PackedLM
    eos_token_ids: frozenset[int]
    top_k: int
    top_p: float
    max_new_tokens: int
    context: int = sys.maxsize
    """tokens of prompt and answer together, at most"""

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        policy: Policy,
        rng: np.random.Generator | None,
        *,
        fallback: str = "last",
        record: bool = True,
    ) -> list[Episode]:
        """Answer B prompts, given as token ids. An answer ends at `max_new_tokens`, or where the context ends.

        rng: samples the actions; None: takes the more probable action. fallback: the candidate to emit when all are
        rejected, first or last; record: keep trajectories.
        Raises NumericsError, naming prompt and position, for a state or logit that is not finite.
        """
        room = [min(self.max_new_tokens, self.context - len(prompt)) for prompt in prompts]
        builders = [_EpisodeBuilder(i, len(p), r) for i, (p, r) in enumerate(zip(prompts, room, strict=True))]
        active = builders
        cache, states = self.lm.prefill(prompts, max(room))
        while active:
            # R candidates of all active sequences; row r is the candidate of rank[r] of the sequence owner[r]
            candidates = self._candidates(states, active)
            counts = np.array([len(c) for c in candidates])
            owner = np.repeat(np.arange(len(candidates)), counts)
            first = counts.cumsum() - counts  # row of each sequence's best candidate
            rank = np.arange(len(owner)) - first[owner]
            tokens = np.concatenate([c.ids for c in candidates])
            reference = np.concatenate([reference_logits(c.log_probabilities) for c in candidates])
            hidden, siblings = self.lm.candidates(cache, torch.from_numpy(tokens), torch.from_numpy(counts))
            self._check_finite(hidden, owner, active)

            margins = policy(hidden, reference)
            if rng is None:
                accepted = margins > 0
            else:
                accepted = rng.random(len(margins)) < 1 / (1 + np.exp(-margins.astype(np.float64)))
            pick = np.full(len(candidates), len(owner))  # rank of each sequence's first accepted candidate
            np.minimum.at(pick, owner[accepted], rank[accepted])
            all_rejected = pick == len(owner)
            last_visited = np.where(all_rejected, counts - 1, pick)
            pick = np.where(all_rejected, counts - 1 if fallback == "last" else 0, pick)
            pick[counts == 1] = 0
            chosen = first + pick

            visited = (counts[owner] > 1) & (rank <= last_visited[owner])
            if record:
                rows = np.flatnonzero(visited)
                kept = hidden[torch.from_numpy(rows).to(hidden.device)].half().cpu().numpy()
                is_pick, is_last = rank == pick[owner], rank == counts[owner] - 1
                columns = (kept, is_pick[rows], margins[rows], reference[rows], is_last[rows])
                for builder, part in zip(active, _split(columns, owner[rows], len(candidates)), strict=True):
                    builder.parts.append(part)
            examined = np.bincount(owner, visited, len(candidates)).astype(int)
            for builder, n, p, r, e, t in zip(
                active, counts, pick, all_rejected, examined, tokens[chosen], strict=True
            ):
                builder.emit(int(t), int(t) in self.eos_token_ids, n > 1, int(p), bool(r), int(e))

            self.lm.commit(siblings, torch.from_numpy(chosen))
            unfinished = np.array([not builder.done for builder in active])
            states = hidden[torch.from_numpy(chosen[unfinished]).to(hidden.device)]
            if not unfinished.all():
                cache.keep(torch.from_numpy(np.flatnonzero(unfinished)).to(hidden.device))
                active = [builder for builder in active if not builder.done]
        return [builder.episode(self.lm.hidden_size) for builder in builders]

    def _candidates(self, states: Tensor, active: Sequence[_EpisodeBuilder]) -> list[Candidates]:
        """The candidates that follow each of B states."""
        logits = self.lm.head(states).float()
        best = logits.topk(min(self.top_k + TOP_SPARE, logits.shape[-1]))
        ids, values = best.indices.cpu().numpy(), best.values.cpu().numpy()
        for builder, row in zip(active, values, strict=True):
            if not np.isfinite(row[0]):
                raise NumericsError(f"prompt {builder.index}: the logits at position {builder.position} are not finite")
        return [select(i, v, 0.0, self.top_k, self.top_p) for i, v in zip(ids, values, strict=True)]

    def _check_finite(self, hidden: Tensor, owner: NDArray[np.int64], active: Sequence[_EpisodeBuilder]) -> None:
        finite = hidden.half().isfinite().all(-1).cpu().numpy()
        if not finite.all():
            builder = active[owner[int(np.flatnonzero(~finite)[0])]]
            raise NumericsError(
                f"prompt {builder.index}: a hidden state at position {builder.position} is not finite as float16"
            )


class _EpisodeBuilder:
    """An episode in progress."""

    def __init__(self, index: int, prompt_tokens: int, room: int) -> None:
        self.index, self.prompt_tokens, self.room = index, prompt_tokens, room
        self.tokens: list[int] = []
        self.parts: list[tuple[NDArray[np.generic], ...]] = []  # columns of the trajectory, one tuple per position
        self.finished = self.done = False
        self.decisions = self.examined = self.interventions = self.forced = 0

    @property
    def position(self) -> int:
        return self.prompt_tokens + len(self.tokens)

    def emit(self, token: int, end: bool, decision: bool, pick: int, forced: bool, asked: int) -> None:
        self.examined += asked
        if decision:
            self.decisions += 1
            self.interventions += pick > 0
            self.forced += forced
        if end:
            self.finished = self.done = True
        else:
            self.tokens.append(token)
            self.done = len(self.tokens) == self.room

    def episode(self, hidden_size: int) -> Episode:
        if any(len(part[0]) for part in self.parts):
            trajectory = Trajectory(*(np.concatenate(column) for column in zip(*self.parts, strict=True)))
        else:
            empty = np.empty(0, np.float32)
            trajectory = Trajectory(np.empty((0, hidden_size), np.float16), empty > 0, empty, empty, empty > 0)
        return Episode(
            self.tokens, self.finished, trajectory, self.decisions, self.examined, self.interventions, self.forced
        )


def _split(
    columns: tuple[NDArray[np.generic], ...], owner: NDArray[np.int64], count: int
) -> list[tuple[NDArray[np.generic], ...]]:
    """Rows of several arrays, sorted by owner → one tuple of arrays per owner."""
    ends = np.bincount(owner, minlength=count).cumsum()[:-1]
    return list(zip(*(np.split(column, ends) for column in columns), strict=True))
