"""`mara-run --explain`: what the agents changed in an answer, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from mara_deploy.commands.terminal import Column, printable, styled, table, visible, wrapped

if TYPE_CHECKING:
    from mara_runtime.answer import Piece
    from mara_runtime.stats import Step
    from mara_runtime.text import TextSide

Name = Callable[[int], str]
"""The text of a token by its id."""
ONLY, FIRST, CHANGED, FORCED = "only", "first", "changed", "forced"
"""How a token was chosen: without a choice, accepted at rank 1, accepted at another rank, all were rejected."""
_SIGNS = {CHANGED: ("‹", "›"), FORCED: ("«", "»")}
_STYLES = {CHANGED: "36", FORCED: "1;31"}
_NONE = "–"


def namer(side: TextSide | None) -> Name:
    """The text of tokens, with a leading space where they have one; their ids without a tokenizer."""
    if side is None:
        return str

    def name(token: int) -> str:
        once, twice = (side.tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        # at the beginning of a text, some decoders drop a space
        return str(twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once)

    return name


def kind(step: Step) -> str:
    """ONLY, FIRST, CHANGED or FORCED."""
    if not step.margins:
        return ONLY
    return FORCED if step.forced else FIRST if step.rank == 1 else CHANGED


class Marker:
    """Marks the tokens of an answer while it is made: ‹changed›, «forced»."""

    def __init__(self, name: Name, colour: bool) -> None:
        self._name, self._colour = name, colour
        self._kinds: list[str] = []  # of tokens whose text is still withheld, as that of a part of a character

    def __call__(self, piece: Piece) -> str:
        """The text of the next piece."""
        self._kinds.append(kind(piece.step))
        text = piece.text
        if not text and piece.result is None:
            return ""
        kinds, self._kinds = self._kinds if text else self._kinds[-1:], []
        what = next((each for each in (FORCED, CHANGED) if each in kinds), "")
        if not what:
            return printable(text)
        body = text.strip()
        before, _, after = text.partition(body) if body else ("", "", "\n" * text.count("\n"))
        body = printable(body) or visible(text or self._name(piece.step.token))  # an end of the answer has no text
        return before + _signed(body, what, self._colour) + after


def _signed(text: str, what: str, colour: bool = False) -> str:
    left, right = _SIGNS.get(what, ("", ""))
    return styled(left + text + right, _STYLES.get(what, ""), colour)


def marked(pieces: Sequence[Piece], side: TextSide | None, colour: bool) -> str:
    """The text of an answer with ‹changed› and «forced» tokens marked; without a tokenizer its token ids, so marked."""
    if side is None:
        return " ".join(_signed(str(piece.step.token), kind(piece.step), colour) for piece in pieces)
    return "".join(map(Marker(namer(side), colour), pieces))


def explanation(pieces: Sequence[Piece], name: Name, threshold: float, most: int, colour: bool) -> list[str]:
    """Lines of `most` columns below an answer: the changed and forced tokens, and a summary.

    threshold: of the margins.
    """
    steps = [piece.step for piece in pieces]
    return [*changes(steps, name, threshold, most, colour), *wrapped(summary(tally(steps)), most)]


def changes(steps: Sequence[Step], name: Name, threshold: float, most: int, colour: bool) -> list[str]:
    """A table of the changed and the forced tokens, and what its signs mean; nothing if there are none."""
    found = [(number, step) for number, step in enumerate(steps, 1) if kind(step) in _SIGNS]
    if not found:
        return []
    heads = [
        Column("token", right=True),
        Column("chosen", elastic=True),
        Column("rank", right=True, spare=1),
        Column("p", right=True, spare=4),
        Column("margin", right=True, spare=3),
        Column("LLM's 1st", elastic=True),
        Column("p", right=True, spare=6),
        Column("margin", right=True, spare=5),
        Column("verdict", spare=2),
    ]
    rows = []
    for number, step in found:
        p = step.candidates.probabilities
        rows.append(
            [
                str(number),
                _signed(visible(name(step.token)), kind(step)),
                f"{step.rank}/{len(p)}",
                _percent(p[step.rank - 1]),
                _margin(step, step.rank),
                visible(name(int(step.candidates.ids[0]))),
                _percent(p[0]),
                _margin(step, 1),
                verdict(step, threshold),
            ]
        )
    lines = table(heads, rows, most, lambda row, column: _STYLES[kind(found[row][1])] if colour and column == 1 else "")
    return [*lines, *wrapped("‹changed›: the LLM's first choice was passed over  «forced»: all were rejected", most)]


def verdict(step: Step, threshold: float) -> str:
    """What the agents said about the candidates that were examined; empty where none was."""
    accepted = sum(margin > threshold for margin in step.margins.values())
    rejected = len(step.margins) - accepted
    if not accepted:
        return f"all {rejected} rejected" if rejected else ""
    return f"{accepted} accepted, {rejected} rejected"


def tally(steps: Sequence[Step]) -> Counter[str]:
    """How many tokens are of each kind."""
    return Counter(map(kind, steps))


def summary(counts: Mapping[str, int]) -> str:
    """How many tokens were accepted at rank 1, changed and forced. counts: of `tally`."""
    tokens = sum(counts.values())
    decisions = tokens - counts[ONLY]
    if not decisions:
        return f"{_count(tokens, 'token')}, none of them decided by an agent"
    return (
        f"{_count(tokens, 'token')}, {_count(decisions, 'decision')}: {counts[FIRST]} accepted at rank 1, "
        f"{counts[CHANGED]} changed, {counts[FORCED]} forced"
    )


def candidates(steps: Sequence[Step], number: int, name: Name, threshold: float, most: int, colour: bool) -> list[str]:
    """The candidates of an answer's token, `number` from 1, by LM rank: probability, margin, verdict."""
    step = steps[number - 1]
    how = {ONLY: "without a decision", FIRST: "accepted", CHANGED: "changed", FORCED: "forced"}[kind(step)]
    title = f"token {number} of {len(steps)}: {visible(name(step.token))}, rank {step.rank} of {len(step.candidates)}, "
    heads = [
        Column("rank", right=True),
        Column("token", elastic=True),
        Column("p", right=True),
        Column("margin", right=True),
        Column("verdict", spare=1),
    ]
    rows = []
    for rank, (token, p) in enumerate(zip(step.candidates.ids, step.candidates.probabilities, strict=True), 1):
        margin = step.margins.get(rank)
        said = "not asked" if margin is None else "accepted" if margin > threshold else "rejected"
        if rank == step.rank:
            said = f"{said}, chosen" if margin is not None else "chosen"
        rows.append([str(rank), visible(name(int(token))), _percent(p), _margin(step, rank), said])
    style = _STYLES.get(kind(step), "1")
    lines = table(heads, rows, most, lambda row, column: style if colour and row == step.rank - 1 else "")
    return [*wrapped(title + how, most), *lines]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _percent(probability: float) -> str:
    return "<1%" if probability < 0.005 else f"{probability:.0%}"


def _margin(step: Step, rank: int) -> str:
    margin = step.margins.get(rank)
    return _NONE if margin is None else f"{margin:+.2f}"
