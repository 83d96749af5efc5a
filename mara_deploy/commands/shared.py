"""The frame of every command: parse, run, report errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from mara_deploy.commands import process
from mara_runtime.errors import MaraError
from mara_runtime.signature import SIGNATURE_FILE
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_runtime.bundle import Bundle

EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, --debug and --version."""

    def __init__(self, prog: str, description: str, epilog: str | None = None, **details: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **details,
        )
        self.commands: dict[str, Parser] = {}
        """parsers of what follows the name of a command within this one"""
        self._adder: Any = None
        self._reports_as = prog
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        version = f"%(prog)s (mara-deploy {installed('mara-deploy')['mara-deploy']})"
        self.add_argument("--version", action="version", version=version, help="show the version and exit")

    def add_command(self, name: str, description: str) -> Parser:
        """A command within this one, whose name becomes `args.command`: the parser of its own options."""
        if self._adder is None:
            self._adder = self.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
        added: Parser = self._adder.add_parser(name, description=description, help=description)
        added._reports_as = self.prog
        self.commands[name] = added
        return added

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
        self.exit(EXIT_BAD_INPUT, f"{self._reports_as}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def guarded(parser: Parser, body: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None) -> int:
    """Parse and run `body`; return its exit code. Errors the user can fix are one line on stderr and exit code 2."""
    with process.prepared():
        debug = False
        try:
            given = sys.argv[1:] if argv is None else argv
            if reason := process.unusable(given):
                parser.error(reason)
            args = parser.parse_args(given)
            debug = getattr(args, "debug", False)
            code = body(args)
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
    return code or 0


def print_json(value: object) -> None:
    """Print a line of JSON, with escapes where the stream cannot show a letter."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not utf8))


def note_signature(prog: str, bundle: Bundle) -> None:
    """Say on stderr that a signed bundle, whose manifest has just changed, is to be signed again."""
    if (bundle.folder / SIGNATURE_FILE).exists():
        print(f"{prog}: the bundle's signature no longer holds: sign it again with mara-sign", file=sys.stderr)


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
