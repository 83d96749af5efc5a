"""The tiny checkpoints: each reveals a misused model, and the oracle's answers on them are those of a second decoder.

The second decoder is written differently and without any cache. A model is called as a whole: how it makes logits of
states is its own affair.
"""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import checkpoints, oracle
from tests.reference import FALLBACKS, ORDERS, STRATEGIES

FRAGILE = 1e-4
"""What float32 leaves uncertain in the logits of the tiny models (float32 against float64: up to 6e-5)."""


QUICK = ("qwen2", "llama")


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in checkpoints.ARCHITECTURES]
)
def tiny(request, reference, agent) -> SimpleNamespace:
    """A tiny checkpoint: Hugging Face's model, and its agent."""
    return SimpleNamespace(name=request.param, model=reference(request.param), agent=agent(request.param))


PROMPTS = checkpoints.random_prompts(6, seed=4)


@pytest.fixture(scope="module")
def texts():
    """The oracle's answers to the prompts on a tiny checkpoint, once for all tests."""
    known: dict[str, list[oracle.OracleResult]] = {}

    def get(tiny: SimpleNamespace) -> list[oracle.OracleResult]:
        if tiny.name not in known:
            known[tiny.name] = [decoded(tiny, prompt, 64) for prompt in PROMPTS]
        return known[tiny.name]

    return get


def decoded(tiny: SimpleNamespace, prompt: list[int], tokens: int, model: Any = None, **options: Any) -> Any:
    return oracle.decode(
        model or tiny.model, tiny.agent, prompt, eos_ids=checkpoints.EOS_IDS, max_new_tokens=tokens, **options
    )


@torch.no_grad()
def without_a_cache(
    tiny, prompt, tokens, *, top_k=40, top_p=0.95, strategy="top1", order="ranked", fallback="first", threshold, seed
) -> list[int]:
    """The same algorithm again: the whole text is recomputed with all candidates, one of them a row."""

    def read(texts: list[list[int]]) -> tuple[list[list[float]], list[float]]:
        out = tiny.model(input_ids=torch.tensor(texts), use_cache=False, output_hidden_states=True)
        rejects, accepts = tiny.agent(out.hidden_states[-1][:, -1]).T
        return out.logits[:, -1].tolist(), (accepts - rejects).tolist()

    rng = np.random.default_rng(seed)
    text = list(prompt)
    logits = read([text])[0][0]
    while len(text) < len(prompt) + tokens:
        survivors = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
        weights = {i: math.exp(logits[i] - logits[survivors[0]]) for i in survivors}
        total = math.fsum(weights.values())
        while len(survivors) > 1:  # strip from the low end what fits into 1 - top_p
            dropped = [i for i in weights if i not in survivors]
            if math.fsum(weights[i] for i in [survivors[-1], *dropped]) / total > 1 - top_p:
                break
            survivors.pop()
        best, *others = survivors
        rows, margins = (dict(zip(survivors, values, strict=True)) for values in read([[*text, i] for i in survivors]))
        queue = {"ranked": survivors, "best_last": [*others, best], "reversed": survivors[::-1]}[order]
        accepted = [i for i in queue if margins[i] > threshold]
        if not others:
            pick = best
        elif not accepted:
            pick = best if fallback == "first" else others[-1]
        elif strategy == "random":
            pick = accepted[rng.integers(len(accepted))]
        else:
            pick = accepted[0] if strategy == "top1" else max(accepted, key=margins.__getitem__)
        text.append(pick)
        if pick in checkpoints.EOS_IDS:
            break
        logits = rows[pick]
    return text[len(prompt) :]


VARIANTS: list[dict[str, Any]] = [
    *(
        {"strategy": strategy, "order": order, "fallback": FALLBACKS[i % 2]}
        for i, (strategy, order) in enumerate(product(STRATEGIES, ORDERS))
    ),
    *({"top_k": top_k, "top_p": top_p} for top_k, top_p in ((1, 0.95), (3, 1.0), (40, 0.0), (10_000, 0.5))),
]


