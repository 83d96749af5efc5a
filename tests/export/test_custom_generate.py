"""`model.generate(…, custom_generate=…)` of transformers, against the sequential oracle on the same model."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from functools import wraps
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors import safe_open
from safetensors.torch import save_file

import mara_deploy
from mara_deploy import agent as agents
from mara_runtime.config import FALLBACKS, ORDERS, STRATEGIES
from tests import checkpoints, families, oracle

FOLDER = Path(mara_deploy.__file__).parent / "hub"
FRAGILE = 1e-4
"""A gap of the oracle's that float32 may close, where prompts of other lengths share the passes."""
PAD = checkpoints.PAD_ID
MODELS = [
    "llama",
    "gemma2",  # has windows, which a pass that is taken back must not move, and a cap on its logits
    *(pytest.param(name, marks=pytest.mark.long) for name in (*checkpoints.ARCHITECTURES, *families.NAMES)
      if name not in ("llama", "gemma2")),
]  # fmt: skip


@pytest.fixture
def generate(reference, agent_file, tmp_path, monkeypatch):
    """(name, prompts, options) → the answers' tokens as `generate` returns them, without the prompts."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(name: str, prompts: list[list[int]], **options):
        longest = max(map(len, prompts))
        ids, mask = (
            torch.tensor([[fill] * (longest - len(prompt)) + row for prompt, row in zip(prompts, rows, strict=True)])
            for fill, rows in ((PAD, prompts), (0, [[1] * len(prompt) for prompt in prompts]))
        )
        given = {"agent": str(agent_file(name)), "attention_mask": mask, **options}
        out = reference(name).generate(input_ids=ids, custom_generate=str(FOLDER), trust_remote_code=True, **given)
        assert torch.equal(out[:, :longest], ids)
        return out[:, longest:].tolist()

    return run


def check(answers: list[list[int]], truths: list[oracle.OracleResult]) -> None:
    """Each answer is the oracle's, padded behind its end; after a gap that rounding may close, anything goes."""
    for answer, truth in zip(answers, truths, strict=True):
        wanted = truth.token_ids
        safe = next((i for i, gap in enumerate(truth.gaps) if gap < FRAGILE), None)
        if safe is None:
            assert answer == wanted + [PAD] * (len(answer) - len(wanted))
        else:
            assert answer[:safe] == wanted[:safe]


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_any_length_side_by_side(name, answers, generate):
    prompts, truths = zip(*answers(name, every=4, max_new_tokens=40), strict=True)
    eos = [*checkpoints.EOS_IDS, truths[0].token_ids[3]]
    ended = [next((i + 1 for i, token in enumerate(truth.token_ids) if token in eos), None) for truth in truths]
    assert len(set(ended)) > 1, "one answer ends before another"
    truths = [replace(t, token_ids=t.token_ids[:n], gaps=t.gaps[:n]) for t, n in zip(truths, ended, strict=True)]
    check(generate(name, list(prompts), max_new_tokens=40, eos_token_id=eos), truths)


def test_every_strategy_order_and_fallback(answers, generate):
    for strategy, order, fallback in product(STRATEGIES, ORDERS, FALLBACKS):
        options = {"strategy": strategy, "order": order, "fallback": fallback, "top_k": 6, "max_new_tokens": 12}
        cases = answers("llama", 2, seed=3, **options)
        check(generate("llama", [prompt for prompt, _ in cases], seed=3, **options), [truth for _, truth in cases])
    options = {"threshold": 0.5, "top_p": 0.7, "max_new_tokens": 12}
    ((prompt, truth),) = answers("llama", 1, **options)
    check(generate("llama", [prompt], token_type_ids=torch.tensor([[0] * len(prompt)]), **options), [truth])


def test_a_rejected_candidate_costs_one_row(answers, generate, reference, monkeypatch):
    ((prompt, truth),) = answers("llama", 1, max_new_tokens=40)
    rows, forward = [], reference("llama").forward

    def counted(input_ids, **others):
        rows.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(reference("llama"), "forward", wraps(forward)(counted))
    check(generate("llama", [prompt], max_new_tokens=40), [truth])
    counts = truth.counters
    alone = counts["candidate_counts"]["1"]
    assert rows[0] == len(prompt)
    assert set(rows[1:]) == {1}
    assert counts["examined"] < len(rows) <= 1 + counts["examined"] + alone + counts["forced"]


def test_files_as_they_are_released_and_trained(answers, agent, agent_file, generate, tmp_path):
    (prompt, first), (_, last) = (answers("llama", 1, max_new_tokens=20, fallback=each)[0] for each in FALLBACKS)
    assert first.token_ids != last.token_ids
    with safe_open(agent_file("llama"), "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.save(state, tmp_path / "agent.pth")
    check(generate("llama", [prompt], agent=str(tmp_path / "agent.pth"), max_new_tokens=20), [first])
    trained = agents.load(agent_file("llama"))
    trained.fallback = "last"
    trained.save(tmp_path / "trained.safetensors")
    check(generate("llama", [prompt], agent=str(tmp_path / "trained.safetensors"), max_new_tokens=20), [last])
    mix = {str(tmp_path / "agent.pth"): 3.0, str(tmp_path / "trained.safetensors"): -2.0}  # the agent itself
    check(generate("llama", [prompt], agent=mix, max_new_tokens=20), [first])


def test_what_it_cannot_do_is_refused(generate, agent_file, tmp_path):
    save_file({"linear1.weight": torch.zeros(8, 8)}, tmp_path / "other.safetensors")
    for options, message in (
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "padding_side to 'left'"),
        ({"num_beams": 4, "token_type_ids": torch.tensor([[0, 1, 1]])}, "no num_beams, token_type_ids"),
        ({"strategy": "top2"}, "strategy is 'top2': choose top1, max_prob, random"),
        ({"agent": str(tmp_path)}, "no agent file found at"),
        ({"agent": str(tmp_path / "other.safetensors")}, "not a MARA agent for a hidden size of 64"),
        ({"agent": {str(agent_file("llama")): 0}}, "part of the mix is not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate("llama", [[1, 2, 3]], **options)


def test_the_file_stands_alone():
    source = (FOLDER / "custom_generate" / "generate.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    third = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert third == {"huggingface_hub", "numpy", "safetensors", "torch", "transformers"}
