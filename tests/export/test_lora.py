"""Adapters: peft makes them, merges them and runs them unmerged. What we merge, export and train on is the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mara_deploy import agent as agents
from mara_deploy.prompts import Prompt
from mara_deploy.scores.base import Combined, WeightedScore
from mara_deploy.scores.load import load_score
from mara_deploy.train.config import RECIPES
from mara_deploy.train.policy import agent_policy
from mara_deploy.train.task import open_task
from mara_export.errors import ModelError, ParityError
from mara_export.export import finish
from mara_export.hf.checkpoint import load_config, load_model
from mara_export.hf.lora import Adapter, read_adapter
from mara_export.hf.sources import ModelSource, resolve_adapter
from mara_export.hf.weights import Weights
from mara_export.options import ExportOptions
from mara_export.parity.reference import run_reference
from mara_export.progress import Progress
from mara_export.tracing import trace
from tests import checkpoints, oracle
from tests.adapters import make_adapter
from tests.export.conftest import REVISION, edit_json
from tests.packings import Kind, pack

WEIGHTS = "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"proj": 9, "down_proj": 2, r"layers\.1\..*q_proj": 5},
    "alpha_pattern": {"layers.0.mlp.up_proj": 3},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "ranks": ("qwen2", {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "one layer": ("qwen2", {"target_modules": ["o_proj"], "layers_to_transform": [1]}),
    "a pattern": ("llama", {"target_modules": r".*\.[02]\.mlp\.(up|down)_proj", "lora_dropout": 0.5}),
    "head": ("llama", {"target_modules": ["lm_head", "k_proj"]}),
    "replaced": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
}


def source(folder: Path) -> ModelSource:
    return ModelSource(folder, folder.name, None)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """variant → the folders of a model and of an adapter."""

    def make(variant: str) -> tuple[Path, Path]:
        architecture, config = VARIANTS[variant]
        base, folder = checkpoint(architecture), tmp_path_factory.getbasetemp() / f"lora-{variant}".replace(" ", "-")
        return base, folder if folder.exists() else make_adapter(base, folder, **config)

    return make


def read(base: Path, folder: Path) -> Adapter:
    return read_adapter(source(folder), source(base), load_config(source(base)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_those_of_peft_to_the_last_bit(adapter, tmp_path, variant) -> None:
    """Also after peft's layers are in the model, whose weights stay in their files; and of a model in memory."""
    base, folder = adapter(variant)
    theirs = PeftModel.from_pretrained(checkpoints.load(base), folder).eval()
    ids = torch.tensor(checkpoints.random_prompts(2, length=12))
    with torch.no_grad():
        unmerged = theirs(ids).logits
    merged = theirs.merge_and_unload()

    ours = read(base, folder)
    model = load_model(source(base), streamed=tmp_path)
    weights = Weights(model, base, ours)
    ours.inject(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, unmerged)
    changed = 0
    for name, weight in merged.named_parameters():
        assert torch.equal(torch.from_numpy(weights.read(name)), weight), name
        changed += not torch.equal(weight, checkpoints.load(base).get_parameter(name))
    assert changed == ours.facts.weights

    here = load_model(source(base))
    ours.merge_into(here)
    assert all(torch.equal(here.get_parameter(name), weight) for name, weight in merged.named_parameters())


def test_an_adapter_in_half_precision_is_merged_in_float32(adapter, tmp_path) -> None:
    base, whole = adapter("ranks")
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((whole / "adapter_config.json").read_bytes())
    save_file({name: tensor.bfloat16() for name, tensor in load_file(whole / WEIGHTS).items()}, folder / WEIGHTS)
    merged = PeftModel.from_pretrained(checkpoints.load(base), folder).merge_and_unload()
    weights = Weights(load_model(source(base)), None, read(base, folder))
    for name, weight in merged.named_parameters():
        assert torch.equal(torch.from_numpy(weights.read(name)), weight), name


