"""Guessing how a text goes on, for free: what followed the same tokens the last time they occurred.

A guess costs rows of a pass that is run anyway, and is verified there against the exact algorithm (docs/method.md),
so a wrong one costs time and never changes the answer. Source of the idea: prompt lookup decoding (Saxena, 2023).
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
    """estimated probability that a token is confirmed when those before it are; 0 … 1"""


NO_DRAFT = Draft((), ())


class DraftSource(Protocol):
    """Where guesses come from. It sees every token of the text, in order, and may learn from it."""

    def begin(self, tokens: Sequence[int]) -> None:
        """A text begins with these tokens."""

    def extend(self, token: int, first_choice: bool) -> None:
        """The text goes on with `token`; first_choice: only such a token could have been confirmed."""

    def draft(self, following: int, most: int) -> Draft:
        """Guess up to `most` tokens, ids of the vocabulary, after the text so far and `following`."""


LONGEST, SHORTEST = 6, 2
"""Tokens of an n-gram that is looked up; the longest that is known decides."""
MOST_NGRAMS = 20_000
"""Of each length; a table that grows beyond is begun anew."""
_PRIOR = (1.0, 3.0)  # confirmed and missed guesses that every length of n-gram begins with
_MEMORY = 0.98  # weight of the past when a guess is counted


class NGrams:
    """The last continuation of every n-gram of the prompts and answers of one decoder."""

    def __init__(self) -> None:
        self._after: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(SHORTEST, LONGEST + 1)}
        self._text: list[int] = []
        self._hits = {n: list(_PRIOR) for n in self._after}  # [confirmed, missed], fading

    def begin(self, tokens: Sequence[int]) -> None:
        """See `DraftSource`."""
        self._text = []
        for token in tokens:
            self._learn(int(token))

    def extend(self, token: int, first_choice: bool) -> None:
        """See `DraftSource`. What would have been guessed here is scored, whether or not a pass carried it."""
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
