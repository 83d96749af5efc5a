"""The folder of a training run, and its checkpoints.

    run.json           what is trained, on what, with which settings and versions
    prompts.json       the training prompts
    log.jsonl          one line per round of rollouts
    tensorboard/       the same for TensorBoard
    checkpoint.pt      everything else that the run depends on, as of the last checkpoint
    replay/            the transitions, in files that grow (mara_deploy.train.replay)
    agent.safetensors  the agent as of the last checkpoint; agent.pth: under the names of MARA's released checkpoints
    report.html        plots

Every file is written beside its name and then renamed, or only ever grows, so a run that is killed at any moment can be
resumed. `checkpoint.pt` and `replay/` serve no other purpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mara_deploy import agent as agents
from mara_deploy.files import in_one_line, partial, write_text, write_whole
from mara_runtime.errors import MaraError, first_line

_RUN, _PROMPTS, _LOG, _CHECKPOINT = "run.json", "prompts.json", "log.jsonl", "checkpoint.pt"


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of a run."""

    path: Path

    @classmethod
    def new(cls, path: Path, run: Mapping[str, Any], prompts: list[str]) -> RunFolder:
        """Begin a run. Raises MaraError where `path` is not new or empty."""
        cls.refuse_used(path)
        with in_one_line(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        write_text(path / _PROMPTS, json.dumps(prompts, ensure_ascii=False, indent=0))
        folder.describe(run)
        return folder

    @staticmethod
    def refuse_used(path: Path) -> None:
        """Raise MaraError where `path` is not new or empty, or what a run that was killed in its first moment left."""
        begun = {_PROMPTS, *(partial(Path(file)).name for file in (_PROMPTS, _RUN))}
        with in_one_line(path):
            used = path.exists() and (not path.is_dir() or any(inside.name not in begun for inside in path.iterdir()))
        if used:
            again = " or go on with it by --resume" if (path / _RUN).is_file() else ""
            raise MaraError(f"{path} exists already and is not an empty folder: choose another --out{again}")

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Go on with a run. Raises MaraError where there is none."""
        if not (path / _RUN).is_file():
            raise MaraError(f"{path} holds no training run to resume: it has no {_RUN}")
        return cls(path)

    def describe(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        write_text(self.path / _RUN, json.dumps(run, ensure_ascii=False, indent=2) + "\n")

    def read(self, name: str) -> Any:
        """run.json or prompts.json. Raises MaraError when it is damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MaraError(f"{self.path / name} cannot be read: {error}") from None

    @property
    def run(self) -> dict[str, Any]:
        """What run.json says."""
        found: dict[str, Any] = self.read(_RUN)
        return found

    @property
    def prompts(self) -> list[str]:
        """The training prompts."""
        found: list[str] = self.read(_PROMPTS)
        return found

    @property
    def replay(self) -> Path:
        """Folder of the replay memory."""
        return self.path / "replay"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    def write_report(self, page: str) -> None:
        """Write report.html."""
        write_text(self.path / "report.html", page)

    def save(self, state: Mapping[str, Any], agent: agents.Agent, facts: Mapping[str, str]) -> None:
        """Write a checkpoint and the agent. facts: recorded in the agent's file."""
        write_whole(self.path / _CHECKPOINT, lambda to: _torch_save(dict(state), to))
        write_whole(self.path / "agent.safetensors", lambda to: agents.save(agent, to, facts))
        write_whole(self.path / "agent.pth", lambda to: _torch_save(agents.cpu_state(agent), to))

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint; None if the run ended before its first. Raises MaraError when it is damaged."""
        if not (self.path / _CHECKPOINT).is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path / _CHECKPOINT, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle fails in every way there is
            reason = first_line(error)
            raise MaraError(f"{self.path / _CHECKPOINT} cannot be read: {reason}") from None
        return state

    def log(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        path = self.path / _LOG
        with in_one_line(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the log; one that was cut off in the middle is left out."""
        path = self.path / _LOG
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in lines]

    def rewind(self, episodes: int) -> None:
        """Forget what was logged after a checkpoint at `episodes`."""
        kept = [row for row in self.rows() if row["episodes"] <= episodes]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_text(self.path / _LOG, text)


def _torch_save(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch fails once more as it closes the file
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
