"""Text on a terminal: its width in columns, what is shown of control characters, colour, wrapping, tables."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TextIO

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_PART = re.compile(r"\x1b\[[0-9;]*m|.", re.DOTALL)
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥"}
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that have no letter, or move others: controls, formats, surrogates, separators of lines."""


def columns(least: int = 20) -> int:
    """Columns of the terminal; 100 where there is none."""
    return max(least, shutil.get_terminal_size((100, 24)).columns)


def has_colour(stream: TextIO) -> bool:
    """Whether colours may be written to a stream: a terminal that has them, and NO_COLOR (no-color.org) is unset."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, colour: bool) -> str:
    """The text in a style, an SGR parameter such as "31"; as it is without colour or style."""
    return f"\x1b[{style}m{text}\x1b[0m" if colour and style and text else text


def width(text: str) -> int:
    """Columns of a text, by East Asian width; combining characters and styles have none."""
    return sum(map(_width, _STYLE.sub("", text)))


def _width(character: str) -> int:
    joins = "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff"  # to the Hangul letter before it
    if joins or (unicodedata.category(character) in ("Mn", "Me", "Cf") and character != "\N{SOFT HYPHEN}"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def printable(text: str) -> str:
    """A text of several lines that cannot move the cursor or change the terminal: controls become escapes."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else _escape(c) for c in text)


def visible(text: str) -> str:
    """A piece of text in one line, with signs for white space and escapes for what has no letter."""
    shown = "".join(
        _VISIBLE.get(c) or (_escape(c) if unicodedata.category(c) in _UNSEEN else c) for c in text.replace("\r\n", "\n")
    )
    return "◌" + shown if shown and width(shown[0]) == 0 else shown


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def clipped(text: str, most: int) -> str:
    """The beginning of a text without styles, of `most` columns at most; "…" stands for the rest."""
    if width(text) <= most:
        return text
    kept, room = "", most - 1
    for character in text:
        if (room := room - _width(character)) < 0:
            break
        kept += character
    return kept + "…"


def wrapped(text: str, most: int, indent: str = "") -> list[str]:
    """Lines of `most` columns at most, broken between words, long words within; `indent` before all but the first.

    A line break of the text stays one.
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in re.findall(r"\s*\S+|\s+\Z", paragraph.expandtabs()):
            if line.strip() and width(line) + width(word) > most:
                lines.append(line)
                line, word = indent, word.lstrip()
            for part in _PART.findall(word):
                if width(line) + width(part) > most:
                    lines.append(line)
                    line = indent
                line += part
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    right: bool = False
    """numbers end at the right"""
    elastic: bool = False
    """cells are cut where there is no room"""
    spare: int = 0
    """the column with the highest number goes first where there is no room; 0: it stays"""


_ELASTIC = 9, 20
"""Columns that an elastic column has at least and at most."""
_GAP = "  "


def table(
    heads: Sequence[Column],
    rows: Sequence[Sequence[str]],
    most: int,
    paint: Callable[[int, int], str] = lambda row, column: "",
) -> list[str]:
    """Lines of a table of `most` columns, if its columns can be that narrow. Cells are in one line, without styles.

    paint: the style of a cell, by its row and column.
    """
    sizes = [max(width(text) for text in (head.title, *(cells[i] for cells in rows))) for i, head in enumerate(heads)]
    least = [min(size, _ELASTIC[0]) if head.elastic else size for head, size in zip(heads, sizes, strict=True)]
    shown = list(range(len(heads)))
    while sum(least[i] for i in shown) + len(_GAP) * (len(shown) - 1) > most:
        first = max(shown, key=lambda i: heads[i].spare)
        if not heads[first].spare:
            break
        shown.remove(first)
    elastic = [i for i in shown if heads[i].elastic]
    room = most - len(_GAP) * (len(shown) - 1) - sum(sizes[i] for i in shown if i not in elastic)
    for place, i in enumerate(sorted(elastic, key=sizes.__getitem__)):  # what a narrow one leaves is for the others
        sizes[i] = max(least[i], min(sizes[i], _ELASTIC[1], room // (len(elastic) - place)))
        room -= sizes[i]

    def line(cells: Sequence[str], style: Callable[[int], str]) -> str:
        parts = []
        for i in shown:
            text = clipped(cells[i], sizes[i])
            blank = " " * (sizes[i] - width(text))
            text = styled(text, style(i), bool(style(i)))
            parts.append(blank + text if heads[i].right else text + blank)
        return _GAP.join(parts).rstrip()

    return [
        line([head.title for head in heads], lambda _: ""),
        *(line(cells, partial(paint, row)) for row, cells in enumerate(rows)),
    ]
