"""Answers of a bundle for an evaluation: their seeds, the settings they depend on, and counters over all of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mara_deploy.evaluate.answers import BundleAnswers, PromptFormat, answer_seed, total_stats
from mara_runtime.answer import Generation
from mara_runtime.bundle import Bundle
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import NumericsError
from mara_runtime.stats import Stats
from tests.unit import helpers


def test_counters_add_up():
    one = {"tokens": 3, "accepted_rank": {"1": 2, "10": 1}, "smallest_margin": 0.5, "decode_ms": 1.5}
    two = {"tokens": 5, "accepted_rank": {"2": 1, "1": 1}, "smallest_margin": None, "decode_ms": 2.5}
    total = total_stats([{**one, "tokens_per_second": 2}, {**two, "tokens_per_second": 9}])
    assert total == {
        "tokens": 8,
        "accepted_rank": {"1": 3, "2": 1, "10": 1},
        "smallest_margin": 0.5,
        "decode_ms": 4.0,
        "tokens_per_second": 1500.0,  # the first token of each comes from the prefill
    }
    assert list(total["accepted_rank"]) == ["1", "2", "10"]
    assert total_stats([two])["smallest_margin"] is None
    for decode_ms in (0.0, 2.5):
        prefilled = Stats(tokens=1, decode_ms=decode_ms).to_json()
        assert total_stats([prefilled, prefilled])["tokens_per_second"] == 0.0


class Recorder:
    """A decoder that records how it is called, and finishes the last first; with an engine whose memory grows."""

    def __init__(self, folder=None, failing="") -> None:
        self.calls: list[object] = []
        self.failing = failing
        self.bundle, self.engine = folder and Bundle.open(folder), self
        self.slots, self.text_side = 512, SimpleNamespace(has_template=True)

    def describe(self):
        return {"name": "tensorrt", "gpu": "some", "memory": {"slots": self.slots}}

    def forget(self) -> None:
        self.calls.append("forget")

    def generate_many(self, prompts, configs, **options):
        self.calls.append(([(p, c.seed) for p, c in zip(prompts, configs, strict=True)], options))
        for index, prompt in reversed([*enumerate(prompts)]):
            yield index, SimpleNamespace(result=None)
            if prompt == self.failing:
                yield index, NumericsError("a margin is not finite")
                continue
            made = Generation([1], f"{prompt} {configs[index].seed}", "stop", Stats(tokens=1), {}, configs[index])
            yield index, SimpleNamespace(result=made)


@pytest.mark.parametrize("conversations", [1, 3])
def test_every_answer_of_a_bundle_has_its_own_seed_and_an_empty_cache(conversations):
    decoder = Recorder()
    config = DecodeConfig(align=False, sample=True, seed=5)
    source = BundleAnswers("best-of-2", decoder, config, PromptFormat(True, {"a": 1}), 2, conversations)
    asked = [(prompt, answer_seed(5, prompt, sample)) for prompt in ("one", "two") for sample in (0, 1)]
    texts = [f"{prompt} {seed}" for prompt, seed in asked]
    found = [(index, [answer.text for answer in samples]) for index, samples in source(["one", "two"])]
    in_order = [(0, texts[:2]), (1, texts[2:])]
    assert found == (in_order if conversations == 1 else in_order[::-1])
    options = {"places": conversations, "share": False, "raw": True, "template": {"a": 1}}
    together = [asked] if conversations > 1 else [[one] for one in asked]
    assert decoder.calls == [call for lot in together for call in ("forget", (lot, options))]
    seeds = {answer_seed(seed, prompt, sample) for seed in (0, 1) for prompt in ("a", "b") for sample in (0, 1)}
    assert len(seeds) == 8
    assert answer_seed(0, "a") == answer_seed(0, "a", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_answer_that_fails_ends_the_evaluation_and_those_finished_before_it_are_there():
    source = BundleAnswers("aligned", Recorder(failing="one"), DecodeConfig(), PromptFormat(), conversations=2)
    answers = source(["zero", "one", "two"])
    assert next(answers)[0] == 2
    with pytest.raises(NumericsError, match="a margin is not finite"):
        next(answers)


def test_settings_of_a_bundles_answers(tmp_path):
    """Whatever changes an answer is one of them; the engine's memory, schedule, drafts and other agents are not."""
    asked, other, changed_one = (helpers.agent_file([1.0, part]) for part in (1.0, 2.0, 3.0))

    def open_with(agents: dict[str, bytes], **options: int) -> Bundle:
        return Bundle.open(helpers.make_bundle(tmp_path / "-".join(agents), agents=agents, **options))

    decoder = Recorder(helpers.make_bundle(tmp_path / "bundle", agents={"asked": asked}))

    def settings(prompt_format=None, samples=1, **options):
        config = DecodeConfig(**{"agents": {"asked": 1.0}, **options})
        return BundleAnswers("aligned", decoder, config, prompt_format or PromptFormat(), samples).settings

    before = settings()
    assert before["engine gpu"] == "some"
    for options, changed in (
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"top_k": 5}, "top_k"),
        ({"prompt_format": PromptFormat(raw=True)}, "raw"),
        ({"prompt_format": PromptFormat(template={"a": 1})}, "template"),
        ({"samples": 3}, "samples"),
        ({"schedule": "together", "draft": 2}, None),
    ):
        after = settings(**options)
        assert [key for key in before if after[key] != before[key]] == [changed] * (changed is not None)
        assert after.keys() == before.keys()
    decoder.slots *= 2
    assert settings() == before
    decoder.text_side.has_template = False
    assert settings() == {**before, "raw": True}

    def bundle(**options):
        return settings(**options)["bundle"]

    plain = bundle(align=False)
    decoder.bundle = open_with({"other": other, "asked": asked})
    assert bundle() == before["bundle"]
    assert bundle(agents={"asked": 1.0, "other": 0.5}) != before["bundle"]
    decoder.bundle = open_with({"asked": changed_one})
    assert (bundle() == before["bundle"], bundle(align=False) == plain) == (False, True)
    decoder.bundle = open_with({"asked": asked}, max_context=33)
    assert (bundle() == before["bundle"], bundle(align=False) == plain) == (False, False)
