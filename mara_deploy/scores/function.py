"""A Python function as a score, in a process of its own.

Whatever the function does to its process, such as leaving it, changing the working directory, printing, or replacing
signal handlers, modules or random states, does not reach the run. The process reads and writes one JSON object a line:

    {"spec": "my_scores:politeness"}                  {"name": "…", "fingerprint": "…", "columns": ["reference"]}
    {"prompts": […], "answers": […], "columns": {"reference": […]}}
                                                      {"values": […]}

and answers with `{"error": "one line", "transient": false}` what fails. It ends when its input does.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from json import dumps, loads
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from mara_deploy.scores.base import ScoreError, checked_values, failure
from mara_runtime.errors import MaraError

_START = "import sys; sys.path[:] = sys.argv[1:]; from mara_deploy.scores.function import serve; serve()"
"""Python has imported almost nothing by then: no file beside the run can take the place of a module of Python's."""
_OPTIONAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_GRACE_SECONDS = 2.0
"""For what the function's module does at the end of its process."""


class FunctionScore:
    """A Python callable (prompts, answers, **columns) → floats, in this process.

    Parameters after the first two that have no default are the names of the columns that it reads.
    fingerprint: of its code. Raises ScoreError for one that cannot be called so.
    """

    def __init__(self, name: str, function: Callable[..., Any], fingerprint: str = "unknown") -> None:
        self.name, self.fingerprint = name, fingerprint
        self.columns = _columns(name, function)
        self._function = function

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], **columns: Sequence[Any]) -> Any:
        """What the function returns, or raises."""
        return self._function(list(prompts), list(answers), **{name: list(values) for name, values in columns.items()})


class IsolatedScore:
    """A Python function of a module, in a process of its own. spec: see `load_function`. Raises ScoreError."""

    def __init__(self, spec: str) -> None:
        self.name = spec
        here = str(Path.cwd())
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *(path for path in sys.path if path not in ("", here)), here],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the run, which ends this process if it ends
        )
        self._end = weakref.finalize(self, _end, self._process)
        about = self._ask({"spec": spec})
        self.name, self.fingerprint = str(about["name"]), str(about["fingerprint"])
        self.columns = tuple(about["columns"])

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """See `Score`."""
        reply = self._ask({"prompts": list(prompts), "answers": list(answers), "columns": columns})
        values: list[float] = reply["values"]
        return values

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        requests: IO[bytes] = self._process.stdin  # type: ignore[assignment]
        replies: IO[bytes] = self._process.stdout  # type: ignore[assignment]
        try:
            requests.write(dumps(request).encode() + b"\n")
            requests.flush()
            line = replies.readline()
        except OSError:
            line = b""
        except BaseException:  # Ctrl-C between a request and its answer
            self._process.kill()
            raise
        if not line:
            code = self._process.wait()
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise ScoreError(f"the score {self.name} ended its process, with {how}")
        reply: dict[str, Any] = loads(line)
        if "error" in reply:
            error = ScoreError(reply["error"])
            error.transient = reply["transient"]
            raise error
        return reply


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        with suppress(OSError):
            stream.close()  # type: ignore[union-attr]
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ── in the process ───────────────────────────────────────────────────────────────────────────────────────────────────


def serve() -> None:
    """Answer the requests on stdin, until it ends."""
    del sys.argv[1:]
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints does not belong to the results
    received: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, received), daemon=True).start()
    score = None
    while line := received.get():
        request = loads(line)
        try:
            if score is None:
                score = load_function(**request)
                reply: dict[str, Any] = {key: getattr(score, key) for key in ("name", "fingerprint", "columns")}
            else:
                reply = {"values": checked_values(score.name, score, **request)}
        except MaraError as error:
            reply = {"error": str(error), "transient": getattr(error, "transient", False)}
        except BaseException as error:  # also its KeyboardInterrupt: that of a terminal does not come here
            failed = failure(f"the score {score.name if score else request['spec']} failed", error)
            reply = {"error": str(failed), "transient": failed.transient}
        try:
            print(dumps(reply), file=replies, flush=True)
        except OSError:  # the run has ended, or the function has closed our files
            os._exit(1)


def _receive(requests: IO[bytes], received: queue.SimpleQueue[bytes]) -> None:
    """Pass on the requests; when there are no more, as the run has ended, end even a call that does not."""
    with suppress(OSError):
        for line in requests:
            received.put(line)
    received.put(b"")
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


def load_function(spec: str) -> FunctionScore:
    """Import a function, into this process.

    spec: `MODULE:FUNCTION` or `FILE.py:FUNCTION`. The module's file may be in the working directory, with the name of
    one of Python's modules or of a package too, and finds the modules beside it. Raises ScoreError.
    """
    module, _, function = spec.rpartition(":")
    by_path = module.endswith(".py")
    file = Path(module if by_path else f"{module}.py").expanduser()
    if by_path and not file.is_file():
        raise ScoreError(f"the score {spec} cannot be loaded: there is no file {file}")
    name = f"{file.name}:{function}" if by_path else spec
    try:
        loaded = _import_file(file.resolve()) if file.is_file() else importlib.import_module(module)
    except BaseException as error:  # a module of others can raise anything
        raise failure(f"the score {name} cannot be loaded: it fails", error) from error
    if not hasattr(loaded, function):
        raise ScoreError(f"the score {name} cannot be loaded: {module} has no function {function!r}")
    found = getattr(loaded, function)
    if not callable(found):
        raise ScoreError(
            f"the score {name} cannot be loaded: {function!r} in {module} is of type {type(found).__name__}, not a "
            "function of prompts and answers"
        )
    code = getattr(loaded, "__file__", None)
    return FunctionScore(name, found, hashlib.sha256(Path(code).read_bytes()).hexdigest()[:16] if code else "built in")


def _import_file(file: Path) -> ModuleType:
    """The module of a file, under another name if others may need that of the file for theirs."""
    name, folder = file.stem, str(file.parent)
    others = [path for path in sys.path if path != folder]
    taken = "." in name or name in sys.stdlib_module_names or PathFinder.find_spec(name, others) is not None
    if folder not in sys.path:
        sys.path.append(folder)
    if not taken:
        return importlib.import_module(name)
    spec = spec_from_file_location(f"{name.replace('.', '_')}_score", file)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _columns(name: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """The columns that a function reads. Raises ScoreError for one that cannot be called with prompts and answers."""
    for code in (function, getattr(function, "__call__", None)):  # noqa: B004 - that of an object
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise ScoreError(f"the score {name} is an `async def`: write a `def`, and await with asyncio.run in it")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some built-in functions
        return ()
    try:
        bound = signature.bind_partial([], [])
        others = [each for key, each in signature.parameters.items() if key not in bound.arguments]
        columns = tuple(each.name for each in others if each.default is each.empty and each.kind not in _OPTIONAL)
        signature.bind([], [], **dict.fromkeys(columns))
    except TypeError as error:
        raise ScoreError(f"the score {name} cannot be called with prompts and answers: {error}") from None
    return columns
