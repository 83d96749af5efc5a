"""What a pass costs on this machine: measured with a made-up clock, kept in the cache folder, and read again."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mara_runtime import files
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.kv_cache import KVCache
from mara_runtime.schedule import calibrate
from mara_runtime.schedule.calibrate import BUDGET_S, CONTEXTS, HEADS, RAREST, ROUNDS, WIDTHS, measure, measured_cost
from mara_runtime.schedule.cost import Cost
from tests.table_engine import TableMemory
from tests.unit import helpers

BEAT_MS = 1000 / 1024
"""The clock advances in parts of 1/1024 s, so that its differences are exact."""


class Machine:
    """An engine whose passes take so many beats as a rule says."""

    def __init__(self, takes: Callable[[Pass], float], slots: int = 10_000, **facts: Any) -> None:
        self.memory = TableMemory(slots)
        self.cache = KVCache(self.memory)
        self.takes = takes
        self.facts = facts or {"name": "made up"}
        self.now = 0.0
        self.calls: list[Pass] = []

    def run(self, work: Pass) -> StepOutput:
        assert len(set(work.positions)) == 1  # siblings
        assert len(work.agent_rows) == len(work.priorities) == len(work.tokens)
        assert set(work.priorities) == {-np.inf}
        self.cache.reserve(max(work.slot, work.positions[0]), len(work.tokens))
        self.calls.append(work)
        self.now += self.takes(work) / 1024
        empty = np.zeros(0, np.float32)
        return StepOutput(empty, np.zeros(0, np.int64), np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32), empty)

    def describe(self) -> dict[str, Any]:
        return self.facts


def by_rule(work: Pass) -> float:
    """5, and 0.5 per further row, 1 per 1024 tokens, 2 for the head and 0.25 per further row of it."""
    heads = len(work.head_rows)
    head = 2 + 0.25 * (heads - 1) if heads else 0.0
    return 5 + 0.5 * (len(work.tokens) - 1) + work.positions[0] / 1024 + head


def shape(work: Pass) -> tuple[int, int, int]:
    return len(work.tokens), len(work.head_rows), work.positions[0]


Clock = Callable[[Machine], Machine]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Gives a machine the clock."""

    def give(machine: Machine) -> Machine:
        monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: machine.now))
        return machine

    return give


SHAPES = len(WIDTHS) * len(CONTEXTS) + len(HEADS)
"""of passes: every width at every context, and some with their rows through the LM head"""


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_cost_is_what_passes_take(clock):
    machine = clock(Machine(by_rule))
    cost = measure(machine, max_candidates=40)
    assert (cost.contexts, cost.widths, cost.heads) == (CONTEXTS, WIDTHS, HEADS)
    for context, row in zip(cost.contexts, cost.body_ms, strict=True):
        assert row == tuple(BEAT_MS * (5 + 0.5 * (width - 1) + context / 1024) for width in WIDTHS)
    assert cost.head_ms == pytest.approx([BEAT_MS * (2 + 0.25 * (count - 1)) for count in HEADS])
    assert machine.memory.zeroed == 1


def test_first_passes_and_other_programs_do_not_count(clock):
    seen: Counter[tuple[int, int, int]] = Counter()

    def disturbed(work: Pass) -> float:
        seen[shape(work)] += 1
        return by_rule(work) + (1000.0 if seen[shape(work)] == 1 else 0.0) + (400.0 if seen.total() % 6 == 0 else 0.0)

    quiet = measure(clock(Machine(by_rule)), 40, budget_s=100.0)
    assert measure(clock(Machine(disturbed)), 40, budget_s=100.0) == quiet


@pytest.mark.parametrize(
    ("candidates", "slots", "contexts", "widths", "heads"),
    [
        (1, 10**6, CONTEXTS, (1, 2), (1, 2)),
        (5, 10**6, CONTEXTS, (1, 2, 3, 4), (1, 2, 4)),
        (64, 10**6, CONTEXTS, WIDTHS, HEADS),
        (40, 45, (1,), WIDTHS, HEADS),
        (40, CONTEXTS[0] + 39, (1,), WIDTHS, HEADS),
        (40, CONTEXTS[0] + 40, CONTEXTS[:1], WIDTHS, HEADS),
    ],
)
def test_no_pass_is_wider_than_a_decision_or_reaches_beyond_the_cache(
    clock, candidates, slots, contexts, widths, heads
):
    cost = measure(clock(Machine(by_rule, slots=slots)), candidates)  # its memory refuses more
    assert (cost.contexts, cost.widths, cost.heads) == (contexts, widths, heads)
    assert len(cost.body_ms) == len(contexts)


