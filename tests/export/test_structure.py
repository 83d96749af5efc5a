"""The structural gate: it passes every tested family, and stops what short prompts and a model's own weights hide."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mara_export import parity
from mara_export.errors import ModelError, ParityError
from mara_export.export import export_all, finish
from mara_export.graph import decomposed, ort, step, traced
from mara_export.graph.trace import choose_tracer
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import structure
from mara_export.parity.miniature import WINDOW, miniature
from mara_export.parity.structure import PROMPTS, StructuralGate, judge, trace_miniature
from mara_export.progress import Progress
from mara_export.targets import LOWERINGS
from mara_export.tracing import trace
from mara_runtime.errors import OptionError
from tests import families
from tests.checkpoints import named
from tests.export.conftest import copy_model
from tests.export.test_export import Stages

QUICK = {("gemma2", "torch"), ("cohere2", "optimum"), ("smollm3", "optimum"), ("ministral3", "torch")}
BOUND = parity.GATES["fp32"].greatest_difference
SIZES = {**families.SIZES, "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4}


def tracers() -> list[str]:
    """Those of this environment."""
    found = []
    for name in ("optimum", "torch"):
        try:
            found.append(choose_tracer(name))
        except OptionError:
            continue
    return found


# --- miniatures ------------------------------------------------------------------------------------------------------

MIXED = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896, "num_hidden_layers": 28}


@pytest.mark.parametrize(
    ("family", "settings", "layers"),
    [
        ("Llama", {}, 2),
        ("Mistral", {}, 2),
        ("Gemma2", {}, 3),
        ("Gemma3Text", {}, 3),
        ("SmolLM3", {}, 3),  # rotary embedding in three layers of four
        ("Qwen2", {**MIXED, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}, 3),
        (
            "Qwen3Moe",
            {"num_hidden_layers": 8, "decoder_sparse_step": 4, "num_experts": 64},
            4,
        ),  # experts in each fourth
    ],
)
def test_a_miniature_has_a_layer_of_each_kind_and_the_heads_of_the_model(family, settings, layers) -> None:
    config = getattr(transformers, f"{family}Config")(**settings)
    model = miniature(config, family)
    small = model.config
    assert small.model_type == config.model_type
    assert small.num_hidden_layers == layers < config.num_hidden_layers
    assert sum(weight.numel() for weight in model.parameters()) < 1e6
    kinds, wanted = (getattr(each, "layer_types", None) or () for each in (small, config))
    assert {*kinds} == {*wanted}
    if family == "SmolLM3":
        assert {*small.no_rope_layers} == {0, 1}
    if family == "Qwen3Moe":
        assert len({type(layer.mlp) for layer in model.get_decoder().layers}) == 2
    groups = config.num_attention_heads // config.num_key_value_heads
    assert small.num_attention_heads // small.num_key_value_heads == groups
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = model.get_decoder().layers[0].self_attn
    assert attention.k_proj.weight.shape[0] == small.num_key_value_heads * head_dim
    assert attention.q_proj.weight.shape[0] == small.num_attention_heads * head_dim
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == config.tie_word_embeddings
    assert getattr(small, "sliding_window", None) == (WINDOW if getattr(config, "sliding_window", None) else None)


def test_a_model_of_few_small_layers_stays_as_it_is_and_random_generators_too() -> None:
    config = families.config("gemma2", SIZES | {"num_hidden_layers": 1})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = miniature(config, "tiny"), miniature(config, "tiny")
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.config.num_hidden_layers, first.config.hidden_size, first.config.head_dim) == (1, 64, 24)
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "starcoder2", "seed_oss"])
@torch.no_grad()
def test_every_weight_of_a_miniature_is_heard(family) -> None:
    """A hundredth of any exceeds the gate's bound, but a bias of keys: what it adds to all alike the softmax drops."""
    model = miniature(families.config(family, SIZES), family)
    text = torch.randint(96, (1, PROMPTS[0]), generator=torch.Generator().manual_seed(1))
    right = model(text).logits
    for name, weight in model.named_parameters():
        kept = weight.clone()
        weight.mul_(1 + 1e-2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        off = float((model(text).logits - right).abs().max() / right.abs().max())
        weight.copy_(kept)
        assert off > BOUND or name.endswith("k_proj.bias"), (name, off)


def test_a_configuration_that_cannot_be_cut_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(ModelError, match=r"odd cannot be made smaller for the structural gate \(.*--no-gate"):
        miniature(transformers.LlamaConfig(hidden_act="nonsense"), "odd")
    config = families.config("starcoder2", SIZES)
    config.sliding_window = 4096
    monkeypatch.setattr(structure, "miniature", lambda *_: transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ModelError, match="window of 4096 tokens"):
        trace_miniature(config, "odd", tracers()[0], tmp_path)


# --- what passes, and what does not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tracer"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.long)
        for pair in product(families.NAMES, tracers())
    ],
)
def test_a_tested_family_passes_in_every_lowering(family, tracer, tmp_path) -> None:
    config = families.config(family, SIZES)
    gate = StructuralGate(config, family, tracer, tmp_path)
    for lowering in LOWERINGS:
        report = gate.report(lowering, Progress(quiet=True))
        assert report["passed"]
        assert {*report["windows"]} <= {0, WINDOW}
        assert (WINDOW in report["windows"]) == bool(getattr(config, "sliding_window", None))
        assert report["rows"] == 2 * sum(count + parity.SIBLINGS for count in PROMPTS)
        assert report["ranks"]["compared"] > 0.9 * report["rows"] * 40
        assert max(report[name]["greatest_difference"] for name in ("hidden", "logits")) < 0.1 * BOUND


