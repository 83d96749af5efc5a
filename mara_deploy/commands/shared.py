"""The frame of every command: parse, run, report errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from mara_deploy.commands import process
from mara_runtime.errors import MaraError
from mara_runtime.versions import installed

EXIT_BAD_INPUT = 2


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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take `--prompt -hello` for `--prompt=-hello`: argparse takes what begins with a dash for an option."""
        joined: list[str] = []
        for word in args:
            before = self._option_string_actions.get(joined[-1]) if joined else None
            takes_it = before is not None and before.nargs is None and re.match("-[^-]", word)
            if takes_it and word not in self._option_string_actions:
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        """Print one line and exit."""
        if found := re.fullmatch(r"argument (\S+): expected one argument", message):
            message = f"{found[1]} has no value; one that begins with dashes is given as {found[1]}=--…"
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def guarded(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse and run `body`; return the exit code. Errors the user can fix are one line on stderr and exit code 2."""
    with process.prepared():
        debug = False
        try:
            given = sys.argv[1:] if argv is None else argv
            if reason := process.unusable(given):
                parser.error(reason)
            args = parser.parse_args(given)
            debug = args.debug
            body(args)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has exited, as `head` does
            if debug:
                raise
            process.discard_output()
            sys.stderr.close()
            return EXIT_BAD_INPUT
        except (Exception, KeyboardInterrupt, process.Terminated) as error:
            message = process.one_line(error)
            if debug or message is None:
                raise
            if isinstance(error, OSError):
                process.discard_output()
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"{parser.prog}: error: {message}", file=sys.stderr)
            return EXIT_BAD_INPUT
    return 0


def print_json(value: object) -> None:
    """Print a line of JSON, with escapes where the stream cannot show a letter."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8))


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Report an absent package as one that `purpose` needs, or too little memory for it. extra: of pyproject.toml."""
    try:
        process.require_address_space("torch", "mara_export.export")
        yield
    except ModuleNotFoundError as error:
        raise MaraError(
            f"{purpose} needs packages that are not installed ({error}): pip install 'mara-deploy[{extra}]'"
        ) from None
