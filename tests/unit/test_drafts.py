"""Guesses from n-grams: which continuation is taken, and its estimated chance."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.schedule import drafts as drafts_module
from mara_runtime.schedule.drafts import LONGEST, NO_DRAFT, SHORTEST, NGrams


def knowing(*texts: Sequence[int], then: Sequence[int] = ()) -> NGrams:
    """A source that has heard these texts, and the beginning of another."""
    source = NGrams()
    for text in (*texts, then):
        source.begin(text)
    return source


def guess(source: NGrams, following: int, most: int = 16) -> list[int]:
    return list(source.draft(following, most).tokens)


# ── which continuation ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("texts", "then", "following", "most", "tokens"),
    [
        ([[1, 2, 3, 4, 5]], [9, 2], 3, 16, [4, 5]),  # after 2 3; 4 5 is unknown
        ([], [1, 2, 3, 1, 2], 3, 7, [1, 2, 3, 1, 2, 3, 1]),  # a guess continues its own tokens
        ([[1, 2, 3, 4], [9, 2, 3, 5]], [8, 1, 2], 3, 1, [4]),  # the longest match …
        ([[1, 2, 3, 4], [9, 2, 3, 5]], [8, 7, 2], 3, 1, [5]),  # … then the most recent
        ([[1, 2, 3, 4], [9, 2, 3, 5]], [1], 2, 2, [3, 4]),  # guessed tokens belong to the match
        ([[7, 1, 2, 3, 4, 5, 6, 70], [8, 1, 2, 3, 4, 5, 6, 80]], [7, 1, 2, 3, 4, 5], 6, 1, [80]),  # six tokens at most
        ([[1, 2, 3]], [], 2, 16, []),  # one token alone says nothing
        ([[1, 2], [3, 4]], [9, 2], 3, 16, []),  # no n-gram crosses the border of texts
        ([[1, 2, 3, 4], [7, 7, 7]], [1], 2, 16, [3, 4]),  # a new text keeps what was learned
    ],
)
def test_what_is_guessed(texts, then, following, most, tokens):
    source = knowing(*texts, then=then)
    assert guess(source, following, most) == guess(source, following, most) == tokens  # a draft changes nothing
    assert NGrams().draft(following, most) == NO_DRAFT


texts_of = st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=3)


@given(texts_of, st.lists(st.integers(0, 3), max_size=30), st.integers(0, 16))
def test_a_guess_is_the_last_continuation_of_the_longest_known_n_gram(texts, present, most):
    source = knowing(*texts, then=present)
    tail, heard = [*present, 1], [*texts, present]
    expected = None
    for length in range(min(LONGEST, len(tail)), SHORTEST - 1, -1):
        for text in heard:
            for at in range(length, len(text)):
                if text[at - length : at] == tail[-length:]:
                    expected = text[at]  # the last of them stays
        if expected is not None:
            break
    longest, draft = source.draft(1, 16), source.draft(1, most)
    assert longest.tokens[:1] == (() if expected is None else (expected,))
    assert (draft.tokens, draft.chances) == (longest.tokens[:most], longest.chances[:most])
    assert len(draft.tokens) == len(draft.chances)
    assert all(0.0 < chance < 1.0 for chance in draft.chances)


def test_an_answer_is_heard_token_by_token():
    source = knowing(then=np.array([1, 2]))  # type: ignore[arg-type]
    for token in (3, 4, 1, 2):
        source.extend(token, first_choice=True)
    draft = source.draft(3, 16)
    assert draft.tokens == knowing(then=[1, 2, 3, 4, 1, 2]).draft(3, 16).tokens
    assert {type(token) for token in draft.tokens} == {int}


# ── the chance ───────────────────────────────────────────────────────────────────────────────────────────────────────


def chance_of(source: NGrams, following: int) -> float:
    return source.draft(following, 1).chances[0]


def after(rounds: int, *, first_choice: bool = True, right: bool = True, source: NGrams | None = None) -> NGrams:
    """A source that has guessed 3 after 1 2 so many times, at the beginning of a text 9 1."""
    base = 100 if source is None else 1000
    source = source or knowing([1, 2, 3])
    for index in range(rounds):
        source.begin([base + index, 1, 2])  # only 1 2 matches, the shortest
        source.extend(3 if right else 200 + index, first_choice)
        if not right:
            source.begin([1, 2, 3])  # the next guess is 3 again
    source.begin([9, 1])
    return source


def test_chances_begin_low_rise_with_confirmed_guesses_and_fall_with_missed_ones():
    rising = [chance_of(after(rounds), 2) for rounds in (0, 1, 3, 10, 40, 200)]
    falling = [chance_of(after(rounds, right=False), 2) for rounds in (0, 1, 3, 10, 40, 200)]
    assert rising[0] == falling[0] == pytest.approx(0.25)
    assert rising == sorted(set(rising))
    assert falling == sorted(set(falling), reverse=True)
    assert (rising[-1] > 0.95, falling[-1] < 0.05) == (True, True)


def test_only_a_first_choice_confirms_a_guess_and_the_past_fades():
    missed = chance_of(after(40, right=False), 2)
    assert chance_of(after(40, first_choice=False), 2) == pytest.approx(missed)
    assert chance_of(after(60, right=False, source=after(300)), 2) < 0.5


def test_each_length_has_chances_of_its_own():
    source = after(40)  # right after two tokens
    for index in range(40):  # wrong after six
        source.begin([10, 11, 12, 13, 14, 15, 700 + index])
        source.begin([10, 11, 12, 13, 14, 15])
        source.extend(800 + index, True)
    source.begin([9, 1])
    assert chance_of(source, 2) > 0.8
    source.begin([10, 11, 12, 13, 14])
    assert chance_of(source, 15) < 0.1


def test_prompts_and_tokens_without_a_guess_change_no_chance():
    source = after(3)
    before = chance_of(source, 2)
    for index in range(20):
        source.begin([300 + index, 400 + index])
        source.extend(5, True)
        source.begin([5, 1, 2, 3, 6, 1, 2, 3])
    source.begin([9, 1])
    assert chance_of(source, 2) == before


def test_a_full_table_starts_over_and_keeps_what_came_last(monkeypatch):
    monkeypatch.setattr(drafts_module, "MOST_NGRAMS", 10)
    source = NGrams()
    for start in range(0, 1000, 7):
        source.begin(range(start, start + 7))
    source.begin([0, 1])
    assert guess(source, 2) == []
    source.begin([994, 995])
    assert guess(source, 996, 2) == [997, 998]
