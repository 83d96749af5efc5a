"""KV entries in host memory: places of like length share memory, and keep their entries wherever they are carried."""

import random
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

from mara_runtime.engines import ort_banks, ort_memory
from mara_runtime.engines.ort_banks import CpuMemory, CpuPlace
from mara_runtime.engines.ort_memory import Binding, Slab
from mara_runtime.errors import EngineError
from mara_runtime.tensors import CacheGroup, ModelShape

CACHES = CacheGroup(2, 2, 2), CacheGroup(1, 1, 3)
SHAPE = ModelShape(hidden_size=4, vocab_size=8, num_layers=4, num_heads=2, caches=CACHES)
CAPACITY = 90


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_memory, "FIRST_SLOTS", 4)
    monkeypatch.setattr(ort_banks, "FIRST_LIMIT", 16)


def fill(place: CpuPlace, number: float, slots: slice | int = slice(None)) -> None:
    for group in place.entries:
        group[:, :, slots] = number


def holds(place: CpuPlace, held: list[float]) -> bool:
    parts = [group[:, :, : len(held)] for group in place.entries]
    return all((part == np.array(held, np.float32)[:, None]).all() for part in parts)


def is_finite(place: CpuPlace) -> bool:
    return all(np.isfinite(group).all() for group in place.entries)


class Watched:
    """Places, and what each should hold."""

    def __init__(self, count: int) -> None:
        self.memory = CpuMemory(SHAPE, "float32", CAPACITY)
        self.places = [self.memory.place(i) for i in range(count)]
        self.held: list[list[float]] = [[] for _ in self.places]
        self.number = 0.0

    def write(self, at: int, slot: int, count: int) -> None:
        """Passes write entries, each with a number of its own."""
        place = self.places[at]
        place.grow(slot + count)
        del self.held[at][slot:]
        for i in range(slot, slot + count):
            self.number += 1
            fill(place, self.number, i)
            self.held[at].append(self.number)

    def check(self) -> None:
        memory = self.memory
        for place, held in zip(self.places, self.held, strict=True):
            assert holds(place, held)
            assert is_finite(place)
            assert len(held) <= place.slots <= CAPACITY
        assert len({bank.limit for bank in memory.banks}) == len(memory.banks)
        for bank in memory.banks:
            assert [place.seat[1] for place in memory.members(bank)] == [*range(len(memory.members(bank)))]

    def banks(self) -> dict[int, list[int]]:
        """By limit: the places, in their order."""
        return {
            bank.limit: [self.places.index(place) for place in self.memory.members(bank)] for bank in self.memory.banks
        }


@pytest.mark.parametrize("seed", range(6))
def test_places_keep_their_entries_whatever_the_others_do(seed: int) -> None:
    rng, all_of = random.Random(seed), Watched(5)
    for _ in range(300):
        at = rng.randrange(5)
        place, held = all_of.places[at], all_of.held[at]
        match rng.randrange(7):
            case 0:
                kept = rng.randint(0, len(held))
                place.resize(rng.randint(kept + 1, CAPACITY + 5), kept)
                del held[kept:]
            case 1:
                other = rng.choice([i for i in range(5) if i != at])
                count = rng.randint(0, len(all_of.held[other]))
                assert place.copy(other, count)
                held[:] = all_of.held[other][:count]
            case 2 if held:
                source, target = (rng.randrange(len(held)) for _ in range(2))
                place.move(0, source, target)
                held[target] = held[source]
            case 3 if rng.random() < 0.3:
                fill(place, np.nan, slice(len(held)))
                place.zero()
                held.clear()
            case 4:
                bank = place.seat[0]
                taking = [place, *(p for p in all_of.memory.members(bank) if p is not place and rng.random() < 0.5)]
                order = all_of.memory.put_together(bank, taking)
                assert [p.seat[1] for p in order] == sorted(p.seat[1] for p in taking)
            case _ if len(held) < CAPACITY:
                all_of.write(
                    at, slot := rng.randint(max(0, len(held) - 2), len(held)), rng.randint(1, min(9, CAPACITY - slot))
                )
        all_of.check()


