"""An answer printed while it is made, and the line of counters below it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mara_runtime.answer import Generation, Piece

Stream = Callable[..., Iterator["Piece"]]
"""As `AlignedDecoder.stream`."""


def answered(pieces: Iterable[Piece], show: Callable[[Piece], str], kept: list[Piece] | None = None) -> Generation:
    """Run a generation to its end and print, of each piece, what `show` makes of it. kept: takes all pieces."""
    result, open_line = None, False
    try:
        for piece in pieces:
            if kept is not None:
                kept.append(piece)
            if text := show(piece):
                print(text, end="", flush=True)
                open_line = True
            result = piece.result
    finally:
        if open_line and result is None:  # the message about the error gets a line of its own
            print(flush=True)
    assert result is not None  # the last piece carries it
    return result


def counters(result: Generation) -> str:
    """The counters of an answer in a line."""
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
        parts.append(f"{s.confirmed} of {s.drafted} drafted tokens confirmed")
    parts.append(f"ended by {result.finish_reason}")
    return "[" + "; ".join(parts) + "]"
