"""What is typed into the chat of `mara-run`: messages, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mara_deploy.commands.decoding import mix_text, report_departures
from mara_deploy.commands.explain import candidates, explanation, marked, summary
from mara_deploy.commands.line_editor import LineEditor, history_file
from mara_deploy.commands.process import handled
from mara_deploy.commands.run_answer import counters
from mara_deploy.commands.run_chat import Chat, say
from mara_deploy.commands.terminal import clipped, columns, has_colour, visible, width, wrapped
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.files import write_atomic, writing

BANNER = "chat: /help lists commands, Ctrl-C stops an answer, Ctrl-D exits"
HISTORY = "run-history"
SAVED = (".jsonl", ".ndjson", ".json")
"""Suffixes of what `/save` writes; the last one is a list."""


@dataclass(frozen=True)
class ChatCommand:
    """A command: what follows its name, what it does, and how."""

    arguments: str
    help: str
    run: Callable[[Chat, str], None]
    options: tuple[str, ...] = ()
    """words that its argument may be"""


def talk(chat: Chat, keep_history: bool) -> None:
    """Read messages and commands until the end of input. keep_history: in a file, if it can be written."""
    path = None
    if keep_history:
        with contextlib.suppress(RuntimeError):  # a user without a home folder
            path = history_file(HISTORY)
    agents = [agent.name for agent in chat.decoder.bundle.manifest.agents]
    editor = LineEditor(path, lambda before, word: completions(before, word, agents))
    say(BANNER)
    with handled(("SIGINT",), chat.interrupts.handle):
        while True:
            try:
                with chat.interrupts.awaited():
                    text = editor.read("plain> " if chat.plain else "> ")
            except KeyboardInterrupt:  # what was typed is discarded
                say("")
                continue
            except EOFError:
                say("")
                return
            except UnicodeDecodeError as error:
                say(f"error: the line is not {error.encoding} text: {error.reason}")
                continue
            if text.split() in (["/quit"], ["/exit"]):
                return
            if text.startswith("/") and not text.startswith("//"):
                obey(chat, text)
            elif text.strip():
                chat.ask(text[1:] if text.startswith("//") else text)


def obey(chat: Chat, text: str) -> None:
    """Run a command; what is wrong with it is one line."""
    name, *rest = text[1:].split(maxsplit=1)[:2] or [""]
    try:
        if name not in COMMANDS:
            near = "".join(f", perhaps you meant /{found}" for found in difflib.get_close_matches(name, COMMANDS, n=1))
            shown = clipped(visible(name), 40)
            raise OptionError(f"there is no command /{shown}{near}: /help lists them, and //{shown} … is a message")
        COMMANDS[name].run(chat, "".join(rest).strip())
    except MaraError as error:
        say("error: " + " ".join(str(error).replace(f"--{name}", f"/{name}").split()))


def completions(before: str, word: str, agents: Sequence[str]) -> list[str]:
    """What a word that has begun may become. before: the line before it; agents: by name."""
    if not before.strip():
        names = [f"/{name} " if command.arguments else f"/{name}" for name, command in COMMANDS.items()]
        return [name for name in names if word and name.startswith(word)]
    name = before.split()[0].removeprefix("/")
    if not before.startswith("/") or name not in COMMANDS:
        return []
    if name == "save":
        return sorted(_paths(word))
    return [
        found
        for found in (*COMMANDS[name].options, *(agents if name in ("agent", "mix") else ()))
        if found.startswith(word)
    ]


def _paths(word: str) -> Iterator[str]:
    folder, slash, start = word.rpartition("/")
    with contextlib.suppress(OSError, RuntimeError):
        for path in Path(folder + slash or ".").expanduser().iterdir():
            if path.name.startswith(start) and (start or not path.name.startswith(".")):
                yield f"{folder}{slash}{path.name}{'/' * path.is_dir()}"


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _help(chat: Chat, argument: str) -> None:
    _none(argument)
    heads = [f"/{name} {command.arguments}".rstrip() for name, command in COMMANDS.items()]
    size, most = max(map(width, heads)) + 2, columns()
    helps = [command.help for command in COMMANDS.values()]
    for head, text in zip([*heads, "//TEXT"], [*helps, "a message that begins with a slash"], strict=True):
        say(*wrapped(f"{head:<{size}}{text}", most, " " * min(size, most // 2)))
    say(*wrapped("A line that ends with a backslash goes on in the next one; pasted lines are one message.", most))


def _plain(chat: Chat, argument: str) -> None:
    if argument in ("on", "off"):
        if argument == "off":
            chat.decoder.resolve(chat.aligned)  # raises where the bundle has no agent
        chat.plain = argument == "on"
        say("the LLM alone answers" if chat.plain else _in_force(chat))
    elif argument:
        raise OptionError(f"/plain is {argument!r}; it must be on or off, or nothing")
    else:
        _turns(chat)
        chat.compare()


def _agent(chat: Chat, argument: str) -> None:
    known = [agent.name for agent in chat.decoder.bundle.manifest.agents]
    if argument:
        _judge(chat, _parts(argument))
    elif known:
        say(f"this bundle has {', '.join(known)}", _in_force(chat))
    else:
        raise OptionError("this bundle has no agent: mara-agent adds one")


def _mix(chat: Chat, argument: str) -> None:
    if argument:
        before = chat.decoder.resolve(chat.aligned).agents or {}
        _judge(chat, {**before, **_parts(argument)})
    else:
        say(_in_force(chat))


def _threshold(chat: Chat, argument: str) -> None:
    if argument:
        chat.aligned = replace(chat.aligned, threshold=_number(argument, "/threshold"))
    say(f"candidates are accepted when their margin exceeds {chat.aligned.threshold:g}")


def _explain(chat: Chat, argument: str) -> None:
    _turns(chat)
    config, steps, colour = chat.turns[-1].config, [piece.step for piece in chat.pieces], has_colour(sys.stderr)
    if argument:
        if not (argument.isdecimal() and len(argument) < 10 and 1 <= int(argument) <= len(steps)):
            raise OptionError(
                f"/explain is {argument!r}; it must be a token of the last answer, from 1 to {len(steps)}"
            )
        say(*candidates(steps, int(argument), chat.name, config.threshold, columns(), colour))
        return
    if not config.align:
        raise OptionError("no agent judged the last answer: /explain N shows the candidates at a token")
    text = marked(chat.pieces, chat.decoder.text_side, colour)
    say(*wrapped(text, columns()), *explanation(chat.pieces, chat.name, config.threshold, columns(), colour))


def _stats(chat: Chat, argument: str) -> None:
    _none(argument)
    if chat.turns:
        held, last = chat.pieces[-1].step.position + 1, chat.result
        turns, most = len(chat.turns), chat.decoder.bundle.manifest.max_context
        say(f"conversation: {turns} turn{'s' * (turns > 1)}, {held} of {most} tokens")
        if last is None:
            say(f"last answer: stopped after {len(chat.pieces)} tokens")
        else:
            s = last.stats
            facts = [
                f"prompt of {s.prompt_tokens} tokens, {s.reused_tokens} of them in the KV cache: {s.prefill_ms:.0f} ms",
                f"decoding: {s.decode_ms:.0f} ms, {s.engine_ms:.0f} of them in the engine",
            ]
            if s.smallest_margin is not None:
                facts.append(f"a decision as close as {s.smallest_margin:.2g}, {s.within_noise} within the noise")
            say(*wrapped(f"last answer: {counters(last)}", columns()), *wrapped("; ".join(facts), columns()))
    say(*wrapped(f"chat: {chat.answers} answer{'s' * (chat.answers != 1)}, {summary(chat.counts)}", columns()))


def _system(chat: Chat, argument: str) -> None:
    if argument:
        before, chat.system = chat.system, None if argument == "off" else argument
        try:
            chat.decoder.encode(chat.conversation("?", []), template=chat.variables, agents=chat.aligned.agents)
        except MaraError:
            chat.system = before
            raise
    say("there is no system message" if chat.system is None else f"system message: {chat.system}")


def _reset(chat: Chat, argument: str) -> None:
    _none(argument)
    chat.turns, chat.pieces, chat.result = [], [], None
    say("(new conversation)")


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        raise OptionError("/save has no file: name one that ends in .jsonl or .json")
    _turns(chat)
    path = Path(argument)
    if path.suffix.lower() not in SAVED:
        raise OptionError(f"{path} ends in {path.suffix!r}; it must end in {', '.join(SAVED)}")
    entries = [json.dumps(turn.to_json(), ensure_ascii=False) for turn in chat.turns]
    text = "[\n" + ",\n".join(entries) + "\n]\n" if path.suffix.lower() == SAVED[-1] else "\n".join(entries) + "\n"
    try:
        path = path.expanduser()
    except RuntimeError:
        raise OptionError(f"{path} cannot be written: there is no such user") from None
    with writing(path):
        if path.exists() and path.absolute() not in chat.saved:
            raise OptionError(f"{path} exists: choose another name")
        write_atomic(path, text)
    chat.saved.add(path.absolute())
    say(f"saved {len(entries)} turn{'s' * (len(entries) > 1)} to {path}")


def _quit(chat: Chat, argument: str) -> None:
    _none(argument)  # without an argument, `talk` returns


COMMANDS = {
    "help": ChatCommand("", "this list", _help),
    "plain": ChatCommand(
        "[on|off]",
        "answer the last question again by the LLM alone, for comparison: the conversation keeps the first answer; "
        "on: all answers from now on are plain, off: they are aligned",
        _plain,
        ("on", "off"),
    ),
    "agent": ChatCommand("[NAME[=PART] …]", "the agents that judge from now on; alone: those of the bundle", _agent),
    "mix": ChatCommand("[NAME=PART …]", "change the parts of some agents and keep the others; alone: show them", _mix),
    "threshold": ChatCommand(
        "[X]", "accept candidates whose margin exceeds this from now on; alone: show it", _threshold
    ),
    "explain": ChatCommand(
        "[N]", "what the agents changed in the last answer; the candidates at its N-th token", _explain
    ),
    "stats": ChatCommand("", "counters of the last answer and of the chat", _stats),
    "system": ChatCommand(
        "[TEXT|off]", "system message of the conversation from now on; alone: show it", _system, ("off",)
    ),
    "reset": ChatCommand("", "start a new conversation", _reset),
    "save": ChatCommand("FILE", "write the conversation as .jsonl or .json, which mara-run --prompts reads", _save),
    "quit": ChatCommand("", "leave, as Ctrl-D does", _quit),
}


def _none(argument: str) -> None:
    if argument:
        raise OptionError(f"{argument!r} follows a command that takes nothing: leave it out")


def _turns(chat: Chat) -> None:
    if not chat.turns:
        raise OptionError("there is no answer yet")


def _parts(argument: str) -> dict[str, float]:
    """Agents by name, each with its part."""
    parts: dict[str, float] = {}
    for word in argument.split():
        name, sign, number = word.partition("=")
        if name in parts:
            raise OptionError(f"{name!r} is given twice")
        parts[name] = _number(number, name) if sign else 1.0
    return parts


def _number(text: str, what: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise OptionError(f"{what} is {text!r}; it must be a finite number")


def _judge(chat: Chat, parts: dict[str, float]) -> None:
    """From now on these agents judge."""
    config = replace(chat.aligned, agents=parts)
    chat.decoder.resolve(config)
    chat.aligned = config
    say(_in_force(chat))
    report_departures(chat.decoder, config, chat.variables)


def _in_force(chat: Chat) -> str:
    text = f"agent {mix_text(chat.decoder.resolve(chat.aligned))}"
    return text + " (answers are plain: /plain off)" if chat.plain else text
