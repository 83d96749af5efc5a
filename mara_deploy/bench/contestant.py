"""The processes that take part in a benchmark. They answer the requests of protocol.py."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any

from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS

MARA = "mara"


def commands(
    bundle: Bundle, engine: str, peers: Sequence[str], threads: int, *, threads_given: bool
) -> dict[str, list[str]]:
    """The command of each contestant by name: the bundle's, then those of `--peer`. Raises OptionError.

    threads: of each contestant; threads_given: the number is the user's, not a default.
    """
    shared = ["--threads", str(threads)]
    ours = [sys.executable, "-m", "mara_deploy.bench.worker", str(bundle.folder), "--engine", engine]
    # TensorRT engines take no threads, and "auto" may choose one: then only a number that the user gave is passed on
    on_cpu = engine not in ENGINE_TARGETS and (threads_given or engine != "auto" or not bundle.manifest.engines)
    by_name = {MARA: [*ours, *shared] if on_cpu else ours}
    for peer in peers:
        name, _, text = peer.partition("=")
        try:
            command = shlex.split(text)
        except ValueError:  # an unclosed quote
            command = []
        if not name or not command:
            raise OptionError(
                f"--peer is {peer!r}; it must be NAME=COMMAND, a command that benchmarks/peers has or like it"
            )
        if name in by_name:
            raise OptionError(f"--peer is {peer!r}, but the name {name} is already in use; choose another one")
        by_name[name] = [*command, *shared]
    return by_name


class Contestant:
    """A process that answers requests."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._read()
        self.serial: bool = self.about.get("serial") is True
        """aligned decoding takes one pass per candidate; slow, see protocol.py"""
        self.conversations = int(self.about.get("conversations", 0))
        """that it decodes at once; 0: it cannot"""

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises MaraError when it fails."""
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            pipe.write(json.dumps({"do": do, **request}) + "\n")
            pipe.flush()
        except OSError:
            raise MaraError(f"{self.name} exited before the request {do}") from None
        return self._read()

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it has exited, and its last request is still in the pipe
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
            raise MaraError(f"{self.name} did not answer with JSON, but with {line[:200]!r}") from None
        if "error" in answer:
            raise MaraError(f"{self.name}: {answer['error']}")
        return answer


class Contestants(dict[str, Contestant]):
    """Contestants by name, from `open` to `close`."""

    def __init__(self, commands: dict[str, list[str]]) -> None:
        super().__init__()
        self._commands = commands

    def open(self) -> dict[str, dict[str, Any]]:
        """Start all. Returns what each says about itself."""
        for name in self._commands:
            self[name] = self.fresh(name)
        return {name: contestant.about for name, contestant in self.items()}

    def fresh(self, name: str) -> Contestant:
        """A new process of a contestant; the caller closes it."""
        try:
            return Contestant(name, self._commands[name])
        except OSError as error:
            raise OptionError(f"--peer {name}: cannot run {self._commands[name][0]}: {error.strerror}") from None

    def restart(self, names: Sequence[str], first: int) -> None:
        """Restart these, in the order rotated by `first`."""
        for name in names:
            self[name].close()
        for name in (*names[first % len(names) :], *names[: first % len(names)]):
            self[name] = self.fresh(name)

    def close(self) -> None:
        """End all."""
        for contestant in self.values():
            contestant.close()
