"""The latest transitions of a run, in files.

The transitions of an episode are the links of a chain: each one's next state is the next one's state. So every state is
kept once, as float16, and a transition takes 2·D + 13 bytes (`Replay.row_bytes`), of which an eighth more is reserved:
rows that a checkpoint counts on are not overwritten before the next checkpoint, so a run that was killed at any moment
goes on from its last checkpoint as if nothing had happened. The files are memory-mapped: what is not in use need not
fit into memory, and a checkpoint costs a flush.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from mara_deploy.files import in_one_line
from mara_deploy.train.config import capacity_for, reserve
from mara_deploy.train.environment import Chain
from mara_runtime.errors import MaraError

_ACCEPTED, _DONE, _FORCED = 1, 2, 4


@dataclass(frozen=True)
class Batch:
    """B transitions, each with the links of its chain that an n-step return runs over."""

    states: NDArray[np.float32]
    """(B, D)"""
    accepted: NDArray[np.bool_]
    """(B,) actions"""
    margins: NDArray[np.float32]
    """(B, n) of the policy that acted; column 0 belongs to `states`"""
    reference: NDArray[np.float32]
    """(B, n) logits of q"""
    forced: NDArray[np.bool_]
    """(B, n) the last candidate, all others rejected"""
    scores: NDArray[np.float32]
    """(B, n) the episode's score on its last link, else 0"""
    inside: NDArray[np.bool_]
    """(B, n) whether the link belongs to the return: False after the end of the episode"""
    next_states: NDArray[np.float32]
    """(B, D) after the return's last link; the first state where the episode ends inside"""
    next_reference: NDArray[np.float32]
    """(B,)"""
    next_forced: NDArray[np.bool_]
    """(B,)"""
    ended: NDArray[np.bool_]
    """(B,) the episode ends inside the return: nothing is bootstrapped"""


class Replay:
    """A ring of `capacity` transitions of states of size D in `folder`, which is made if it is missing."""

    def __init__(self, folder: Path, capacity: int, hidden_size: int, added: int = 0) -> None:
        self.capacity = capacity
        self.added = added
        """transitions ever added"""
        self._kept = added
        self._rows = capacity + reserve(capacity)
        self._folder, self._allocated = folder, 0
        shapes: dict[str, tuple[type, tuple[int, ...]]] = {
            "states": (np.float16, (hidden_size,)),
            "reference": (np.float32, ()),
            "margins": (np.float32, ()),
            "scores": (np.float32, ()),
            "flags": (np.uint8, ()),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = {
                name: open_memmap(
                    folder / f"{name}.npy",
                    mode="r+" if added else "w+",
                    dtype=None if added else dtype,
                    shape=None if added else (self._rows, *shape),
                )
                for name, (dtype, shape) in shapes.items()
            }
        except (OSError, ValueError) as error:
            raise MaraError(f"the replay memory in {folder} cannot be opened: {error}") from None
        for name, (dtype, shape) in shapes.items():
            found = self._files[name]
            if found.shape != (self._rows, *shape) or found.dtype != dtype:
                raise MaraError(f"{folder / name}.npy is not this run's replay memory: {found.dtype} {found.shape}")

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @staticmethod
    def row_bytes(hidden_size: int) -> int:
        """Bytes of a transition, the reserve not included."""
        return 2 * hidden_size + 3 * 4 + 1

    @property
    def room(self) -> int:
        """Transitions that may be added before a checkpoint must be made."""
        return self._kept - min(self._kept, self.capacity) + self._rows - self.added

    def check(self, transitions: int) -> None:
        """Raise MaraError for a round of more transitions than fit between two checkpoints once the ring is full."""
        if transitions > reserve(self.capacity):
            raise MaraError(
                f"a round has {transitions} transitions, more than the {reserve(self.capacity)} that the replay memory "
                f"can take between checkpoints: begin a new run with --replay-transitions {capacity_for(transitions)} "
                "or more, or lower --prompts-at-once or --max-new-tokens"
            )

    def add(self, chain: Chain, score: float) -> None:
        """Append an episode of T transitions, T ≥ 1. score: paid at its end."""
        T = len(chain.accepted)
        if self.room < T:
            raise MaraError(
                f"{T} transitions are more than the {self.room} that the replay memory takes before a checkpoint"
            )
        self._allocate(min(self.added + T, self._rows))
        rows = (np.arange(T) + self.added) % self._rows
        self._files["states"][rows] = chain.states
        self._files["reference"][rows] = chain.reference
        self._files["margins"][rows] = chain.margins
        self._files["scores"][rows] = 0.0
        self._files["flags"][rows] = chain.accepted * _ACCEPTED + chain.forced * _FORCED
        self._files["scores"][rows[-1]] = score
        self._files["flags"][rows[-1]] |= _DONE
        self.added += T

    def flush(self) -> None:
        """Bring everything to the disk: the first part of a checkpoint."""
        with in_one_line(self._folder):
            for file in self._files.values():
                file.flush()

    def _allocate(self, rows: int) -> None:
        """Reserve the disk for the first `rows` rows. A full one is an error here; later it would kill the process."""
        if rows <= self._allocated or not hasattr(os, "posix_fallocate"):
            return
        for name, file in self._files.items():
            path, size = self._folder / f"{name}.npy", file.nbytes // self._rows
            with in_one_line(path), path.open("r+b") as opened:
                os.posix_fallocate(
                    opened.fileno(), file.offset + self._allocated * size, (rows - self._allocated) * size
                )
        self._allocated = rows

    def saved(self) -> None:
        """A checkpoint with `added` is written: what had left the ring before it may be overwritten."""
        self._kept = self.added

    def sample(self, rng: np.random.Generator, batch: int, n_step: int) -> Batch:
        """Draw transitions uniformly, with replacement."""
        start = self.added - len(self) + rng.integers(len(self), size=batch)
        links = (start[:, None] + np.arange(n_step)) % self._rows  # (B, n); after an episode's end: other episodes
        flags = self._files["flags"][links]
        done = (flags & _DONE) > 0
        inside = np.ones_like(done)
        inside[:, 1:] = ~np.logical_or.accumulate(done[:, :-1], axis=1)
        ended = done.any(axis=1)
        after = np.where(ended, start, start + n_step) % self._rows
        return Batch(
            states=self._files["states"][links[:, 0]].astype(np.float32),
            accepted=(flags[:, 0] & _ACCEPTED) > 0,
            margins=self._files["margins"][links],
            reference=self._files["reference"][links],
            forced=(flags & _FORCED) > 0,
            scores=self._files["scores"][links],
            inside=inside,
            next_states=self._files["states"][after].astype(np.float32),
            next_reference=self._files["reference"][after],
            next_forced=(self._files["flags"][after] & _FORCED) > 0,
            ended=ended,
        )
