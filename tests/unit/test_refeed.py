"""Rows that are owed: TableEngine, whose cache is told everything by passes, against itself with its own `move`."""

import random
from dataclasses import replace

import numpy as np
import pytest

from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.recompute import Prepared, Recompute
from tests.table_engine import TableEngine
from tests.unit import helpers

MOST = 8


class Refeeding(TableEngine):
    """An engine whose `move` owes a row."""

    def __init__(self) -> None:
        super().__init__(helpers.hash_table(1, 12, 5, 2.0), helpers.sum_agent, 64)
        self.refeed = Recompute(64)
        self.widths: list[int] = []

    def run(self, work: Pass) -> StepOutput:
        *before, last = self.refeed.prepare(work, together=len(work.tokens) < MOST)
        for prepared in before:
            super().run(prepared.work)
        self.widths.append(len(last.work.tokens))
        out = super().run(last.work)
        self.refeed.done()
        return replace(out, rows=out.rows - last.extra)

    def move(self, source: int, target: int) -> None:
        self.refeed.owe(source, target)

    def clear(self) -> None:
        super().clear()
        self.refeed.forget()


def passes(refeed: Recompute, work: Pass, *, together: bool = True) -> list[tuple[int, list[int], int]]:
    """(slot, tokens, rows in front) of each pass that does `work`."""
    prepared = refeed.prepare(work, together=together)
    refeed.done()
    return [(p.work.slot, list(p.work.tokens), p.extra) for p in prepared]


@pytest.fixture
def refeed() -> Recompute:
    """A prompt in slots 0 to 2, and three siblings after it."""
    refeed = Recompute(32)
    refeed.prepare(Pass([1, 2, 3], [0, 1, 2], 0))
    refeed.prepare(Pass([7, 8, 9], [3, 3, 3], 3))
    return refeed


def test_the_row_stands_in_front_of_the_pass_that_follows_it(refeed: Recompute) -> None:
    refeed.owe(5, 3)
    work = Pass([4, 5], [4, 4], 4, [0], [1, 0], [0.0, -1.0], 0.5, 0.25, 1)
    joined = Pass([9, 4, 5], [3, 4, 4], 3, [1], [2, 1], [0.0, -1.0], 0.5, 0.25, 2)
    assert refeed.prepare(work) == [Prepared(joined, 1)]
    assert refeed.prepare(work) == [Prepared(joined, 1)]  # the first was interrupted: it is owed still
    refeed.done()
    assert refeed.prepare(work) == [Prepared(work)]  # it is owed once


def test_no_fallback_stays_none(refeed: Recompute) -> None:
    refeed.owe(5, 3)
    assert refeed.prepare(Pass([4], [4], 4))[0].work.fallback_row is None


def test_a_pass_that_shall_be_no_wider_comes_after_it(refeed: Recompute) -> None:
    refeed.owe(5, 3)
    assert passes(refeed, Pass([4, 5], [4, 5], 4), together=False) == [(3, [9], 1), (4, [4, 5], 0)]


def test_a_row_that_is_written_over_is_not_owed(refeed: Recompute) -> None:
    for work in (Pass([4], [3], 3), Pass([4, 5, 6], [1, 2, 3], 1)):
        refeed.owe(5, 3)
        assert refeed.prepare(work) == [Prepared(work)]
        refeed.done()


def test_elsewhere_the_row_runs_alone_and_first(refeed: Recompute) -> None:
    for slot in (1, 7):
        refeed.owe(5, 3)
        assert passes(refeed, Pass([4], [slot], slot)) == [(3, [9], 1), (slot, [4], 0)]


def test_several_rows_come_in_their_order(refeed: Recompute) -> None:
    refeed.owe(5, 3)
    refeed.owe(4, 6)
    assert passes(refeed, Pass([4], [7], 7)) == [(3, [9], 1), (6, [8, 4], 1)]
    refeed.owe(6, 4)
    refeed.owe(4, 5)  # the entry that slot 4 was to have
    assert passes(refeed, Pass([4, 4], [4, 4], 4)) == [(4, [4, 4], 0)]
    refeed.owe(3, 4)
    refeed.owe(4, 9)
    assert passes(refeed, Pass([4, 4], [4, 4], 4)) == [(4, [9], 1), (9, [9], 1), (4, [4, 4], 0)]


def test_to_its_own_place_nothing_is_owed(refeed: Recompute) -> None:
    refeed.owe(3, 3)
    work = Pass([4], [4], 4)
    assert refeed.prepare(work) == [Prepared(work)]


def test_what_was_never_written_cannot_be_moved(refeed: Recompute) -> None:
    with pytest.raises(IndexError, match="slot 6 holds no entry"):
        refeed.owe(6, 3)
    refeed.owe(5, 3)
    refeed.forget()
    assert passes(refeed, Pass([4], [4], 4)) == [(4, [4], 0)]
    with pytest.raises(IndexError, match="slot 5 holds no entry"):
        refeed.owe(5, 3)


def test_an_engine_that_owes_gives_what_one_that_copies_gives() -> None:
    rng = random.Random(0)
    owing, copying = Refeeding(), TableEngine(helpers.hash_table(1, 12, 5, 2.0), helpers.sum_agent, 64)
    moved = 0
    for _ in range(60):
        owing.clear()
        copying.clear()
        length = 0
        while length < 40:
            count, rows = rng.randint(1, MOST), range(rng.randint(1, MOST - 1))
            prompt = Pass([rng.randrange(12) for _ in range(count)], range(length, length + count), length, [count - 1])
            siblings = [rng.randrange(12) for _ in rows]
            positions = [length + count] * len(rows)
            work = Pass(siblings, positions, length + count, [0], rows, [0.0] * len(rows))
            for part in (prompt, work):
                found, expected = owing.run(part), copying.run(part)
                for name in ("margins", "rows", "top_ids", "top_logits"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            chosen = rng.choice(rows)
            for engine in (owing, copying):
                engine.move(work.slot + chosen, work.slot)
            moved += chosen > 0
            length += count + 1
    assert moved > 50
    assert max(owing.widths) == MOST
