"""What width costs on this machine: measured with a clock made up, kept in the cache folder, and read again."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mara_runtime import files
from mara_runtime.bundle import Bundle
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.schedule import calibrate
from mara_runtime.schedule.calibrate import BUDGET_S, CONTEXTS, HEADS, RAREST, ROUNDS, WIDTHS, measure, measured_cost
from mara_runtime.schedule.cost import Cost
from tests.unit import helpers

BEAT_MS = 1000 / 1024
"""The clock below goes in parts of 1/1024 s, so that its differences are exact."""


class Machine(helpers.CountingEngine):
    """A table that nothing is looked up in, on a machine whose passes take so many beats as a rule says."""

    def __init__(
        self, takes: Callable[[Pass], float], slots: int = 10_000, facts: dict[str, Any] | None = None
    ) -> None:
        super().__init__(helpers.scripted({}, {}), slots=0)
        self._size = slots
        self.takes = takes
        self.facts = facts or {"name": "made up"}
        self.now = 0.0
        self.reached = 0
        self.log: list[str] = []

    @property
    def slots(self) -> int:
        return self._size

    def run(self, work: Pass) -> StepOutput:
        assert len(set(work.positions)) == 1  # siblings
        assert len(work.agent_rows) == len(work.priorities) == len(work.tokens)
        assert set(work.priorities) == {-np.inf}
        assert work.fallback_row is None
        self.reached = max(self.reached, work.slot + len(work.tokens), work.positions[0] + 1)
        self.calls.append(work)
        self.log.append("run")
        self.now += self.takes(work) / 1024
        empty = np.zeros(0, np.float32)
        return StepOutput(empty, np.zeros(0, np.int64), np.zeros((0, 1), np.int64), np.zeros((0, 1), np.float32), empty)

    def clear(self) -> None:
        self.log.append("clear")

    def describe(self) -> dict[str, Any]:
        return self.facts


def by_rule(work: Pass) -> float:
    """5, and 0.5 a row more, 1 a thousand tokens, 2 for the head and 0.25 for every row of it more."""
    heads = len(work.head_rows)
    head = 2 + 0.25 * (heads - 1) if heads else 0.0
    return 5 + 0.5 * (len(work.tokens) - 1) + work.positions[0] / 1024 + head


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], Machine]:
    """Hands a machine the clock."""

    def hand(machine: Machine) -> Machine:
        monkeypatch.setattr(calibrate, "time", SimpleNamespace(perf_counter=lambda: machine.now))
        return machine

    return hand


Clock = Callable[[Machine], Machine]


SHAPES = len(WIDTHS) * len(CONTEXTS) + len(HEADS)
"""of passes: every width at every context, and some with their rows through the LM head"""


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_measurement_finds_what_passes_take(clock: Clock) -> None:
    cost = measure(clock(Machine(by_rule)), max_candidates=40)
    assert (cost.contexts, cost.widths, cost.heads) == (CONTEXTS, WIDTHS, HEADS)
    for context, row in zip(cost.contexts, cost.body_ms, strict=True):
        assert row == tuple(BEAT_MS * (5 + 0.5 * (width - 1) + context / 1024) for width in WIDTHS)
    assert cost.head_ms == pytest.approx([BEAT_MS * (2 + 0.25 * (count - 1)) for count in HEADS])


def test_what_other_programs_take_now_and_then_is_no_cost(clock: Clock) -> None:
    passes = {"n": 0}

    def disturbed(work: Pass) -> float:
        passes["n"] += 1
        return by_rule(work) + (400.0 if passes["n"] % 6 == 0 else 0.0)

    quiet = measure(clock(Machine(by_rule)), 40, budget_s=100.0)
    assert measure(clock(Machine(disturbed)), 40, budget_s=100.0) == quiet


def test_the_first_run_of_a_shape_is_not_counted(clock: Clock) -> None:
    seen: set[tuple[int, int, int]] = set()

    def slow_at_first(work: Pass) -> float:
        shape = (len(work.tokens), len(work.head_rows), work.positions[0])
        extra = 0.0 if shape in seen else 1000.0
        seen.add(shape)
        return by_rule(work) + extra

    cost = measure(clock(Machine(slow_at_first)), 40)
    assert max(map(max, cost.body_ms)) < 100


def test_the_cache_is_cleared_afterwards(clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    measure(machine, 40)
    assert (machine.log.count("clear"), machine.log[-1]) == (1, "clear")


@pytest.mark.parametrize(
    ("candidates", "widths", "heads"),
    [
        (1, (1, 2), (1, 2)),
        (2, (1, 2), (1, 2)),
        (5, (1, 2, 3, 4), (1, 2, 4)),
        (40, WIDTHS, HEADS),
        (64, WIDTHS, HEADS),
    ],
)
def test_no_wider_than_a_decision_may_be(
    clock: Clock, candidates: int, widths: Sequence[int], heads: Sequence[int]
) -> None:
    cost = measure(clock(Machine(by_rule)), candidates)
    assert (cost.widths, cost.heads) == (widths, heads)


@pytest.mark.parametrize(
    ("slots", "contexts"),
    [
        (45, (1,)),  # a bundle of few tokens
        (CONTEXTS[0] + 39, (1,)),
        (CONTEXTS[0] + 40, CONTEXTS[:1]),
        (CONTEXTS[1] + 39, CONTEXTS[:1]),
        (CONTEXTS[1] + 40, CONTEXTS[:2]),
        (10**6, CONTEXTS),
    ],
)
def test_no_further_than_the_cache_reaches(clock: Clock, slots: int, contexts: tuple[int, ...]) -> None:
    machine = clock(Machine(by_rule, slots=slots))
    cost = measure(machine, 40)
    assert cost.contexts == contexts
    assert machine.reached <= slots
    assert len(cost.body_ms) == len(contexts)


def test_a_slow_machine_measures_everything_once_and_stops(clock: Clock) -> None:
    machine = clock(Machine(lambda work: 1000 + by_rule(work)))
    cost = measure(machine, 40)
    assert len(machine.calls) == 2 * SHAPES  # once to warm up, once to measure
    assert cost.body_ms[0][0] == BEAT_MS * (1000 + 5 + CONTEXTS[0] / 1024)


def test_a_fast_machine_measures_a_few_rounds_narrow_passes_in_all_of_them(clock: Clock) -> None:
    machine = clock(Machine(lambda work: by_rule(work) / 100))
    measure(machine, 40)
    counts = Counter((len(work.tokens), len(work.head_rows), work.positions[0]) for work in machine.calls)
    keys = [(width, 0, context) for context in CONTEXTS for width in WIDTHS]
    keys += [(count, count, CONTEXTS[0]) for count in HEADS]
    assert counts == {key: 1 + len(range(0, ROUNDS, min(key[0], RAREST))) for key in keys}
    assert min(counts.values()) == 1 + 3


def test_the_budget_ends_a_measurement(clock: Clock) -> None:
    machine = clock(Machine(lambda work: 40.0))
    measure(machine, 40)
    assert 2 * SHAPES < len(machine.calls) < (1 + ROUNDS) * SHAPES
    assert BUDGET_S <= machine.now - 40 / 1024 * SHAPES <= BUDGET_S + 0.1


def test_an_engine_that_grows_is_measured_at_every_size(clock: Clock) -> None:
    # A pass takes as long as the cache is large, and that is never smaller again before it is cleared.
    class Growing(Machine):
        def run(self, work: Pass) -> StepOutput:
            self.takes = lambda _: max(self.reached, work.slot + len(work.tokens))
            return super().run(work)

    cost = measure(clock(Growing(by_rule)), 40)
    reached = [context + WIDTHS[-1] for context in CONTEXTS]
    assert cost.body_ms == tuple((BEAT_MS * slots,) * len(WIDTHS) for slots in reached)


def test_a_head_that_seems_to_cost_less_than_nothing_costs_nothing(clock: Clock) -> None:
    cost = measure(clock(Machine(lambda work: 5.0 - 0.5 * len(work.head_rows))), 40)
    assert cost.head_ms == (0.0,) * len(HEADS)


def test_what_was_measured_makes_a_cost_that_never_falls(clock: Clock) -> None:
    rng = np.random.default_rng(0)
    cost = measure(clock(Machine(lambda work: 5.0 + float(rng.uniform(0, 3)))), 40)
    assert (np.diff(cost.rows_ms(500)) >= 0).all()


# ── the cache folder ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(helpers.make_bundle(tmp_path / "bundle", max_candidates=8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mara-deploy"


def asked(bundle: Bundle, machine: Machine) -> tuple[Cost, bool]:
    """The cost, and whether it was measured for it."""
    told: list[str] = []
    before = len(machine.calls)
    cost = measured_cost(bundle, machine, told.append)
    measured = len(machine.calls) > before
    assert len(told) == int(measured)
    return cost, measured


def test_a_measurement_is_kept_and_used_again(bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    first, measured = asked(bundle, machine)
    assert measured
    (path,) = folder.iterdir()  # and nothing half-written beside it
    assert path.suffix == ".json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(asdict(first)))

    assert asked(bundle, machine) == (first, False)
    assert asked(Bundle.open(bundle.folder), Machine(lambda work: 99.0)) == (first, False)  # another start
    assert machine.log[-1] == "clear"


def test_who_does_not_care_is_told_nothing(bundle: Bundle, folder: Path, clock: Clock) -> None:
    assert measured_cost(bundle, clock(Machine(by_rule))).widths[0] == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"{}",
        b'{"contexts": [1]}',
        b'{"contexts": 1, "widths": 1, "body_ms": 1, "heads": 1, "head_ms": 1}',
        b'{"contexts": ["x"], "widths": [1], "body_ms": [[1.0]], "heads": [1], "head_ms": [1.0]}',
        b'{"contexts": [1], "widths": [1], "body_ms": [1.0], "heads": [1], "head_ms": [1.0]}',
        b'{"contexts": [1], "widths": [1], "body_ms": [["x"]], "heads": [1], "head_ms": [null]}',
        b"\xff\xfe\x00\x80",
    ],
    ids=repr,
)
def test_a_file_that_is_broken_is_measured_anew(bundle: Bundle, folder: Path, clock: Clock, content: bytes) -> None:
    machine = clock(Machine(by_rule))
    first, _ = asked(bundle, machine)
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert asked(bundle, machine) == (first, True)
    assert asked(bundle, machine) == (first, False)  # and mended
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("body_ms", [[1.0]]),
        ("head_ms", [1.0]),
        ("contexts", []),
        ("widths", []),
        ("body_ms", []),
        ("body_ms", "NaN"),
        ("contexts", [1024, 128, 4096]),
    ],
    ids=str,
)
def test_a_cost_that_does_not_fit_itself_is_measured_anew(
    bundle: Bundle, folder: Path, clock: Clock, field: str, value: Any
) -> None:
    machine = clock(Machine(by_rule))
    first, _ = asked(bundle, machine)
    (path,) = folder.iterdir()
    values = json.loads(path.read_text())
    nan = [[float("nan")] * len(row) for row in values["body_ms"]]
    path.write_text(json.dumps({**values, field: nan if value == "NaN" else value}))
    assert asked(bundle, machine) == (first, True)


@pytest.mark.parametrize("content", ["[" * 100_000, "1e999"], ids=["deep", "infinite"])
def test_a_file_that_python_chokes_on_is_measured_anew(
    bundle: Bundle, folder: Path, clock: Clock, content: str
) -> None:
    machine = clock(Machine(by_rule))
    first, _ = asked(bundle, machine)
    (path,) = folder.iterdir()
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "contexts": ["HERE"]}).replace('"HERE"', content))
    assert asked(bundle, machine) == (first, True)


def test_a_cache_folder_that_cannot_be_made_is_no_error(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    # By its effect: permissions do not stop a test that runs as root.
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    machine = clock(Machine(by_rule))
    cost, measured = asked(bundle, machine)
    assert measured
    assert asked(bundle, machine) == (cost, True)
    assert (tmp_path / "a file").read_text() == "in the way"


def test_a_cache_folder_that_is_full_is_no_error(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert asked(bundle, clock(Machine(by_rule)))[1]
    monkeypatch.undo()


def test_a_cache_file_that_is_a_folder_is_no_error(bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    first, _ = asked(bundle, machine)
    (path,) = folder.iterdir()
    path.unlink()
    path.mkdir()
    assert asked(bundle, machine) == (first, True)


def test_a_user_without_a_home_is_no_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    # As in a container that runs under a number without a name.
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert asked(bundle, clock(Machine(by_rule)))[1]


def test_where_measurements_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "mara-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "mara-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "mara-deploy"


# ── what a measurement is for ────────────────────────────────────────────────────────────────────────────────────────


def test_another_graph_is_measured_for_itself(tmp_path: Path, bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    asked(bundle, machine)
    same = Bundle.open(helpers.make_bundle(tmp_path / "same", max_candidates=8))
    assert asked(same, machine)[1] is False  # a bundle that was moved, or exported again
    other = Bundle.open(helpers.make_bundle(tmp_path / "other", max_candidates=8, graph=b"another graph"))
    assert asked(other, machine)[1] is True
    assert len(list(folder.iterdir())) == 2


def test_other_weights_are_measured_for_themselves(tmp_path: Path, bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    asked(bundle, machine)
    other = helpers.make_bundle(tmp_path / "other", max_candidates=8)
    helpers.add_file(other, "step.onnx.data", b"other weights")
    assert asked(Bundle.open(other), machine)[1] is True


def test_a_file_that_is_no_graph_does_not_matter(tmp_path: Path, bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule))
    asked(bundle, machine)
    other = helpers.make_bundle(tmp_path / "other", max_candidates=8)
    helpers.add_file(other, "notes.txt", b"mine")
    assert asked(Bundle.open(other), machine)[1] is False


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "cuda", "version": "1", "threads": None},
        {"name": "cpu", "version": "2", "threads": None},
        {"name": "cpu", "version": "1", "threads": 2},
    ],
    ids=str,
)
def test_another_engine_is_measured_for_itself(
    bundle: Bundle, folder: Path, clock: Clock, facts: dict[str, Any]
) -> None:
    machine = clock(Machine(by_rule, facts={"name": "cpu", "version": "1", "threads": None}))
    first, _ = asked(bundle, machine)
    other = clock(Machine(lambda work: 2 * by_rule(work), facts=facts))
    cost, measured = asked(bundle, other)
    assert measured
    assert cost != first
    assert asked(bundle, machine) == (first, False)


def test_what_changes_while_an_engine_runs_does_not_matter(bundle: Bundle, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule, facts={"name": "tensorrt", "memory": {"slots": 512}}))
    asked(bundle, machine)
    machine.facts = {"name": "tensorrt", "memory": {"slots": 4096}}
    assert asked(bundle, machine)[1] is False


def test_another_engine_file_is_measured_for_itself(tmp_path: Path, folder: Path, clock: Clock) -> None:
    machine = clock(Machine(by_rule, facts={"name": "tensorrt"}))
    for content, measured in ((b"one", True), (b"two", True), (b"one", False)):
        made = helpers.make_bundle(tmp_path / f"{content.decode()}-{measured}", max_candidates=8)
        helpers.add_file(made, "engines/tensorrt/step-80.engine", content)
        helpers.add_file(made, "engines/tensorrt-rtx/step-80.engine", str(made).encode())  # not its own
        assert asked(Bundle.open(made), machine)[1] is measured


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (calibrate, "_processor", lambda: "another processor"),
        (calibrate.platform, "machine", lambda: "another machine"),
        (calibrate.os, "sched_getaffinity", lambda _: {0, 1, 2}),
    ],
    ids=["processor", "machine", "cores"],
)
def test_another_machine_is_measured_for_itself(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, module: Any, name: str, value: Any
) -> None:
    monkeypatch.setattr(calibrate.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    machine = clock(Machine(by_rule))
    asked(bundle, machine)
    monkeypatch.setattr(module, name, value, raising=False)
    assert asked(bundle, machine)[1] is True
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("name", "value"), [("FORM", 0), ("WIDTHS", (1, 2)), ("page_size", lambda: 12345)])
def test_what_was_measured_in_another_way_is_measured_anew(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, name: str, value: Any
) -> None:
    machine = clock(Machine(by_rule))
    asked(bundle, machine)
    monkeypatch.setattr(calibrate, name, value)
    assert asked(bundle, machine)[1] is True
    assert len(list(folder.iterdir())) == 2


def test_the_tests_have_a_cache_folder_of_their_own(cache_folder: Path) -> None:
    assert files.cache_folder() == cache_folder / "mara-deploy"
    assert not str(cache_folder).startswith(str(Path.home() / ".cache"))


def test_a_file_of_the_cache_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError

    (path := tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError):  # noqa: PT011 - the one above
        files.write_atomic(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
