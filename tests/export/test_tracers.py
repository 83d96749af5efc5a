"""The seam and its two doors: the same nodes from both, and what is refused by name."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PretrainedConfig,
    SmolLM3Config,
)

from mara_export.errors import ModelError
from mara_export.export import finish
from mara_export.graph import probes
from mara_export.graph import trace as tracing
from mara_export.graph.nodes import ATTENTION, DOMAIN, LINEAR, NORM, ROTARY, TABLE
from mara_export.graph.seam import Seam
from mara_export.hf.families import decoder_sizes
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.tracing import Traced, trace
from mara_runtime.errors import OptionError
from mara_runtime.tensors import CacheGroup
from tests import checkpoints, families
from tests.export.conftest import MAX_CONTEXT
from tests.families import SIZES


def optimum_is_here() -> bool:
    try:
        return tracing.choose_tracer("optimum") == "optimum"
    except OptionError:
        return False


with_optimum = pytest.mark.skipif(not optimum_is_here(), reason="Optimum is not installed beside this transformers")


def model_of(config: type[PretrainedConfig], **values: Any) -> Any:
    return AutoModelForCausalLM.from_config(config(**{**SIZES, **values}), attn_implementation="eager").eval()


def trace_llm(model: Any, folder: Path, tracer: str) -> Path:
    return tracing.trace_llm(model, folder, tracer, "it", 64, 64)[0]


def nodes(path: Path) -> Counter[tuple[Any, ...]]:
    """The seam's nodes of a trace, by kind and attributes. Rotary has no name of its own."""
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(
        (node.op_type, *sorted((a.name, onnx.helper.get_attribute_value(a)) for a in node.attribute))
        for node in graph.node
        if node.domain == DOMAIN
    )


@pytest.fixture(scope="module")
def by_torch(checkpoint: Callable[[str], Path], agent: Any, tmp_path_factory: Any) -> Callable[[str], Traced]:
    def make(architecture: str) -> Traced:
        agents = checkpoints.named(agent(architecture))
        source, folder = resolve_model(str(checkpoint(architecture))), tmp_path_factory.mktemp("torch")
        return trace(source, agents, folder, max_context=MAX_CONTEXT, tracer="torch")

    return make


@with_optimum
@pytest.mark.parametrize(
    ("architecture", "lowering"),
    [
        ("qwen2", "ort"),  # biases, a tied head
        pytest.param("qwen3", "portable", marks=pytest.mark.long),  # norms of heads
        pytest.param("llama", "decomposed", marks=pytest.mark.long),
        pytest.param("mistral", "ort", marks=pytest.mark.long),
    ],
)
def test_both_doors_give_the_same_nodes_and_weights(
    by_torch, traced, tmp_path: Path, architecture: str, lowering: str
) -> None:
    ours, optimum = by_torch(architecture), traced(architecture)
    assert (ours.made_with["tracer"], optimum.made_with["tracer"]) == ("torch", "optimum")
    assert nodes(ours.graph.llm) == nodes(optimum.graph.llm)
    made = [
        finish(each, ExportOptions(lowering=lowering), tmp_path / each.made_with["tracer"]) for each in (ours, optimum)
    ]  # which pass the gate
    assert [bundle.manifest.made_with["tracer"] for bundle in made] == ["torch", "optimum"]
    graphs = [onnx.load(bundle.path("step.onnx"), load_external_data=False).graph for bundle in made]
    names = [{node.name for node in graph.node if "_proj" in node.name} for graph in graphs]
    assert names[0] == names[1]
    sizes = [bundle.path("step.onnx.data").stat().st_size for bundle in made]
    assert abs(sizes[0] - sizes[1]) <= 4096, "one copy of each weight"


FAMILIES = [
    (GemmaConfig, {"head_dim": 12}, {NORM: 5, ROTARY: 4, LINEAR: 15, ATTENTION: 2, TABLE: 1}),
    (SmolLM3Config, {"no_rope_layers": [1, 0]}, {NORM: 5, ROTARY: 2, LINEAR: 15, ATTENTION: 2, TABLE: 1}),
    (Olmo2Config, {}, {NORM: 9, ROTARY: 4, LINEAR: 15, ATTENTION: 2, TABLE: 1}),
    (GraniteConfig, {"attention_multiplier": 0.1}, {NORM: 5, ROTARY: 4, LINEAR: 15, ATTENTION: 2, TABLE: 1}),
]
QUICK = {("torch", GemmaConfig), ("optimum", SmolLM3Config)}


@pytest.mark.parametrize(
    ("tracer", "config", "values", "expected"),
    [
        pytest.param(
            *(tracer, *family),
            id=f"{family[0].model_type}-{tracer}",
            marks=[with_optimum] * (tracer == "optimum") + [pytest.mark.long] * ((tracer, family[0]) not in QUICK),
        )
        for tracer in ("optimum", "torch")
        for family in FAMILIES
    ],
)
def test_families_that_nobody_named_come_through(tracer: str, config, values, expected, tmp_path: Path) -> None:
    path = trace_llm(model_of(config, **values), tmp_path, tracer)
    found = nodes(path)
    assert {kind: sum(n for (k, *_), n in found.items() if k == kind) for kind in expected} == expected
    offsets = {dict(rest)["offset"] for kind, *rest in found if kind == NORM}
    assert offsets == {int(config is GemmaConfig)}
    scales = {dict(rest)["scale"] for kind, *rest in found if kind == ATTENTION}
    assert [*scales] == [pytest.approx(values.get("attention_multiplier", values.get("head_dim", 8) ** -0.5))]


