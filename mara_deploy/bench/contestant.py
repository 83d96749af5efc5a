"""The processes that take part in a benchmark, each of which answers requests as protocol.py says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS

MARA, HUGGING_FACE = "mara", "hugging-face"
OTHERS = {"genai": "peer_genai.py", "llama.cpp": "peer_llama.py"}
"""Peers that need an environment of their own, and what drives them there."""


def commands(bundle: Bundle, engine: str, peers: Sequence[str], threads: int, *, asked: bool) -> dict[str, list[str]]:
    """What starts each contestant, by name: the bundle's first, then those of `--peer`. Raises OptionError.

    threads: of each; asked: they are the user's, and not a default.
    """
    shared = ["--threads", str(threads)]
    ours = [sys.executable, "-m", "mara_deploy.bench.worker", str(bundle.folder), "--engine", engine]
    # engines of TensorRT take no threads, and "auto" may choose one: then it refuses those that the user asked for
    on_cpu = engine not in ENGINE_TARGETS and (asked or engine != "auto" or not bundle.manifest.engines)
    found = {MARA: [*ours, *shared] if on_cpu else ours}
    for peer in peers:
        name, _, where = peer.partition("=")
        python, colon, model = where.partition(":")
        if name in OTHERS and colon:
            command = [python, str(Path(__file__).with_name(OTHERS[name])), model]
        elif name == HUGGING_FACE and where:
            command = [sys.executable, "-m", "mara_deploy.bench.peer_hf", where]
        else:
            raise OptionError(
                f"--peer is {peer!r}; it must be genai=PYTHON:FOLDER, llama.cpp=PYTHON:FILE or hugging-face=FOLDER"
            )
        if name in found:
            raise OptionError(f"--peer names {name} twice; leave one of them out")
        found[name] = [*command, *shared]
    return found


class Contestant:
    """A process that answers requests."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request. Raises MaraError when it fails."""
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            pipe.write(json.dumps({"do": do, **request}) + "\n")
            pipe.flush()
        except OSError:
            raise MaraError(f"{self.name} has ended before it was asked to {do}") from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it has ended, and what it was asked last is still in the pipe
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise MaraError(f"{self.name} did not answer; it said {line[:200]!r}") from None
        if "error" in answer:
            raise MaraError(f"{self.name}: {answer['error']}")
        return answer


class Contestants:
    """All that take part, by name; they run from `open` to `close`."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        self._commands = commands
        self._open: dict[str, Contestant] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __getitem__(self, name: str) -> Contestant:
        return self._open[name]

    def open(self) -> dict[str, dict[str, Any]]:
        """Start all of them. Returns what each says of itself."""
        for name in self:
            self._open[name] = self.fresh(name)
        return {name: contestant.about for name, contestant in self._open.items()}

    def fresh(self, name: str) -> Contestant:
        """Another process of a contestant, for the caller to close."""
        try:
            return Contestant(name, self._commands[name])
        except OSError as error:
            raise OptionError(f"--peer {name}: cannot run {self._commands[name][0]}: {error.strerror}") from None

    def start_anew(self, names: Sequence[str], first: int) -> None:
        """End these and start them again, another one first by `first`."""
        for name in names:
            self._open[name].close()
        for name in (*names[first % len(names) :], *names[: first % len(names)]):
            self._open[name] = self.fresh(name)

    def close(self) -> None:
        """End all of them."""
        for contestant in self._open.values():
            contestant.close()
