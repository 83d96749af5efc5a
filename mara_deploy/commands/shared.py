"""What all commands share: one-line errors with exit code 2, and the options of decoding."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from mara_runtime.config import ENGINES, FALLBACKS, ORDERS, SCHEDULES, STRATEGIES, DecodeConfig
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import Manifest

EXIT_BAD_INPUT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mara_runtime.versions import installed

        print(f"{parser.prog} (mara-deploy {installed('mara-deploy')['mara-deploy']})")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which every command gives `--debug`."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.add_argument("--version", action=_Version, help="show the version, and leave")

    def error(self, message: str) -> NoReturn:
        """Print one line and leave."""
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def guarded(parser: Parser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parse, run, and turn what the user can mend into one line on stderr and exit code 2."""
    args = parser.parse_args(argv)
    try:
        with _termination_unwinds():
            body(args)
            if sys.stdout is not None:
                sys.stdout.flush()
    except (MaraError, KeyboardInterrupt, Terminated, OSError) as error:
        if args.debug or (isinstance(error, OSError) and error.errno not in (*_FULL, errno.EPIPE)):
            raise
        if isinstance(error, OSError):
            _drop_output()
        if isinstance(error, BrokenPipeError):  # the reader has left, as `head` does
            sys.stderr.close()
            return EXIT_BAD_INPUT
        if isinstance(error, MaraError):
            message = " ".join(str(error).split())
        else:
            message = f"cannot write: {error.strerror}" if isinstance(error, OSError) else "interrupted"
        with contextlib.suppress(OSError):  # the terminal is gone
            print(f"{parser.prog}: error: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


def _drop_output() -> None:
    """What is left of the output cannot be written; Python would try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Terminated(BaseException):
    """SIGTERM or SIGHUP came: like Ctrl-C, but nothing goes on afterwards."""


@contextlib.contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP unless it is ignored, unwind as Ctrl-C does: nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return

    came = False

    def terminate(*_: object) -> None:
        nonlocal came
        if not came:  # a terminal that closes sends several, and the first one's unwinding must end
            came = True
            raise Terminated

    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that opens a bundle to decode."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        default="auto",
        metavar="NAME",
        help=f"one of auto, {', '.join(ENGINES)} (default auto: the best that bundle and machine have)",
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads of a CPU engine (default: one a physical core)"
    )
    group.add_argument(
        "--no-verify", action="store_true", help="do not compare the bundle's files with their checksums first"
    )


def add_decode_options(parser: argparse.ArgumentParser, plain: bool = True) -> None:
    """Options that make a DecodeConfig. plain: also those of decoding without the agent."""
    default = DecodeConfig()
    group = parser.add_argument_group("decoding")

    def add(flag: str, kind: type, value: object, text: str, choices: Sequence[str] | None = None) -> None:
        group.add_argument(
            flag,
            type=kind,
            default=value,
            metavar=None if choices else "N" if kind is int else "X",
            choices=choices,
            help=text + ("" if value is None else f" (default {value})"),
        )

    add("--max-new-tokens", int, default.max_new_tokens, "tokens to emit at most")
    add("--top-k", int, default.top_k, "candidates of a position at most")
    add("--top-p", float, default.top_p, "nucleus of the candidates, applied after --top-k")
    add("--strategy", str, default.strategy, "which accepted candidate is emitted", STRATEGIES)
    add("--order", str, default.order, "order in which candidates are examined", ORDERS)
    add("--fallback", str, None, "emitted when all are rejected (default: what the agent records)", FALLBACKS)
    add(
        "--threshold",
        float,
        default.threshold,
        "a candidate is accepted when its margin exceeds this; write a negative one as --threshold=-1e-3",
    )
    add("--schedule", str, default.schedule, "how candidates share passes; the result is the same", SCHEDULES)
    add("--draft", int, None, "tokens guessed from repetitions, verified in the same pass (default: as many as pay)")
    add("--seed", int, default.seed, "of --strategy random and of " + ("--sample" if plain else "sampling"))
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer at this text (may be repeated)"
    )
    if not plain:
        parser.set_defaults(no_align=False, sample=False, temperature=default.temperature)
        return
    group.add_argument("--no-align", action="store_true", help="plain decoding: the LLM alone, greedy")
    group.add_argument("--sample", action="store_true", help="with --no-align: sample instead of greedy")
    add("--temperature", float, default.temperature, "of --sample, applied after --top-k and --top-p")


def add_template_option(parser: argparse.ArgumentParser) -> None:
    """`--template`, read by `template_variables`."""
    parser.add_argument(
        "--template",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="a variable for the chat template, as enable_thinking=false (may be repeated)",
    )


def template_variables(settings: Sequence[str]) -> dict[str, Any]:
    """The values of `--template` by key. Raises OptionError."""
    variables = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        try:
            variables[key] = json.loads(value)
        except ValueError:
            sign = ""
        if not key or not sign:
            raise OptionError(
                f"--template is {setting!r}; it must be KEY=JSON, as in enable_thinking=false or 'name=\"text\"'"
            )
    return variables


def decode_config(args: argparse.Namespace) -> DecodeConfig:
    """The options of `add_decode_options` as a DecodeConfig. Raises OptionError, also for what would be ignored."""
    default = DecodeConfig()
    if args.no_align:
        for name in ("strategy", "order", "fallback", "threshold"):
            if (value := getattr(args, name)) != getattr(default, name):
                raise OptionError(f"--{name} is {value}, but --no-align asks no agent; leave one of them out")
    if args.draft and (args.sample or args.strategy != default.strategy or args.order != default.order):
        raise OptionError(
            f"--draft is {args.draft}, but only greedy decoding and top1 in ranked order draft; leave it out"
        )
    return DecodeConfig(
        align=not args.no_align,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        strategy=args.strategy,
        order=args.order,
        fallback=args.fallback,
        threshold=args.threshold,
        schedule=args.schedule,
        draft=args.draft,
        sample=args.sample,
        temperature=args.temperature,
        seed=args.seed,
        stop=tuple(args.stop),
    )


def prompt_options(manifest: Manifest) -> str:
    """What `mara-run` needs besides a bundle, as an example."""
    prompt = "--input-ids 1,2,3" if manifest.tokenizer is None else '--prompt "…"'
    few = manifest.max_candidates < DecodeConfig().top_k
    return f"{prompt} --top-k {manifest.max_candidates}" if few else prompt