def test_layers_that_attend_to_the_same_memory_have_one_cache_and_equal_sizes_lie_together() -> None:
    small, large, equal = ((torch.zeros(1, heads, 3, 8), torch.zeros(1, heads, 3, 8)) for heads in (1, 2, 1))
    again = small[0].view(1, 1, 3, 8), small[1].view(1, 1, 3, 8)
    mixed = small[0], equal[1]
    caches, numbers = probes.group_caches({0: small, 1: large, 2: equal, 3: again, 4: mixed, 5: large})
    assert caches == (CacheGroup(3, 1, 8), CacheGroup(1, 2, 8))
    assert numbers == {0: 0, 2: 1, 4: 2, 1: 3, 3: 0, 5: 3}


@pytest.mark.parametrize("family", [name for name in ("olmo3", "gemma4_text") if name in families.NAMES])
def test_the_seam_finds_the_caches_that_the_configuration_tells(family: str) -> None:
    """And the parameters are as many."""
    config = families.config(family, {**SIZES, "vocab_size": 320, "num_hidden_layers": 4, "tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config).eval()
    sizes = decoder_sizes(config.to_dict(), "it")
    assert Seam(model, "it").caches == sizes.shape.caches
    assert sum(parameter.numel() for parameter in model.parameters()) == sizes.parameters


def test_what_the_seam_has_no_word_for_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="it: a window that changes from row to row"):
        Seam(model_of(Llama4TextConfig, head_dim=8, attention_chunk_size=16), "it")
    with pytest.raises(ModelError, match="it: the attention of layer 3 takes head_bias"):
        probes.check_attention(probes.Window(0), {"dropout": 0.1, "head_bias": torch.ones(1)}, 3, "it")


def test_a_part_that_heads_are_not_rotated_by_is_refused(tmp_path: Path) -> None:
    """Said as transformers 4 has it, where Llama fails, and as 5 has it, where Llama passes over it."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ModelError, match=r"has partial_rotary_factor = 0\.5|cannot be traced"):
        trace_llm(model_of(LlamaConfig, partial_rotary_factor=0.5, rope_parameters=rope), tmp_path, "torch")


def test_a_trace_that_fails_is_one_line(capfd, tmp_path: Path) -> None:
    """Its rows choose what is computed, as those of a mixture of experts do."""
    model = model_of(MistralConfig)
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, given, out: out if bool(out.sum() > 0) else -out)
    with pytest.raises(ModelError, match=r"^it cannot be traced \(--tracer torch\): .*data-dependent.*"):
        trace_llm(model, tmp_path, "torch")
    assert capfd.readouterr().out == ""


def test_the_model_is_as_it_was_after_a_trace_and_does_not_stay_in_memory(tmp_path: Path) -> None:
    model = model_of(MistralConfig, sliding_window=16)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        trace_llm(model, tmp_path, "torch")
        assert torch.equal(model(ids).logits, before)
    weights = weakref.ref(model.model.embed_tokens.weight)
    del model
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize(("pairs", "half"), [(False, False), (True, False), (False, True)])
def test_a_probe_tells_how_heads_are_turned(pairs: bool, half: bool) -> None:
    def apply_rotary(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        def turn(x: Any) -> Any:
            width = cos.shape[-1]
            x, rest = x[..., :width], x[..., width:]
            low, high = (x[..., ::2], x[..., 1::2]) if pairs else x.chunk(2, -1)
            turned = torch.stack((-high, low), -1).flatten(-2) if pairs else torch.cat((-high, low), -1)
            return torch.cat((x * cos[:, None] + turned * sin[:, None], rest), -1)

        return turn(q), turn(k)

    found = probes.probe_rotary(apply_rotary, 8 if half else 16, 16)
    assert found == {"interleaved": int(pairs), "layout": "pairs" if pairs else "halves"}
    assert probes.probe_rotary(lambda q, k, cos, sin: (q * cos[:, None], k), 16, 16) is None


def test_a_probe_tells_a_root_mean_square_from_other_norms() -> None:
    assert probes.probe_norm(torch.nn.RMSNorm(16, eps=1e-3)) == {"epsilon": 1e-3, "offset": 0}
    assert probes.probe_norm(torch.nn.LayerNorm(16)) is None
    assert probes.probe_norm(torch.nn.Linear(16, 16)) is None


def test_a_tracer_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_DOORS", {"optimum": "no_such_module", "torch": "by_export"})
    assert tracing.choose_tracer("auto") == "torch"
    with pytest.raises(
        OptionError, match=r"--tracer is 'optimum', which cannot be used here \(.*mara-deploy\[export\]"
    ):
        tracing.choose_tracer("optimum")
