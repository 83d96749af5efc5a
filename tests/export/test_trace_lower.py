"""The exported step graph, as ONNX Runtime computes it, against Hugging Face eager.

What the step graph adds to the model, the choice among candidates, is compared with its definition on a written model
(tests/conformance.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from transformers import AutoModelForCausalLM, GptOssConfig

from mara_export.export import finish
from mara_export.graph.trace import trace_llm
from mara_export.hf.sources import resolve_model
from mara_export.hf.weights import Weights
from mara_export.options import ExportOptions
from mara_export.parity import NAMES, Rows, run_reference
from mara_export.progress import Progress
from mara_export.targets import LOWERINGS
from mara_export.tracing import Traced, trace
from mara_runtime.bundle import Bundle
from mara_runtime.engines import ort_memory
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort_cpu import CpuEngine
from tests import checkpoints
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT, PAIRS

LENGTH = 23
RELATIVE = 1e-5
TOP = MAX_CANDIDATES + 8


@dataclass
class Pair:
    """An engine with a prompt in its cache, and what Hugging Face computes for sequences."""

    engine: CpuEngine
    model: Any
    agent: Any
    prompt: list[int]

    def prefill(self, pieces: Sequence[int] = (LENGTH,)) -> Rows:
        """The prompt in passes of the given sizes."""
        assert sum(pieces) == LENGTH
        out, start = [], 0
        for size in pieces:
            out.append(self.evaluate(self.prompt[start : start + size], range(start, start + size), start))
            start += size
        return Rows.concatenate(out)

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> Rows:
        out = self.engine.run(Pass.full_outputs(tokens, positions, slot))
        return Rows(*(getattr(out, name).copy() for name in NAMES))

    @torch.no_grad()
    def expected(self, tokens: Sequence[int]) -> Rows:
        """All rows of a sequence, in one pass without a cache."""
        out = self.model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[-1][0]
        return Rows(hidden.numpy(), out.logits[0].numpy(), self.agent.margin(hidden).numpy())

    def after_prompt(self, *continuations: Sequence[int]) -> Rows:
        """The last row of the prompt followed by each continuation."""
        return Rows.concatenate([self.expected([*self.prompt, *more]).tail(1) for more in continuations])


def assert_close(found: Rows, expected: Rows, relative: float = RELATIVE) -> None:
    for name in NAMES:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        assert a.dtype == np.float32
        assert np.abs(a - b).max() <= relative * max(np.abs(b).max(), 1.0), name  # margins are of the order of 1


def some(rows: Rows, *indices: int) -> Rows:
    return Rows(*(getattr(rows, name)[np.array(indices, int)] for name in NAMES))


@pytest.fixture(scope="module")
def engines(bundle: Callable[..., Path]) -> Callable[[str, str], CpuEngine]:
    opened: dict[tuple[str, str], CpuEngine] = {}

    def get(architecture: str, lowering: str) -> CpuEngine:
        key = architecture, lowering
        if key not in opened:
            opened[key] = CpuEngine(Bundle.open(bundle(architecture, lowering)), threads=1)
            opened[key].use(["agent"])
        return opened[key]

    return get


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest, engines, reference, agent) -> Pair:
    architecture, lowering = request.param
    engine = engines(architecture, lowering)
    # Rubbish in every slot: a test would notice if it saw what it must not see.
    rubbish = checkpoints.random_prompts(1, seed=99, length=engine.cache.capacity)[0]
    engine.run(Pass(rubbish, [slot % MAX_CONTEXT for slot in range(engine.cache.capacity)], 0))
    return Pair(engine, reference(architecture), agent(architecture), PROMPT)


PROMPT = checkpoints.random_prompts(1, seed=5, length=LENGTH)[0]
SIBLINGS = list(range(40, 57))
COUNT = len(SIBLINGS)


def test_any_chunking_of_the_prompt_gives_hugging_faces_rows(pair: Pair) -> None:
    expected = pair.expected(pair.prompt)
    assert 0 < (expected.margins > 0).sum() < LENGTH
    for pieces in ([LENGTH], [1] * LENGTH, [7, 7, 7, 2], [1, 3, 7, 12]):
        assert_close(pair.prefill(pieces), expected)
    whole = checkpoints.random_prompts(1, seed=8, length=MAX_CONTEXT)[0]
    assert_close(pair.evaluate(whole, range(MAX_CONTEXT), 0), pair.expected(whole), 3e-5)


def test_siblings_see_the_prompt_alone_wherever_they_are_written(pair: Pair) -> None:
    expected = pair.after_prompt(*([token] for token in SIBLINGS))
    assert np.abs(expected.hidden[0] - expected.hidden[1]).max() > 0.01 * np.abs(expected.hidden).max()
    pair.prefill()
    for slot in (LENGTH, LENGTH + 60, pair.engine.cache.capacity - COUNT):
        assert_close(pair.evaluate(SIBLINGS, [LENGTH] * COUNT, slot), expected)
    for index, slot in ((0, LENGTH), (1, LENGTH + 1), (16, LENGTH + 16), (3, LENGTH), (0, LENGTH)):
        assert_close(pair.evaluate([SIBLINGS[index]], [LENGTH], slot), some(expected, index))
    # A draft under the first candidate and the others behind it: what a pass of the decode loop holds.
    chain, others = [70, 71, 72], SIBLINGS[:2]
    found = pair.evaluate([*chain, *others], [LENGTH, LENGTH + 1, LENGTH + 2, LENGTH, LENGTH], LENGTH)
    expected = pair.after_prompt(chain[:1], chain[:2], chain, *([token] for token in others))
    assert_close(found, expected)


def test_a_moved_entry_continues_the_sequence(pair: Pair) -> None:
    siblings, following = [65, 66, 67, 68], 99
    pair.prefill()
    pair.evaluate(siblings, [LENGTH] * len(siblings), LENGTH)
    for index in (2, 1, 3):  # the moved one stays where it was: a move is a copy
        pair.engine.memory.places[0].move(0, LENGTH + index, LENGTH)
        found = pair.evaluate([following], [LENGTH + 1], LENGTH + 10)
        assert_close(found, pair.after_prompt([siblings[index], following]))
    wrong = pair.after_prompt([siblings[0], following])  # what stands there without a move
    assert np.abs(found.hidden - wrong.hidden).max() > 0.01 * np.abs(wrong.hidden).max()


def assert_best_tokens(out: StepOutput, logits: NDArray[np.float32], top: int = TOP) -> None:
    """The best tokens of `logits` (R, V) and the normalisers, within what float32 leaves open."""
    wanted = logits.astype(np.float64)
    slack = RELATIVE * max(np.abs(wanted).max(initial=0.0), 1.0)
    assert out.top_ids.shape == out.top_logits.shape == (len(out.rows), top)
    assert out.log_normaliser.shape == (len(out.rows),)
    assert (out.top_logits[:, :-1] >= out.top_logits[:, 1:]).all()
    np.testing.assert_allclose(out.top_logits, np.sort(wanted, axis=1)[:, ::-1][:, :top], rtol=0, atol=slack)
    np.testing.assert_allclose(out.top_logits, np.take_along_axis(wanted, out.top_ids, 1), rtol=0, atol=slack)
    assert all(len(set(ids)) == top for ids in out.top_ids.tolist())
    greatest = wanted.max(axis=1, initial=-np.inf)
    normaliser = np.log(np.exp(wanted - greatest[:, None]).sum(axis=1)) + greatest
    np.testing.assert_allclose(out.log_normaliser, normaliser, rtol=0, atol=2 * slack)


def choice(work: Pass, margins: NDArray[np.float32]) -> list[int]:
    """The rows for the head, as mara_runtime.tensors words it; scores add up in float32, as in the graph."""
    best, elected = -np.inf, work.fallback_row
    for asked, priority, margin in zip(work.agent_rows, work.priorities, margins, strict=True):
        score = np.float32(priority) + np.float32(work.margin_weight) * margin
        if float(margin) > work.threshold and score > best:
            best, elected = score, asked
    return [*work.head_rows, *([] if elected is None else [elected])]


def test_any_pass_gives_hugging_faces_rows_and_the_defined_choice(pair: Pair) -> None:
    """Random passes of a chain and siblings; all rows are Hugging Face's, and the elected one is that of `choice`."""
    rng = np.random.default_rng(7)
    known: dict[tuple[int, ...], Rows] = {}
    none = some(pair.expected(pair.prompt))

    def expected(work: Pass, rows: Sequence[int]) -> Rows:
        """Rows of a pass whose chain comes first."""
        found = [none]
        for i in rows:
            continuation = (*work.tokens[: work.positions[i] - LENGTH], work.tokens[i])
            if continuation not in known:
                known[continuation] = pair.after_prompt(continuation)
            found.append(known[continuation])
        return Rows.concatenate(found)

    pair.prefill()
    chains = [rng.integers(0, 256, 5).tolist() for _ in range(3)]
    elected, rounds = 0, 60
    for _ in range(rounds):
        chain = chains[rng.integers(3)][: rng.integers(1, 6)]
        others = rng.choice(16, rng.integers(0, 12), replace=False).tolist()
        tokens = [*chain, *others]
        count = int(rng.integers(0, len(tokens) + 1))
        work = Pass(
            tokens,
            [*range(LENGTH, LENGTH + len(chain)), *[LENGTH] * len(others)],
            LENGTH,
            rng.choice(len(tokens), rng.integers(0, 4)).tolist(),
            rng.choice(len(tokens), count, replace=False).tolist(),
            rng.choice([-np.inf, -2.0, -1.0, 0.0, 1.5], count).tolist(),
            float(rng.choice([0.0, 1.0, 0.5])),
            float(rng.choice([0.0, 0.0, -0.5, 0.5, 9.0, -9.0])),
            None if rng.random() < 0.5 else int(rng.integers(len(tokens))),
        )
        out = pair.engine.run(work)
        assert out.rows.tolist() == choice(work, out.margins)
        np.testing.assert_allclose(out.margins, expected(work, work.agent_rows).margins, rtol=0, atol=RELATIVE)
        assert_best_tokens(out, expected(work, out.rows.tolist()).logits)
        elected += len(out.rows) - len(work.head_rows)
    assert 0.4 * rounds < elected < 0.95 * rounds


