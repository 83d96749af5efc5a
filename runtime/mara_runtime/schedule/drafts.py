"""Drafts: guessed continuations, from what followed the same tokens the last time they occurred.

A draft costs rows of a pass that runs anyway, and is verified there against the exact algorithm
(docs/internals/method.md): a wrong one costs time and never changes the answer. Source: prompt lookup decoding
(Saxena, 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """A guessed continuation."""

    tokens: tuple[int, ...]
    chances: tuple[float, ...]
    """estimated probability that a token is confirmed if those before it are; 0 … 1"""


NO_DRAFT = Draft((), ())


class DraftSource(Protocol):
    """Where drafts come from. It sees every token of the text, in order, and may learn from it."""

    def begin(self, tokens: Sequence[int]) -> None:
        """Start a text with these tokens."""

    def extend(self, token: int, first_choice: bool) -> None:
        """Append `token` to the text; first_choice: the LM's first choice and accepted, as a confirmed draft is."""

    def draft(self, following: int, most: int) -> Draft:
        """Guess up to `most` tokens, ids of the vocabulary, after the text so far and `following`."""


LONGEST, SHORTEST = 6, 2
"""Lengths of n-grams that are looked up; the longest known one decides."""
MOST_NGRAMS = 20_000
"""Per length; a table that would grow beyond is cleared."""
_PRIOR = (1.0, 3.0)  # initial counts of confirmed and missed guesses, per length
_MEMORY = 0.98  # decay of the counts


class NGrams:
    """The last continuation of every n-gram of the prompts and answers of one decoder."""

    def __init__(self) -> None:
        self._after: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(SHORTEST, LONGEST + 1)}
        self._text: list[int] = []
        self._hits = {n: list(_PRIOR) for n in self._after}  # [confirmed, missed], decaying

    def begin(self, tokens: Sequence[int]) -> None:
        """See `DraftSource`."""
        self._text = []
        for token in tokens:
            self._learn(int(token))

    def extend(self, token: int, first_choice: bool) -> None:
        """See `DraftSource`. What would have been guessed here is scored, whether or not it was run."""
        length, guess = self._look_up(self._text)
        if guess is not None:
            hit = first_choice and guess == token
            counts = self._hits[length]
            counts[0] = counts[0] * _MEMORY + hit
            counts[1] = counts[1] * _MEMORY + (not hit)
        self._learn(token)

    def draft(self, following: int, most: int) -> Draft:
        """See `DraftSource`."""
        tail = [*self._text[1 - LONGEST :], following] if LONGEST > 1 else [following]
        tokens: list[int] = []
        chances: list[float] = []
        while len(tokens) < most:
            length, guess = self._look_up(tail)
            if guess is None:
                break
            confirmed, missed = self._hits[length]
            tokens.append(guess)
            chances.append(confirmed / (confirmed + missed))
            tail = [*tail[1:], guess] if len(tail) >= LONGEST else [*tail, guess]
        return Draft(tuple(tokens), tuple(chances))

    def _look_up(self, text: list[int]) -> tuple[int, int | None]:
        for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            guess = self._after[length].get(tuple(text[-length:]))
            if guess is not None:
                return length, guess
        return 0, None

    def _learn(self, token: int) -> None:
        for length in range(SHORTEST, min(LONGEST, len(self._text)) + 1):
            table = self._after[length]
            if len(table) >= MOST_NGRAMS:
                table.clear()
            table[tuple(self._text[-length:])] = token
        self._text.append(token)
