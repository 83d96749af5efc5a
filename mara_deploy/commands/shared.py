"""The frame of every command: parse, run, report errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from mara_runtime.errors import MaraError
from mara_runtime.versions import installed

EXIT_BAD_INPUT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, --debug and --version."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        version = f"%(prog)s (mara-deploy {installed('mara-deploy')['mara-deploy']})"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def guarded(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse and run `body`; return the exit code. Errors the user can fix are one line on stderr and exit code 2."""
    args = parser.parse_args(argv)
    try:
        with _termination_unwinds():
            body(args)
            if sys.stdout is not None:
                sys.stdout.flush()
    except (MaraError, KeyboardInterrupt, Terminated, OSError) as error:
        if args.debug or (isinstance(error, OSError) and error.errno not in (*_FULL, errno.EPIPE)):
            raise
        if isinstance(error, OSError):
            _discard_output()
        if isinstance(error, BrokenPipeError):  # the reader has exited, as `head` does
            sys.stderr.close()
            return EXIT_BAD_INPUT
        if isinstance(error, MaraError):
            message = " ".join(str(error).split())
        else:
            message = f"cannot write: {error.strerror}" if isinstance(error, OSError) else "interrupted"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Report an ImportError as the packages that `purpose` needs. extra: of pyproject.toml."""
    try:
        yield
    except ImportError as error:
        raise MaraError(
            f"{purpose} needs packages that are not installed ({error}): pip install 'mara-deploy[{extra}]'"
        ) from None


def _discard_output() -> None:
    """Redirect stdout: Python would try to write the rest of the buffer again at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Terminated(BaseException):
    """SIGTERM or SIGHUP: like Ctrl-C, except that nothing may continue afterwards."""


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless ignored, unwind the stack as Ctrl-C does, so that nothing half-written remains."""
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return

    received = False

    def terminate(*_: object) -> None:
        nonlocal received
        if not received:  # a closing terminal sends several, and the cleanup of the first must finish
            received = True
            raise Terminated

    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
