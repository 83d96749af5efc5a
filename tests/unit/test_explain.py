"""`mara-run --explain`: what is shown of the decisions of an answer, and how wide it is."""

from __future__ import annotations

import ctypes
import io
import locale
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from mara_deploy.commands.explain import Marker, candidates, changes, explanation, marked, namer, summary, tally
from mara_deploy.commands.terminal import Column, clipped, has_colour, printable, table, visible, width, wrapped
from mara_runtime.answer import Piece
from mara_runtime.bundle import Bundle
from mara_runtime.candidates import Candidates
from mara_runtime.stats import Step
from mara_runtime.text import TextSide
from tests.unit import helpers, tiny_tokenizers

WORDS = ["I", " am", " tired", " Please", " wait", ",", "\n", "中文", "\x1b[2J", " e\u0301", "🙂", "\u0301", "<|end|>"]
STYLE = re.compile(r"\x1b\[[\d;]*m")


def name(token: int) -> str:
    return WORDS[token]


def step(ids: list[int], margins: dict[int, float], rank: int = 1, forced: bool = False) -> Step:
    p = np.array([2.0**-i for i in range(len(ids))])
    p /= p.sum()
    return Step(ids[rank - 1], 7, Candidates(np.array(ids), p, np.log(p), 1.0), rank, margins, forced)


STEPS = [
    step([0], {}),
    step([1, 2], {1: 0.5}),
    step([2, 4, 3], {1: -1.25, 2: -0.5, 3: 8.0}, rank=3),
    step([4, 2], {1: -3.0, 2: -0.004}, forced=True),
    step([2, 0], {1: 0.75, 2: 1.5}, rank=2),
    step([5, 12], {1: -1.0, 2: 1.0}, rank=2),
]


def pieces(steps: list[Step], *texts: str) -> list[Piece]:
    """The last one ends the answer."""
    result: Any = object()
    shown = texts or tuple(name(step.token) for step in steps)
    return [Piece(text, each, result if each is steps[-1] else None) for text, each in zip(shown, steps, strict=True)]


def without_colour(found: list[Piece]) -> str:
    return "".join(map(Marker(name, colour=False), found))


def test_changed_and_forced_tokens_have_signs_around_their_words() -> None:
    found = pieces(STEPS, "I", " am", " Please", " wait", "I", "")
    assert without_colour(found) == "I am ‹Please› «wait»‹I›‹<|end|>›"
    coloured = "".join(map(Marker(name, colour=True), found))
    assert STYLE.sub("", coloured) == without_colour(found)
    assert len(STYLE.findall(coloured)) == 2 * 4
    assert marked(found, None, colour=False) == "0 1 ‹3› «4» ‹0› ‹12›"


def test_a_mark_waits_for_text_that_is_withheld_and_blanks_are_shown() -> None:
    changed, plain = STEPS[2], STEPS[0]
    assert without_colour(pieces([changed, plain, plain], "", "é", "!")) == "‹é›!"
    assert without_colour(pieces([changed, plain, plain], "\n", "a", "b")) == "‹↵›\nab"
    assert without_colour(pieces([changed, plain], "  a \n", "\x1b[2J")) == "  ‹a› \n\\x1b[2J"
    assert without_colour(pieces([changed, plain], "", "")) == ""  # withheld for a stop text, which came


def test_the_table_has_the_changed_and_forced_positions() -> None:
    lines = explanation(pieces(STEPS), name, 0.0, 100, colour=False)
    assert [re.split(r"  +", line.strip()) for line in lines] == [
        ["token", "chosen", "rank", "p", "margin", "LLM's 1st", "p", "margin", "verdict"],
        ["3", "‹␣Please›", "3/3", "14%", "+8.00", "␣tired", "57%", "-1.25", "1 accepted, 2 rejected"],
        ["4", "«␣wait»", "1/2", "67%", "-3.00", "␣wait", "67%", "-3.00", "all 2 rejected"],
        ["5", "‹I›", "2/2", "33%", "+1.50", "␣tired", "67%", "+0.75", "2 accepted, 0 rejected"],
        ["6", "‹<|end|>›", "2/2", "33%", "+1.00", ",", "67%", "-1.00", "1 accepted, 1 rejected"],
        ["‹changed›: the LLM's first choice was passed over", "«forced»: all were rejected"],
        ["6 tokens, 5 decisions: 1 accepted at rank 1, 3 changed, 1 forced"],
    ]
    assert explanation(pieces(STEPS[:2]), name, 0.0, 100, colour=False) == [
        "2 tokens, 1 decision: 1 accepted at rank 1, 0 changed, 0 forced"
    ]
    assert summary(tally([STEPS[0]])) == "1 token, none of them decided by an agent"
    # a first choice that was not examined, in another order; and another threshold
    odd = [step([0, 1, 2], {2: 1.0, 3: 0.5}, rank=2)]
    assert re.split(r"  +", changes(odd, name, 0.75, 100, colour=False)[1].strip())[-2:] == [
        "–", "1 accepted, 1 rejected",
    ]  # fmt: skip