def test_the_gate_compares_with_pefts_own_forward(adapter, tmp_path, monkeypatch) -> None:
    base, folder = adapter("ranks")
    traced = trace(source(base), [], tmp_path, max_context=64, max_candidates=8, lora=source(folder))
    options = ExportOptions(max_context=64, max_candidates=8)
    facts = finish(traced, options, tmp_path / "whole").manifest.model
    assert facts.adapter is not None
    assert (facts.adapter.source, facts.adapter.base, facts.adapter.revision) == (folder.name, base.name, None)
    assert (facts.adapter.rank, facts.adapter.weights) == (5, 14)
    assert facts.weights != Weights(load_model(source(base))).fingerprint()
    real = Adapter.merged
    for factor in (1.001, -1.0, 0.0):

        def wrong(self: Adapter, *args: Any, factor: float = factor) -> torch.Tensor:
            scales = {name: factor * scale for name, scale in self.scales.items()}
            return real(replace(self, scales=scales), *args)

        monkeypatch.setattr(Adapter, "merged", wrong)
        with pytest.raises(ParityError, match=rf"^qwen2 \+ {folder.name}: the exported graphs differ"):
            finish(traced, options, tmp_path / "wrong")


def test_the_largest_activation_is_that_of_the_merged_model(adapter, tmp_path) -> None:
    """Not what lies between the two matrices of an adapter, nor what the model's own matrix gives without them."""
    base, _ = adapter("plain")
    folder = make_adapter(base, tmp_path / "loud", target_modules=ALL)
    state = load_file(folder / WEIGHTS)
    save_file({k: t * (1e3 if "lora_A" in k else 2e-3) for k, t in state.items()}, folder / WEIGHTS)
    prompts = [(ids, False) for ids in checkpoints.random_prompts(2, length=12)]
    found = []
    for way in (Adapter.inject, Adapter.merge_into):
        model = load_model(source(base))
        way(read(base, folder), model)
        found.append(run_reference(model, "x", [], prompts, 2, Progress(quiet=True)).largest_activation)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_agent_is_trained_on_the_model_with_the_adapter(adapter, agent, reference) -> None:
    base, folder = adapter("ranks")
    score, prompts = Combined([WeightedScore(load_score("demo"))]), [Prompt("Why?"), Prompt("Bread")]
    recipe = replace(RECIPES["demo"], max_new_tokens=24)
    task = open_task(source(base), prompts, score, recipe, lora=source(folder), device="cpu", given=["max_new_tokens"])
    merged = PeftModel.from_pretrained(checkpoints.load(base), folder).merge_and_unload()
    episodes = task.environment.rollout(task.tokens, agent_policy(agent("qwen2")), None, fallback="last")
    eos = sorted(task.environment.eos_token_ids)

    def expected(model: torch.nn.Module) -> list[list[int]]:
        limits: dict[str, Any] = {"eos_ids": eos, "max_new_tokens": 24, "fallback": "last"}
        limits |= {"top_k": recipe.top_k, "top_p": recipe.top_p}
        answers = [oracle.decode(model, agent("qwen2"), list(ids), **limits).token_ids for ids in task.tokens]
        return [[token for token in answer if token not in eos] for answer in answers]

    assert [episode.token_ids for episode in episodes] == expected(merged) != expected(reference("qwen2"))


def damaged(change: str, tensor: torch.Tensor) -> torch.Tensor:
    return {"nan": tensor * float("nan"), "integers": tensor.to(torch.int8), "rows": tensor[:-1]}[change]


