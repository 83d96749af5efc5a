"""Which agents an answer is decoded with, and what follows from them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_runtime import AlignedDecoder, DecodeConfig
from mara_runtime.errors import OptionError
from tests.unit import helpers
from tests.unit.decoders import GREEDY, PAIRS, make_decoder, reciting
from tests.unit.helpers import TRAINING, CountingEngine

JUDGES: dict[str, helpers.Judge] = {
    "polite": helpers.sum_agent,
    "brief": lambda hidden: np.float32(-0.75) * helpers.sum_agent(hidden),
}
PARTS = {"polite": 1.0, "brief": 0.5}
LOUD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ 'LOUD' if loud else '' }}<assistant>"


@pytest.fixture
def made(tmp_path: Path) -> tuple[AlignedDecoder, CountingEngine]:
    """Two agents, of which the first accepts everything, and rejects it where its part is below 0."""
    return make_decoder(tmp_path, reciting(), JUDGES)


@pytest.mark.parametrize(
    ("agents", "used", "margin"),
    [
        (None, {"polite": 1.0}, 1.0),
        ({"polite": 2.0}, {"polite": 2.0}, 2.0),
        ({"brief": 1.0}, {"brief": 1.0}, -0.75),
        ({"brief": 2.0, "polite": 0.25}, {"brief": 2.0, "polite": 0.25}, -1.25),
        ({"brief": 0.0, "polite": 1.0}, {"brief": 0.0, "polite": 1.0}, 1.0),
    ],
    ids=str,
)
def test_margins_are_those_of_the_mix(made: Any, agents: dict[str, float] | None, used: Any, margin: float) -> None:
    decoder, engine = made
    pieces = list(decoder.stream([5], replace(PAIRS, agents=agents)))
    assert engine.uses == [tuple(used)]
    assert {value for piece in pieces for value in piece.step.margins.values()} == {margin}
    result = pieces[-1].result
    assert [*result.config.agents.items()] == [*used.items()] == [*result.to_json()["config"]["agents"].items()]
    assert (result.stats.forced > 0) == (margin < 0)


def test_agents_that_the_bundle_does_not_have_are_named(made: Any, tmp_path: Path) -> None:
    decoder, engine = made
    for agents in ({"rude": 1.0}, {"polite": 1.0, "rude": 0.0}):
        with pytest.raises(OptionError, match=r"--agent is 'rude'; the bundle has polite, brief$"):
            decoder.stream([5], replace(PAIRS, agents=agents))
    assert engine.calls == engine.uses == []


def test_a_bundle_without_agents_decodes_plainly(tmp_path: Path) -> None:
    decoder, engine = make_decoder(tmp_path, reciting(), {})
    with pytest.raises(OptionError, match=r"has no agent: add one with mara-agent, or decode without: --no-align"):
        decoder.stream([5], PAIRS)
    with pytest.raises(OptionError, match=r"--agent is 'polite'; the bundle has none: add one with mara-agent"):
        decoder.stream([5], replace(PAIRS, agents={"polite": 1.0}))
    result = decoder.generate([5], replace(GREEDY, max_new_tokens=5))
    assert (result.text, result.config.agents, result.config.fallback) == ("bcabc", None, "first")
    assert engine.uses == []  # nor does a plain answer take any agent into memory


def test_the_first_agent_decides_what_is_not_said(tmp_path: Path) -> None:
    training = {**TRAINING, "template": {"loud": True}}
    options: Any = {"training": training, "fallback": "last", "max_candidates": 8, "chat_template": LOUD}
    decoder, _ = make_decoder(tmp_path, reciting(), JUDGES, **options)

    def resolved(*names: str) -> tuple[Any, ...]:
        config = decoder.resolve(DecodeConfig(agents=dict.fromkeys(names, 1.0) or None))
        return config.top_k, config.top_p, config.fallback

    trained, unknown = (3, 0.4, "last"), (8, 0.95, "first")  # 40, but the bundle allows 8
    assert resolved() == resolved("polite") == resolved("polite", "brief") == trained
    assert resolved("brief") == resolved("brief", "polite") == unknown
    agents: Iterable[str] | None
    for agents, loud in ((None, True), (["polite", "brief"], True), (["brief", "polite"], False)):
        assert decoder.variables(agents=agents) == ({"loud": True} if loud else {})
        config = replace(PAIRS, agents=None if agents is None else dict.fromkeys(agents, 1.0))
        spoken = decoder.text_side.decode(decoder.encode("hi", agents=agents))  # type: ignore[union-attr]
        assert ("LOUD" in spoken) == loud
        assert decoder.generate("hi", config).stats.prompt_tokens == len(decoder.encode("hi", agents=agents))
    assert decoder.variables({"loud": False}) == {"loud": False}


def test_agents_change_between_answers(made: Any) -> None:
    decoder, engine = made
    configs = [replace(PAIRS, agents=agents) for agents in ({"polite": 1.0}, {"brief": 1.0, "polite": 1.0}, None)]
    first = [decoder.generate([5], config).token_ids for config in configs]
    decoder.generate([5], GREEDY)
    assert [decoder.generate([5], config).token_ids for config in configs] == first
    names = [("polite",), ("brief", "polite"), ("polite",)]
    assert engine.uses == names * 2


def test_habits_are_learned_of_each_mix_of_agents(tmp_path: Path) -> None:
    """As `test_the_agent_s_habits_are_learned_over_answers`: one that rejects everything is soon asked about both."""
    decoder, _ = make_decoder(tmp_path, reciting(), JUDGES)
    config = DecodeConfig(top_k=2, max_new_tokens=12, draft=0)
    strict = replace(config, agents={"brief": 1.0})
    for _ in range(2):
        learned = decoder.generate([6], strict).stats
    assert (learned.forwards, learned.rows) == (12, 24)
    fresh, _ = make_decoder(tmp_path / "fresh", reciting(), JUDGES)
    for _ in range(3):
        alone, after = (each.generate([6], config).stats for each in (fresh, decoder))
        assert (alone.forwards, alone.rows) == (after.forwards, after.rows)
    assert decoder.generate([6], strict).stats.rows == 24


def test_habits_are_kept_of_the_mixes_that_were_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mara_runtime.decoder.MOST_MIXES", 2)
    decoder, _ = make_decoder(tmp_path, reciting(), JUDGES)
    config = DecodeConfig(top_k=2, max_new_tokens=12, draft=0)
    strict, other, third = (replace(config, agents=mix) for mix in ({"brief": 1.0}, {"polite": 1.0}, PARTS))

    def rows(asked: DecodeConfig) -> int:
        return decoder.generate([6], asked).stats.rows

    fresh, learned = rows(strict), rows(strict)
    assert learned < fresh  # both are asked about in each pass
    rows(other)
    assert rows(strict) == learned
    rows(third)  # the other one is forgotten
    assert rows(strict) == learned
    rows(other), rows(third)
    assert rows(strict) == fresh
