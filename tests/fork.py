"""Processes that are killed at a chosen moment: before the nth change that they make to the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

CHANGES = ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "tempfile.mkdtemp")
"""Audit events, besides a file that is opened to be written."""


def kill_before(change: int, kinds: tuple[str, ...] = CHANGES, count: Callable[[], object] = lambda: None) -> None:
    """Kill this process before its nth change, from 1; 0: never. count: called at each."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        writes = event == "open" and "open" in kinds and isinstance(args[2], int) and args[2] & os.O_CREAT
        if event in kinds or writes:
            seen += 1
            count()
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_before(change: int, body: Callable[[], object]) -> bool:
    """Run `body` in a process of its own that is killed before its nth change; False: it ended before."""
    child = os.fork()
    if not child:
        try:
            kill_before(change, (*CHANGES, "open"))
            body()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0
