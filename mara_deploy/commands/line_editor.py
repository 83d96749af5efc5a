"""Lines typed on a terminal: editing, history and completion where Python has readline, and messages of several lines.

The history is a file of the user's, readable by nobody else: a line per message, as JSON, so that one of several lines
stays one. Several programs may append to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mara_runtime.files import read_file

MOST_ENTRIES, MOST_LETTERS = 1000, 10_000
"""Of the history: messages, and letters of one that is kept."""
_MOST_BYTES = 1 << 26
Complete = Callable[[str, str], Sequence[str]]
"""What a word may become, by the line before it and its beginning."""


def history_file(name: str) -> Path:
    """`$XDG_STATE_HOME/mara-deploy/NAME` or `~/.local/state/mara-deploy/NAME`.

    Raises RuntimeError for a user without a home folder.
    """
    root = os.environ.get("XDG_STATE_HOME")
    return (Path(root) if root else Path.home() / ".local" / "state") / "mara-deploy" / name


class LineEditor:
    """Reads messages from the terminal. history: its file; None: none is kept. complete: asked at the Tab key.

    Without readline, or where standard output is no terminal, lines are read as the terminal edits them.
    """

    def __init__(self, history: Path | None, complete: Complete) -> None:
        self._readline = _readline() if sys.stdout.isatty() else None
        self._path, self._last = history, ""
        if self._readline is not None:
            self._set_up(self._readline, complete)

    def read(self, prompt: str) -> str:
        """The next message: a line, with those after it as long as they end with a backslash, or what was pasted.

        Raises EOFError at the end of input, and UnicodeDecodeError.
        """
        lines = [_input(prompt)]
        while (len(lines[-1]) - len(lines[-1].rstrip("\\"))) % 2:
            lines[-1] = lines[-1][:-1]
            lines.append(_input("... "))
        message = "\n".join(lines).strip("\n")
        if self._readline is not None and message.strip() and message != self._last:
            self._last = message
            self._readline.add_history(message)
            self._append(message)
        return message

    def _set_up(self, readline: Any, complete: Complete) -> None:
        emulated = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if emulated else "tab: complete")
        if not emulated and os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_completer_delims(" \t\n")
        readline.set_auto_history(False)
        readline.set_completer(_Completer(readline, complete))
        for message in self._load():
            with contextlib.suppress(ValueError):  # a letter that the terminal cannot show
                readline.add_history(message)
            self._last = message

    def _load(self) -> list[str]:
        """The messages of the file, which is shortened to them."""
        if self._path is None:
            return []
        messages = []
        with contextlib.suppress(OSError):
            for line in read_file(self._path, _MOST_BYTES).splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    if isinstance(message := json.loads(line), str):
                        messages.append(message)
            if len(messages) > MOST_ENTRIES:
                messages = messages[-MOST_ENTRIES:]
                self._write("".join(json.dumps(message) + "\n" for message in messages), os.O_TRUNC)
        return messages

    def _append(self, message: str) -> None:
        if self._path is not None and len(message) <= MOST_LETTERS:
            try:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._write(json.dumps(message) + "\n", os.O_APPEND)
            except OSError:
                self._path = None

    def _write(self, text: str, how: int) -> None:
        assert self._path is not None
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            os.fchmod(handle, 0o600)
            file.write(text)


def _readline() -> Any:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _input(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # standard output is for the answers
    return input()


class _Completer:
    """What readline asks for the completions of a word, one at a time."""

    def __init__(self, readline: Any, complete: Complete) -> None:
        self._readline, self._complete = readline, complete
        self._found: list[str] = []

    def __call__(self, word: str, state: int) -> str | None:
        if state == 0:
            before = self._readline.get_line_buffer()[: self._readline.get_begidx()]
            self._found = list(self._complete(before, word))
        return self._found[state] if state < len(self._found) else None
