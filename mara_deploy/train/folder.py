"""The folder of a training run, and its checkpoints.

    run.json           what is trained, on what, with which settings and versions
    prompts.json       the training prompts
    log.jsonl          one line per round of rollouts
    tensorboard/       the same for TensorBoard
    checkpoint.pt      all other state, as of the last checkpoint
    replay/            the replay buffer (mara_deploy.train.replay)
    agent.safetensors  the agent as of the last checkpoint; agent.pth: in the format of MARA's released checkpoints
    report.html        plots

Every file is replaced atomically or only grows, so a run that is killed at any moment can be resumed. `run.json`, which
is written last when a run begins, has a checksum of itself and of `prompts.json`; `checkpoint.pt` ends with its own,
and holds those of the log and of the replay buffer. `checkpoint.pt` and `replay/` serve no other purpose.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from mara_deploy import agent as agents
from mara_deploy.files import write_file
from mara_deploy.train.config import RUN_FILE
from mara_runtime.bundle import sha256
from mara_runtime.errors import MaraError, first_line
from mara_runtime.files import read_file, writing
from mara_runtime.json_reader import load_object
from mara_runtime.manifest import checksum

_RUN, _PROMPTS, _LOG, _CHECKPOINT = RUN_FILE, "prompts.json", "log.jsonl", "checkpoint.pt"

_STATE = {"learner", "progress", "actions", "batches", "replay", "log"}
"""Keys of a checkpoint, see `mara_deploy.train.loop`."""


def damaged(path: Path, why: str = "its content differs from its checksum") -> MaraError:
    """The error for a file of a run that cannot be continued from."""
    return MaraError(
        f"{path} is damaged ({why}): restore it, or start a new run, with this one's agent as its --init-agent"
    )


@dataclass(frozen=True)
class RunFolder:
    """Reads and writes the files of a run."""

    path: Path

    @classmethod
    def new(cls, path: Path, run: dict[str, Any], prompts: list[Any], state: Mapping[str, Any]) -> RunFolder:
        """Create the folder of a new run, whose checkpoint is `state`. Raises MaraError if `path` is in use.

        prompts: entries of a prompt file.
        """
        cls.check_unused(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        write_file(path / _PROMPTS, json.dumps(prompts, ensure_ascii=False, indent=0))
        folder._save_state(state)
        run["prompts"] = {**run.get("prompts", {}), "sha256": sha256(path / _PROMPTS)}
        folder.describe(run)
        return folder

    @staticmethod
    def check_unused(path: Path) -> None:
        """Raise MaraError unless `path` is new, empty, or left by a run that was killed before it had a run.json."""
        begun = (_PROMPTS, _CHECKPOINT)
        with writing(path):
            used = path.exists() and (
                not path.is_dir() or any(p.name not in begun and p.suffix != ".partial" for p in path.iterdir())
            )
        if used:
            resume = ", or add --resume to continue the run in it" if (path / _RUN).is_file() else ""
            raise MaraError(f"{path} exists and is not an empty folder: choose another --out{resume}")

    def describe(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        text = json.dumps({**run, "sha256": checksum(run)}, ensure_ascii=False, indent=2)
        write_file(self.path / _RUN, text + "\n")

    def run(self) -> dict[str, Any]:
        """The content of run.json. Raises MaraError if it is damaged."""
        run: dict[str, Any] = self._read(_RUN)
        if not isinstance(run, dict) or run.pop("sha256", None) != checksum(run):
            raise damaged(self.path / _RUN)
        return run

    def prompts(self, run: Mapping[str, Any]) -> Path:
        """The file of the training prompts. run: as of run.json. Raises MaraError if it is damaged."""
        path = self.path / _PROMPTS
        try:
            changed = hashlib.sha256(_content(path)).hexdigest() != run["prompts"]["sha256"]
        except OSError as error:
            raise damaged(path, first_line(error)) from None
        if changed:
            raise damaged(path)
        return path

    def _read(self, name: str) -> Any:
        try:
            return load_object(_content(self.path / name).decode())
        except (OSError, ValueError) as error:
            raise damaged(self.path / name, first_line(error)) from None

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
        self._save_state(state)
        with writing(self.path / "agent.safetensors"):
            agent.save(self.path / "agent.safetensors")
        write_file(self.path / "agent.pth", lambda path: _torch_save(agents.cpu_state(agent), path))

    def _save_state(self, state: Mapping[str, Any]) -> None:
        write_file(self.path / _CHECKPOINT, lambda path: _torch_save(dict(state), path, sealed=True))

    def load(self) -> dict[str, Any]:
        """The last checkpoint. Raises MaraError if it is damaged."""
        path = self.path / _CHECKPOINT
        try:
            content = _content(path)
        except OSError as error:
            raise damaged(path, error.strerror or "it cannot be read") from None
        end = len(content) - hashlib.sha256().digest_size
        if end < 0 or hashlib.sha256(memoryview(content)[:end]).digest() != content[end:]:
            raise damaged(path)
        state: dict[str, Any] = torch.load(io.BytesIO(content[:end]), map_location="cpu", weights_only=True)
        if state.keys() != _STATE:
            raise damaged(path, "another version of mara-train wrote it")
        return state

    def log(self, state: Mapping[str, Any] | None = None) -> Log:
        """The log, cut to what it was at a checkpoint with this state of it. Raises MaraError if it is damaged."""
        return Log(self.path / _LOG, state)

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the log. Raises MaraError if it is damaged."""
        path = self.path / _LOG
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise damaged(path, first_line(error)) from None


class Log:
    """A file of JSON lines that grows."""

    def __init__(self, path: Path, state: Mapping[str, Any] | None) -> None:
        self._path = path
        self._bytes: int = state["bytes"] if state else 0
        with writing(path):
            path.touch()
            content = path.read_bytes()[: self._bytes]
        self._sum = hashlib.sha256(content)
        if state and self._sum.hexdigest() != state["sha256"]:
            raise damaged(path)
        with writing(path), path.open("rb+") as file:
            file.truncate(self._bytes)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a line. Raises MaraError for a full disk."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with writing(self._path), self._path.open("ab") as file:
            file.write(line)
        self._sum.update(line)
        self._bytes += len(line)

    def state(self) -> dict[str, Any]:
        """Length and checksum, for a checkpoint."""
        return {"bytes": self._bytes, "sha256": self._sum.hexdigest()}


def _content(path: Path) -> bytes:
    """Of a regular file. Raises OSError."""
    return read_file(path, path.stat().st_size)


class _Sealed(io.RawIOBase):
    """A file that is written from its start to its end, and the checksum of what was written."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file, self.sum = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.sum.update(content)
        return self._file.write(content)


def _torch_save(state: Mapping[str, Any], path: Path, sealed: bool = False) -> None:
    """Write a file of torch's format, with its SHA-256 behind it if it is `sealed`."""
    with path.open("wb") as file:
        target = _Sealed(file)
        try:
            torch.save(state, cast(IO[bytes], target))
        except RuntimeError as error:  # torch fails again, less clearly, when it closes the file after an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        if sealed:
            file.write(target.sum.digest())
