"""The folder of a training run, and its checkpoints.

    run.json           what is trained, on what, with which settings and versions
    prompts.json       the training prompts
    log.jsonl          one line per round of rollouts
    tensorboard/       the same for TensorBoard
    checkpoint.pt      all other state, as of the last checkpoint
    replay/            the replay buffer (mara_deploy.train.replay)
    agent.safetensors  the agent as of the last checkpoint; agent.pth: in the format of MARA's released checkpoints
    report.html        plots

Every file is replaced atomically or only grows, so a run that is killed at any moment can be resumed. `checkpoint.pt`
and `replay/` serve no other purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mara_deploy import agent as agents
from mara_deploy.files import write_file
from mara_runtime.errors import MaraError, first_line
from mara_runtime.files import writing

_RUN, _PROMPTS, _LOG, _CHECKPOINT = "run.json", "prompts.json", "log.jsonl", "checkpoint.pt"


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of a run."""

    path: Path

    @classmethod
    def new(cls, path: Path, run: Mapping[str, Any], prompts: list[Any]) -> RunFolder:
        """Create the folder of a new run. prompts: entries of a prompt file. Raises MaraError if `path` is in use."""
        cls.check_unused(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        write_file(path / _PROMPTS, json.dumps(prompts, ensure_ascii=False, indent=0))
        folder.describe(run)
        return folder

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raise MaraError unless `path` is new, empty, or left by a run that was killed before it had a run.json."""
        with writing(path):
            used = path.exists() and (
                not path.is_dir() or any(p.name != _PROMPTS and p.suffix != ".partial" for p in path.iterdir())
            )
        if used:
            resume = ", or add --resume to continue the run in it" if (path / _RUN).is_file() else ""
            raise MaraError(f"{path} exists and is not an empty folder: choose another --out{resume}")

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open the folder of a run. Raises MaraError if there is none."""
        if not (path / _RUN).is_file():
            raise MaraError(f"{path} has no training run to resume: there is no {_RUN}")
        return cls(path)

    def describe(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_file(self.path / _RUN, json.dumps(run, ensure_ascii=False, indent=2) + "\n")

    @property
    def run(self) -> dict[str, Any]:
        """The content of run.json. Raises MaraError if it is damaged."""
        try:
            run: dict[str, Any] = json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MaraError(f"{self.path / _RUN} cannot be read: {error}") from None
        return run

    @property
    def prompts(self) -> Path:
        """The training prompts: a prompt file."""
        return self.path / _PROMPTS

    @property
    def replay(self) -> Path:
        """Folder of the replay buffer."""
        return self.path / "replay"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    def save(self, state: Mapping[str, Any], agent: agents.Agent) -> None:
        """Write a checkpoint and the agent."""
        write_file(self.path / _CHECKPOINT, lambda path: _torch_save(dict(state), path))
        with writing(self.path / "agent.safetensors"):
            agents.save(agent, self.path / "agent.safetensors")
        write_file(self.path / "agent.pth", lambda path: _torch_save(agents.cpu_state(agent), path))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint; None if the run has none yet. Raises MaraError if it is damaged."""
        path = self.path / _CHECKPOINT
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise MaraError(f"{path} cannot be read: {first_line(error)}") from None
        return state

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        path = self.path / _LOG
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the log, without an incomplete last one."""
        path = self.path / _LOG
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def rewind(self, episodes: int) -> None:
        """Drop what an interrupted run left after its checkpoint at `episodes`: lines of the log, partial files."""
        rows = [row for row in self.rows() if row["episodes"] <= episodes]
        write_file(self.path / _LOG, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        for partial in self.path.glob(".*.partial"):
            with writing(partial):
                partial.unlink()


def _torch_save(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch fails again, less clearly, when it closes the file after an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
