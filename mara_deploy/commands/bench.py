"""`mara-bench`: what aligned decoding costs here, compared with plain decoding and with other engines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from mara_deploy.bench.contestant import Contestants, commands
from mara_deploy.bench.measure import PROFILES, Bench
from mara_deploy.commands.decoding import BUNDLE_HELP
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded, print_json
from mara_runtime.bundle import Bundle
from mara_runtime.config import ENGINES
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option, required

EPILOG = """\
Every contestant runs in a process of its own. They take turns, in several sessions with another one started first.
Profiles are measured with synthetic acceptance: real passes of the bundle's graph, with candidates and agent decisions
drawn from a set profile (benchmarks/README.md). Figures are medians, with quartiles in brackets. The last line of the
output is one JSON object.

A peer is any command that speaks the line protocol of mara_deploy/bench/protocol.py; --threads N is appended to it.
benchmarks/peers has ONNX Runtime GenAI, llama.cpp and Hugging Face eager.

examples:
  mara-bench BUNDLE
  mara-bench BUNDLE --measure conversations --conversations 1,4,8
  mara-bench BUNDLE --peer genai="GENAI_ENV/bin/python benchmarks/peers/genai.py MODEL_FOLDER"
"""
MEASURES = ("memory", "steps", "prefill", "width", "profiles", "conversations")
NUMBERS = tuple(range(1, len(PROFILES) + 1))
"""Of the profiles."""
STANDARD_CONTEXTS = (256, 1024, 4096)


@dataclass(frozen=True)
class BenchArguments(Options):
    """What to measure."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    engine: str = option("auto", "engine of the bundle, as in mara-run", choices=("auto", *ENGINES))
    threads: int | None = option(None, "threads of every contestant", least=1, unset="one per physical core")
    context: tuple[int, ...] = option(
        (), "tokens cached before the measured ones", least=1, unset="256, 1024 and 4096, as far as the bundle allows"
    )
    tokens: int = option(96, "tokens decoded per turn", least=2)
    rounds: int = option(9, "turns of each contestant", least=1)
    peer: tuple[str, ...] = option((), "another contestant and the command that starts it", metavar="NAME=COMMAND")
    measure: tuple[str, ...] = option(
        MEASURES,
        "what to measure: " + ", ".join(MEASURES),
        choices=MEASURES,
        metavar="NAME[,NAME…]",
        separator=",",
        unset="all",
    )
    profile: tuple[int, ...] = option(
        (), "number of a synthetic-acceptance profile to measure", choices=NUMBERS, unset="all"
    )
    conversations: tuple[int, ...] = option(
        (), "conversations decoded at once", least=1, metavar="N[,N…]", separator=",", unset="1,4,8"
    )
    quiet: bool = option(False, "print only the JSON line")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile and "profiles" not in self.measure:
            raise OptionError("--profile needs 'profiles' among --measure")
        if self.conversations and "conversations" not in self.measure:
            raise OptionError("--conversations needs 'conversations' among --measure")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-bench", "Compare aligned decoding of a bundle with plain decoding and with other engines.", EPILOG
    )
    add_options(options, BenchArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _bench, argv)


def _bench(args: argparse.Namespace) -> None:
    from mara_deploy.bench.machine import cores, machine

    arguments = from_args(BenchArguments, args)
    bundle = Bundle.open(arguments.bundle)
    contexts = _contexts(arguments, bundle.manifest.max_context)
    threads = arguments.threads or cores()
    contestants = Contestants(
        commands(bundle, arguments.engine, arguments.peer, threads, threads_given=arguments.threads is not None)
    )

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, flush=True)

    bench = Bench(contestants, contexts, arguments.tokens, arguments.rounds, say)
    measures: dict[str, Callable[[], Any]] = {
        "memory": bench.memory,
        "steps": bench.steps,
        "prefill": bench.prefill,
        "width": bench.width,
        "profiles": lambda: [bench.profile(number) for number in arguments.profile or NUMBERS],
        "conversations": lambda: bench.together(arguments.conversations or (1, 4, 8)),
    }
    with closing(contestants):
        about = contestants.open()
        results = {name: measure() for name, measure in measures.items() if name in arguments.measure}
    document = {
        "bundle": {
            "model": bundle.manifest.model.name,
            "precision": bundle.manifest.step.precision,
            "size_bytes": sum(entry.size_bytes for entry in bundle.manifest.files.values()),
        },
        "contestants": about,
        "machine": machine(),
        "threads": threads,
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
        **results,
    }
    print_json(document)


def _contexts(arguments: BenchArguments, capacity: int) -> list[int]:
    """Numbers of tokens before the measured ones, ascending. Raises OptionError."""
    longest = capacity - arguments.tokens - 1  # leaves room for what is decoded
    room = f"{arguments.bundle} has room for {capacity} tokens"
    if longest < 1:
        raise OptionError(f"--tokens is {arguments.tokens}, but {room}, which leaves none for a context")
    for context in arguments.context:
        if context > longest:
            raise OptionError(f"--context is {context}; {room}, which leaves 1 to {longest} for the context")
    standard = [min(c, longest) for c in STANDARD_CONTEXTS if c <= capacity]
    return sorted({*(arguments.context or standard or [longest])})


if __name__ == "__main__":
    sys.exit(main())