def wider(window: int) -> int:
    return window and window + 1


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any], str, str]] = {
    "a window a token wider": (step, "mask_window", lambda own: lambda name: wider(own(name)), "Mistral", "ort"),
    "scores without a cap": (ort, "capped", lambda own: lambda add, scores, node: scores, "Gemma2", "ort"),
    "one table of angles": (
        traced,
        "said_once",
        lambda own: lambda table, layout: own(table, layout)[:, ::-1].copy(),
        "Gemma3Text",
        "portable",
    ),
    "neighbours for halves": (
        decomposed,
        "attribute",
        lambda own: lambda node, name: 1 - own(node, name) if name == "interleaved" else own(node, name),
        "Llama",
        "decomposed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_structure_of_a_large_model_is_stopped(fault, tmp_path, monkeypatch) -> None:
    """Of the classes' own configurations: windows of 4096 tokens, caps of 50."""
    module, name, change, family, lowering = FAULTS[fault]
    config = getattr(transformers, f"{family}Config")()
    made = trace_miniature(config, family, tracers()[0], tmp_path)
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    with pytest.raises(ParityError, match=rf"^{family}: in miniature, .*hidden: greatest difference .*nothing was"):
        judge(made, lowering, tmp_path)


# --- in an export ----------------------------------------------------------------------------------------------------


@pytest.fixture
def wide(checkpoint, tmp_path) -> Path:
    """A checkpoint whose window no prompt of the parity gate fills."""
    return copy_model(checkpoint("mistral"), tmp_path / "wide", sliding_window=256)


def test_a_window_that_the_parity_gate_does_not_reach_is_seen(wide, agent, tmp_path, monkeypatch) -> None:
    own = step.mask_window
    monkeypatch.setattr(step, "mask_window", lambda name: wider(own(name)))
    (tmp_path / "trace").mkdir()
    made = trace(resolve_model(str(wide)), named(agent("mistral")), tmp_path / "trace", max_context=512)
    with pytest.raises(ParityError, match="in miniature"):
        finish(made, ExportOptions(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(made.structure, "report", lambda *_: None)
    assert finish(made, ExportOptions(), tmp_path / "out").manifest.parity["passed"]


def test_a_structure_is_judged_once_in_a_process_and_before_the_reference(wide, agent, tmp_path) -> None:
    changes = ({}, {"precision": "fp16"}, {"lowering": "portable"})
    options = [ExportOptions(max_context=64, **each) for each in changes]
    seen = []
    for folder in ("first", "again"):
        stages = Stages()
        outs = [tmp_path / f"{folder}{number}" for number in range(3)]
        source = resolve_model(str(wide))
        made = export_all(source, named(agent("mistral")), list(zip(options, outs, strict=True)), stages)
        seen.append([stage for stage in stages.seen if stage.startswith(("structural gate", "run the reference"))])
        for bundle in made:
            written = json.loads((bundle.folder / "manifest.json").read_text(encoding="utf-8"))
            assert written["structure"]["windows"] == [WINDOW, WINDOW]
            assert written["structure"]["passed"]
    assert [stage.partition("(")[2][:-1] for stage in seen[0][:-1]] == ["ort", "portable"]
    assert len(seen[1]) == 1
    assert not [*tmp_path.glob(".*")]
