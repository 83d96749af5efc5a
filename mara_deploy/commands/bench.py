"""`mara-bench`: what aligned decoding costs here, against plain decoding and against the peers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from mara_deploy.bench.contestant import Contestants, commands
from mara_deploy.bench.measure import PROFILES, Bench
from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError

EPILOG = """\
Every contestant runs in a process of its own, and they take turns, in several sittings with another one started first.
The instrument: real passes of the bundle's graph, whose candidates and verdicts follow a set profile (docs:
benchmarks/README.md). Figures are medians; in brackets the quartiles. The last line of the output is one JSON object.

examples:
  mara-bench BUNDLE
  mara-bench BUNDLE --peer genai=GENAI_ENV/bin/python:MODEL_FOLDER --peer hugging-face=CHECKPOINT_FOLDER
"""
MEASURES = ("memory", "steps", "prefill", "width", "profiles")
NUMBERS = range(1, len(PROFILES) + 1)
"""Of the profiles."""
STANDARD_CONTEXTS = (256, 1024, 4096)


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-bench", "Measure aligned decoding of a bundle against plain decoding and against peers.", EPILOG
    )
    options.add_argument("bundle", metavar="BUNDLE", help="folder made by mara-export")
    options.add_argument("--engine", default="auto", metavar="NAME", help="as of mara-run (default auto)")
    options.add_argument("--threads", type=int, metavar="N", help="of every contestant (default: one a core)")
    options.add_argument(
        "--context",
        type=int,
        action="append",
        metavar="N",
        help="tokens before the measured ones (may be repeated; default 256, 1024 and 4096, as the capacity allows)",
    )
    options.add_argument("--tokens", type=int, default=96, metavar="N", help="decoded at a time (default 96)")
    options.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each contestant (default 9)")
    options.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="genai=PYTHON:FOLDER, llama.cpp=PYTHON:FILE (in environments of their own) or hugging-face=FOLDER (eager, "
        "float32); may be repeated",
    )
    options.add_argument(
        "--measure",
        default=",".join(MEASURES),
        metavar="NAMES",
        help=f"what to measure, separated by commas (default {','.join(MEASURES)})",
    )
    options.add_argument(
        "--profile",
        type=int,
        action="append",
        choices=NUMBERS,
        help="number of an instrument to measure (may be repeated; default all)",
    )
    options.add_argument("--quiet", action="store_true", help="print the JSON line alone")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _bench, argv)


def _bench(args: argparse.Namespace) -> None:
    from mara_deploy.bench.machine import cores, machine

    wanted = _wanted(args)
    bundle = Bundle.open(args.bundle)
    contexts = _contexts(args, bundle.manifest.max_context)
    threads = args.threads or cores()
    contestants = Contestants(commands(bundle, args.engine, args.peer, threads, asked=args.threads is not None))

    def say(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    bench = Bench(contestants, contexts, args.tokens, args.rounds, say)
    measures: dict[str, Callable[[], Any]] = {
        "memory": bench.memory,
        "steps": bench.steps,
        "prefill": bench.prefill,
        "width": bench.width,
        "profiles": lambda: [bench.profile(number) for number in args.profile or NUMBERS],
    }
    with closing(contestants):
        about = contestants.open()
        results = {name: measure() for name, measure in measures.items() if name in wanted}
    document = {
        "bundle": {
            "model": bundle.manifest.model.source,
            "precision": bundle.manifest.step.precision,
            "size_bytes": sum(entry.size_bytes for entry in bundle.manifest.files.values()),
        },
        "contestants": about,
        "machine": machine(),
        "threads": threads,
        "tokens": args.tokens,
        "rounds": args.rounds,
        **results,
    }
    print(json.dumps(document))


def _wanted(args: argparse.Namespace) -> list[str]:
    """What to measure. Raises OptionError, also for other options that cannot be right for any bundle."""
    wanted: list[str] = args.measure.split(",")
    if args.rounds < 1 or args.tokens < 2:
        raise OptionError("--rounds must be at least 1, --tokens at least 2")
    if unknown := sorted(set(wanted) - set(MEASURES)):
        raise OptionError(f"--measure names {unknown[0]!r}; it must be among {', '.join(MEASURES)}")
    if args.profile and "profiles" not in wanted:
        raise OptionError("--profile needs 'profiles' among --measure")
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads is {args.threads}; it must be at least 1")
    return wanted


def _contexts(args: argparse.Namespace, capacity: int) -> list[int]:
    """Numbers of tokens before the measured ones, ascending. Raises OptionError."""
    longest = capacity - args.tokens - 1  # leaves room for what is decoded
    if longest < 1:
        raise OptionError(f"{args.bundle} holds {capacity} tokens; --tokens {args.tokens} leaves no context")
    for context in args.context or []:
        if not 1 <= context <= longest:
            raise OptionError(
                f"--context is {context}; {args.bundle} holds {capacity} tokens, which leaves 1 to {longest}"
            )
    standard = [min(c, longest) for c in STANDARD_CONTEXTS if c <= capacity]
    return sorted({*(args.context or standard or [longest])})


if __name__ == "__main__":
    sys.exit(main())
