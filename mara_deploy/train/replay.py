"""The replay buffer: the latest transitions of a run.

The next state of a transition is the state of the following one in its trajectory, so each state is stored once, as
float16, and a transition takes 2·D + 13 bytes. States lie in files that only grow (`NUMBER.f16`, from that transition
on) and are removed when a checkpoint no longer needs them; the 13 bytes are kept in memory and in the checkpoint, with
length and checksum of every file. So a run that is killed at any moment resumes from its last checkpoint as if nothing
had happened, a damaged file is noticed, and the capacity may change when a run is resumed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mara_deploy.train.environment import Trajectory
from mara_deploy.train.folder import damaged
from mara_runtime.files import writing

_ACCEPTED, _DONE, _FORCED = 1, 2, 4
_ROW = np.dtype([("reference", "f4"), ("margin", "f4"), ("score", "f4"), ("flags", "u1")])
_FILES = 8
"""Files that a full buffer spreads over; so much more than its capacity remains on the disk at most."""


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


class _States:
    """A file of states, from transition `first` on."""

    def __init__(self, folder: Path, first: int, hidden_size: int) -> None:
        self.path = folder / f"{first:015}.f16"
        self.first, self.rows, self._synced = first, 0, 0
        self._hidden_size = hidden_size
        self._sum = hashlib.sha256()
        self._map: NDArray[np.float16] = np.empty((0, hidden_size), np.float16)

    def append(self, states: NDArray[np.float16]) -> None:
        """Raises MaraError for a full disk."""
        content = np.ascontiguousarray(states, np.float16).tobytes()
        with writing(self.path), self.path.open("ab") as file:
            file.write(content)
        self._sum.update(content)
        self.rows += len(states)

    def cut(self, rows: int, checksum: str) -> None:
        """Shorten the file to its length at a checkpoint. Raises MaraError for another content than it had then."""
        size = rows * self._hidden_size * 2
        try:
            with self.path.open("rb+") as file:
                while block := file.read(min(1 << 20, size - file.tell())):
                    self._sum.update(block)
                if self._sum.hexdigest() != checksum:
                    raise damaged(self.path)
                file.truncate(size)
        except OSError as error:
            raise damaged(self.path, str(error.strerror)) from None
        self.rows = self._synced = rows

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """(N,) rows → (N, D)."""
        if len(self._map) < self.rows:
            self._map = np.memmap(self.path, np.float16, "r", shape=(self.rows, self._hidden_size))
        return self._map[rows]

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        if self._synced < self.rows:
            with writing(self.path), self.path.open("rb+") as file:
                os.fsync(file.fileno())
        self._synced = self.rows

    def state(self) -> list[Any]:
        """[first transition, rows, checksum]."""
        return [self.first, self.rows, self._sum.hexdigest()]


class ReplayBuffer:
    """The last `capacity` transitions, with states of size D in `folder`, which is created if it is missing.

    state: of the checkpoint to continue from; None for an empty buffer.
    Raises MaraError for files that are damaged or cannot be written.
    """

    def __init__(self, folder: Path, capacity: int, hidden_size: int, state: Mapping[str, Any] | None = None) -> None:
        self.capacity = capacity
        self.added: int = state["added"] if state else 0
        """transitions ever added"""
        self._folder, self._hidden_size = folder, hidden_size
        self._rows: NDArray[np.void] = state["rows"].numpy().view(_ROW) if state else np.empty(0, _ROW)
        self._first = self.added - len(self._rows)  # transition of the first row
        self._files: list[_States] = []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for first, rows, checksum in state["files"] if state else ():
            file = _States(folder, first, hidden_size)
            file.cut(rows, checksum)
            self._files.append(file)
        self._remove_others()

    def __len__(self) -> int:
        return min(self.added - self._first, self.capacity)

    @staticmethod
    def bytes_per_transition(hidden_size: int) -> int:
        """On the disk."""
        return 2 * hidden_size + _ROW.itemsize

    def add(self, trajectory: Trajectory, score: float) -> None:
        """Append an episode of T ≥ 1 transitions. score: the reward at its end. Raises MaraError for a full disk."""
        rows = np.zeros(len(trajectory), _ROW)
        rows["reference"], rows["margin"] = trajectory.reference, trajectory.margins
        rows["flags"] = trajectory.accepted * _ACCEPTED + trajectory.forced * _FORCED
        rows["score"][-1] = score
        rows["flags"][-1] |= _DONE
        if not self._files or self._files[-1].rows >= -(-self.capacity // _FILES):
            self._files.append(_States(self._folder, self.added, self._hidden_size))
        self._files[-1].append(trajectory.states)
        used = self.added - self._first
        if used + len(rows) > len(self._rows):
            kept = self._rows[max(0, used - self.capacity) : used]
            self._rows = np.concatenate([kept, np.zeros(len(kept) + 2 * len(rows), _ROW)])
            self._first, used = self.added - len(kept), len(kept)
        self._rows[used : used + len(rows)] = rows
        self.added += len(rows)

    def state(self) -> dict[str, Any]:
        """All but the states, for a checkpoint."""
        rows = self._rows[self.added - self._first - len(self) : self.added - self._first].copy()
        files = [file.state() for file in self._files if file.first + file.rows > self.added - len(self)]
        return {"added": self.added, "rows": torch.from_numpy(rows.view(np.uint8)), "files": files}

    def flush(self) -> None:
        """Wait until the states are on the disk, before a checkpoint refers to them."""
        for file in self._files:
            file.sync()

    def saved(self, state: Mapping[str, Any]) -> None:
        """Remove the files that a checkpoint with this state, the last one, does not need."""
        oldest = min((first for first, *_ in state["files"]), default=0)
        self._files = [file for file in self._files if file.first >= oldest]
        self._remove_others()

    def sample(self, rng: np.random.Generator, batch: int, n_step: int) -> Batch:
        """Sample transitions uniformly, with replacement."""
        start = self.added - len(self) + rng.integers(len(self), size=batch)
        covered = np.minimum(start[:, None] + np.arange(n_step), self.added - 1)  # into the next episode after an end
        rows = self._rows[covered - self._first]  # (B, n)
        done = (rows["flags"] & _DONE) > 0
        inside = np.ones_like(done)
        inside[:, 1:] = ~np.logical_or.accumulate(done[:, :-1], axis=1)
        ended = done.any(axis=1)
        after = np.where(ended, start, start + n_step)
        next_rows = self._rows[after - self._first]
        columns = (
            self._states(start),
            (rows["flags"][:, 0] & _ACCEPTED) > 0,
            rows["margin"],
            rows["reference"],
            (rows["flags"] & _FORCED) > 0,
            rows["score"],
            inside,
            self._states(after),
            next_rows["reference"],
            (next_rows["flags"] & _FORCED) > 0,
            ended,
        )
        return Batch(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))

    def _states(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B,) transitions → (B, D)."""
        states = np.empty((len(numbers), self._hidden_size), np.float32)
        owner = np.searchsorted([file.first for file in self._files], numbers, side="right") - 1
        for index in np.unique(owner):
            mine = owner == index
            states[mine] = self._files[index].read(numbers[mine] - self._files[index].first)
        return states

    def _remove_others(self) -> None:
        """Remove files that no longer belong to the buffer."""
        ours = {file.path for file in self._files}
        with writing(self._folder):
            for path in self._folder.glob("*.f16"):
                if path not in ours:
                    path.unlink()
