"""Rollouts follow the algorithm: the sequential oracle decides alike, and the chain is what was visited."""

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

from mara_deploy.scores.base import Combined, load_score
from mara_deploy.train.environment import Environment, reference_policy
from mara_deploy.train.packed import ATTENTION, PackedLM
from mara_deploy.train.task import Task
from mara_export.hf.checkpoint import load_model
from mara_export.hf.sources import resolve_model
from mara_runtime.errors import NumericsError
from tests import checkpoints, oracle

EOS = frozenset({checkpoints.EOS_ID, checkpoints.SECOND_EOS_ID})
NEW_TOKENS = 24
PROMPTS = [[5, 17, 40], [9, 9, 9, 30, 61, 12, 7], [33], [8, 21, 55, 13]]


@pytest.fixture(scope="module")
def environment(checkpoint):
    model = load_model(resolve_model(str(checkpoint("qwen2"))), ATTENTION)
    return Environment(PackedLM(model), EOS, 40, 0.95, NEW_TOKENS)


def policy_of(agent):
    def margins(states, _):
        with torch.no_grad():
            return agent.margin(states).numpy()

    return margins


@pytest.mark.parametrize("architecture", [checkpoints.ARCHITECTURES[0], pytest.param("llama", marks=pytest.mark.long)])
@pytest.mark.parametrize("fallback", ["first", "last"])
def test_the_likelier_action_is_what_the_oracle_does(architecture, fallback, checkpoint, reference, agent) -> None:
    model = load_model(resolve_model(str(checkpoint(architecture))), ATTENTION)
    environment = Environment(PackedLM(model), EOS, 40, 0.95, NEW_TOKENS)
    episodes = environment.rollout(PROMPTS, policy_of(agent(architecture)), None, fallback=fallback)
    forced = 0
    for prompt, episode in zip(PROMPTS, episodes, strict=True):
        expected = oracle.decode(
            reference(architecture),
            agent(architecture),
            prompt,
            eos_ids=sorted(EOS),
            max_new_tokens=NEW_TOKENS,
            fallback=fallback,
        )
        assert min(expected.gaps) > 1e-5, "a prompt whose outcome hangs on rounding: take another"
        ids = [token for token in expected.token_ids if token not in EOS]
        assert episode.token_ids == ids
        assert episode.finished == (expected.finish_reason == "stop")
        counters = expected.counters
        assert (episode.decisions, episode.examined, episode.forced) == tuple(
            counters[name] for name in ("decisions", "examined", "forced")
        )
        first = counters["accepted_rank"].get(1, 0) + (counters["forced"] if fallback == "first" else 0)
        assert episode.interventions == counters["decisions"] - first
        forced += episode.forced
    assert forced, "no prompt in which all candidates are rejected"


@torch.no_grad()
def test_the_chain_is_what_the_oracle_examined(environment, reference, agent) -> None:
    """States, actions and references of every visited candidate, in order."""
    (episode,) = environment.rollout(PROMPTS[:1], policy_of(agent("qwen2")), None)
    expected = oracle.decode(
        reference("qwen2"),
        agent("qwen2"),
        PROMPTS[0],
        eos_ids=sorted(EOS),
        max_new_tokens=NEW_TOKENS,
        fallback="last",
    )
    chain, at, prefix = episode.chain, 0, list(PROMPTS[0])
    for position in expected.positions:
        examined = position["examined"]
        if examined:
            logits = reference("qwen2")(torch.tensor([prefix])).logits[0, -1].double()[position["candidates"]]
            p = logits.softmax(0).numpy()
        for place, token in enumerate(examined):
            out = reference("qwen2")(torch.tensor([[*prefix, token]]), output_hidden_states=True)
            assert np.allclose(chain.states[at], out.hidden_states[-1][0, -1].numpy(), atol=5e-3)  # float16
            assert chain.margins[at] == pytest.approx(position["margins"][token], abs=1e-4)
            last = place == len(position["candidates"]) - 1
            assert chain.forced[at] == last
            assert chain.accepted[at] == (token == position["token"])
            q = p[place] / p[place:].sum()
            assert chain.reference[at] == (math.inf if last else pytest.approx(math.log(q / (1 - q)), abs=1e-3))
            at += 1
        prefix.append(position["token"])
    assert at == len(chain.accepted) > 20


def test_prompts_do_not_disturb_each_other(environment, agent) -> None:
    together = environment.rollout(PROMPTS, policy_of(agent("qwen2")), None)
    alone = [environment.rollout([prompt], policy_of(agent("qwen2")), None)[0] for prompt in PROMPTS]
    assert [e.token_ids for e in together] == [e.token_ids for e in alone]
    assert [len(e.chain.accepted) for e in together] == [len(e.chain.accepted) for e in alone]


