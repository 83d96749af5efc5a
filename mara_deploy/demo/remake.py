"""Remake the whole demo, LM and agent, from nothing: `python -m mara_deploy.demo.remake [--out DIR]`.

It runs the two commands that made what is shipped, one after the other: `python -m mara_deploy.demo.train` and
`mara-train`, both with their default recipes. About ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mara_deploy.commands import train as mara_train
from mara_deploy.commands.shared import Parser, guarded
from mara_deploy.demo import train as demo_lm
from mara_runtime.errors import MaraError, OptionError


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "python -m mara_deploy.demo.remake",
        "Train the demo's LM from scratch, and then its agent (about ten minutes on one CPU core).",
    )
    options.add_argument("--out", default="demo-remade", metavar="DIR", help="folder to write; must be new or empty")
    options.add_argument("--seed", type=int, default=0, metavar="N", help="of both (default 0)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _remake, argv)


def _remake(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if args.seed < 0:
        raise OptionError(f"--seed is {args.seed}; it must be at least 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")
    seed = ["--seed", str(args.seed)]
    if code := demo_lm.main(["--out", str(out / "model"), *seed]):
        sys.exit(code)
    task = ["--model", str(out / "model"), "--prompts", "demo", "--score", "demo", "--recipe", "demo"]
    if code := mara_train.main([*task, "--out", str(out / "agent"), "--threads", "1", *seed]):
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
