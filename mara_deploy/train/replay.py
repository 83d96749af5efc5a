"""The replay buffer: the latest transitions of a run, in memory-mapped files.

The next state of a transition is the state of the following one in its trajectory, so each state is stored once, as
float16, and a transition takes 2·D + 13 bytes. The files hold 1/8 more than the capacity: rows that the last checkpoint
depends on are not overwritten before the next checkpoint, so a run that is killed at any moment resumes from its last
checkpoint as if nothing had happened, and a checkpoint costs no more than a flush.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from mara_deploy.train.config import capacity_for, reserve
from mara_deploy.train.environment import Trajectory
from mara_runtime.errors import MaraError
from mara_runtime.files import writing

_ACCEPTED, _DONE, _FORCED = 1, 2, 4


@dataclass(frozen=True)
class Batch:
    """B transitions, each with the n transitions from it on that its n-step return covers."""

    states: Tensor
    """(B, D) float32"""
    accepted: Tensor
    """(B,) bool, the actions"""
    margins: Tensor
    """(B, n) of the behaviour policy; column 0 belongs to `states`"""
    reference: Tensor
    """(B, n) logits of q"""
    forced: Tensor
    """(B, n) bool: the last candidate, all others rejected"""
    scores: Tensor
    """(B, n) the episode's score at its last transition, else 0"""
    inside: Tensor
    """(B, n) bool: whether the transition belongs to the return; False after the end of the episode"""
    next_states: Tensor
    """(B, D) after the n transitions; `states` where the episode ends within them"""
    next_reference: Tensor
    """(B,)"""
    next_forced: Tensor
    """(B,) bool"""
    ended: Tensor
    """(B,) bool: the episode ends within the n transitions, so nothing is bootstrapped"""

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        return Batch(*(getattr(self, column.name).to(device) for column in fields(self)))


class ReplayBuffer:
    """A ring buffer of `capacity` transitions with states of size D in `folder`, which is created if it is missing.

    added: transitions ever added, as of the checkpoint to resume from; 0 for a new buffer.
    Raises MaraError for files that cannot be opened or belong to another run.
    """

    def __init__(self, folder: Path, capacity: int, hidden_size: int, added: int = 0) -> None:
        self.capacity = capacity
        self.added = added
        """transitions ever added"""
        self._saved = added  # `added` as of the last checkpoint
        self._rows = capacity + reserve(capacity)
        self._folder, self._allocated = folder, 0
        columns: dict[str, tuple[type, tuple[int, ...]]] = {
            "states": (np.float16, (hidden_size,)),
            "reference": (np.float32, ()),
            "margins": (np.float32, ()),
            "scores": (np.float32, ()),
            "flags": (np.uint8, ()),
        }
        self._files = {}
        for name, (dtype, shape) in columns.items():
            path, expected = folder / f"{name}.npy", (self._rows, *shape)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if added:
                    file = open_memmap(path, mode="r+")
                else:
                    file = open_memmap(path, mode="w+", dtype=dtype, shape=expected)
            except (OSError, ValueError) as error:
                raise MaraError(f"the replay buffer in {folder} cannot be opened: {error}") from None
            if file.shape != expected or file.dtype != dtype:
                raise MaraError(f"{path} is not the replay buffer of this run: {file.dtype} {file.shape}")
            self._files[name] = file

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @staticmethod
    def bytes_per_transition(hidden_size: int) -> int:
        """Without the reserve."""
        return 2 * hidden_size + 3 * 4 + 1

    @property
    def room(self) -> int:
        """Transitions that can be added before the next checkpoint."""
        return self._saved - min(self._saved, self.capacity) + self._rows - self.added

    def check(self, transitions: int) -> None:
        """Raise MaraError for a round of more transitions than fit between two checkpoints of a full buffer."""
        if transitions > reserve(self.capacity):
            raise MaraError(
                f"a round has {transitions} transitions, more than the {reserve(self.capacity)} that the replay buffer "
                f"can take between checkpoints: start a new run with --replay-transitions {capacity_for(transitions)} "
                "or more, or lower --prompts-at-once or --max-new-tokens"
            )

    def add(self, trajectory: Trajectory, score: float) -> None:
        """Append an episode of T ≥ 1 transitions. score: the reward at its end. Raises MaraError if room < T."""
        T = len(trajectory)
        if self.room < T:
            raise MaraError(f"{T} transitions exceed the {self.room} that the replay buffer takes before a checkpoint")
        self._allocate(min(self.added + T, self._rows))
        rows = (np.arange(T) + self.added) % self._rows
        files = self._files
        files["states"][rows] = trajectory.states
        files["reference"][rows] = trajectory.reference
        files["margins"][rows] = trajectory.margins
        files["scores"][rows] = 0.0
        files["flags"][rows] = trajectory.accepted * _ACCEPTED + trajectory.forced * _FORCED
        files["scores"][rows[-1]] = score
        files["flags"][rows[-1]] |= _DONE
        self.added += T

    def flush(self) -> None:
        """Write everything to disk, before a checkpoint refers to it."""
        with writing(self._folder):
            for file in self._files.values():
                file.flush()

    def _allocate(self, rows: int) -> None:
        """Allocate disk space for `rows` rows: writing to a sparse map on a full disk would kill the process."""
        if rows <= self._allocated or not hasattr(os, "posix_fallocate"):
            return
        for name, file in self._files.items():
            path, size = self._folder / f"{name}.npy", file.nbytes // self._rows
            start, length = file.offset + self._allocated * size, (rows - self._allocated) * size
            with writing(path), path.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), start, length)
        self._allocated = rows

    def saved(self) -> None:
        """Note that a checkpoint with the current `added` exists: older rows may be overwritten."""
        self._saved = self.added

    def sample(self, rng: np.random.Generator, batch: int, n_step: int) -> Batch:
        """Sample transitions uniformly, with replacement."""
        files = self._files
        start = self.added - len(self) + rng.integers(len(self), size=batch)
        rows = (start[:, None] + np.arange(n_step)) % self._rows  # (B, n), into other episodes after the end of one
        flags = files["flags"][rows]
        done = (flags & _DONE) > 0
        inside = np.ones_like(done)
        inside[:, 1:] = ~np.logical_or.accumulate(done[:, :-1], axis=1)
        ended = done.any(axis=1)
        after = np.where(ended, start, start + n_step) % self._rows
        columns = (
            files["states"][rows[:, 0]].astype(np.float32),
            (flags[:, 0] & _ACCEPTED) > 0,
            files["margins"][rows],
            files["reference"][rows],
            (flags & _FORCED) > 0,
            files["scores"][rows],
            inside,
            files["states"][after].astype(np.float32),
            files["reference"][after],
            (files["flags"][after] & _FORCED) > 0,
            ended,
        )
        return Batch(*map(torch.from_numpy, columns))
