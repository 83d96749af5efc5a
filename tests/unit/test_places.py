"""Which place a text gets, and what it begins with."""

from collections.abc import Sequence

import pytest

from mara_runtime.engines.kv_cache import WORTH_COPYING, Places
from mara_runtime.errors import EngineError
from tests.table_engine import TableMemories

LONG = [*range(100, 140)]


def places_with(*texts: Sequence[int], most: int = 8) -> tuple[Places, TableMemories]:
    """Places that hold these texts, which began in this order."""
    memories = TableMemories(64, most)
    places = Places(memories)
    places.open(len(texts))
    for place, text in enumerate(texts):
        assert places.seat([*text, 0], [place]) == place
        places[place].tokens[:] = text
        memories[place].entries[: len(text)] = [(token, index) for index, token in enumerate(text)]
    return places, memories


def test_there_are_as_many_as_were_asked_for_at_most() -> None:
    places, _ = places_with([], most=3)
    for count in (1, 3, 2):
        places.open(count)
    assert (len(places), places.most) == (3, 3)
    with pytest.raises(EngineError, match="4 conversations at once are more than the 3"):
        places.open(4)


@pytest.mark.parametrize(
    ("texts", "prompt", "free", "place"),
    [
        ([[], [], []], [5], [0, 1, 2], 0),  # the first, as long as nobody has begun anywhere else …
        ([[1, 2, 3, 4], [1, 2], [9]], [1, 2, 3, 4, 5], [0, 1, 2], 0),  # the conversation that goes on
        ([[1, 2, 3, 4], [1, 2], [9]], [1, 2, 7], [0, 1, 2], 0),  # half of it is kept
        ([[1, 2, 3, 4, 5], [9], [1]], [1, 2, 7], [0, 1, 2], 0),  # less: the oldest, which is the same
        ([[9], [1, 2, 3, 4, 5], [8]], [1, 2, 7], [0, 1, 2], 0),  # less: the oldest
        ([[9], [1, 2, 3, 4, 5], [8]], [1, 2, 3, 7], [0, 2], 0),  # it is taken
        ([[9], [8], [7]], [1], [1, 2], 1),
    ],
    ids=str,
)
def test_a_text_goes_on_where_it_was_or_takes_the_place_left_alone_longest(
    texts: list[list[int]], prompt: list[int], free: list[int], place: int
) -> None:
    places, _ = places_with(*texts)
    assert places.seat(prompt, free) == place


def test_places_without_a_text_are_taken_first_from_the_first_on() -> None:
    places, _ = places_with([1])
    places.open(4)
    assert [places.seat([5, i], range(4)) for i in range(4)] == [1, 2, 3, 0]
    assert [places.seat([5, i], range(4)) for i in range(4)] == [1, 2, 3, 0]


@pytest.mark.parametrize("common", [WORTH_COPYING - 1, WORTH_COPYING])
def test_a_long_common_prefix_is_copied_from_any_place(common: int) -> None:
    places, memories = places_with([1, 2], LONG)
    prompt = [*LONG[:common], 7, 8]
    assert places.seat(prompt, [0]) == 0
    copied = common >= WORTH_COPYING
    assert places[0].tokens == (prompt[:common] if copied else [1, 2])
    if copied:
        assert memories[0].entries[:common] == [(token, index) for index, token in enumerate(prompt[:common])]
    assert places[1].tokens == LONG


def test_what_is_copied_leaves_the_prompt_s_last_token_to_run() -> None:
    places, _ = places_with([1, 2], LONG)
    places.seat(LONG, [0])
    assert places[0].tokens == LONG[:-1]


def test_a_prompt_that_only_begins_like_another_text_leaves_that_text_alone() -> None:
    """A system prompt, say; the next turn of that conversation keeps all but a few tokens, and goes on in its place."""
    begins = [*LONG[:20], 7]
    places, _ = places_with([9], LONG, [8])
    assert places.seat(begins, range(3)) == 0
    assert (places[0].tokens, places[1].tokens) == (LONG[:20], LONG)
    for kept in (len(LONG), len(LONG) - WORTH_COPYING):
        places, _ = places_with([9], LONG, [8])
        assert places.seat([*LONG[:kept], 7], range(3)) == 1
    places, memories = places_with([9], LONG, [8])
    memories[0].copy = lambda place, count: False  # type: ignore[method-assign]
    assert places.seat(begins, range(3)) == 1  # where it keeps half
    assert [places[0].tokens, places[1].tokens, places[2].tokens] == [[9], LONG, [8]]


def test_a_copy_that_fails_leaves_the_place_empty() -> None:
    places, memories = places_with([1, 2], LONG)

    def copy(place: int, count: int) -> bool:
        raise EngineError("no room")

    memories[0].copy = copy  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        places.seat(LONG, [0])
    assert (places[0].tokens, places[1].tokens) == ([], LONG)
    memories[0].copy = lambda place, count: False  # type: ignore[method-assign]
    assert places.seat(LONG, [0]) == 0
    assert places[0].tokens == []
