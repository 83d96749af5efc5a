"""The chat of mara-run, but for the terminal: commands, the conversation, interrupted answers, history."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mara_deploy.commands import line_editor, run_chat
from mara_deploy.commands.chat_commands import COMMANDS, completions, obey
from mara_deploy.commands.line_editor import LineEditor, history_file
from mara_deploy.commands.run_chat import Chat
from mara_deploy.prompts import read_prompts
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import NumericsError
from tests.unit.decoders import make_decoder, reciting
from tests.unit.test_decoder_agents import JUDGES

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CONFIG = DecodeConfig(top_k=2, max_new_tokens=4)


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    """With two agents: one accepts everything, the other rejects it. What was asked of the decoder is in `asked`."""
    (tmp_path / "bundle").mkdir()
    decoder, _ = make_decoder(tmp_path / "bundle", reciting(), JUDGES, chat_template=TEMPLATE, max_context=400)
    made = Chat(decoder, lambda *args, **more: decoder.stream(*args, **more), CONFIG, None, {}, explain=False)
    made.asked = []  # type: ignore[attr-defined]
    stream = decoder.stream

    def watched(prompt: Any, config: Any, **options: Any) -> Any:
        made.asked.append((prompt, config))  # type: ignore[attr-defined]
        return stream(prompt, config, **options)

    decoder.stream = watched  # type: ignore[method-assign,assignment]
    return made


@pytest.fixture
def said(chat: Chat, capsys: Any) -> Callable[[str], str]:
    """A command → what it says, beside the answers."""

    def call(text: str) -> str:
        capsys.readouterr()
        obey(chat, text)
        return str(capsys.readouterr().err)

    return call


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
def test_a_saved_conversation_asks_the_same_again(chat: Any, said: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    chat.ask("One?")
    said("/system Be brief.")
    chat.ask("Zwei\n„ä“?")
    said("/agent brief")
    chat.ask("Three?")
    assert said(f"/save {path}") == f"saved 3 turns to {path}\n"
    assert [prompt.asked for prompt in read_prompts(path).prompts] == [prompt for prompt, _ in chat.asked]
    answers = [turn.answer for turn in chat.turns]
    assert chat.asked[-1][0] == [
        system("Be brief."), user("One?"), {"role": "assistant", "content": answers[0]},
        user("Zwei\n„ä“?"), {"role": "assistant", "content": answers[1]}, user("Three?"),
    ]  # fmt: skip
    text = path.read_text(encoding="utf-8")
    entries = json.loads(text) if name == "c.json" else list(map(json.loads, text.splitlines()))
    assert [entry["answer"] for entry in entries] == answers
    assert [list(entry["config"]["agents"]) for entry in entries] == [["polite"], ["polite"], ["brief"]]
    assert said(f"/save {path}").startswith("saved 3")  # its own file is brought up to date
    other = path.with_name(f"other-{name}")
    other.write_text("kept")
    assert said(f"/save {other}") == f"error: {other} exists: choose another name\n"
    assert other.read_text() == "kept"


def test_plain_compares_and_the_conversation_keeps_its_answer(chat: Any, said: Any, capsys: Any) -> None:
    chat.ask("One?")
    before = list(chat.turns)
    said("/plain")
    assert [config.align for _, config in chat.asked] == [True, False]
    assert chat.asked[0][0] == chat.asked[1][0]
    assert chat.turns == before
    said("/plain on")
    chat.ask("Two?")
    assert not chat.turns[-1].config.align
    assert "no agent judged" in said("/explain")
    assert "without a decision" in said("/explain 1")
    said("/plain off")
    chat.ask("Three?")
    assert chat.turns[-1].config.align
    assert "4 decisions" in said("/explain")
    assert chat.counts["only"] == 2 * 4


def test_agents_mix_and_threshold_hold_from_now_on(chat: Any, said: Any) -> None:
    used = []
    for command in ("/agent brief=0.5", "/mix polite=2", "/mix brief=-1", "/agent polite", "/threshold 1.5"):
        assert "error" not in said(command)
        chat.ask("One?")
        config = chat.turns[-1].config
        used.append((dict(config.agents), config.threshold, chat.result.stats.forced > 0))
    assert used == [
        ({"brief": 0.5}, 0.0, True),
        ({"brief": 0.5, "polite": 2.0}, 0.0, False),
        ({"brief": -1.0, "polite": 2.0}, 0.0, False),
        ({"polite": 1.0}, 0.0, False),
        ({"polite": 1.0}, 1.5, True),
    ]


@pytest.mark.parametrize(
    "command",
    ["/", "/nothing", "/agent rude", "/agent polite=x", "/agent polite=inf", "/agent polite polite", "/mix brief=",
     "/threshold high", "/threshold nan", "/plain maybe", "/explain 0", "/explain 5", "/explain one", "/explain ²",
     "/reset all", "/stats x", "/save", "/save file.txt", "/save /nowhere/file.json", "/save ~no-such-user/file.json",
     "/save " + "x" * 300 + ".json", "/help me", "/quit now"],
)  # fmt: skip
def test_a_wrong_command_is_one_line_and_changes_nothing(chat: Any, said: Any, command: str) -> None:
    chat.ask("One?")
    before = chat.config, chat.system, list(chat.turns)
    line = said(command)
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "--" not in line
    assert (chat.config, chat.system, chat.turns) == before


def test_a_system_message_that_the_template_refuses_is_not_taken(chat: Any, said: Any) -> None:
    strict = TEMPLATE + "{% if messages[0].role == 'system' and messages[0].content == 'no' %}{{ 1 / 0 }}{% endif %}"
    (chat.decoder.bundle.folder / "chat_template.jinja").write_text(strict)
    chat.decoder.text_side = type(chat.decoder.text_side)(chat.decoder.bundle)
    assert said("/system yes") == "system message: yes\n"
    assert said("/system no").startswith("error: the bundle's chat template rejects")
    assert chat.system == "yes"
    said("/system off")
    assert chat.system is None


def test_what_needs_an_answer_says_so_and_a_reset_forgets(chat: Any, said: Any) -> None:
    commands = ["/plain", "/explain", "/save x.json"]
    assert [said(command) for command in commands] == ["error: there is no answer yet\n"] * 3
    chat.ask("One?")
    assert "conversation: 1 turn, " in said("/stats")
    said("/reset")
    assert said("/explain") == "error: there is no answer yet\n"
    assert said("/stats") == "chat: 1 answer, 4 tokens, 4 decisions: 4 accepted at rank 1, 0 changed, 0 forced\n"
    chat.ask("Two?")
    assert chat.asked[-1][0] == [user("Two?")]


@pytest.mark.parametrize("written", [0, 2, 4])
def test_an_interrupted_answer_leaves_what_is_written(chat: Any, capsys: Any, monkeypatch: Any, written: int) -> None:
    stream, say = chat.decoder.stream, run_chat.say

    def interrupted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for _, piece in zip(range(written), stream(*arguments, **options), strict=False):
            yield piece
        signal.raise_signal(signal.SIGINT)

    def impatient(*lines: str) -> None:
        signal.raise_signal(signal.SIGINT)  # once more, while the chat deals with the first
        say(*lines)

    chat.decoder.stream = interrupted
    monkeypatch.setattr(run_chat, "say", impatient)
    before = signal.signal(signal.SIGINT, chat.interrupts.handle)
    try:
        chat.ask("One?")
    except KeyboardInterrupt:
        pytest.fail("Ctrl-C ends the chat")
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert ("discarded" in err, "goes on with what is written" in err) == (written == 0, written == 2)
    turns = [(turn.answer, turn.finish_reason) for turn in chat.turns]
    reason = "length" if written == 4 else "interrupted"
    assert turns == ([(out.removesuffix("\n"), reason)] if written else [])
    chat.decoder.stream = stream
    monkeypatch.undo()
    chat.ask("Two?")
    said = [] if not written else [user("One?"), {"role": "assistant", "content": turns[0][0]}]
    assert chat.asked[-1][0] == [*said, user("Two?")]


def test_a_failed_answer_leaves_the_conversation_as_it_was(chat: Any, capsys: Any) -> None:
    chat.ask("One?")
    stream = chat.decoder.stream

    def failing(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield next(stream(*arguments, **options))
        raise NumericsError("a margin is not finite")

    chat.decoder.stream = failing
    capsys.readouterr()
    chat.ask("Two?")
    assert capsys.readouterr().err == "error: a margin is not finite\n"
    chat.decoder.stream = stream
    chat.ask("Three?")
    assert [message["content"] for message in chat.asked[-1][0]][::2] == ["One?", "Three?"]


def test_words_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(before: str, word: str) -> list[str]:
        return completions(before, word, ["polite", "brief"])

    assert complete("", "/s") == ["/stats", "/system ", "/save "]
    assert len(complete("", "/")) == len(COMMANDS)
    assert complete("/agent polite=1 ", "b") == complete("/mix ", "b") == ["brief"]
    assert complete("/plain ", "o") == ["on", "off"]
    assert complete("", "") == complete("", "p") == complete("what is /agent ", "b") == complete("/nothing ", "b") == []
    monkeypatch.chdir(tmp_path)
    for name in ("one.json", "other", ".hidden"):
        (tmp_path / name).mkdir() if name == "other" else (tmp_path / name).touch()
    assert complete("/save ", "o") == complete("/save ", "") == ["one.json", "other/"]
    assert complete("/save ", f"{tmp_path}/one") == [f"{tmp_path}/one.json"]
    assert complete("/save ", "./.h") == ["./.hidden"]
    assert complete("/save ", "nowhere/x") == []


class Lines:
    """Python's readline and input, as far as the editor takes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *typed: str, readline: bool = True) -> None:
        self.history: list[str] = []
        ignored = dict.fromkeys(
            ("parse_and_bind", "set_completer_delims", "set_auto_history", "set_completer"), lambda _: None
        )
        module = SimpleNamespace(__doc__="", add_history=self.history.append, **ignored)
        monkeypatch.setattr(line_editor, "_readline", lambda: module if readline else None)
        monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
        lines = iter(typed)
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))


