"""Rollouts follow the algorithm: they decide like the sequential oracle and record what it visits."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.environment import Environment
from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_deploy.train.policy import agent_policy, reference_policy
from mara_deploy.train.task import TrainingTask
from mara_export.hf.checkpoint import load_model
from mara_export.hf.sources import resolve_model
from mara_runtime.errors import NumericsError
from tests import checkpoints, oracle

EOS = frozenset({checkpoints.EOS_ID, checkpoints.SECOND_EOS_ID})
NEW_TOKENS = 24
PROMPTS = [[5, 17, 40], [9, 9, 9, 30, 61, 12, 7], [33], [8, 21, 55, 13]]


@pytest.fixture(scope="module")
def environments(checkpoint):
    def make(architecture):
        model = load_model(resolve_model(str(checkpoint(architecture))), ATTENTION)
        return Environment(PackedLM(model), EOS, 40, 0.95, NEW_TOKENS)

    return make


@pytest.fixture(scope="module")
def environment(environments):
    return environments("qwen2")


@pytest.fixture
def policy(agent):
    return agent_policy(agent("qwen2"))


def oracle_of(reference, agent, prompt, fallback):
    return oracle.decode(reference, agent, prompt, eos_ids=sorted(EOS), max_new_tokens=NEW_TOKENS, fallback=fallback)


@pytest.mark.parametrize("architecture", [checkpoints.ARCHITECTURES[0], pytest.param("llama", marks=pytest.mark.long)])
@pytest.mark.parametrize("fallback", ["first", "last"])
def test_the_more_probable_action_is_the_oracles(architecture, fallback, environments, reference, agent) -> None:
    """Token for token, in a batch and alone, with the same counters."""
    environment, policy = environments(architecture), agent_policy(agent(architecture))
    episodes = environment.rollout(PROMPTS, policy, None, fallback=fallback)
    for prompt, episode in zip(PROMPTS, episodes, strict=True):
        expected = oracle_of(reference(architecture), agent(architecture), prompt, fallback)
        assert min(expected.gaps) > 1e-5, "the outcome depends on rounding: take another prompt"
        assert episode.token_ids == [token for token in expected.token_ids if token not in EOS]
        assert episode.finished == (expected.finish_reason == "stop")
        counters = expected.counters
        assert episode.decisions == counters["decisions"]
        assert episode.examined == len(episode.trajectory) == counters["examined"]
        assert episode.forced == counters["forced"]
        first = counters["accepted_rank"].get("1", 0) + (counters["forced"] if fallback == "first" else 0)
        assert episode.interventions == counters["decisions"] - first
        (alone,) = environment.rollout([prompt], policy, None, fallback=fallback, record=False)
        assert alone.token_ids == episode.token_ids
        assert len(alone.trajectory) == 0
    assert sum(episode.forced for episode in episodes), "no decision in which all candidates are rejected"
    assert {episode.finished for episode in episodes} == {True, False}, "no answer ends, or none reaches its limit"


@torch.no_grad()
def test_the_trajectory_is_what_the_oracle_examined(environment, reference, agent, policy) -> None:
    """States, actions and references of every visited candidate, in order."""
    (episode,) = environment.rollout(PROMPTS[:1], policy, None)
    expected = oracle_of(reference("qwen2"), agent("qwen2"), PROMPTS[0], "last")
    trajectory, at, prefix = episode.trajectory, 0, list(PROMPTS[0])
    for position in expected.positions:
        examined = position["examined"]
        if examined:
            logits = reference("qwen2")(torch.tensor([prefix])).logits[0, -1].double()[position["candidates"]]
            p = logits.softmax(0).numpy()
        for rank, token in enumerate(examined):
            out = reference("qwen2")(torch.tensor([[*prefix, token]]), output_hidden_states=True)
            state = out.hidden_states[-1][0, -1].numpy()
            assert np.allclose(trajectory.states[at], state, atol=5e-3)  # float16
            assert trajectory.margins[at] == pytest.approx(position["margins"][token], abs=1e-4)
            last = rank == len(position["candidates"]) - 1
            assert trajectory.forced[at] == last
            assert trajectory.accepted[at] == (token == position["token"])
            q = p[rank] / p[rank:].sum()
            assert trajectory.reference[at] == (math.inf if last else pytest.approx(math.log(q / (1 - q)), abs=1e-3))
            at += 1
        prefix.append(position["token"])
    assert at == len(trajectory) > 20


@torch.no_grad()
def test_the_reference_policy_samples_from_the_candidates(environment, reference) -> None:
    """Frequencies of the first token against the renormalised probabilities, by a chi-squared statistic."""
    draws = 2000
    for prompt in ([i, i + 1] for i in range(3, 60)):
        logits = reference("qwen2")(torch.tensor([prompt])).logits[0, -1]
        ids = oracle.candidates(logits, top_k=40, top_p=0.95).ids
        if len(ids) > 3:
            break
    p = logits[ids].double().softmax(0).numpy()
    short = Environment(environment.lm, EOS, 40, 0.95, 1)
    episodes = short.rollout([prompt] * draws, reference_policy, np.random.default_rng(0), record=False)
    counts = Counter(e.token_ids[0] if e.token_ids else -1 for e in episodes)
    keys = [-1 if i in EOS else i for i in ids]
    assert set(counts) <= set(keys)
    statistic = sum((counts[k] - draws * q) ** 2 / (draws * q) for k, q in zip(keys, p, strict=True))
    df = len(ids) - 1
    assert statistic < df + 4 * math.sqrt(2 * df)  # four standard deviations


def test_of_equal_logits_the_lower_ids_are_candidates() -> None:
    """Not those that torch happens to rank first."""
    logits = torch.zeros(1, 300)
    logits[0, [250, 40, 90, 20, 11, 200]] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    examined = []

    def candidates(cache, tokens, counts):
        examined.append(tokens.tolist())
        return torch.zeros(len(tokens), 2), None

    lm = SimpleNamespace(
        hidden_size=2,
        prefill=lambda *_: (SimpleNamespace(keep=lambda _: None), torch.zeros(1, 2)),
        head=lambda _: logits,
        candidates=candidates,
        commit=lambda *_: None,
    )
    Environment(lm, EOS, 3, 1.0, 1).rollout([[0]], reference_policy, None)
    assert examined == [[250, 11, 20]]


def test_what_is_not_finite_is_an_error(environment, policy, monkeypatch) -> None:
    """A state, also one that only float16 cannot hold, and logits: with the number of the prompt and the position."""
    real, at = environment.lm.candidates, len(PROMPTS[1]) + 2
    for value in (math.inf, 1e5):

        def broken(cache, tokens, counts, value=value):
            states, siblings = real(cache, tokens, counts)
            if int(cache.lengths[1]) == at:
                states[int(counts[0])] = value
            return states, siblings

        monkeypatch.setattr(environment.lm, "candidates", broken)
        with pytest.raises(NumericsError, match=f"prompt 1: .* position {at} "):
            environment.rollout(PROMPTS, policy, None)
    monkeypatch.setattr(environment.lm, "head", lambda states: torch.full((len(states), 300), math.nan))
    with pytest.raises(NumericsError, match=f"prompt 0: the logits at position {len(PROMPTS[0])} "):
        environment.rollout(PROMPTS, policy, None)


def test_texts_keep_spaces_before_punctuation_like_the_runtimes() -> None:
    words = Tokenizer(models.WordLevel({"well": 0, ".": 1}, unk_token="well"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=True)
    assert tokenizer.decode([0, 1]) == "well."
    environment = SimpleNamespace(rollout=lambda *_, **__: [SimpleNamespace(token_ids=[0, 1])])
    task = TrainingTask(environment, tokenizer, [Prompt("Well?")], [[0]], Combined([WeightedScore(load_score("demo"))]))
    assert task.answer(np.array([0]), reference_policy, None).texts == ["well ."]


def test_the_benchmark_of_transitions_runs(monkeypatch, capsys) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "transitions.py"
    spec = importlib.util.spec_from_file_location("transitions", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened, real = [], module.open_task
    monkeypatch.setattr(module, "open_task", lambda *args, **kw: opened.append(real(*args, **kw)) or opened[-1])
    options = ["--max-new-tokens", "3", "--rounds", "2", "--prompts-at-once", "8"]
    monkeypatch.setattr(sys, "argv", ["transitions.py", *options])
    module.main()
    assert opened[0].environment.max_new_tokens == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["prompts_at_once"] == 8