@pytest.mark.parametrize(
    "tiny",
    ["qwen2", "llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3", "mistral"))],
    indirect=True,
)
def test_a_second_decoder_without_a_cache_gives_the_same_ids(tiny) -> None:
    compared = emitted = 0
    for variant, prompt in zip(VARIANTS, checkpoints.random_prompts(len(VARIANTS), seed=11), strict=True):
        options = {**variant, "threshold": 0.1, "seed": 3}
        result = decoded(tiny, prompt, 8, **options)
        again = without_a_cache(tiny, prompt, 8, **options)
        sure = next((i for i, gap in enumerate(result.gaps) if gap < FRAGILE), len(result.gaps))
        assert again[:sure] == result.token_ids[:sure], variant
        assert sure < len(result.gaps) or again == result.token_ids, variant
        compared, emitted = compared + sure, emitted + len(result.token_ids)
    assert compared > 0.8 * emitted  # the comparison is about something


def test_accepting_all_and_rejecting_all_are_greedy_decoding(tiny) -> None:
    prompt = checkpoints.random_prompts(1, seed=5)[0]
    greedy = tiny.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=24, do_sample=False
    )
    for threshold, fallback in ((-1e9, "last"), (1e9, "first")):
        result = decoded(tiny, prompt, 24, threshold=threshold, fallback=fallback)
        assert result.token_ids == greedy[0, len(prompt) :].tolist()


def one_position_too_far(model: Any) -> Any:
    def run(*, input_ids, past_key_values, **options):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = past + torch.arange(input_ids.shape[1])[None] + (past > 0)
        return model(input_ids=input_ids, past_key_values=past_key_values, position_ids=places, **options)

    return run


def state_before_the_norm(model: Any) -> Any:
    def run(**options):
        seen: list[torch.Tensor] = []
        hook = model.base_model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        out = model(**options)
        hook.remove()
        return SimpleNamespace(logits=out.logits, hidden_states=seen, past_key_values=out.past_key_values)

    return run


def test_each_checkpoint_reveals_a_misused_model(tiny, texts, monkeypatch) -> None:
    """Else a product that does the same would pass."""

    def differing(model: Any = None) -> int:
        return sum(
            decoded(tiny, prompt, 20, model).token_ids != right.token_ids[:20]
            for prompt, right in zip(PROMPTS[:3], texts(tiny), strict=False)
        )

    assert differing(one_position_too_far(tiny.model)) >= 2
    assert differing(state_before_the_norm(tiny.model)) >= 2
    monkeypatch.setattr(oracle, "copy", SimpleNamespace(deepcopy=lambda cache: cache))  # siblings share it
    assert differing() >= 2


def test_the_text_is_fit_for_tests(tiny, texts) -> None:
    results = texts(tiny)
    positions = [p for r in results for p in r.positions]
    sizes = np.array([len(p["candidates"]) for p in positions])
    margins = np.array([m for p in positions for m in p["margins"].values()])
    assert 0.4 < np.mean(sizes == 1) < 0.6
    assert np.mean(sizes[sizes > 1] <= 8) > 0.95
    assert 0.45 < np.mean(margins > 0) < 0.75
    assert np.mean(np.abs(margins) < 1e-3) < 0.01
    assert np.mean(np.array([g for r in results for g in r.gaps]) < FRAGILE) < 0.01
    assert len({t for r in results for t in r.token_ids}) > 80
    assert {"1", "2", "3"} <= {rank for r in results for rank in r.counters["accepted_rank"]}
    assert sum(r.counters["forced"] for r in results) > 0
    assert 1 <= sum(r.finish_reason == "stop" for r in results) < len(results)
    assert all(len(set(r.token_ids[-16:])) > 4 for r in results if r.finish_reason == "length")  # no short loop


# --- the files -------------------------------------------------------------------------------------------------------


def test_files_are_deterministic_and_differ_by_seed(checkpoint, tmp_path: Path) -> None:
    again = checkpoints.make("qwen2", tmp_path / "again")
    other = checkpoints.make("qwen2", tmp_path / "other", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (checkpoint("qwen2"), again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_shapes_that_matter_occur(checkpoint) -> None:
    configs = {}
    for name in checkpoints.ARCHITECTURES:
        configs[name] = config = json.loads((checkpoint(name) / "config.json").read_text())
        generation = json.loads((checkpoint(name) / "generation_config.json").read_text())
        assert (config["eos_token_id"], generation["eos_token_id"]) == (257, [257, 258])  # only one has the list
        assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert [configs[name]["tie_word_embeddings"] for name in ("qwen2", "qwen3", "llama", "mistral")] == [1, 1, 0, 0]
    assert configs["qwen3"]["head_dim"] * configs["qwen3"]["num_attention_heads"] != configs["qwen3"]["hidden_size"]
    assert configs["llama"]["rope_scaling"]["rope_type"] == "llama3"
