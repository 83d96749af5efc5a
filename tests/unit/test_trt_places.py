"""Several conversations on a TensorRT engine, on the double: which passes they share, and what adding one takes.

What every engine does with several: tests/conformance_places.py.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.engines.io_block import Sizes
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.engines.trt_plan import Plan
from mara_runtime.engines.trt_shared import Bounds, Table, rounded
from mara_runtime.errors import EngineError
from tests.conformance import chain, siblings
from tests.double.machine import Machine
from tests.unit.written_model import (
    FINE,
    PLACES,
    SHARED_ROWS,
    SLOTS,
    add_engines,
    table,
    write_bundle,
)

Open = Callable[..., TrtEngine]
sides = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "two copies"])


@pytest.fixture
def start(machine: Machine, tmp_path: Path) -> Iterator[Open]:
    """Opens an engine with an agent in use; facts: of its files, as in `add_engines`."""
    engines = []

    def start(
        in_place: bool = True, slots: tuple[int, ...] = (SLOTS,), places: int = PLACES, **facts: Any
    ) -> TrtEngine:
        made = add_engines(write_bundle(tmp_path, always_head=True), slots, in_place, **facts)
        engines.append(TrtEngine(made, "tensorrt"))
        engines[-1].use(["agent"])
        engines[-1].places.open(places)
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Sizes]:
    """The sizes of each pass of the graph."""
    sizes: list[Sizes] = []
    real = Plan.run

    def run(plan: Plan, size: Sizes, side: int, low: int) -> None:
        sizes.append(size)
        real(plan, size, side, low)

    monkeypatch.setattr(Plan, "run", run)
    return sizes


def test_passes_within_the_bounds_are_one_and_the_others_as_few_as_can_be(start: Open, passes: list[Sizes]) -> None:
    engine = start()

    def shapes(*widths: int) -> list[tuple[int, int, int]]:
        """B, M and S of the passes for works of these widths; 0: none."""
        passes.clear()
        engine.run_together([(i, siblings([1] * width, 0, head_rows=[0])) for i, width in enumerate(widths) if width])
        return [(p.conversations, p.width, p.rows) for p in passes]

    assert shapes(1) == [(1, 1, 1)]
    assert shapes(0, 3) == [(1, 3, 3)]
    assert shapes(1, 1) == [(2, 1, 2)]
    assert shapes(1, 1, 1, 1) == [(4, 1, 4)]
    assert shapes(0, 1, 0, 1) == [(3, 1, 3)]  # and an idle row
    assert shapes(2, 3, 2, 2) == [(4, 4, 16)]  # idle rows where there is room
    wide = SHARED_ROWS + 1
    assert shapes(1, wide, 1) == [(1, wide, wide), (3, 1, 3)]
    assert shapes(8, 8, 8, 7) == [(4, 8, 31)]  # as many as the engine takes
    assert shapes(8, 8, 8, 8) == [(3, 8, 24), (1, 8, 8)]


def test_at_the_end_of_a_place_its_pass_runs_alone(start: Open, passes: list[Sizes]) -> None:
    """A pass of several writes as many slots for each as the widest of them has rows."""
    engine = start()
    row, wide = siblings([1], 3, SLOTS - 2, head_rows=[0]), siblings([2] * 4, 0, head_rows=[0])
    engine.run_together([(0, row), (1, siblings([2], 0, head_rows=[0]))])
    assert len(passes) == 1
    engine.run_together([(0, row), (1, wide)])
    assert len(passes) == 3
    engine.run_together([(1, wide), (2, wide)])  # beside the full place, not over it
    assert len(passes) == 4
    engine.run_together([(0, siblings([1], 0)), (1, siblings([1], SLOTS - 1, SLOTS - 1)), (2, wide)])
    assert len(passes) == 6  # the last slot takes a row of one, and no more


@sides
def test_a_place_is_added_while_others_hold_texts(start: Open, machine: Machine, in_place: bool) -> None:
    engine, text = start(in_place, places=1), [1, 2, 3]
    for position, token in enumerate(text):
        engine.run(chain([token], position))
        engine.cache.extend([token])
    for count in range(2, PLACES + 1):
        before = machine.in_use()["device bytes"]
        engine.places.open(count)
        assert machine.in_use()["device bytes"] > before
        out = engine.run_together([(0, chain([4], 3, head_rows=[0])), (count - 1, chain([count], 0, head_rows=[0]))])
        assert [o.top_logits[0, 0] for o in out] == [table((*text, 4))[0].max(), table((count,))[0].max()]
    with pytest.raises(EngineError, match=f"{PLACES + 1} conversations at once are more than the {PLACES} "):
        engine.places.open(PLACES + 1)


def test_without_memory_for_another_place_the_others_go_on(start: Open, machine: Machine) -> None:
    engine = start(places=2)
    machine.cuda.total_bytes = machine.in_use()["device bytes"] + 100
    with pytest.raises(EngineError, match=f"the KV cache of {SLOTS} slots for 3 conversations"):
        engine.places.open(3)
    out = engine.run_together([(0, chain([1], head_rows=[0])), (1, chain([2], head_rows=[0]))])
    assert [o.top_logits[0, 0] for o in out] == [table((token,))[0].max() for token in (1, 2)]


@sides
def test_shared_passes_that_repeat_run_as_graphs(start: Open, machine: Machine, in_place: bool) -> None:
    engine = start(in_place)
    for turn in range(12):
        asked = [(place, siblings([turn % FINE] * (1 + place % 2), 0, head_rows=[0])) for place in range(PLACES)]
        for out in engine.run_together(asked):
            assert out.top_logits[0, 0] == table((turn % FINE,))[0].max()
    assert machine.cuda.launched == 12 - (2 if in_place else 4)


def test_sizes_are_rounded_up_and_few() -> None:
    assert [rounded(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]
    like = Sizes(1, 1, 1, 1, 1, 1, 1, (1, 1))
    rows = Table(Bounds(places=4, width=32, rows=114, heads=68, slots=1000), [0] * 4, like)
    found = set()
    for seed in range(300):
        rng = random.Random(seed)
        works = {i: siblings([1] * rng.randint(1, 4), 5, head_rows=[0]) for i in range(4)}
        (layout,) = rows.layouts(works)
        found.add(layout.sizes)
        assert layout.sizes.rows == sum(len(work.tokens) for work in layout.passes)
    assert len(found) <= 10