CONFIGURATIONS = {
    "DoRA": ({"use_dora": True}, "it has use_dora; merge it with PEFT"),
    "biases": ({"bias": "lora_only"}, "its bias is 'lora_only'; merge it with PEFT"),
    "a bias of its own": ({"lora_bias": True}, "it has lora_bias"),
    "IA3": ({"peft_type": "IA3"}, "its peft_type is 'IA3'; only LoRA is merged"),
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "its peft_type is 'PROMPT_TUNING'"),
    "a classifier": ({"task_type": "SEQ_CLS"}, "its task_type is 'SEQ_CLS'"),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_4"},
        "its init_lora_weights is 'pissa_niter_4'; it belongs to a model whose own",
    ),
    "layers twice": ({"layer_replication": [[0, 1], [0, 2]]}, "it has layer_replication"),
    "single tokens": ({"trainable_token_indices": [5]}, "it has trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "it has target_parameters"),
    "what is not known": ({"use_something_new": 0.5}, "it has use_something_new"),
    "no rank": ({"r": None}, "has no rank and alpha of model.layers.0.self_attn.q_proj"),
    "half a rank": ({"r": 4.0}, "has no rank and alpha of .*: they are 4.0 and 6"),
    "no number": ({"lora_alpha": float("nan")}, "has no rank and alpha of .*: they are 4 and nan"),
    "a pattern": ({"rank_pattern": {"(": 2}}, "has no rank and alpha of model.layers.0.self_attn.q_proj"),
    "another rank": ({"r": 8}, r"its .*lora_A.weight is \[4, 64\]; qwen2 takes \[8, 64\] there"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "targets model.layers.0.self_attn.o_proj"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "has matrices of model.layers.0.self_attn.v_proj"),
    "weights to come": ({"modules_to_save": ["lm_head"]}, "is to replace lm_head, and has no weights of it"),
    "a text": ({"modules_to_save": "lm_head"}, "modules_to_save of its adapter_config.json is not a list: 'lm_head'"),
    "a number": ({"target_modules": 7}, "cannot be loaded by peft"),
}
QV = [f"base_model.model.model.layers.{i}.self_attn.{name}_proj.lora_" for i in (0, 1) for name in "qv"]
Q, V = QV[:2]
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "a NaN": ({f"{Q}A.weight": "nan"}, "q_proj.lora_A.weight has values that are not finite"),
    "integers": ({f"{Q}B.weight": "integers"}, "is stored as torch.int8, which is not floating point"),
    "another width": ({f"{Q}B.weight": "rows"}, r"lora_B.weight is \[63, 4\]; qwen2 takes \[64, 4\] there"),
    "half of a pair": ({f"{V}B.weight": None}, "lora_B.weight"),
    "another model": ({f"{Q.replace('layers.0', 'layers.9')}A.weight": (4, 64)}, "which qwen2 has no place for: name"),
    "an embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 320)},
        "which qwen2 has no place for: LoRA of an embedding is not merged here: merge it with PEFT",
    ),
    "an expert": (
        {f"{Q.replace('self_attn', 'mlp.experts.3')}A.weight": (4, 64)},
        "which qwen2 has no place for: transformers keeps the experts of a layer in one tensor",
    ),
    "no bias": (
        {"base_model.model.model.layers.0.self_attn.k_proj.weight": (32, 64)},
        "replaces a part of model.layers.0.self_attn.k_proj, and model.layers.0.self_attn.k_proj.bias is not that",
    ),
    "both": (
        {
            f"base_model.model.model.layers.0.self_attn.q_proj.{n}": s
            for n, s in (("weight", (64, 64)), ("bias", (64,)))
        },
        "replaces a part of model.layers.0.self_attn.q_proj, and model.layers.0.self_attn.q_proj.weight is not that",
    ),
    "no prefix": ({"lm_head.weight": (320, 64)}, "which qwen2 has no place for"),
    "a tied head": ({"base_model.model.lm_head.weight": (320, 64)}, "embedding and LM head of qwen2 are one matrix"),
    "nothing": (dict.fromkeys(f"{q}{e}.weight" for q in QV for e in "AB"), "changes no matrix"),
}


@pytest.fixture
def copied(adapter, tmp_path) -> tuple[Path, Path]:
    base, folder = adapter("plain")
    copy = tmp_path / "tuned"
    copy.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (copy / name).write_bytes((folder / name).read_bytes())
    return base, copy


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_is_no_plain_lora_is_refused_by_name(copied, case) -> None:
    (base, folder), (values, named) = copied, CONFIGURATIONS[case]
    edit_json(folder / "adapter_config.json", **values)
    with pytest.raises(ModelError, match=f"^tuned.* {named}") as caught:
        read(base, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(copied, case) -> None:
    (base, folder), (changes, named) = copied, TENSORS[case]
    state = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        if isinstance(change, tuple):
            state[name] = torch.ones(change)
        elif change is None:
            del state[name]
        else:
            state[name] = damaged(change, state[name]).contiguous()
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ModelError, match=f"^tuned.*{named}"):
        read(base, folder)


