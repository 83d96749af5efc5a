"""The batcher on engines that run the step graph: whole numbers, so that company must not change a bit of an answer."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mara_runtime.bundle import Bundle
from mara_runtime.config import FALLBACKS, DecodeConfig
from mara_runtime.engines.base import Engine
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import NumericsError
from mara_runtime.schedule.base import Schedule
from tests.double.machine import Machine
from tests.unit import written_model
from tests.unit.batches import Crowd, some_config
from tests.unit.sessions import Draw, a_schedule
from tests.unit.written_model import CANDIDATES, CONTEXT, FINE, INFINITE, JUDGES, PLACES, SIZES, table

CONFIG = DecodeConfig(top_k=2, max_new_tokens=8, agents={"agent": 1.0})


@pytest.fixture(params=["cpu", "tensorrt, in place", "tensorrt, two copies"])
def engine(request: pytest.FixtureRequest, tmp_path: Path, machine: Machine) -> Iterator[Engine]:
    name, *rest = request.param.split(", ")
    if name == "cpu":
        yield CpuEngine(Bundle.open(written_model.write_bundle(tmp_path, always_head=False)), 1)
        return
    folder = written_model.write_bundle(tmp_path, always_head=True, targets=["tensorrt"])
    made = TrtEngine(written_model.add_engines(folder, SIZES, rest[0] == "in place"), "tensorrt")
    yield made
    made.close()


def some_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FINE) for _ in range(rng.randint(1, length))]


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 10))])
def test_in_company_each_answers_as_it_does_alone(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    schedules: dict[int, Schedule] = {}
    draw = Draw(rng.randint)
    crowd = Crowd(table, PLACES, engine=engine, judges=JUDGES, schedule=lambda request: schedules[id(request)])
    system, left = some_prompt(rng, 20), 40
    while left or crowd.batcher.busy:
        if left and rng.random() < 0.5:
            left -= 1
            prompt = rng.choice([[], system]) + some_prompt(rng, 12)
            config = some_config(draw)
            config = replace(config, top_k=min(config.top_k or CANDIDATES, CANDIDATES))
            limit = min(config.max_new_tokens, CONTEXT - len(prompt))
            job = crowd.submit(prompt, config, rng.choice(FALLBACKS), limit=limit, states=left % 2 == 0)
            schedules[id(job.request)] = a_schedule(draw)
        crowd.step()
    ill = [job for job in crowd.submitted if job.error is not None]
    for job in crowd.submitted:
        assert job.error is None or f"(token {INFINITE})" in str(job.error)  # a candidate
        if job.error is None:
            crowd.check(job)
    assert len(ill) < 20


def test_a_nan_reaches_no_other_conversation(engine: Engine) -> None:
    rng = random.Random(2)
    for round_ in range(4):
        crowd = Crowd(table, PLACES, engine=engine, judges=JUDGES, share=round_ % 2 == 0)
        ill = crowd.submit([1, 2, INFINITE, 4], CONFIG)
        others = [crowd.submit([3 + i, *some_prompt(rng, 9)], CONFIG) for i in range(5)]
        crowd.run()
        assert isinstance(ill.error, NumericsError)
        assert f"hidden state at position 2 (token {INFINITE})" in str(ill.error)
        for job in others:
            if job.error is None:
                crowd.check(job)
        assert sum(job.error is None for job in others) >= 4