def test_the_history_is_private_bounded_and_survives_what_is_not_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file("run-history")
    path.parent.mkdir()
    kept = [f"message {i}\nof two lines" for i in range(line_editor.MOST_ENTRIES + 5)]
    path.write_text("\n".join(["no JSON", "[1]", *map(json.dumps, kept)]) + "\n")
    path.chmod(0o644)
    lines = Lines(monkeypatch, "new \\", "line", "new line", "new line", " ", "x" * 10_001, "back\\\\")
    editor = LineEditor(path, lambda before, word: [])
    assert lines.history == kept[5:]
    read = [editor.read("> ") for _ in range(6)]
    assert read == ["new \nline", "new line", "new line", " ", "x" * 10_001, "back\\\\"]
    assert lines.history[-4:] == ["new \nline", "new line", "x" * 10_001, "back\\\\"]
    found = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert found == [*kept[5:], "new \nline", "new line", "back\\\\"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_where_no_history_can_be_written_there_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").touch()
    for path in (None, tmp_path / "file" / "history", tmp_path):
        lines = Lines(monkeypatch, "one", "two")
        editor = LineEditor(path, lambda before, word: [])
        assert [editor.read("> "), editor.read("> ")] == lines.history == ["one", "two"]


def test_without_readline_lines_are_read_and_no_history_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    Lines(monkeypatch, "one \\", "two", readline=False)
    editor = LineEditor(tmp_path / "history", lambda before, word: [])
    assert editor.read("> ") == "one \ntwo"
    assert not (tmp_path / "history").exists()


def test_a_plain_start_can_become_aligned(chat: Any) -> None:
    config = replace(CONFIG, align=False, sample=True, temperature=2.0)
    started = Chat(chat.decoder, chat.stream, config, None, {}, explain=False)
    assert started.config == config
    started.plain = False
    assert started.config == CONFIG