def test_the_budget_ends_a_measurement_once_everything_was_timed(clock):
    slow = clock(Machine(lambda work: 1000 + by_rule(work)))
    cost = measure(slow, 40)
    assert len(slow.calls) == 2 * SHAPES  # once to warm up, once to measure
    assert cost.body_ms[0][0] == BEAT_MS * (1000 + 5 + CONTEXTS[0] / 1024)

    medium = clock(Machine(lambda work: 40.0))
    measure(medium, 40)
    assert 2 * SHAPES < len(medium.calls) < (1 + ROUNDS) * SHAPES
    assert BUDGET_S <= medium.now - 40 / 1024 * SHAPES <= BUDGET_S + 0.1

    fast = clock(Machine(lambda work: by_rule(work) / 100))
    measure(fast, 40)
    keys = [(width, 0, context) for context in CONTEXTS for width in WIDTHS]
    keys += [(count, count, CONTEXTS[0]) for count in HEADS]
    counts = {key: 1 + len(range(0, ROUNDS, min(key[0], RAREST))) for key in keys}  # narrow ones in all rounds
    assert Counter(map(shape, fast.calls)) == counts


def test_a_growing_cache_is_measured_at_each_size(clock):
    # A pass takes as long as the cache is large, and that shrinks only when it is cleared.
    reached = 0

    def takes(work: Pass) -> float:
        nonlocal reached
        reached = max(reached, work.slot + len(work.tokens))
        return reached

    cost = measure(clock(Machine(takes)), 40)
    assert cost.body_ms == tuple((BEAT_MS * (context + WIDTHS[-1]),) * len(WIDTHS) for context in CONTEXTS)


def test_measurements_make_a_cost_that_never_falls(clock):
    rng = np.random.default_rng(0)
    cost = measure(clock(Machine(lambda work: 5.0 + float(rng.uniform(0, 3)))), 40)
    assert (np.diff(cost.rows_ms(500)) >= 0).all()
    cheaper_head = measure(clock(Machine(lambda work: 5.0 - 0.5 * len(work.head_rows))), 40)
    assert cheaper_head.head_ms == (0.0,) * len(HEADS)


# ── the cache folder ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(helpers.make_bundle(tmp_path / "bundle", max_candidates=8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mara-deploy"


def cost_of(bundle: Bundle, machine: Machine) -> tuple[Cost, bool]:
    """The cost, and whether it was measured now."""
    reported: list[str] = []
    before = len(machine.calls)
    cost = measured_cost(bundle, machine, reported.append)
    measured = len(machine.calls) > before
    assert len(reported) == int(measured)
    return cost, measured


def test_a_measurement_is_kept_for_the_next_start(bundle, folder, clock):
    machine = clock(Machine(by_rule))
    first, measured = cost_of(bundle, machine)
    assert measured
    (path,) = folder.iterdir()  # and nothing half-written
    assert json.loads(path.read_text()) == json.loads(json.dumps(asdict(first)))
    assert cost_of(bundle, machine) == (first, False)
    assert cost_of(Bundle.open(bundle.folder), Machine(lambda work: 99.0)) == (first, False)


def damaged(**fields: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **fields}).encode()