def test_places_of_like_length_lie_together() -> None:
    all_of = Watched(4)
    assert all_of.banks() == {16: [0, 1, 2, 3]}
    all_of.write(1, 0, 20)
    assert all_of.banks() == {16: [0, 3, 2], 32: [1]}  # the last has taken its index
    all_of.write(0, 0, 30)
    assert all_of.banks() == {16: [2, 3], 32: [1, 0]}
    assert [place.slots for place in all_of.places] == [32, 32, 4, 4]
    all_of.places[1].resize(9, 5)
    del all_of.held[1][5:]
    assert all_of.banks() == {16: [2, 3, 1], 32: [0]}
    all_of.check()
    with pytest.raises(EngineError, match=f"{CAPACITY + 1} slots are needed; the KV cache has {CAPACITY}"):
        all_of.places[0].grow(CAPACITY + 1)
    all_of.places[0].zero()
    assert all_of.banks() == {16: [2, 3, 1, 0]}  # the memory of the other bank is given back


def test_what_was_not_finite_is_gone_when_another_place_comes_there() -> None:
    all_of = Watched(3)
    all_of.places[2].grow(12)
    fill(all_of.places[2], np.nan)
    all_of.places[2].zero()
    assert not any(group.any() for group in all_of.places[2].entries)
    fill(all_of.places[1], np.nan)
    all_of.places[1].resize(40, 0)
    all_of.places[0].resize(40, 0)
    all_of.places[1].resize(3, 0)
    for place in all_of.places:
        assert is_finite(place)


def test_gaps_are_closed_when_they_have_cost_enough() -> None:
    all_of = Watched(5)
    for at in range(5):
        all_of.write(at, 0, 3 + at)
    bank, taking = all_of.places[0].seat[0], [all_of.places[4], all_of.places[0]]
    rounds = 0
    while all_of.banks()[16][:2] != [0, 4]:
        assert all_of.memory.put_together(bank, taking)[0] is all_of.places[0]
        rounds += 1
    assert rounds == -(-ort_banks.WORTH_CLOSING // 3)
    all_of.check()
    assert all_of.memory.put_together(bank, taking[:1]) == taking[:1]
    assert bank.gaps == 0


def test_many_places_grow_in_longer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step copies all of them; the bank's limit bounds it, as attention costs every slot."""
    monkeypatch.setattr(ort_banks, "FIRST_LIMIT", 64)
    steps: list[list[int]] = []
    for count in (1, 6):
        all_of, sizes = Watched(count), {}
        for slots in range(33, 70):
            for place in all_of.places:
                place.grow(slots)
            sizes[all_of.places[0].slots] = True
        steps.append([*sizes])
    assert steps == [[*range(36, 73, 4)], [36, 48, 64, 68, CAPACITY]]


def interrupted(all_of: Watched, action: Any, line: int) -> bool:
    """Run an action and interrupt it before a line of the module; has it been?"""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal line
        if frame.f_code.co_filename != ort_banks.__file__:
            return None
        if event == "line":
            line -= 1
            if line < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action(all_of)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


ACTIONS: dict[str, Any] = {
    "grow": lambda all_of: all_of.places[1].grow(40),
    "join": lambda all_of: all_of.places[1].grow(20),
    "resize": lambda all_of: all_of.places[0].resize(70, 8),
    "zero": lambda all_of: all_of.places[4].zero(),
    "close gaps": lambda all_of: all_of.memory.put_together(
        all_of.places[0].seat[0], [all_of.places[0], all_of.places[3]]
    ),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_interruption_leaves_every_place_its_entries(name: str) -> None:
    line = 0
    while True:
        all_of = Watched(5)
        for at, count in enumerate((8, 9, 10, 11, 25)):
            all_of.write(at, 0, count)
        all_of.places[0].seat[0].gaps = ort_banks.WORTH_CLOSING
        if name == "zero":
            all_of.held[4] = []
        stopped = interrupted(all_of, ACTIONS[name], line)
        for place, held in zip(all_of.places, all_of.held, strict=True):
            assert holds(place, held), line
        ACTIONS[name](all_of)  # again, and things go on
        for at in range(5):
            all_of.write(at, len(all_of.held[at]), 2)
        for place, held in zip(all_of.places, all_of.held, strict=True):
            assert holds(place, held), line
        if not stopped:
            break
        line += 1
    assert line > 10


def test_bindings_are_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_memory, "_MOST_BINDINGS", 3)
    slab = Slab([np.zeros((4, 1, 2, 4, 2))], [])
    for rows in range(5):
        slab.keep((0, 1, rows, rows, 0, 0, 0), Binding(None, None, {}, {}))
    assert [rows for _, _, rows, *_ in slab.bindings] == [2, 3, 4]
