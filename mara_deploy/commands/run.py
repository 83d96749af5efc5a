"""`mara-run`: decode text with a bundle, without PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.decoding import (
    BUNDLE_HELP,
    TEMPLATE_HELP,
    EngineOptions,
    decode_config,
    mix_text,
    report_departures,
    template_variables,
)
from mara_deploy.commands.explain import Marker, explanation, marked, namer
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.run_answer import Stream, answered, counters
from mara_deploy.commands.shared import Parser, guarded, print_json
from mara_deploy.commands.terminal import columns, has_colour, printable, wrapped
from mara_deploy.trace import TraceFile
from mara_runtime.config import CONVERSATIONS, DecodeConfig
from mara_runtime.errors import OptionError, PromptError
from mara_runtime.options import Options, option, required

if TYPE_CHECKING:
    from mara_runtime.answer import Piece
    from mara_runtime.decoder import AlignedDecoder
    from mara_runtime.prompt import Prompt

EPILOG = """\
Without --prompt, --input-ids and --prompts, mara-run starts a chat on a terminal, where /help lists its commands, and
otherwise reads the prompt from stdin. Of the prompts of a file, several are answered at once, and each answer is
printed when it is finished; the exit code is 1 if some could not be answered.

examples:
  mara-run BUNDLE --prompt "How do I cook rice?"
  mara-run BUNDLE
  mara-run BUNDLE --prompt "How do I cook rice?" --no-align
  mara-run BUNDLE --prompt "How do I cook rice?" --explain
  mara-run BUNDLE --prompt "How do I cook rice?" --agent polite=1 --agent brief=0.5
  echo "How do I cook rice?" | mara-run BUNDLE --json
  mara-run BUNDLE --prompts questions.txt --jsonl > answers.jsonl
"""


@dataclass(frozen=True)
class RunArguments(Options):
    """What to decode and how to print it."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    prompt: str | None = option(None, "user message, formatted with the bundle's chat template", allow_empty=True)
    input_ids: tuple[int, ...] = option((), "token ids, passed to the LLM as they are", metavar="N[,N…]", separator=",")
    prompts: str | None = option(
        None,
        "answer every prompt of a file: one per line; .jsonl or a .json list of texts, conversations, or objects with "
        "them; each answer is printed when it is finished",
        metavar="FILE",
    )
    conversations: int | None = option(None, "--prompts: answers decoded at once", least=1, unset=str(CONVERSATIONS))
    jsonl: bool = option(
        False, "--prompts: print one JSON object per line: index and prompt, then what --json prints, or error"
    )
    system: str | None = option(None, "system message before the prompt", allow_empty=True)
    prefill: str | None = option(
        None, "beginning of the answer, which goes on from there; what is printed is what comes after it"
    )
    template: tuple[str, ...] = option((), TEMPLATE_HELP, metavar="KEY=JSON")
    raw: bool = option(False, "use the prompt as plain text, without the chat template")
    json: bool = option(False, "print one JSON object: token_ids, text, finish_reason, stats, config")
    explain: bool = option(
        False, "mark the tokens that the agents changed or forced, and list them below the answer, on stderr"
    )
    history: bool = option(True, "chat: keep no history of what is typed")
    trace: Path | None = option(
        None,
        "write one JSON line per token: candidates, probabilities, margins; mara-inspect makes a page of it",
        metavar="FILE",
    )
    beside_plain: bool = option(False, "--trace: answer without agents, too, in the same passes, and trace both")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.input_ids:
            raise OptionError("--prompt and --input-ids are both given; leave one of them out")
        for flag, given in (("--conversations", self.conversations is not None), ("--jsonl", self.jsonl)):
            if given and self.prompts is None:
                raise OptionError(f"{flag} is given, but no --prompts; leave it out")
        if self.beside_plain and self.trace is None:
            raise OptionError("--beside-plain is given, but no --trace; leave it out")
        if self.prompts is not None:
            if self.json:
                raise OptionError("--json is for one answer: use --jsonl with --prompts")
            others = {"--prompt": self.prompt, "--input-ids": self.input_ids or None, "--trace": self.trace}
            if other := next((flag for flag, value in others.items() if value is not None), None):
                raise OptionError(f"--prompts and {other} are both given; leave one of them out")
        if self.explain:
            for flag, given in (("--json", self.json), ("--prompts", self.prompts is not None)):
                if given:
                    raise OptionError(f"--explain is for people, and {flag} is given: use --trace, or leave one out")
        if self.raw or self.input_ids:
            for flag, value in (("--template", self.template), ("--system", self.system), ("--prefill", self.prefill)):
                if value not in (None, ()):
                    raise OptionError(f"{flag} needs the chat template: leave out --raw and --input-ids")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-run", "Decode text with a bundle's LLM; an agent accepts or rejects each candidate token.", EPILOG
    )
    add_options(options, RunArguments)
    add_options(options.add_argument_group("decoding"), DecodeConfig)
    add_options(options.add_argument_group("engine"), EngineOptions)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _run, argv)


