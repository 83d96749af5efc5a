"""`mara-run --prompts`: what is asked, and what is printed when answers come in any order and some fail."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mara_deploy.commands.run_prompts import answer_all, with_messages
from mara_deploy.prompts import Prompt, PromptSet
from mara_runtime.answer import Generation
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import NumericsError, OptionError, PromptError
from mara_runtime.stats import Stats

TURNS = [{"role": "user", "content": "Hello\nthere"}]
ASKED = ["One?", TURNS, "Three?"]


class Decoder:
    """The first answer is finished last, and the second fails."""

    def __init__(self, error: Exception) -> None:
        self.error, self.options = error, {}

    def generate_many(self, prompts: Any, config: DecodeConfig, **options: Any) -> Any:
        self.options = options
        yield 1, self.error
        for index in (0, 2):
            yield index, SimpleNamespace(result=None)
        for index in (2, 0):
            yield (
                index,
                SimpleNamespace(
                    result=Generation([1, 2], f"to {prompts[index]}", "stop", Stats(tokens=2), {"name": "cpu"}, config)
                ),
            )


def answered(error: Exception, *, jsonl: bool) -> tuple[int, Decoder]:
    decoder: Any = Decoder(error)
    options: Any = {"raw": False, "template": {"a": 1}, "begun": False}
    return answer_all(decoder, ASKED, DecodeConfig(), conversations=3, jsonl=jsonl, **options), decoder


def test_every_answer_is_printed_when_it_is_finished(capsys: Any) -> None:
    error = NumericsError("a margin is not finite")
    failed, decoder = answered(error, jsonl=True)
    assert failed == 1
    assert decoder.options == {
        "places": 3, "raw": False, "template": {"a": 1}, "continue_final_message": False,
    }  # fmt: skip
    out, err = capsys.readouterr()
    first, second, third = map(json.loads, out.splitlines())
    assert first == {"index": 1, "prompt": TURNS, "error": "a margin is not finite"}
    assert [second["index"], third["index"]] == [2, 0]
    assert list(third) == ["index", "prompt", "token_ids", "text", "finish_reason", "stats", "config"]
    assert (third["prompt"], third["text"], err) == ("One?", "to One?", "")

    answered(error, jsonl=False)
    out, err = capsys.readouterr()
    assert out == "── 3 of 3: Three?\nto Three?\n\n── 1 of 3: One?\nto One?\n\n"
    failure, counters = err.splitlines()
    assert failure == "mara-run: prompt 2: a margin is not finite"
    assert counters.startswith("[2 of 3 answers, 1 failed; 4 tokens, ")


def test_on_a_terminal_a_line_shows_how_far_it_is(monkeypatch: Any, capsys: Any) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    answered(NumericsError("no"), jsonl=True)
    lines = terminal.getvalue().split("\r\x1b[K")
    assert any(line.startswith("0 of 3 answers, 1 failed; 0 tokens") for line in lines)
    assert lines[-1] == ""  # nothing is left of it


def test_an_option_that_fits_no_prompt_ends_it() -> None:
    with pytest.raises(OptionError, match="variables"):
        answered(OptionError("variables of the chat template are given"), jsonl=True)


def test_a_system_message_and_the_beginning_of_the_answer() -> None:
    def asked(*prompts: Any, system: str | None = None, prefill: str | None = None) -> Any:
        return with_messages(PromptSet("p.txt", tuple(map(Prompt, prompts))), system, prefill)

    assert asked("One?", TURNS) == ["One?", TURNS]
    system, answer = {"role": "system", "content": "S"}, {"role": "assistant", "content": "P"}
    assert asked("One?", TURNS, system="S", prefill="P") == [
        [system, {"role": "user", "content": "One?"}, answer],
        [system, *TURNS, answer],
    ]
    with pytest.raises(PromptError, match=r"prompt 2 of p\.txt has a system message of its own"):
        asked("One?", [system, *TURNS], system="S")
