"""Commands in processes of their own, forked from one that has imported what they need: for tests that kill many."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fork import kill_before

ROOT = Path(__file__).resolve().parents[1]


class ForkServer:
    """Runs commands, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, command: str, *argv: object, kill_after: float | None = None, kill_at_rename: int | None = None
    ) -> tuple[int, int]:
        """(exit code or minus the signal, renames begun). kill_after: seconds; kill_at_rename: before that one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = [f"mara_deploy.commands.{command}", [str(word) for word in argv], kill_at_rename or 0]
        print(json.dumps(request), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            select.select([self._process.stdout], [], [], kill_after)  # until then, or until it has ended
            with contextlib.suppress(ProcessLookupError):  # the server has not reaped it, or it has ended
                os.kill(child, signal.SIGKILL)
        code, renames = json.loads(self._process.stdout.readline())
        return code, renames


@contextlib.contextmanager
def fork_server(*imports: str) -> Iterator[ForkServer]:
    """A server whose commands find these modules imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "export", ROOT / "runtime")))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fork_server", *imports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    try:
        yield ForkServer(process)
    finally:
        process.stdin.close()  # type: ignore[union-attr] # the end of its input ends the server
        process.wait(60)


def serve(imports: Sequence[str]) -> None:
    """Fork a process for each line of stdin."""
    for name in imports:
        importlib.import_module(name)
    for line in sys.stdin:
        command, argv, kill_at_rename = json.loads(line)
        counter, counted = os.pipe()
        child = os.fork()
        if not child:
            os._exit(_child(command, argv, kill_at_rename, counted))
        os.close(counted)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        renames = 0
        while piece := os.read(counter, 4096):
            renames += len(piece)
        os.close(counter)
        print(json.dumps([os.waitstatus_to_exitcode(status), renames]), flush=True)


def _child(command: str, argv: list[str], kill_at_rename: int, counted: int) -> int:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    kill_before(kill_at_rename, ("os.rename",), lambda: os.write(counted, b"."))
    try:
        return int(importlib.import_module(command).main(argv))
    except BaseException:
        return 1


if __name__ == "__main__":
    serve(sys.argv[1:])
