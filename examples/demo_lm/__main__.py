"""Remake the whole demo, LM and agent, from scratch: `python -m examples.demo_lm [--out DIR]`.

Runs the two commands that produced what mara_deploy/demo contains, with their default recipes:
`python -m examples.demo_lm.train` and `mara-train`. Takes about ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.demo_lm import train as demo_lm
from mara_deploy.commands import train as mara_train
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.errors import MaraError
from mara_runtime.options import Options, option


@dataclass(frozen=True)
class RemakeArguments(Options):
    """Where to write the demo."""

    out: Path = option(Path("demo-remade"), "folder to write; must be new or empty", metavar="DIR")
    seed: int = option(0, "random seed of LM and agent", least=0)


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "python -m examples.demo_lm",
        "Train the demo's LM from scratch, and then its agent (about ten minutes on one CPU core).",
    )
    add_options(options, RemakeArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _remake, argv)


def _remake(args: argparse.Namespace) -> None:
    options = from_args(RemakeArguments, args)
    out, seed = options.out, ["--seed", str(options.seed)]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")
    if code := demo_lm.main(["--out", str(out / "model"), *seed]):
        sys.exit(code)
    task = ["--model", str(out / "model"), "--prompts", "demo", "--score", "demo", "--recipe", "demo"]
    if code := mara_train.main([*task, "--out", str(out / "agent"), "--threads", "1", *seed]):
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
