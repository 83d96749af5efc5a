"""`mara-run`: aligned text from a bundle, without PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mara_deploy.commands.shared import (
    Parser,
    add_decode_options,
    add_engine_options,
    add_template_option,
    decode_config,
    guarded,
    template_variables,
)
from mara_runtime.errors import MaraError, OptionError, PromptError

if TYPE_CHECKING:
    from mara_runtime.config import DecodeConfig
    from mara_runtime.decoder import AlignedDecoder, Generation, Piece, Prompt

EPILOG = """\
Without --prompt and --input-ids: a chat on a terminal, else the prompt is read from standard input.

examples:
  mara-run BUNDLE --prompt "How do I cook rice?"
  mara-run BUNDLE --prompt "How do I cook rice?" --no-align
  echo "How do I cook rice?" | mara-run BUNDLE --json
"""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-run", "Decode text with a bundle's LLM, each token accepted or rejected by its agent.", EPILOG
    )
    options.add_argument("bundle", metavar="BUNDLE", help="folder made by mara-export")
    prompt = options.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="a user message, put through the bundle's chat template")
    prompt.add_argument("--input-ids", metavar="1,2,3", help="token ids, taken as they are")
    options.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    add_template_option(options)
    options.add_argument("--raw", action="store_true", help="take the prompt as plain text, without the chat template")
    options.add_argument(
        "--json", action="store_true", help="print one JSON object: token_ids, text, finish_reason, stats"
    )
    options.add_argument(
        "--trace", metavar="FILE", help="write a JSON line a token: candidates, probabilities, margins"
    )
    add_decode_options(options)
    add_engine_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _run, argv)


def _run(args: argparse.Namespace) -> None:
    config = decode_config(args)
    variables = template_variables(args.template)
    if variables and (args.raw or args.input_ids is not None):
        raise OptionError("--template needs the chat template: leave out --raw and --input-ids")
    if args.system is not None and (args.raw or args.input_ids is not None):
        raise OptionError("--system needs the chat template: leave out --raw and --input-ids")
    chat = args.prompt is None and args.input_ids is None and sys.stdin is not None and sys.stdin.isatty()
    if chat and (args.json or args.raw):
        raise OptionError("--json and --raw answer one prompt: give it with --prompt, --input-ids or on standard input")
    prompt = None if chat else _prompt(args)

    from mara_runtime.decoder import AlignedDecoder

    decoder = AlignedDecoder(
        args.bundle,
        engine=args.engine,
        threads=args.threads,
        verify=not args.no_verify,
        report=lambda what: print(f"mara-run: {what}", file=sys.stderr) if sys.stderr.isatty() else None,
    )
    if not args.json:
        _announce(decoder, config)
    with _tracer(args.trace, decoder) as trace:
        if prompt is None:
            if decoder.text_side is None or not decoder.text_side.has_template:
                raise OptionError(f"{args.bundle} has no chat template: give --input-ids, or --prompt with --raw")
            _chat(decoder, config, args.system, variables, trace)
        elif args.json:
            result = _answer(decoder.stream(prompt, config, raw=args.raw, template=variables), trace)
            utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
            print(json.dumps(result.to_json(), ensure_ascii=not utf8))
        else:
            result = _answer(decoder.stream(prompt, config, raw=args.raw, template=variables), trace, echo=True)
            if result.text is None:
                print(",".join(map(str, result.token_ids)), end="")
            print(flush=True)
            print(_counters(result), file=sys.stderr)


def _prompt(args: argparse.Namespace) -> Prompt:
    if args.input_ids is not None:
        try:
            return [int(part) for part in args.input_ids.split(",")]
        except ValueError:
            raise OptionError(f"--input-ids is {args.input_ids!r}; it must be whole numbers, as in 1,2,3") from None
    if args.prompt is None and sys.stdin is None:
        raise PromptError("there is no prompt: give --prompt or --input-ids, as standard input is closed")
    try:
        text: str = sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt
    except UnicodeDecodeError as error:
        raise PromptError(f"standard input is not UTF-8 text: {error}") from None
    return text if args.system is None else _with_system(args.system, [{"role": "user", "content": text}])


def _with_system(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _announce(decoder: AlignedDecoder, config: DecodeConfig) -> None:
    engine = decoder.engine.describe()
    facts = [engine[key] for key in ("version", "gpu", "lowering", "precision") if key in engine]
    if "threads" in engine:
        facts.append(f"{engine['threads'] or 'default'} threads")
    print(f"engine {engine['name']} ({', '.join(facts)})", file=sys.stderr)
    for name, reason in decoder.declined.items():
        if name in decoder.bundle.manifest.targets:  # of the others nobody expects anything
            print(f"engine {name} declined: {reason}", file=sys.stderr)
    if config.align:
        agent = decoder.bundle.manifest.agent
        fallback = config.fallback or agent.fallback
        print(f"agent {agent.source}, fallback {fallback}", file=sys.stderr)


def _answer(pieces: Iterator[Piece], trace: Tracer, echo: bool = False) -> Generation:
    """Run a generation to its end, printing its text as it comes."""
    result, open_line = None, False
    try:
        for piece in pieces:
            trace(piece)
            if echo:
                print(piece.text, end="", flush=True)
                open_line = open_line or bool(piece.text)
            result = piece.result
    finally:
        if open_line and result is None:  # what went wrong is said on a line of its own
            print(flush=True)
    assert result is not None  # the last piece carries it
    return result


def _chat(
    decoder: AlignedDecoder, config: DecodeConfig, system: str | None, variables: dict[str, Any], trace: Tracer
) -> None:
    """A conversation on the terminal; the end of input leaves it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing for input()

    print("chat: an empty line starts over, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # what was typed is taken back
            print()
            continue
        if not text.strip():
            messages = []
            print("(new conversation)", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": text})
        try:
            whole = _with_system(system, messages)
            result = _answer(decoder.stream(whole, config, template=variables), trace, echo=True)
        except (MaraError, KeyboardInterrupt) as error:  # neither ends the session
            messages.pop()
            why = f"error: {error}" if isinstance(error, MaraError) else "(stopped; your message is taken back)"
            print(f"\n{why}", file=sys.stderr)
            continue
        print(flush=True)
        print(_counters(result), file=sys.stderr)
        messages.append({"role": "assistant", "content": result.text or ""})


def _counters(result: Generation) -> str:
    s = result.stats
    parts = [f"{s.tokens} token{'s' * (s.tokens != 1)}"]
    if s.tokens_per_second:
        parts.append(f"{s.tokens_per_second:.1f} tokens/s")
    if result.config.align:
        ranks = ", ".join(f"{n}× rank {rank}" for rank, n in sorted(s.accepted_rank.items()))
        parts += [
            f"{s.decisions} decisions ({ranks}{', ' if ranks else ''}{s.forced}× all rejected)",
            f"{s.examined} candidates examined",
        ]
    parts.append(f"{s.forwards} passes of {s.rows} rows")
    if s.drafted:
        parts.append(f"{s.confirmed} of {s.drafted} guessed tokens confirmed")
    parts.append(f"ended by {result.finish_reason}")
    return "[" + "; ".join(parts) + "]"


class Tracer:
    """Writes what was decided at each position; nothing without a file."""

    def __init__(self, file: TextIO | None, decoder: AlignedDecoder) -> None:
        self._file, self._side = file, decoder.text_side

    def __call__(self, piece: Piece) -> None:
        """One JSON line."""
        if self._file is None:
            return
        step = piece.step
        record = {
            "position": step.position,
            **self._token(step.token),
            "rank": step.rank,
            "forced": step.forced,
            "drafted": step.drafted,
            "candidates": [
                {
                    "rank": rank,
                    **self._token(int(token)),
                    "probability": round(float(probability), 6),
                    "log_probability": round(float(log_probability), 6),
                    "margin": step.margins.get(rank),
                }
                for rank, (token, probability, log_probability) in enumerate(
                    zip(
                        step.candidates.ids,
                        step.candidates.probabilities,
                        step.candidates.log_probabilities,
                        strict=True,
                    ),
                    start=1,
                )
            ],
        }
        try:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()  # so that a full disk is noticed here, and a reader sees the line
        except OSError as error:
            raise OptionError(f"--trace cannot write {self._file.name}: {error.strerror}") from None

    def _token(self, token: int) -> dict[str, Any]:
        if self._side is None:
            return {"token": token}
        return {"token": token, "text": self._side.tokenizer.decode([token], skip_special_tokens=False)}


@contextlib.contextmanager
def _tracer(path: str | None, decoder: AlignedDecoder) -> Iterator[Tracer]:
    if path is None:
        yield Tracer(None, decoder)
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - closed below
    except OSError as error:
        raise OptionError(f"--trace cannot write {path}: {error.strerror}") from None
    try:
        yield Tracer(file, decoder)
    finally:
        with contextlib.suppress(OSError):  # of a line that could not be written, which was said
            file.close()


if __name__ == "__main__":
    sys.exit(main())