@torch.no_grad()
def candidates_after(reference, prompt):
    """Their ids and their probabilities, renormalised over them."""
    logits = reference("qwen2")(torch.tensor([prompt])).logits[0, -1]
    ids = oracle.candidates(logits, top_k=40, top_p=0.95).ids
    return ids, logits[ids].double().softmax(0).numpy()


def test_the_reference_policy_samples_from_the_candidates(environment, reference) -> None:
    """Frequencies of the first token against the renormalised probabilities, by a chi-squared statistic."""
    draws = 2000
    prompt = next(p for p in ([i, i + 1] for i in range(3, 60)) if len(candidates_after(reference, p)[0]) > 3)
    ids, p = candidates_after(reference, prompt)
    short = Environment(environment.lm, EOS, 40, 0.95, 1)
    episodes = short.rollout([prompt] * draws, reference_policy, np.random.default_rng(0), record=False)
    counts = Counter(e.token_ids[0] if e.token_ids else -1 for e in episodes)
    keys = [-1 if i in EOS else i for i in ids]
    assert set(counts) <= set(keys)
    statistic = sum((counts[k] - draws * q) ** 2 / (draws * q) for k, q in zip(keys, p, strict=True))
    df = len(ids) - 1
    assert statistic < df + 4 * math.sqrt(2 * df)  # four standard deviations


def test_it_is_the_seed_that_decides(environment, agent) -> None:
    def tokens(seed):
        episodes = environment.rollout(PROMPTS, policy_of(agent("qwen2")), np.random.default_rng(seed))
        return [e.token_ids for e in episodes]

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)


def test_of_equal_logits_the_lower_ids_are_candidates() -> None:
    """Not those that torch happens to find first."""
    logits = torch.zeros(1, 300)
    logits[0, [250, 40, 90, 20, 11, 200]] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    lm = SimpleNamespace(head=lambda states: logits)
    (found,) = Environment(lm, EOS, 3, 1.0, NEW_TOKENS)._candidates(torch.zeros(1, 2), [SimpleNamespace(index=0)])
    assert found.ids.tolist() == [250, 11, 20]


def test_an_answer_ends_at_its_limit(environment, agent) -> None:
    short = Environment(environment.lm, frozenset(), 40, 0.95, 3)
    for episode in short.rollout(PROMPTS, policy_of(agent("qwen2")), None):
        assert len(episode.token_ids) == 3
        assert not episode.finished


def test_one_candidate_everywhere_is_greedy_decoding_without_a_decision(environment, reference, agent) -> None:
    greedy = Environment(environment.lm, EOS, 1, 0.95, NEW_TOKENS)
    for prompt, episode in zip(PROMPTS, greedy.rollout(PROMPTS, policy_of(agent("qwen2")), None), strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + NEW_TOKENS:
                ids.append(int(reference("qwen2")(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in EOS:
                    ids.pop()
                    break
        assert episode.token_ids == ids[len(prompt) :]
        assert (episode.decisions, len(episode.chain.accepted)) == (0, 0)


@pytest.mark.parametrize("value", [math.inf, 1e5])
def test_a_state_that_is_not_finite_as_float16_is_named(environment, agent, monkeypatch, value) -> None:
    real = environment.lm.candidates

    def broken(cache, tokens, counts):
        states, siblings = real(cache, tokens, counts)
        if int(cache.lengths[1]) == len(PROMPTS[1]) + 2:
            states[int(counts[0])] = value
        return states, siblings

    monkeypatch.setattr(environment.lm, "candidates", broken)
    with pytest.raises(NumericsError, match=f"prompt 1: a hidden state at position {len(PROMPTS[1]) + 2} is not"):
        environment.rollout(PROMPTS, policy_of(agent("qwen2")), None)


def test_texts_are_not_tidied_as_the_runtime_does_not() -> None:
    made = Tokenizer(models.WordLevel({"well": 0, ".": 1}, unk_token="well"))
    tidy = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=True)
    assert tidy.decode([0, 1]) == "well."
    told = SimpleNamespace(rollout=lambda *_, **__: [SimpleNamespace(token_ids=[0, 1])])
    task = Task(told, tidy, ["Well?"], [[0]], Combined([(1.0, load_score("demo"))]))
    assert task.answer(np.array([0]), reference_policy, None).texts == ["well ."]


def test_both_sides_of_the_benchmark_answer_at_most_so_many_tokens(monkeypatch, capsys) -> None:
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