def _run(args: argparse.Namespace) -> int:
    options, config, engine = from_args(RunArguments, args), decode_config(args), from_args(EngineOptions, args)
    variables = template_variables(options.template)
    if options.explain and not config.align:
        raise OptionError("--explain shows what agents decide, and --no-align runs none: leave one of them out")
    if options.prompts is not None:
        return _answer_file(options, config, engine, variables)
    chat = options.prompt is None and not options.input_ids and sys.stdin.isatty()
    if chat and (options.json or options.raw or options.prefill):
        raise OptionError("--json, --raw and --prefill need a prompt: give --prompt, or write it to stdin")
    if options.beside_plain and not config.align:
        raise OptionError("--beside-plain and --no-align are both given; leave one of them out")
    prompt = None if chat else _prompt(options)

    decoder = engine.open(options.bundle, _report)
    if not options.json:
        _announce(decoder, config)
    with _traced(decoder, options.trace, options.beside_plain) as stream:
        if prompt is None:
            if decoder.text_side is None or not decoder.text_side.has_template:
                raise OptionError(f"{options.bundle} has no chat template: give --input-ids, or --prompt with --raw")
            report_departures(decoder, config, variables)
            from mara_deploy.commands.chat_commands import talk
            from mara_deploy.commands.run_chat import Chat

            talk(Chat(decoder, stream, config, options.system, variables, options.explain), options.history)
            return 0
        begun = options.prefill is not None
        pieces = stream(prompt, config, raw=options.raw, template=variables, continue_final_message=begun)
        report_departures(decoder, config, None if options.raw or options.input_ids else variables)
        shown = _shown(options, decoder)
        kept: list[Piece] | None = [] if options.explain else None
        result = answered(pieces, shown, kept)
    if options.json:
        print_json(result.to_json())
        return 0
    if result.text is None:
        print(",".join(map(str, result.token_ids)), end="")
    print(flush=True)
    if kept is not None:
        colour = has_colour(sys.stderr)
        if not isinstance(shown, Marker):
            print(*wrapped(marked(kept, decoder.text_side, colour), columns()), sep="\n", file=sys.stderr)
        name = namer(decoder.text_side)
        print(*explanation(kept, name, config.threshold, columns(), colour), sep="\n", file=sys.stderr)
    print(counters(result), file=sys.stderr)
    return 0


def _shown(options: RunArguments, decoder: AlignedDecoder) -> Callable[[Piece], str]:
    """What is printed of each piece: with --explain, marks on a terminal; a pipe gets the text alone."""
    if options.json:
        return lambda piece: ""
    if options.explain and decoder.text_side is not None and sys.stdout.isatty():
        return Marker(namer(decoder.text_side), has_colour(sys.stdout))
    return (lambda piece: printable(piece.text)) if sys.stdout.isatty() else lambda piece: piece.text


def _answer_file(options: RunArguments, config: DecodeConfig, engine: EngineOptions, variables: dict[str, Any]) -> int:
    """Answer the prompts of a file. Returns the exit code."""
    from mara_deploy.commands.run_prompts import answer_all, with_messages
    from mara_deploy.prompts import read_prompts

    prompts = read_prompts(options.prompts or "")
    asked = with_messages(prompts, options.system, options.prefill)
    for remark in (
        *prompts.remarks,
        *[f"{prompts.name} repeats prompts: each is asked once"] * bool(prompts.duplicates),
    ):
        print(f"mara-run: {remark}", file=sys.stderr)
    decoder = engine.open(options.bundle, _report)
    if decoder.text_side is None:
        raise OptionError(f"{options.bundle} has no tokenizer, so it cannot answer text: give --input-ids")
    config = decoder.resolve(config)
    if not options.jsonl:
        _announce(decoder, config)
    report_departures(decoder, config, None if options.raw else variables)
    failed = answer_all(
        decoder,
        asked,
        config,
        conversations=options.conversations or CONVERSATIONS,
        jsonl=options.jsonl,
        raw=options.raw,
        template=variables,
        begun=options.prefill is not None,
    )
    return 1 if failed else 0


def _report(message: str) -> None:
    """Say on a terminal what takes time."""
    if sys.stderr.isatty():
        print(f"mara-run: {message}", file=sys.stderr)


def _prompt(options: RunArguments) -> Prompt:
    if options.input_ids:
        return list(options.input_ids)
    try:
        text: str = sys.stdin.read().rstrip("\n") if options.prompt is None else options.prompt
    except UnicodeDecodeError as error:
        raise PromptError(f"stdin is not UTF-8 text: {error}") from None
    if options.system is None and options.prefill is None:
        return text
    answer = [] if options.prefill is None else [{"role": "assistant", "content": options.prefill}]
    return _with_system(options.system, [{"role": "user", "content": text}, *answer])


def _with_system(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _announce(decoder: AlignedDecoder, config: DecodeConfig) -> None:
    engine = decoder.engine.describe()
    facts = [engine[key] for key in ("version", "gpu", "lowering", "precision") if key in engine]
    if "threads" in engine:
        facts.append(f"{engine['threads'] or 'default'} threads")
    print(f"engine {engine['name']} ({', '.join(facts)})", file=sys.stderr)
    for name, reason in decoder.declined.items():
        if name in decoder.bundle.manifest.targets:  # nobody expects the others to run
            print(f"engine {name} declined: {reason}", file=sys.stderr)
    if config.align:
        config = decoder.resolve(config)
        print(f"agent {mix_text(config)}, fallback {config.fallback}", file=sys.stderr)


@contextlib.contextmanager
def _traced(decoder: AlignedDecoder, path: Path | None, beside_plain: bool) -> Iterator[Stream]:
    """The decoder's `stream`; with a file, one whose answers are written to it as they come."""
    if path is None:
        yield decoder.stream
        return
    with _trace_errors(path):
        file = path.open("w", encoding="utf-8", buffering=1)  # a reader sees each line at once, and a full disk fails

    def write(line: dict[str, Any]) -> None:
        with _trace_errors(path):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    try:
        yield TraceFile(decoder, write, beside_plain=beside_plain).stream
    finally:
        with contextlib.suppress(OSError):  # an unwritten line was reported already
            file.close()


@contextlib.contextmanager
def _trace_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"--trace cannot write {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