def test_a_small_vocabulary_is_returned_whole(traced, reference, agent, tmp_path) -> None:
    """More candidates than tokens."""
    options = ExportOptions(max_context=32, max_candidates=1024, gate=False)
    made = finish(replace(traced("mistral"), max_candidates=1024), options, tmp_path / "out")
    pair = Pair(CpuEngine(made, threads=1), reference("mistral"), agent("mistral"), SIBLINGS)
    out = pair.engine.run(Pass(SIBLINGS, range(COUNT), 0, range(COUNT)))
    assert_best_tokens(out, pair.expected(SIBLINGS).logits, pair.model.config.vocab_size)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_cache_that_grows_gives_the_same_rows(bundle, reference, agent, monkeypatch, lowering) -> None:
    monkeypatch.setattr(ort_memory, "FIRST_SLOTS", 16)
    engine = CpuEngine(Bundle.open(bundle("qwen3", lowering)), threads=1)
    engine.use(["agent"])
    pair = Pair(engine, reference("qwen3"), agent("qwen3"), PROMPT)
    assert_close(pair.prefill([9, *[1] * 14]), pair.expected(pair.prompt))  # the seventeenth row needs more slots
    expected, sizes = pair.after_prompt([65], [66], [67]), [engine.memory.slots]
    for slot in (40, 100, engine.cache.capacity - 3):
        assert_close(pair.evaluate([65, 66, 67], [LENGTH] * 3, slot), expected)
        sizes.append(engine.memory.slots)
    assert sizes == sorted({16 * 2, *sizes})
    engine.memory.places[0].move(67, 42, LENGTH)  # the third sibling, written before the last growth
    assert_close(pair.evaluate([99], [LENGTH + 1], LENGTH + 1), pair.after_prompt([67, 99]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_logits_that_are_not_finite_have_no_normaliser(bundle, engines, tmp_path, value) -> None:
    original = Bundle.open(bundle("llama"))
    model = onnx.load(original.path("step.onnx"))
    (head,) = [n for n in model.graph.node if n.name == "/lm_head/MatMul"]
    (tensor,) = [t for t in model.graph.initializer if t.name == head.input[1]]
    array = numpy_helper.to_array(tensor).copy()
    array[0, 300] = value  # one weight of one token
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "step.onnx")
    shutil.copytree(original.folder / "agents", tmp_path / "agents")
    engine = CpuEngine(Bundle(tmp_path, original.manifest), threads=1)
    engine.use(["agent"])
    work = Pass(SIBLINGS, range(COUNT), 0, range(COUNT), [0], [-np.inf])
    out = engine.run(work)
    full = engine.run(Pass.full_outputs(work.tokens, work.positions, 0)).logits
    assert full is not None
    bad = np.isnan(full[:, 300]) | np.isposinf(full[:, 300])
    assert bad.any()
    assert np.array_equal(np.isnan(out.log_normaliser), bad)  # minus infinity is a token that is never emitted
    assert np.array_equal(out.margins, engines("llama", "ort").run(work).margins)


# --- models that no tiny checkpoint is -------------------------------------------------------------------------------


def scaled(model: Any) -> Any:
    """No configuration of the supported families can ask for a scale of its own."""
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.7
    return model


def sinking(mistral: Any) -> Any:
    """gpt-oss with one matrix in place of its experts; its sinks are where scores are."""
    sizes = {name: getattr(mistral.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 8}
    config = GptOssConfig(**sizes, num_local_experts=1, sliding_window=16, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = torch.nn.Linear(config.hidden_size, config.hidden_size)
        layer.mlp.register_forward_hook(lambda mlp, given, out: (out, None))  # beside it, how experts were chosen
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 2.0 if name.endswith("sinks") else 1.0 if "norm" in name else 0.0
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module", params=[scaled, sinking])
def changed(request, checkpoint, agent, traced, tmp_path_factory) -> Traced:
    model = request.param(checkpoints.load(checkpoint("mistral")))
    plain = traced("mistral")
    prompts = [(case.tokens, True) for case in plain.reference.cases[:2]]
    wanted = run_reference(model, "changed", [agent("mistral")], prompts, MAX_CANDIDATES, Progress(quiet=True))
    folder = tmp_path_factory.mktemp("changed")
    llm, rotary, caches = trace_llm(model, folder, "torch", "changed", plain.max_context, plain.max_context)
    shape = replace(plain.model.shape, caches=caches)
    graph = replace(plain.graph, llm=llm, weights=Weights(model), rotary=rotary, shape=shape)
    return replace(plain, reference=wanted, graph=graph, model=replace(plain.model, shape=shape))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_attention_keeps_a_scale_of_its_own_and_sinks(changed: Traced, tmp_path, lowering) -> None:
    assert max(len(case.tokens) for case in changed.reference.cases) > 16
    made = finish(changed, ExportOptions(lowering=lowering), tmp_path / "out")
    assert made.manifest.parity is not None
    assert made.manifest.parity["passed"]


@pytest.mark.parametrize("architecture", ["qwen2", pytest.param("qwen3", marks=pytest.mark.long)])
def test_equal_weights_are_read_from_one_place(checkpoint, agent, tmp_path, monkeypatch, architecture: str) -> None:
    """As in an untrained model, and in one that was made deeper by repeating layers. The tracer keeps one of them."""
    monkeypatch.setattr("mara_export.graph.weights.INLINE_BYTES", 160)  # nearly all lie in the data file
    model = checkpoints.load(checkpoint(architecture))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.constant_(parameter, float("norm" in name))
    first, second, *_ = model.model.layers
    second.load_state_dict(first.state_dict())
    folder = shutil.copytree(checkpoint(architecture), tmp_path / "equal")
    model.save_pretrained(folder)
    (tmp_path / "trace").mkdir()
    traced = trace(
        resolve_model(str(folder)), checkpoints.named(agent(architecture)), tmp_path / "trace", max_context=64
    )
    for lowering, precision in (("ort", "fp32"), ("ort", "int8"), ("portable", "int8"), ("decomposed", "fp32")):
        out = finish(traced, ExportOptions(lowering=lowering, precision=precision), tmp_path / lowering / precision)
        graph = onnx.load(out.path("step.onnx"), load_external_data=False).graph  # it has passed the gate
        assert "Identity" not in {node.op_type for node in graph.node}
        stored = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
        plain = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored]
        assert bool(plain) == (precision == "fp32"), plain
