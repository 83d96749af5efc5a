"""What every engine promises, as tests: subclass `Conformance`, define the fixtures `engine` and `growing_and_whole`.

tests/unit/test_ort_engine.py runs them on ONNX Runtime and on TensorRT's double, tests/gpu/test_conformance.py on a
device. The model (tests/unit/written_model.py) is made of small whole numbers, so every engine agrees with its table
to the last bit.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mara_runtime import tensors
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES, DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.engines.base import Engine, Pass, StepOutput, is_finite
from mara_runtime.errors import EngineError, NumericsError
from mara_runtime.schedule.adaptive import Adaptive
from mara_runtime.schedule.base import Fixed, Schedule
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from tests import reference
from tests.conformance_agents import MIXES
from tests.conformance_places import PlacesConformance
from tests.unit import helpers
from tests.unit.written_model import CANDIDATES, CONTEXT, FINE, INFINITE, JUDGES, SHAPE, SLOTS, table

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "one-by-one": lambda: Fixed(1),
    "in pairs, drafted": lambda: Fixed(2, 16),
    "together, drafted": lambda: Fixed(None, 4),
    "adaptive": lambda: Adaptive(helpers.COST),
}


def chain(tokens: Sequence[int], start: int = 0, **options: Any) -> Pass:
    """Consecutive tokens from a position on, each in the slot of its position."""
    return Pass(tokens, range(start, start + len(tokens)), start, **options)


def siblings(tokens: Sequence[int], position: int, slot: int | None = None, **options: Any) -> Pass:
    """Candidates of one position."""
    return Pass(tokens, [position] * len(tokens), position if slot is None else slot, **options)


def judged(count: int, **options: Any) -> dict[str, Any]:
    """Options of a pass whose first rows are judged, the earlier the better."""
    return {"agent_rows": range(count), "mix": [1.0], "priorities": [-float(i) for i in range(count)], **options}


def filled(engines: Sequence[Any], tokens: Sequence[int]) -> None:
    """Put a prompt into the caches."""
    for engine in engines:
        engine.run(chain(tokens))
        engine.cache.extend(tokens)


class Conformance(PlacesConformance):
    """Tests of any engine on the written model."""

    strategies: Sequence[str] = STRATEGIES

    # ── what an engine is compared with ──────────────────────────────────────────────────────────────────────────────

    def check(self, actual: StepOutput, expected: StepOutput) -> None:
        """Equal, of equal logits the lower id first."""
        np.testing.assert_array_equal(actual.top_logits, expected.top_logits)
        np.testing.assert_array_equal(actual.top_ids, expected.top_ids)
        self.check_all_but_order(actual, expected)

    def check_all_but_order(self, actual: StepOutput, expected: StepOutput) -> None:
        np.testing.assert_array_equal(actual.margins, expected.margins)
        np.testing.assert_array_equal(actual.rows, expected.rows)
        np.testing.assert_allclose(actual.log_normaliser, expected.log_normaliser, rtol=1e-6)
        assert actual.margins.dtype == actual.top_logits.dtype == actual.log_normaliser.dtype == np.float32
        assert actual.top_ids.shape == (len(actual.rows), CANDIDATES + tensors.TOP_SPARE)
        assert (actual.hidden is None) == (actual.logits is None) == (expected.hidden is None)
        if actual.hidden is not None:
            np.testing.assert_array_equal(actual.hidden, expected.hidden)
            np.testing.assert_array_equal(actual.logits, expected.logits)

    def random_pass(self, rng: random.Random, length: int, used: int, mix: Sequence[float]) -> Pass:
        """Candidates of a position, a chain under the first where it may stand, and an election among them.

        mix: of the agents; rows may leave out all but the first.
        """
        drafted = 0 if used else rng.randint(0, 3)
        others = rng.randint(0, 4)
        rows = 1 + drafted + others
        shown = rng.sample(range(rows), rng.randint(0, rows))
        by_row = np.tile(mix, (len(shown), 1))
        by_row[::2, 1:] = 0
        return Pass(
            tokens=[rng.randrange(FINE) for _ in range(rows)],
            positions=[*range(length, length + 1 + drafted), *[length] * others],
            slot=length + used,
            head_rows=rng.sample(range(rows), rng.randint(0, min(rows, 3))),
            agent_rows=shown,
            mix=rng.choice([mix, by_row]) if shown else mix,
            priorities=[rng.choice([-math.inf, 0.0, 0.0, -1.0, -2.0]) for _ in shown],
            margin_weight=rng.choice([0.0, 0.0, 1.0]),
            threshold=rng.choice([-2.0, 0.0, 0.0, 0.25, 0.1, 1e9]),
            fallback_row=rng.choice([None, rng.randrange(rows)]),
        )

    # ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("part", [0, 1, *(pytest.param(i, marks=pytest.mark.long) for i in range(2, 10))])
    def test_any_sequence_of_passes_gives_what_the_table_gives(self, engine: Engine, part: int) -> None:
        rng = random.Random(part)
        for _ in range(4):
            engine.cache.clear()
            agents = rng.choice(MIXES)
            expected, mix = self.twin(), [*agents.values()] or [1.0]
            both, length = (engine, expected), 0
            for e in both:
                e.use([*agents])
            while length < CONTEXT - 10:
                prompt = [rng.randrange(FINE) for _ in range(rng.randint(1, 6))]
                work = chain(prompt, length, head_rows=[len(prompt) - 1])
                self.check(engine.run(work), expected.run(work))
                for e in both:
                    e.cache.extend(prompt)
                length += len(prompt)
                used = 0
                for _ in range(rng.randint(0, 3)):
                    work = self.random_pass(rng, length, used, mix)
                    self.check(engine.run(work), expected.run(work))
                    used += len(work.tokens)
                if used:  # one candidate of the last pass goes on
                    row = rng.choice([i for i, position in enumerate(work.positions) if position == length])
                    for e in both:
                        e.cache.commit(work.tokens[row], work.slot + row)
                    length += 1
                if rng.random() < 0.3:
                    work = replace(Pass.full_outputs([1, 2, 3], [length] * 3, length), mix=mix)
                    self.check(engine.run(work), expected.run(work))

    def test_the_threshold_is_compared_in_float64(self, engine: Engine) -> None:
        # A margin of 0.25 exceeds every float64 below it, also one that float32 rounds to 0.25.
        margins = engine.run(siblings(range(FINE), 0, **judged(FINE))).margins.tolist()
        row = margins.index(0.25)
        for threshold, elected in ((0.25, []), (0.25 - 1e-12, [row]), (0.25 + 1e-12, [])):
            work = siblings(range(FINE), 0, agent_rows=[row], mix=[1.0], priorities=[0.0], threshold=threshold)
            assert engine.run(work).rows.tolist() == elected

    def test_a_row_attends_to_the_slots_below_its_position_and_to_its_own(self, engine: Engine) -> None:
        for position in range(4):
            for slot in range(position, 9):
                engine.run(chain([1, 2, 3]))
                hidden = engine.run(Pass.full_outputs([4, 5], [position] * 2, slot)).hidden
                assert hidden is not None
                prefix = (1, 2, 3)[:position]
                if slot == position:  # elsewhere its own slot may lie among those below another row's position
                    np.testing.assert_array_equal(hidden[0], table((*prefix, 4))[1])
                np.testing.assert_array_equal(hidden[1], table((*prefix, 5))[1])

    def test_passes_of_one_shape_repeated_do_not_mix(self, engine: Engine) -> None:
        expected = self.twin()
        filled((engine, expected), [1])
        for threshold in (-99.0, 99.0, -99.0, 99.0, 99.0):  # one row is elected, none, …
            for first in (2, 7, 11):
                work = siblings([first, first + 1], 1, **judged(2, threshold=threshold))
                for again in (work, replace(work, head_rows=[1]), replace(work, fallback_row=1)):
                    self.check(engine.run(again), expected.run(again))

    @pytest.mark.parametrize("heads", [[], [2, 0]], ids=str)
    def test_without_an_elected_row_only_the_head_rows_come_back(self, engine: Engine, heads: list[int]) -> None:
        expected = self.twin()
        filled((engine, expected), [1])
        options: list[dict[str, Any]] = [
            judged(3, threshold=1e9),
            judged(3, threshold=1e9, margin_weight=1.0),
            {"agent_rows": [2, 1], "mix": [1.0], "priorities": [-math.inf] * 2, "threshold": -1e9},
            {},
        ]
        for position, each in enumerate(options, 1):
            work = siblings([2, 3, 4], position, head_rows=heads, **each)
            actual = engine.run(work)
            assert actual.rows.tolist() == heads
            self.check(actual, expected.run(work))
            for e in (engine, expected):  # the next pass may begin with a recomputed row
                e.cache.commit(4, position + 2)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_answers_are_those_of_the_sequential_procedure(self, engine: Engine, name: str) -> None:
        rng = random.Random(name)
        session = Session(engine.cache, SCHEDULES[name](), NGrams())
        moved = confirmed = reused = 0
        prompt: list[int] = []
        for _ in range(15):
            kept = prompt if rng.random() < 0.5 else []
            prompt = [*kept, *(rng.randrange(FINE) for _ in range(rng.randint(1, 8)))][:30]
            strategy = rng.choice(["top1", *self.strategies])
            agents = rng.choice([MIXES[0], *MIXES[:-1]])
            engine.use([*agents])
            config = DecodeConfig(
                align=rng.random() < 0.8,
                agents=agents,
                top_k=rng.randint(1, CANDIDATES),
                top_p=1.0,
                strategy=strategy,
                order=rng.choice(ORDERS) if strategy != "top1" else "ranked",
                threshold=rng.choice([-2.0, 0.0, 0.0, 3.0]),
                max_new_tokens=rng.randint(1, CONTEXT - 30),
                seed=rng.randrange(100),
            )
            fallback, eos = rng.choice(FALLBACKS), {rng.randrange(40)}
            expected = answer(prompt, config, fallback, eos)
            stats = Stats()
            steps = list(decode(engine, session, request(prompt, config, fallback, eos), stats))
            assert [step.token for step in steps] == expected.tokens
            assert [step.margins for step in steps] == [position.margins for position in expected.positions]
            assert stats.algorithm() == expected.counts[-1]
            moved += sum(step.rank > 1 for step in steps)
            confirmed += stats.confirmed
            reused += stats.reused_tokens
        assert min(moved, reused) > 10
        assert confirmed > 2 or name == "one-by-one"

    # ── the KV cache ─────────────────────────────────────────────────────────────────────────────────────────────────

    def test_slots_beyond_the_cache_are_refused(self, engine: Engine) -> None:
        engine.run(chain([1]))
        engine.run(siblings([1, 1], 1, SLOTS - 2))
        for work in (siblings([1, 1], 1, SLOTS - 1), Pass.full_outputs([1, 1], [1, 1], SLOTS - 1)):
            with pytest.raises(EngineError, match=f"{SLOTS + 1} slots .* {SLOTS}"):
                engine.run(work)

    @pytest.mark.parametrize("kept", [0, 9])
    def test_a_prompt_reuses_the_entries_that_it_begins_with(self, engine: Engine, kept: int) -> None:
        expected = self.twin()
        text = [position % FINE for position in range(CONTEXT)]
        filled((engine, expected), text[:20])
        for position in range(20, CONTEXT):
            for e in (engine, expected):
                e.run(chain([text[position]], position))
                e.cache.extend([text[position]])
        prompt = [*text[:kept], 22, 21, 20]
        assert engine.cache.reuse(prompt) == expected.cache.reuse(prompt) == kept
        for position in range(kept, CONTEXT):
            work = chain([(3 * position + 1) % FINE], position, head_rows=[0])
            self.check(engine.run(work), expected.run(work))

    @pytest.mark.parametrize(("drafted", "before"), [(0, 0), (3, 1)])
    def test_growth_in_the_middle_of_an_answer_changes_nothing(
        self, growing_and_whole: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, drafted: int, before: int
    ) -> None:
        growing, whole = growing_and_whole
        monkeypatch.setattr(whole.cache._memory, "resize", lambda slots, kept: None)  # a CPU's shrinks for a short text
        for _ in range(before):  # a cache with two copies then grows from the second
            growing.run(chain([3]))
        smallest = growing.memory.slots
        assert smallest < whole.memory.slots == whole.cache.capacity == growing.cache.capacity
        config = DecodeConfig(top_k=CANDIDATES, top_p=1.0, max_new_tokens=CONTEXT - 8)
        sessions = [(e, Session(e.cache, Fixed(2, drafted), NGrams())) for e in (growing, whole)]
        ranks = set()
        for prompt in ([1, 2, 3, 1, 2], [4], [1, 2, 9]):  # the later ones after growth
            expected = answer(prompt, config, "last")
            for engine, session in sessions:
                steps = list(decode(engine, session, request(prompt, config, "last"), Stats()))
                assert [step.token for step in steps] == expected.tokens
                assert [step.margins for step in steps] == [position.margins for position in expected.positions]
                ranks |= {step.rank for step in steps}
        assert max(ranks) > 1  # entries moved
        assert smallest < growing.memory.slots <= whole.memory.slots == whole.cache.capacity

    # ── NaN and infinity ─────────────────────────────────────────────────────────────────────────────────────────────

    def test_a_candidate_that_is_not_finite_is_not_elected(self, engine: Engine) -> None:
        engine.run(chain([1]))
        work = siblings([2, INFINITE, 3], 1, **judged(3, priorities=[-1.0, 0.0, -2.0], threshold=-1e30))
        out = engine.run(work)
        assert np.isnan(out.margins[1])  # whether it reaches the others depends on the kernel
        assert np.isfinite(out.margins[out.rows]).all()
        assert not is_finite(out)

    @pytest.mark.parametrize("pending", [False, True])
    def test_clear_removes_every_trace_of_nan(self, engine: Engine, pending: bool) -> None:
        filled([engine], [1])
        engine.run(siblings([2, INFINITE, *range(6)], 1))
        if pending:
            engine.cache.commit(0, 3)
        else:
            assert np.isnan(engine.run(chain([3], 3, head_rows=[0])).log_normaliser).all()
        engine.cache.clear()
        expected, first = self.twin(), chain([5], head_rows=[0])  # it leaves the slots behind its own as they are
        self.check(engine.run(first), expected.run(first))
        for position in range(1, 9):  # past every slot that held one
            work = siblings([5, 6], position, head_rows=[0], **judged(2, threshold=99.0, fallback_row=1))
            actual = engine.run(work)
            assert is_finite(actual)
            self.check(actual, expected.run(work))

    @pytest.mark.parametrize("at", [0, 3, 6])
    def test_a_prompt_that_is_not_finite_is_refused_by_position_and_dropped(self, engine: Engine, at: int) -> None:
        session, config = Session(engine.cache, Fixed(None)), DecodeConfig(top_k=3, max_new_tokens=5)
        long, prompt = [1, 2, 3, 4, 5, 6, 7], [1, 2]  # whose slots do not reach the one at fault
        for _ in range(2):
            bad = [*long[:at], INFINITE, *long[at + 1 :]]
            with pytest.raises(NumericsError, match=rf"position {at} \(token {INFINITE}\)"):
                list(decode(engine, session, request(bad, config), Stats()))
            assert engine.cache.tokens == []
            steps = list(decode(engine, session, request(prompt, config), Stats()))
            assert [step.token for step in steps] == answer(prompt, config).tokens


def request(prompt: Sequence[int], config: DecodeConfig, fallback: str = "first", eos: Any = frozenset()) -> Request:
    return Request(prompt, config, fallback, eos, config.max_new_tokens)


def answer(
    prompt: Sequence[int], config: DecodeConfig, fallback: str = "first", eos: Any = frozenset()
) -> reference.Answer:
    """What the sequential procedure says of the written model."""
    return helpers.sequential(table, prompt, config, fallback, eos, config.max_new_tokens, JUDGES)


class DeviceConformance(Conformance):
    """For engines that promise no order of equal logits, and no choice among rows of equal score."""

    strategies = tuple(s for s in STRATEGIES if s != "max_prob")  # margins are its scores

    top = SHAPE.vocab_size  # all

    def check(self, actual: StepOutput, expected: StepOutput) -> None:
        """expected: with all tokens."""
        count = CANDIDATES + tensors.TOP_SPARE
        assert all(len(set(ids)) == count for ids in actual.top_ids.tolist())
        by_id = np.take_along_axis(expected.top_logits, np.argsort(expected.top_ids), 1)
        np.testing.assert_array_equal(actual.top_logits, expected.top_logits[:, :count])
        np.testing.assert_array_equal(actual.top_logits, np.take_along_axis(by_id, actual.top_ids, 1))
        self.check_all_but_order(actual, expected)

    def random_pass(self, rng: random.Random, length: int, used: int, mix: Sequence[float]) -> Pass:
        """Each row's score differs from the others': margins and priorities are multiples of 1/8."""
        work = super().random_pass(rng, length, used, mix)
        return replace(work, priorities=[priority - i / 64 for i, priority in enumerate(work.priorities)])
