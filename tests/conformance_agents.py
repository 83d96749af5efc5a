"""What every engine promises of agents: they are in memory by name, and a pass mixes their margins."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytest

from mara_runtime.engines.base import Engine, Pass, StepOutput, is_finite
from tests.table_engine import TableEngine
from tests.unit.written_model import CANDIDATES, INFINITE, JUDGES, SLOTS, table

MIXES: list[dict[str, float]] = [
    {"agent": 1.0},
    {"other": -0.5},
    {"agent": 1.0, "other": 0.5},
    {"other": 2.0, "agent": 0.0},
    {"endless": 0.0, "agent": 1.0},
    {},
]
"""Agents to use, and how much the margin of each counts."""


class AgentConformance(ABC):
    """Part of `Conformance`, which says how engines are compared."""

    top = CANDIDATES  # of the tokens of a row, as many as the twin returns, and spare ones

    def twin(self) -> TableEngine:
        """The engine as a table, an agent in use."""
        twin = TableEngine(table, JUDGES, SLOTS, self.top)
        twin.use(["agent"])
        return twin

    @abstractmethod
    def check(self, actual: StepOutput, expected: StepOutput) -> None: ...

    @pytest.fixture(autouse=True)
    def an_agent_in_use(self, request: pytest.FixtureRequest) -> None:
        if "engine" in request.fixturenames:
            request.getfixturevalue("engine").use(["agent"])
        if "growing_and_whole" in request.fixturenames:
            for engine in request.getfixturevalue("growing_and_whole"):
                engine.use(["agent"])

    def test_a_mix_is_in_the_order_of_the_agents_in_use(self, engine: Engine) -> None:
        state = table((1,))[1]
        margins = {name: float(judge(state[None])[0]) for name, judge in JUDGES.items()}
        assert len({*margins.values(), 0.0}) == 4
        for names, mix, expected in (
            ((), [1.0], 0.0),
            (("agent", "other"), [1.0, 0.0], margins["agent"]),
            (("other", "agent"), [1.0, 0.0], margins["other"]),
            (("other", "agent"), [-0.5, 2.0], 2 * margins["agent"] - margins["other"] / 2),
            (("endless", "agent"), [0.0, 1.0], margins["agent"]),
            (("endless",), [1.0], margins["endless"]),
            (("agent", "agent"), [0.5, 0.25], 0.75 * margins["agent"]),
            (("agent", "other"), [0.5], 0.5 * (margins["agent"] + margins["other"])),  # one number is for all
        ):
            engine.use(names)
            assert engine.run(Pass([1], [0], 0, agent_rows=[0], mix=mix, priorities=[0.0])).margins == [expected]
        assert abs(margins["endless"]) == math.inf

    def test_rows_have_mixes_of_their_own(self, engine: Engine) -> None:
        expected = self.twin()
        both: list[Any] = [engine, expected]
        for e in both:
            e.use(("other", "agent"))
        mix = np.array([[1, 0], [0, 1], [0.5, -2], [0, 0]], np.float32)
        for rows in ([0, 1, 2, 3], [3, 0, 0, 2]):
            tokens, priorities = [1, 2, 4, 5], [0.0, -1.0, -2.0, -3.0]
            work = Pass(tokens, [0] * 4, 0, agent_rows=rows, mix=mix, priorities=priorities, margin_weight=1.0)
            outs = [e.run(work) for e in both]
            assert len({*outs[1].margins.tolist()}) == 4
            self.check(*outs)
        full = Pass.full_outputs([1, 2, 3], [0] * 3, 0, agents=2)  # of one agent after another
        self.check(engine.run(full), expected.run(full))

    def test_agents_change_without_a_trace(self, engine: Engine) -> None:
        expected = self.twin()
        both: list[Any] = [engine, expected]
        for e in both:
            e.run(Pass([1, 2], [0, 1], 0))
            e.cache.extend([1, 2])
        for agents in (*MIXES, *reversed(MIXES)):
            for e in both:
                e.use([*agents])
            mix, priorities = [*agents.values()] or [1.0], [0.0, -1.0, -2.0]
            work = Pass([3, 4, 5], [2] * 3, 2, head_rows=[0], agent_rows=range(3), mix=mix, priorities=priorities)
            for _ in range(3):  # also as a CUDA graph
                self.check(engine.run(work), expected.run(work))

    @pytest.mark.parametrize(("weight", "fallback"), [(0.0, None), (1.0, 2)])
    def test_rows_after_a_token_that_is_not_finite_have_no_margin_and_are_not_elected(
        self, engine: Engine, weight: float, fallback: int | None
    ) -> None:
        engine.run(Pass([1, INFINITE], [0, 1], 0))
        elect: Any = {"threshold": -1e30, "margin_weight": weight, "fallback_row": fallback}
        judged: Any = {"agent_rows": range(3), "mix": [1.0], "priorities": [0.0, -1.0, -2.0]}
        work = Pass([2, 3, 4], [2] * 3, 2, head_rows=[1], **judged, **elect)
        for _ in range(3):  # also as a CUDA graph
            out = engine.run(work)
            assert np.isnan(out.margins).all()
            assert out.rows.tolist() == [1, *([] if fallback is None else [fallback])]
            assert np.isnan(out.log_normaliser).all()
            assert not is_finite(out)
        assert np.isnan(engine.run(Pass.full_outputs([5], [2], 5)).margins).all()