def test_adapters_of_quantised_models_are_refused(copied, tmp_path) -> None:
    base, folder = copied
    packed = pack(base, tmp_path / "packed", Kind("awq"))
    with pytest.raises(ModelError, match=r"^packed is quantised \(awq\), and the adapter tuned is merged into floats"):
        read(packed, folder)


def test_folders_without_an_adapter_are_refused(copied, checkpoint) -> None:
    base, folder = copied
    with pytest.raises(ModelError, match="adapter not found: 'nothing' is neither a folder nor a Hub id"):
        resolve_adapter("nothing")
    with pytest.raises(ModelError, match=r"qwen2 holds no adapter: it has no adapter_config.json"):
        resolve_adapter(str(checkpoint("qwen2")))
    (folder / WEIGHTS).write_bytes(b"torn")
    with pytest.raises(ModelError, match=f"^tuned: its {WEIGHTS} cannot be read"):
        read(base, folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=rf"tuned has no {WEIGHTS}; pickles \(adapter_model.bin\) are not loaded"):
        resolve_adapter(str(folder))
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"^tuned: its adapter_config.json is not a JSON object"):
        read(base, folder)


def test_training_export_and_inspection_name_the_adapter(command, copied, cached, tmp_path, monkeypatch) -> None:
    """An agent gets a note unless it is exported with the adapter that it was trained with."""
    base, folder = copied
    edit_json(folder / "adapter_config.json", base_model_name_or_path="/home/somebody/other-model")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    cached("somebody/tuned", folder)
    monkeypatch.setattr("mara_deploy.train.report.write_report", lambda folder: None)
    monkeypatch.setattr("mara_deploy.train.cautions.cautions", lambda *_: [])  # answers of 4 tokens give reason to some
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    settings = ("--max-new-tokens", 4, "--prompts-at-once", 2, "--batch", 8, "--threads", 1, "--widths", 8, 4)
    settings += ("--replay-transitions", 100, "--start-transitions", 4, "--episodes", 8, "--score", "demo")
    out = tmp_path / "run"
    given = ("--model", base, "--prompts", tmp_path / "p.txt", "--out", out, "--lora", "somebody/tuned")
    done = command("train", *given, *settings)
    assert done.code == 0, done.err
    assert f"mara-export --model {base} --lora somebody/tuned --agent" in done.err
    agent = out / "agent.safetensors"
    assert agents.load(agent).origin.model == "qwen2 + somebody/tuned"
    run = json.loads((out / "run.json").read_text())["lora"]
    assert (run["name"], run["revision"]) == ("somebody/tuned", REVISION)
    resumed = command("train", "--resume", "--out", out, "--episodes", 10, "--lora", folder, "--quiet")
    assert "have changed since the run started" in resumed.refusal("mara-train")

    def export(name: str, *more: object) -> str:
        given = ("--model", base, "--agent", agent, "--out", tmp_path / name, "--no-gate", "--max-context", 64)
        done = command("export", *given, *more)
        assert done.code == 0, done.err
        return done.out + done.err

    said = export("with", "--lora", "somebody/tuned")
    assert "may not align" not in said
    assert f"with the adapter somebody/tuned @ {REVISION}, trained on other-model: 4 weights, rank 4" in said
    assert "was trained on other-model, which may have other weights than qwen2" in said
    assert "the adapter somebody/tuned brings a chat template that qwen2 does not have" in said
    assert "may not align this model: it was trained for qwen2 + somebody/tuned" in export("without")
    edit_json(folder / "adapter_config.json", lora_alpha=12)
    assert "whose weights are not those of qwen2 + tuned" in export("another", "--lora", folder)
