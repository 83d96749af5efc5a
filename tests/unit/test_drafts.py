"""Guesses from n-grams: which continuation is taken, and how sure of it one may be."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.schedule import drafts as drafts_module
from mara_runtime.schedule.drafts import LONGEST, NO_DRAFT, SHORTEST, NGrams


def knowing(*texts: Sequence[int], then: Sequence[int] = ()) -> NGrams:
    """A source that has heard these texts, the last of which goes on."""
    source = NGrams()
    for text in (*texts, then):
        source.begin(text)
    return source


def guess(source: NGrams, following: int, most: int = 16) -> list[int]:
    return list(source.draft(following, most).tokens)


# ── which continuation ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_followed_the_same_tokens_is_guessed() -> None:
    source = knowing([1, 2, 3, 4, 5], then=[9, 2])
    assert guess(source, 3) == [4, 5]  # after 2 3; then nothing is known of 4 5


def test_a_guess_goes_on_from_its_own_tokens_for_ever() -> None:
    assert guess(knowing(then=[1, 2, 3, 1, 2]), 3, 10) == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


def test_the_longest_match_wins() -> None:
    # After 2 3 came 5 lately; after 1 2 3 came 4, long ago.
    source = knowing([1, 2, 3, 4], [9, 2, 3, 5], then=[8, 1, 2])
    assert guess(source, 3, 1) == [4]
    assert guess(knowing([1, 2, 3, 4], [9, 2, 3, 5], then=[8, 7, 2]), 3, 1) == [5]


@pytest.mark.parametrize("length", range(SHORTEST, LONGEST + 1))
def test_every_length_is_looked_up_and_the_longest_of_them_first(length: int) -> None:
    # Texts that share their last n tokens with the present one, for every n: each went on with 100 + n.
    present = list(range(10, 10 + LONGEST + 1))
    texts = [[0, *present[-n:], 100 + n] for n in range(length, SHORTEST - 1, -1)]  # shorter matches are more recent
    assert guess(knowing(*texts, then=present[:-1]), present[-1], 1) == [100 + length]


def test_the_guess_after_a_guess_is_looked_up_with_all_that_lies_before_it() -> None:
    # After 1 2 3 came 4, and 5 lately after another 2 3: the text had but one token, and is longer by its guess.
    assert guess(knowing([1, 2, 3, 4], [9, 2, 3, 5], then=[1]), 2, 2) == [3, 4]


def test_what_lies_before_the_longest_match_does_not_matter() -> None:
    tail = [1, 2, 3, 4, 5, 6]
    assert len(tail) == LONGEST
    assert guess(knowing([7, *tail, 70], [8, *tail, 80], then=[7, *tail[:-1]]), 6, 1) == [80]


def test_the_most_recent_continuation_wins() -> None:
    assert guess(knowing([1, 2, 3], [1, 2, 4], then=[9, 1]), 2, 1) == [4]
    assert guess(knowing(then=[1, 2, 3, 1, 2, 4, 1]), 2, 1) == [4]


def test_one_token_alone_says_nothing() -> None:
    assert SHORTEST == 2
    assert knowing([1, 2, 3], then=[]).draft(2, 16) == NO_DRAFT
    assert knowing([1, 2, 3], then=[5]).draft(2, 16) == NO_DRAFT


def test_a_source_that_has_heard_nothing_guesses_nothing() -> None:
    assert NGrams().draft(3, 16) == NO_DRAFT
    assert knowing(then=[1, 2, 3]).draft(4, 16) == NO_DRAFT


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_is_heard_token_by_token() -> None:
    source = knowing(then=[1, 2])
    for token in (3, 4, 1, 2):
        source.extend(token, first_choice=True)
    assert guess(source, 3, 2) == [4, 1]
    told = knowing(then=[1, 2, 3, 4, 1, 2])
    assert guess(told, 3, 16) == guess(source, 3, 16)


def test_a_new_text_begins_with_nothing_before_it() -> None:
    # 2 3 is no n-gram of these texts: one ends with 2, the next begins with 3.
    source = knowing([1, 2], [3, 4], then=[9, 2])
    assert guess(source, 3) == []
    source.begin([])
    assert guess(source, 4) == []


def test_a_new_text_keeps_what_was_learned() -> None:
    source = knowing([1, 2, 3, 4], then=[7, 7, 7])
    source.begin([1])
    assert guess(source, 2) == [3, 4]


def test_a_draft_changes_nothing() -> None:
    source = knowing([1, 2, 3, 4], then=[1])
    assert source.draft(2, 5) == source.draft(2, 5) == source.draft(2, 5)
    source.draft(9, 5)
    assert guess(source, 2) == [3, 4]
    source.extend(2, first_choice=True)
    assert guess(source, 3) == [4]


def test_the_text_is_taken_as_it_comes() -> None:
    # From NumPy too: what is guessed are plain numbers.
    import numpy as np

    source = knowing(then=np.array([1, 2, 3, 1]))  # type: ignore[arg-type]
    assert [type(token) for token in source.draft(2, 1).tokens] == [int]


# ── how many ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 3), st.integers(0, 16))
def test_never_more_than_asked_and_a_chance_for_each(text: list[int], following: int, most: int) -> None:
    draft = knowing(then=text).draft(following, most)
    assert len(draft.tokens) == len(draft.chances) <= most
    assert all(0.0 < chance < 1.0 for chance in draft.chances)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 3))
def test_a_shorter_draft_is_the_beginning_of_a_longer_one(text: list[int], following: int) -> None:
    source = knowing(then=text)
    longest = source.draft(following, 16)
    for most in range(16):
        draft = source.draft(following, most)
        assert (draft.tokens, draft.chances) == (longest.tokens[:most], longest.chances[:most])


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=3), st.lists(st.integers(0, 3), max_size=30))
def test_the_guess_is_the_last_continuation_of_the_longest_known_n_gram(
    texts: list[list[int]], present: list[int]
) -> None:
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
    assert guess(source, 1, 1) == ([] if expected is None else [expected])


# ── how sure ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def chance_of(source: NGrams, following: int) -> float:
    return source.draft(following, 1).chances[0]


def heard(rounds: int, *, first_choice: bool = True, right: bool = True) -> NGrams:
    """A source that has guessed 3 after 1 2 so many times, and that then begins with 9 1."""
    source = knowing([1, 2, 3])
    for index in range(rounds):
        source.begin([100 + index, 1, 2])  # only 1 2 matches, the shortest
        source.extend(3 if right else 200 + index, first_choice)
        if not right:
            source.begin([1, 2, 3])  # what is guessed next is 3 again
    source.begin([9, 1])
    return source


def test_at_first_a_guess_is_held_for_unlikely() -> None:
    assert chance_of(heard(0), 2) == pytest.approx(0.25)


def test_chances_rise_while_guesses_are_confirmed_and_fall_while_they_are_not() -> None:
    rising = [chance_of(heard(rounds), 2) for rounds in (0, 1, 3, 10, 40, 200)]
    assert rising == sorted(set(rising))
    assert rising[-1] > 0.95
    falling = [chance_of(heard(rounds, right=False), 2) for rounds in (0, 1, 3, 10, 40, 200)]
    assert falling == sorted(set(falling), reverse=True)
    assert falling[-1] < 0.05


def test_a_token_that_was_not_the_first_choice_could_not_have_been_confirmed() -> None:
    assert chance_of(heard(40, first_choice=False), 2) == pytest.approx(chance_of(heard(40, right=False), 2))


def test_the_past_fades() -> None:
    source = heard(300)
    before = chance_of(source, 2)
    for index in range(60):
        source.begin([500 + index, 1, 2])
        source.extend(600 + index, True)
        source.begin([1, 2, 3])
    source.begin([9, 1])
    assert chance_of(source, 2) < 0.5 < before


def test_every_length_has_chances_of_its_own() -> None:
    source = heard(40)  # right after two tokens
    for index in range(40):  # wrong after six
        source.begin([10, 11, 12, 13, 14, 15, 700 + index])
        source.begin([10, 11, 12, 13, 14, 15])
        source.extend(800 + index, True)
    source.begin([9, 1])
    assert chance_of(source, 2) > 0.8
    source.begin([10, 11, 12, 13, 14])
    assert chance_of(source, 15) < 0.1


def test_a_prompt_is_no_test_of_the_guesses() -> None:
    # Nobody would have drafted in it.
    source = heard(0)
    for _ in range(50):
        source.begin([5, 1, 2, 3, 6, 1, 2, 3])
    source.begin([9, 1])
    assert chance_of(source, 2) == pytest.approx(0.25)


def test_where_nothing_was_guessed_nothing_is_scored() -> None:
    source = heard(3)
    before = chance_of(source, 2)
    for index in range(20):
        source.begin([300 + index, 400 + index])
        source.extend(5, True)
    source.begin([9, 1])
    assert chance_of(source, 2) == before


# ── how much is kept ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_that_is_full_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "MOST_NGRAMS", 10)
    source = NGrams()
    for start in range(0, 1000, 7):
        source.begin(range(start, start + 7))
        for table in source._after.values():
            assert len(table) <= 10
    source.begin([0, 1])
    assert guess(source, 2) == []  # long forgotten
    source.begin([994, 995])
    assert guess(source, 996, 2) == [997, 998]  # what came last is known


def test_a_long_prompt_is_heard_in_time() -> None:
    source = knowing([1, 2, 3])
    source.begin([index % 5000 for index in range(20_000)])
    source.begin([9, 17])
    assert guess(source, 18, 3) == [19, 20, 21]