DAMAGE: dict[str, bytes | Callable[[bytes], bytes]] = {
    "empty": b"",
    "not an object": b"null",
    "not UTF-8": b"\xff\xfe\x00\x80",
    "no lists": b'{"contexts": 1, "widths": 1, "body_ms": 1, "heads": 1, "head_ms": 1}',
    "text for a number": damaged(contexts=["x"]),
    "null for a number": damaged(head_ms=[None] * len(HEADS)),
    "too few": damaged(body_ms=[[1.0]]),
    "none": damaged(contexts=[], body_ms=[]),
    "NaN": damaged(body_ms=[[float("nan")] * len(WIDTHS)] * len(CONTEXTS)),
    "not ascending": damaged(contexts=[1024, 128, 4096]),
    "nested": lambda content: damaged(contexts=["HERE"])(content).replace(b'"HERE"', b"[" * 100_000),
    "infinite": lambda content: damaged(contexts=["HERE"])(content).replace(b'"HERE"', b"1e999"),
}


def test_a_damaged_file_is_measured_again(bundle, folder, clock):
    machine = clock(Machine(by_rule))
    first, _ = cost_of(bundle, machine)
    (path,) = folder.iterdir()
    for name, damage in DAMAGE.items():
        path.write_bytes(damage if isinstance(damage, bytes) else damage(path.read_bytes()))
        assert cost_of(bundle, machine) == (first, True), name
        assert cost_of(bundle, machine) == (first, False), name
        assert list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_no_error(bundle, folder, monkeypatch, clock):
    # By its effect: permissions do not stop a test that runs as root.
    machine = clock(Machine(by_rule))
    first, _ = cost_of(bundle, machine)
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()  # a folder in the place of the file
    assert cost_of(bundle, machine) == (first, True)

    monkeypatch.delenv("XDG_CACHE_HOME")  # a user without a home, as in a container that runs under a bare number
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cost_of(bundle, machine) == (first, True)


def test_where_measurements_are_kept(monkeypatch, tmp_path, cache_folder):
    assert files.cache_folder() == cache_folder / "mara-deploy"  # the tests' own
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "mara-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "mara-deploy"


# ── what a measurement belongs to ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("graph", "file", "content", "measured"),
    [
        (helpers.GRAPH, None, b"", False),  # moved, or exported again
        (helpers.OTHER_GRAPH, None, b"", True),
        (helpers.GRAPH, "step.onnx.data", b"other weights", True),
        (helpers.GRAPH, "engines/tensorrt/step-80.engine", b"its engine", True),
        (helpers.GRAPH, "engines/tensorrt-rtx/step-80.engine", b"another's", False),
    ],
)
def test_a_measurement_belongs_to_what_runs(tmp_path, bundle, folder, clock, graph, file, content, measured):
    machine = clock(Machine(by_rule, name="tensorrt"))
    cost_of(bundle, machine)
    other = helpers.make_bundle(tmp_path / "other", max_candidates=8, graph=graph)
    if file is not None:
        helpers.add_file(other, file, content)
    assert cost_of(Bundle.open(other), machine)[1] is measured


def test_a_measurement_belongs_to_an_engine(bundle, folder, clock):
    facts = {"name": "cpu", "version": "1", "threads": None, "memory": {"slots": 512}}
    first, _ = cost_of(bundle, clock(Machine(by_rule, **facts)))
    for changes in ({"name": "cuda"}, {"version": "2"}, {"threads": 2}):
        cost, measured = cost_of(bundle, clock(Machine(lambda work: 2 * by_rule(work), **{**facts, **changes})))
        assert measured
        assert cost != first
    changed = {**facts, "memory": {"slots": 4096}}  # it changes while an engine runs
    assert cost_of(bundle, clock(Machine(by_rule, **changed))) == (first, False)


def test_a_measurement_belongs_to_a_machine_and_a_way_of_measuring(bundle, folder, monkeypatch, clock):
    monkeypatch.setattr(calibrate.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    machine = clock(Machine(by_rule))
    first, _ = cost_of(bundle, machine)
    for module, name, value in (
        (Path, "read_text", lambda *_, **__: "model name : another processor"),
        (calibrate.platform, "machine", lambda: "another machine"),
        (calibrate.os, "sched_getaffinity", lambda _: {0, 1, 2}),
        (calibrate, "VERSION", 0),
        (calibrate, "WIDTHS", (1, 2)),
        (calibrate, "page_size", lambda: 12345),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value, raising=False)
            assert cost_of(bundle, machine)[1], name
    assert cost_of(bundle, machine) == (first, False)
