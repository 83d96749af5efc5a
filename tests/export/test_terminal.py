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
from typing import Any

import pytest

from mara_export import parity
from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.bundle import Bundle
from mara_runtime.text import TextSide
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT


class Terminal:
    """mara-run with a terminal for all three of its streams."""

    def __init__(self, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mara_deploy.commands.run", *map(str, arguments), "--threads", "1"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
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
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: object) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_turn_follows_the_conversation_and_an_empty_line_starts_a_new_one(terminal, bundle, tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    screen = terminal(bundle("qwen2"), "--max-new-tokens", 12, "--trace", trace, "--top-k", 8)
    head = screen.read_until("> ")
    assert "engine cpu" in head
    assert "Ctrl-D exits" in head
    for text in ("Hello", "And then?", "", "Hello"):
        screen.write(text + "\n")
        shown = screen.read_until(r"ended by \w+\]\n> " if text else "> ")
        assert "error" not in shown
        assert ("(new conversation)" in shown) == (not text)
    screen.write("zz" * MAX_CONTEXT + "\n")
    assert "error: the prompt has" in screen.read_until("> ")  # and the session goes on
    screen.write("\x04")
    assert "Traceback" not in screen.read_until("never")
    assert screen.process.wait(timeout=30) == 0

    turns: list[list[Any]] = []
    for line in map(json.loads, trace.read_text(encoding="utf-8").splitlines()):
        if not turns or line["position"] != turns[-1][-1]["position"] + 1:
            turns.append([])
        turns[-1].append(line)
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


def test_ctrl_c_stops_an_answer_and_a_termination_the_chat(terminal, bundle) -> None:
    slow = ["--schedule", "one-by-one", "--top-k", MAX_CANDIDATES, "--top-p", 1, "--threshold", 1000]
    screen = terminal(bundle("qwen2"), *slow)  # sixty-four passes a token: an answer takes seconds
    screen.read_until("> ")
    screen.write("Hello\n")
    screen.read_until(r"Hello\n(?s:.)+")
    time.sleep(0.5)  # Python's own line reader misses a signal that comes while it hands over a line
    screen.write("\x03")
    text = screen.read_until(r"\(stopped; your message was discarded\)\n> ")
    assert "ended by" not in text
    time.sleep(0.5)  # nor does it see one that comes before its wait for a key
    screen.write("half a line")
    text += screen.read_until("half a line")
    time.sleep(0.5)
    screen.write("\x03")  # discards what was typed
    text += screen.read_until(r"\n> ")
    screen.write("Hello\n")
    screen.read_until(r"Hello\n(?s:.)+")
    screen.process.terminate()  # in the middle of an answer
    text += screen.read_until("never")
    assert screen.process.wait(timeout=30) == 2
    assert "mara-run: error: interrupted" in text
    assert "Traceback" not in text


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
