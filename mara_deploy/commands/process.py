"""The process a command runs in, as it comes: closed or narrow streams, signals, memory, broken libraries.

`prepared` makes it safe once, before anything is parsed or printed. `one_line` says which failures are the
environment's, not this project's: they are reported without a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mara_runtime.engines.machine import allocated_memory, cores, free_memory
from mara_runtime.errors import MaraError, first_line

if sys.platform != "win32":
    import resource

_NO_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "out of memory",
    "allocate memory",
    "not enough memory",
    "failed to map",
    "is smaller than requested bytes",  # ONNX Runtime's arena
)
"""How libraries say in their exceptions that memory has run out."""


class Terminated(BaseException):
    """A signal that ends the process: like Ctrl-C, except that nothing may continue afterwards."""


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Make the standard streams usable; let signals that end a process unwind the stack, as Ctrl-C does.

    Files in the working directory, which `python -m` searches first, no longer hide modules of Python's or of packages.
    """
    _open_streams()
    with contextlib.suppress(OSError):  # the working directory is gone
        here = "", str(Path.cwd())
        sys.path.sort(key=lambda path: path in here)
    with _termination_unwinds(), _limit_restored():
        yield


def unusable(argv: Sequence[str]) -> str | None:
    """Why a command cannot start, or None.

    Its working directory is gone, which ends libraries without an exception; an argument is not UTF-8; or it is
    `--option=--`, whose value argparse drops.
    """
    try:
        Path.cwd()
    except OSError as error:
        return f"the working directory cannot be read ({error.strerror}): change to another"
    for argument in argv:
        if not argument.isascii():
            try:
                argument.encode()
            except UnicodeEncodeError:
                return f"the argument {argument!a} is not valid UTF-8, or the locale is not UTF-8: set PYTHONUTF8=1"
        if argument.startswith("--") and argument.endswith("=--"):
            return f"{argument[:-3]} is '--', which is not a value"
    return None


_ROOM = 256 << 20
"""Bytes of address space that must be left when libraries have been loaded: threads, buffers, a first tensor."""


def require_address_space(*modules: str) -> None:
    """Import `modules` in a process of its own first if the address space is limited (`ulimit -v`).

    Where memory is short, some libraries end the process while they are loaded instead of raising an exception.

    Raises:
        MaraError: `modules` and a reserve do not fit into the limit.
    """
    if sys.platform == "win32":
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    trial = f"""
import mmap
room = mmap.mmap(-1, {_ROOM}, prot=mmap.PROT_READ)
try:
    import {", ".join(modules)}
except ImportError as error:  # otherwise the command itself reports it
    raise SystemExit("failed to map" in str(error))
"""
    nowhere = subprocess.DEVNULL
    if subprocess.run([sys.executable, "-c", trial], stdin=nowhere, stdout=nowhere, stderr=nowhere).returncode:
        raise MaraError(
            f"the address space is limited to {limit >> 20} MiB (ulimit -v), too little to load PyTorch; raise it"
        )


_GPU_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/etc/nv_tegra_release")
"""One of them exists where NVIDIA's driver does: on a PC, a Jetson (in a container or not), Windows' Linux."""
_KEPT = 1 / 16
"""Of the free memory: for page tables and programs, without which a machine stands still."""


def limit_memory(engine: str, threads: int | None = None) -> None:
    """Before a bundle's graph runs: what this process allocates beyond the memory that is free fails, as `one_line`.

    Otherwise the system would end it, or another process. A driver of GPUs may reserve more than it takes: where there
    is one, only the engine "cpu" is limited.

    engine, threads: as the user asks for them.
    """
    if sys.platform != "linux" or (engine != "cpu" and any(Path(name).exists() for name in _GPU_FILES)):
        return
    free = free_memory()
    if free is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    stacks = (threads or cores()) * (0 if stack == resource.RLIM_INFINITY else stack)  # which stay empty, but count
    limit = allocated_memory() + free - int(free * _KEPT) + stacks
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


@contextlib.contextmanager
def _limit_restored() -> Iterator[None]:
    """At the end, the memory is limited as it was."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def one_line(error: BaseException) -> str | None:
    """The message for an error that the user can do something about; None for a defect of this project."""
    if isinstance(error, (KeyboardInterrupt, Terminated)):
        return "interrupted"
    message = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(words in message.lower() for words in _NO_MEMORY):
        why = "" if isinstance(error, MemoryError) else f" ({first_line(error)})"
        return f"there is not enough memory{why}: mara-memory estimates what a model needs"
    if isinstance(error, MaraError):
        return message
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the package {error.name} is not installed: pip install it, or the extra of mara-deploy that contains it"
        )
    if isinstance(error, ImportError):
        return f"a package is installed but cannot be imported: {first_line(error)}"
    if isinstance(error, OSError) and error.strerror:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"cannot write: {error.strerror}"
        return f"{ascii(str(error.filename))[1:-1]}: {error.strerror}" if error.filename else error.strerror
    return None


def discard_output() -> None:
    """Redirect stdout to nowhere: Python would try to write the rest of the buffer again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _open_streams() -> None:
    """Open closed streams to nowhere, as the next file would get their descriptor; replace letters they cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor: this one
            os.set_inheritable(opened, True)
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(opened, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


_ENDS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Signals that end a process; batch systems announce its end by the last three."""


@contextlib.contextmanager
def ends_deferred(notify: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """The first signal that would end the process asks for an end at the next opportunity; a further one unwinds.

    notify: takes a message for the user. Yields a function that returns whether the end was asked for.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        with contextlib.suppress(OSError, RuntimeError):  # no terminal, or in the middle of another message
            notify("interrupted: finishing the round and saving; interrupt again to stop now with the rounds before it")

    with handled(("SIGINT", *_ENDS), ask):
        yield lambda: asked


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Raise Terminated for signals that would end the process, so that nothing half-written remains."""
    received = False

    def terminate(*_: object) -> None:
        nonlocal received
        if not received:  # a closing terminal sends several, and the cleanup of the first must finish
            received = True
            raise Terminated

    with handled(_ENDS, terminate):
        yield


@contextlib.contextmanager
def handled(names: Sequence[str], handler: Callable[..., None]) -> Iterator[None]:
    """Handle signals, except those that are ignored, as nohup lets SIGHUP be."""
    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers only there
        yield
        return
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    previous = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
