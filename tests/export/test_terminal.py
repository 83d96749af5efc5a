"""Commands on a terminal: the chat of mara-run, and an export whose terminal closes."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mara_export import parity
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.text import TextSide
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT


class Terminal:
    """mara-run with a terminal for all three of its streams."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mara_deploy.commands.run", *map(str, arguments), "--threads", "1"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(slave)

    def read_until(self, pattern: str, seconds: float = 30) -> str:
        """What appears on the screen, up to a match of `pattern` at its end, or up to the end of the process."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern + r"\Z", text):
            ready, _, _ = select.select([self.master], [], [], end - time.monotonic())
            assert ready, f"no {pattern!r} in {text!r}"
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux: the other side is closed
                data = b""
            if not data:
                break
            text += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return text

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: object, **environment: str) -> Terminal:
        opened.append(Terminal(*arguments, **{"XDG_STATE_HOME": str(tmp_path / "state"), **environment}))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_turn_follows_the_conversation_and_reset_starts_a_new_one(terminal, bundle, tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    screen = terminal(bundle("qwen2"), "--max-new-tokens", 12, "--trace", trace, "--top-k", 8)
    head = screen.read_until("> ")
    assert "engine cpu" in head
    assert "Ctrl-D exits" in head
    for text in ("Hello", "", "And then?", "/reset", "Hello"):
        screen.write(text + "\n")
        shown = screen.read_until(r"ended by \w+\]\n> " if text not in ("", "/reset") else "> ")
        assert "error" not in shown
        assert ("(new conversation)" in shown) == (text == "/reset")
    screen.write("zz" * MAX_CONTEXT + "\n")
    assert "error: the prompt has" in screen.read_until("> ")  # and the session goes on
    screen.write("\x04")
    assert "Traceback" not in screen.read_until("never")
    assert screen.process.wait(timeout=30) == 0

    turns: list[list[Any]] = []
    for line in map(json.loads, trace.read_text(encoding="utf-8").splitlines()):
        if "format" in line:
            turns.append([])
            assert line["answer"] == len(turns) - 1
        elif "token" in line:
            turns[line["answer"]].append(line)
    found = [(turn[0]["position"], [line["token"] for line in turn]) for turn in turns]
    decoder, config = AlignedDecoder(bundle("qwen2"), threads=1), DecodeConfig(max_new_tokens=12, top_k=8)
    side = TextSide(Bundle.open(bundle("qwen2")))
    user = {"role": "user", "content": "Hello"}
    second = [
        user,
        {"role": "assistant", "content": side.decode(found[0][1])},
        {"role": "user", "content": "And then?"},
    ]
    expected = [
        (len(side.encode_chat(messages)), decoder.generate(messages, config).token_ids)
        for messages in ([user], second, [user])
    ]
    assert found == expected


def test_ctrl_c_stops_an_answer_and_a_termination_the_chat(terminal, bundle, tmp_path) -> None:
    slow = ["--schedule", "one-by-one", "--top-k", MAX_CANDIDATES, "--top-p", 1, "--threshold", 1000]
    screen, saved = terminal(bundle("qwen2"), *slow), tmp_path / "saved.jsonl"  # sixty-four passes a token: seconds
    screen.read_until("> ")
    screen.write("Hello\n")
    screen.read_until(r"Hello\n(?s:.)+")
    time.sleep(0.5)  # Python's own line reader misses a signal that comes while it hands over a line
    screen.write("\x03\x03\x03")
    text = screen.read_until(r"goes on with what is written\)\n(\^C|\n|> )*> ")
    assert "ended by" not in text
    time.sleep(0.5)  # nor does it see one that comes before its wait for a key
    screen.write("half a line")
    text += screen.read_until("half a line")
    time.sleep(0.5)
    screen.write("\x03")  # discards what was typed
    text += screen.read_until(r"\n> ")
    screen.write(f"/save {saved}\n")
    text += screen.read_until(r"saved 1 turn to .*\n> ")
    turn = json.loads(saved.read_text(encoding="utf-8"))
    assert (turn["messages"], turn["finish_reason"]) == ([{"role": "user", "content": "Hello"}], "interrupted")
    assert turn["answer"]
    screen.write("And then?\n")
    screen.read_until(r"And then\?\n(?s:.)+")
    screen.process.terminate()  # in the middle of an answer
    text += screen.read_until("never")
    assert screen.process.wait(timeout=30) == 2
    assert "mara-run: error: interrupted" in text
    assert "Traceback" not in text


def test_lines_are_edited_completed_remembered_and_pasted(terminal, bundle, tmp_path) -> None:
    pytest.importorskip("readline")
    options = [bundle("qwen2"), "--max-new-tokens", 2, "--schedule", "together"]
    history, saved = tmp_path / "state" / "mara-deploy" / "run-history", tmp_path / "saved.json"
    screen = terminal(*options, TERM="xterm")
    screen.read_until("> ")
    for keys in (
        "Hallo\x1b[D\x1b[D\x1b[D\x7fe\r",  # three to the left, and e for a
        "\x1b[200~two\nlines\x1b[201~\r",
        "a line \\\rthat goes on\r",
        "//slash\r",
    ):
        screen.write(keys)
        screen.read_until(r"ended by \w+\]\n(\x1b\S+)?> ")
    for keys in ("/mi\tage\t=2\r", "/no\r", f"/sav\t{saved}\r"):
        screen.write(keys)
        text = screen.read_until(r"\n(\x1b\S+)?> ")
        assert {"m": "agent 2 × agent", "n": "error: there is no command /no", "s": "saved 4"}[keys[1]] in text
    screen.write("/quit\r")
    screen.read_until("never")
    assert screen.process.wait(timeout=30) == 0
    asked = [turn["messages"][-1]["content"] for turn in json.loads(saved.read_text(encoding="utf-8"))]
    assert asked == ["Hello", "two\nlines", "a line \nthat goes on", "/slash"]
    assert history.stat().st_mode & 0o777 == 0o600

    screen = terminal(*options, "--explain", TERM="xterm")
    screen.read_until("> ")
    screen.write("\x1b[A" * 7 + "\x10" + "\r")  # up eight times: to the first message
    screen.read_until(r"\d forced\n(?s:.)*> ")
    screen.write("/stats\r")
    assert "conversation: 1 turn, " in screen.read_until(r"chat: 1 answer, 2 tokens(?s:.)*> ")
    *_, message, command = map(json.loads, history.read_text(encoding="ascii").splitlines())
    assert (message, command) == ("Hello", "/stats")


def test_explain_marks_tokens_in_colour_unless_no_color_is_set(terminal, bundle) -> None:
    options = ["--prompt", "Hello", "--max-new-tokens", 24, "--schedule", "together", "--threshold", 0.5, "--explain"]
    screens = [terminal(bundle("qwen2"), *options, TERM="xterm", NO_COLOR=value) for value in ("", "1")]
    coloured, plain = (re.sub(r"[\d.]+ tokens/s", "", screen.read_until("never")) for screen in screens)
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
    assert re.search(r"\x1b\[36m‹\S+›\x1b\[0m(?s:.)*\ntoken  ", coloured)
    assert "\x1b" not in plain
    answer, _, table = plain.partition("\ntoken  ")
    assert answer.count("›") == int(re.search(r"(\d+) changed", table)[1]) > 0
    assert answer.count("»") == int(re.search(r"(\d+) forced", table)[1]) > 0


@pytest.mark.parametrize("prompt", [("--prompt", "Hello"), ("--input-ids", "72,101,108,108,111")], ids=["text", "ids"])
def test_in_a_pipe_explain_is_beside_the_answer(command, bundle, prompt) -> None:
    options = (bundle("qwen2"), *prompt, "--max-new-tokens", 24, "--threshold", 0.5, "--threads", 1)
    plain, explained, found = (command("run", *options, *more) for more in ((), ("--explain",), ("--json",)))
    assert explained.out == plain.out
    stats = json.loads(found.out)["stats"]
    changed = sum(number for rank, number in stats["accepted_rank"].items() if rank != "1")
    *_, summary, _ = explained.err.splitlines()
    assert summary == (
        f"24 tokens, {stats['decisions']} decisions: {stats['accepted_rank'].get('1', 0)} accepted at rank 1, "
        f"{changed} changed, {stats['forced']} forced"
    )
    assert explained.err.count("›") == 2 * changed + 1 > 1  # in the answer, in the table and below it


def test_the_guide_shows_what_explain_prints(command, bundle, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    guide = Path(__file__).parents[2] / "docs" / "guide" / "run.md"
    (example,) = re.findall(r"^```text\n(‹.*?)^```", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    answer, *lines = [line for line in example.splitlines() if line.strip("…")]
    options = ("--prompt", "How do I oil a squeaky door?", "--explain", "--threads", 1)
    printed = command("run", bundle("demo"), *options).err.splitlines()
    assert [line for line in lines if line not in printed] == []
    assert answer.removesuffix(" …") in " ".join(printed)


@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_on_a_terminal_json_and_raw_need_a_prompt(command, bundle, option) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    line = command("run", bundle("qwen2"), option, stdin=Keyboard()).refusal("mara-run")
    assert all(text in line for text in ("--json", "--raw", "--prompt"))


def test_an_export_whose_terminal_closes_leaves_nothing(command, checkpoint, agent_file, tmp_path, monkeypatch) -> None:
    """As when a connection is lost: a SIGHUP, and afterwards there is nowhere to write to."""
    master, slave = pty.openpty()
    checkpoint("qwen2"), agent_file("qwen2")

    def missed(*_: object) -> None:
        raise AssertionError("the signal came through")

    def hang_up(*_: object) -> None:
        assert any((tmp_path / "new").iterdir())
        os.close(master)
        os.kill(os.getpid(), signal.SIGHUP)
        for _ in range(1000):  # Python calls the handler between two instructions
            pass

    monkeypatch.setattr(parity, "run_reference", hang_up)
    terminal = os.fdopen(slave, "w", buffering=1)
    before = signal.signal(signal.SIGHUP, missed)
    try:
        with monkeypatch.context() as patch:
            for stream in ("stdout", "stderr"):
                patch.setattr(sys, stream, terminal)
            options = ["--model", checkpoint("qwen2"), "--agent", agent_file("qwen2"), "--out", tmp_path / "new" / "b"]
            assert command("export", *options).code == 2
    finally:
        signal.signal(signal.SIGHUP, before)
        with contextlib.suppress(OSError):
            terminal.close()
    assert not (tmp_path / "new").exists()
