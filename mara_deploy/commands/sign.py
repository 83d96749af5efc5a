"""`mara-sign`: sign a bundle, so that others can check who made it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mara_deploy.commands.decoding import BUNDLE_HELP
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option
from mara_runtime.signature import SIGNATURE_FILE, new_key, sign

EPILOG = """\
examples:
  mara-sign --new-key mine.pem
  mara-sign BUNDLE --key mine.pem
  mara-run BUNDLE --require-signature mine.pem.pub --prompt "How do I cook rice?"

Keep mine.pem to yourself, and give mine.pem.pub to those who check. Keys are Ed25519 keys in PEM form, as of
OpenSSL. mara-build and mara-agent change the manifest: sign the bundle again afterwards.
"""


@dataclass(frozen=True)
class SignArguments(Options):
    """What to sign."""

    bundle: str = option("", BUNDLE_HELP, metavar="BUNDLE", positional=True)
    key: Path | None = option(None, "private key that signs", metavar="FILE")
    new_key: Path | None = option(None, "make a private key, and beside it FILE.pub, the public one", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_key is None and not (self.bundle and self.key):
            raise OptionError("nothing is to be done: give BUNDLE and --key, or --new-key")
        if self.new_key is not None and (self.bundle or self.key):
            raise OptionError("--new-key makes a key and signs nothing: leave out BUNDLE and --key")


def parser() -> Parser:
    """The command's options."""
    options = Parser("mara-sign", "Sign a bundle, so that others can check who made it.", EPILOG)
    add_options(options, SignArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _sign, argv)


def _sign(args: argparse.Namespace) -> None:
    arguments = from_args(SignArguments, args)
    if arguments.new_key is not None:
        print(f"wrote {arguments.new_key} and {new_key(arguments.new_key)}")
        return
    assert arguments.key is not None
    folder = Bundle.open(arguments.bundle).folder
    sign(folder, arguments.key)
    print(f"wrote {folder / SIGNATURE_FILE}")


if __name__ == "__main__":
    sys.exit(main())