def test_the_candidates_of_a_token() -> None:
    lines = candidates(STEPS, 3, name, 0.0, 100, colour=True)
    assert [bool(STYLE.search(line)) for line in lines] == [False, False, False, False, True]
    assert [re.split(r"  +", STYLE.sub("", line).strip()) for line in lines] == [
        ["token 3 of 6: ␣Please, rank 3 of 3, changed"],
        ["rank", "token", "p", "margin", "verdict"],
        ["1", "␣tired", "57%", "-1.25", "rejected"],
        ["2", "␣wait", "29%", "-0.50", "rejected"],
        ["3", "␣Please", "14%", "+8.00", "accepted, chosen"],
    ]
    said = [candidates(STEPS, n, name, 0.0, 100, colour=False)[2:] for n in (1, 2)]
    assert [[line.split("  ")[-1] for line in lines] for lines in said] == [
        ["chosen"],
        ["accepted, chosen", "not asked"],
    ]


@pytest.mark.parametrize("most", [30, 60, 80, 100])
@pytest.mark.parametrize("colour", [False, True])
def test_letters_of_any_width_leave_the_columns_in_line(most: int, colour: bool) -> None:
    steps = [step([2, token], {1: -1.0, 2: 1.0}, rank=2) for token in range(len(WORDS)) if token != 2]
    head, *lines = (STYLE.sub("", line) for line in changes(steps, name, 0.0, most, colour)[: len(steps) + 1])
    with libc_width() as measure:
        assert all(measure(line) <= most for line in (head, *lines))
        starts = {measure(line[: line.index("␣tired")]) for line in lines}
        assert starts == {measure(head[: head.index("LLM's")])}
    assert not any(unicodedata.category(c)[0] == "C" for line in lines for c in line)


@contextmanager
def libc_width() -> Iterator[Any]:
    """The C library's widths."""
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        wcwidth = ctypes.CDLL(None).wcwidth
    except (locale.Error, AttributeError, OSError):
        pytest.skip("the C library has no wcwidth for UTF-8")
    try:
        yield lambda text: sum(wcwidth(ord(character)) for character in text)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


def test_widths_are_those_of_the_c_library() -> None:
    letters = [c for c in map(chr, range(0x20, 0x110000)) if unicodedata.category(c) not in ("Cc", "Cs", "Cn", "Co")]
    with libc_width() as measure:
        differ = [c for c in letters if measure(c) >= 0 and measure(c) != width(c)]
    assert len(differ) < len(letters) / 500, differ  # each follows a Unicode version of its own


def test_text_for_a_terminal() -> None:
    assert printable("a\x1b]0;t\x07b\n\t\x9bé") == "a\\x1b]0;t\\x07b\n\t\\x9bé"
    assert visible(" a\tb\r\n\u202e\ud800\U000e0001") == "␣a⇥b↵\\u202e\\ud800\\U000e0001"
    assert [clipped("中文字", most) for most in (6, 5, 4, 3, 2)] == ["中文字", "中文…", "中…", "中…", "…"]
    assert wrapped("one two  three\n\nfour", 8) == ["one two", "three", "", "four"]
    assert wrapped("one two", 3, "  ") == ["one", "  t", "  w", "  o"]
    red = "\x1b[31m中文\x1b[0m"
    assert wrapped(f"a {red}", 4) == ["a", red]
    assert "".join(wrapped(red, 2)) == red
    assert [width(line) for line in wrapped(red, 2)] == [2, 2]
    heads = [Column("n", right=True), Column("text", elastic=True), Column("x", spare=1)]
    assert table(heads, [["1", "a" * 30, "y"], ["22", "b", "yy"]], 40) == [
        " n  text                  x",
        " 1  aaaaaaaaaaaaaaaaaaa…  y",
        "22  b                     yy",
    ]
    assert table(heads, [["1", "a" * 30, "y"]], 14) == ["n  text", "1  aaaaaaaaaa…"]


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    assert not has_colour(terminal)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colour(terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(terminal)


def test_tokens_have_the_spaces_that_they_have_within_a_text(tmp_path: Any) -> None:
    tokenizer = tiny_tokenizers.byte_fallback_tokenizer()
    side = TextSide(Bundle.open(helpers.make_bundle(tmp_path, tokenizer=tokenizer, vocab_size=300)))
    found = [namer(side)(tokenizer.token_to_id(word)) for word in ("▁a", "a", "▁", "▁▁", "中", "</s>")]
    assert found == [" a", "a", " ", "  ", "中", "</s>"]
