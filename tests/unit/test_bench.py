"""Synthetic acceptance: the script follows its profile, and every pass of the engine underneath runs in full."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mara_deploy.bench import machine
from mara_deploy.bench.contestant import commands
from mara_deploy.bench.measure import spread
from mara_deploy.bench.synthetic import HIGH, Profile, Script, SyntheticEngine
from mara_deploy.bench.worker import continued_share
from mara_runtime.batch import Batcher
from mara_runtime.candidates import Candidates, select
from mara_runtime.config import DecodeConfig
from mara_runtime.decode import Request, Session, decode
from mara_runtime.schedule.base import Fixed
from mara_runtime.schedule.cost import Cost
from mara_runtime.schedule.drafts import NGrams
from mara_runtime.stats import Stats
from mara_runtime.tensors import top_tokens
from tests.unit import helpers

pytestmark = pytest.mark.slow

POSITIONS, VOCAB, TOP = 1500, 1000, 72


def script(profile: Profile) -> tuple[Script, list[Candidates]]:
    made = Script(profile, POSITIONS, VOCAB, TOP)
    return made, [select(*made.candidates(p), 0.0, 40, 0.95) for p in range(POSITIONS)]


@pytest.mark.parametrize(("decisions", "foreseen"), [(0.0, False), (0.5, False), (0.5, True), (1.0, True)])
def test_the_share_and_the_size_of_decisions(decisions: float, foreseen: bool) -> None:
    _, lists = script(Profile(decisions=decisions, foreseen=foreseen))
    sizes = [len(c) for c in lists if len(c) > 1]
    assert len(sizes) / POSITIONS == pytest.approx(decisions, abs=0.06)
    if sizes:
        assert 6 <= np.mean(sizes) <= 10


@pytest.mark.parametrize("accept", [0.6, 0.9])
def test_acceptance_is_independent_of_the_rank_or_follows_the_probability(accept: float) -> None:
    made, lists = script(Profile(accept=accept, decisions=1.0))
    verdicts = [[made.accepts(p, int(t)) for t in c.ids] for p, c in enumerate(lists)]
    assert np.mean([v[0] for v in verdicts]) == pytest.approx(accept, abs=0.04)
    assert np.mean([v[1] for v in verdicts if not v[0]]) == pytest.approx(accept, abs=0.08)

    made, lists = script(Profile(accept=accept, decisions=1.0, foreseen=True))
    verdicts = [[made.accepts(p, int(t)) for t in c.ids] for p, c in enumerate(lists)]
    assert verdicts == [(np.exp(c.log_probabilities) <= HIGH).tolist() for c in lists]
    assert np.mean([v[0] for v in verdicts]) == pytest.approx(accept, abs=0.04)


@pytest.mark.parametrize("repeated", [0.0, 0.8])
def test_the_share_that_continues_an_earlier_phrase(repeated: float) -> None:
    text = Script(Profile(repeated=repeated), POSITIONS, VOCAB, TOP).prompt(POSITIONS)
    assert continued_share(text[:300], text[300:]) == pytest.approx(repeated, abs=0.06)
    assert continued_share([1, 2, 3, 1, 2], [3, 1, 9]) == pytest.approx(2 / 3)
    assert continued_share([], [1, 2, 3]) == 0.0


@pytest.mark.parametrize(("allowed", "foreseen"), [(1, False), (2, True), (4, False), (16, True)])
def test_a_bundle_of_few_candidates_has_no_more_of_them(allowed: int, foreseen: bool) -> None:
    made = Script(Profile(decisions=1.0, foreseen=foreseen), 300, VOCAB, top_tokens(allowed, VOCAB))
    sizes = {len(select(*made.candidates(position), 0.0, 40, 0.95)) for position in range(300)}
    assert 0.9 * allowed <= max(sizes) <= allowed


def test_a_core_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(machine, "CPUS", tmp_path)
    assert machine.cores() == 4  # unknown topology
    for number, siblings in enumerate(("0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert machine.cores() == 3


@pytest.mark.parametrize("schedule", [Fixed(1), Fixed(None), Fixed(2, 4)])
def test_decoding_follows_the_script(schedule: Fixed, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Script(Profile(accept=0.6, repeated=0.5), 200, VOCAB, TOP)
    counting = helpers.CountingEngine(helpers.hash_table(1, VOCAB, 256, 4.0), slots=400)
    engine = SyntheticEngine(counting, [made])
    session = Session(engine.cache, schedule, NGrams() if schedule.drafted else None)
    stats = Stats()
    prompt = made.prompt(60)
    monkeypatch.setattr("mara_runtime.passes.PREFILL_ROWS", 25)  # three passes for the prompt
    steps = list(decode(engine, session, Request(prompt, DecodeConfig(), "first", frozenset(), 50), stats))
    for step in steps:
        ids = select(*made.candidates(step.position), 0.0, 40, 0.95).ids
        accepted = [int(t) for t in ids if made.accepts(step.position, int(t))]
        assert step.candidates.ids.tolist() == ids.tolist()
        assert not made.accepts(
            step.position, next(t for t in range(VOCAB) if t not in made.candidates(step.position)[0])
        )
        assert step.token == (ids[0] if len(ids) == 1 or not accepted else accepted[0])
    assert len(counting.calls) == stats.forwards + 3  # every pass went through the engine underneath
    flat = Cost((1,), (1, 2), ((1.0, 1.0),), (1, 2), (0.5, 0.5))
    assert engine.expected_ms(flat, 60, stats.forwards) == pytest.approx(
        sum(1.0 + 0.5 * bool(heads) for heads in counting.headed[3:]), rel=1e-6
    )


def test_conversations_follow_a_script_each() -> None:
    scripts = [Script(Profile(accept=0.6, seed=seed), 60, VOCAB, TOP) for seed in range(3)]
    counting = helpers.CountingEngine(helpers.hash_table(1, VOCAB, 256, 4.0), slots=200)
    engine = SyntheticEngine(counting, scripts)
    engine.places.open(3)
    batcher = Batcher(engine, lambda place, _: Session(engine.places[place], Fixed(2), place=place), share=False)
    texts = [batcher.submit(Request(s.prompt(9), DecodeConfig(), "first", frozenset(), 40)) for s in scripts]
    steps = list(batcher.run())
    for made, text in zip(scripts, texts, strict=True):
        emitted = [step for of, step in steps if of is text]
        assert len(emitted) == 40
        for step in emitted:
            ids = select(*made.candidates(step.position), 0.0, 40, 0.95).ids
            accepted = [int(t) for t in ids if made.accepts(step.position, int(t))]
            assert step.token == (ids[0] if len(ids) == 1 or not accepted else accepted[0])


@pytest.mark.parametrize(
    ("engine", "given", "engines", "passed_on"),
    [
        ("auto", False, [], True),
        ("auto", False, ["step.engine"], False),  # "auto" may choose it, and it takes no threads
        ("auto", True, ["step.engine"], True),  # the worker reports that
        ("cpu", False, ["step.engine"], True),
        ("tensorrt", True, ["step.engine"], False),  # they are for the peers
    ],
)
def test_threads_are_passed_to_whom_they_concern(engine: str, given: bool, engines: list[str], passed_on: bool) -> None:
    bundle: Any = SimpleNamespace(folder="bundle", manifest=SimpleNamespace(engines=engines))
    by_name = commands(bundle, engine, ["x=env/python 'a peer.py' model"], 3, threads_given=given)
    assert (by_name["mara"][-2:] == ["--threads", "3"]) == passed_on
    assert by_name["x"] == ["env/python", "a peer.py", "model", "--threads", "3"]


def test_the_spread_of_measurements() -> None:
    assert spread([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0, "count": 1}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "count": 5}
