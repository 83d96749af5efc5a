"""The exported graphs as files, and as ONNX Runtime computes them, against Hugging Face eager."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from mara_export.architectures import model_shape
from mara_export.lower import LOWERINGS
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engine import Forward
from mara_runtime.errors import EngineError
from mara_runtime.ort_engine import OrtEngine
from tests import checkpoints

BOTH = [(architecture, lowering) for architecture in checkpoints.ARCHITECTURES for lowering in LOWERINGS]
each = pytest.mark.parametrize(("architecture", "lowering"), BOTH)

LENGTH = 23
RELATIVE = 1e-5


# --- the files -------------------------------------------------------------------------------------------------------


def described(infos: Sequence[onnx.ValueInfoProto]) -> list[tensors.Tensor]:
    kinds = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
    return [
        tensors.Tensor(
            info.name,
            kinds[info.type.tensor_type.elem_type],
            tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim),
        )
        for info in infos
    ]


@each
def test_inputs_and_outputs_are_those_of_the_one_table(bundle, reference, architecture, lowering) -> None:
    folder = bundle(architecture, lowering)
    config = reference(architecture).config
    shape = model_shape(config)
    assert (shape.hidden_size, shape.vocab_size) == (config.hidden_size, config.vocab_size)
    llm = onnx.load(folder / "llm.onnx", load_external_data=False).graph
    assert described(llm.input) == tensors.llm_inputs(shape)
    assert described(llm.output) == tensors.llm_outputs(shape)
    agent = onnx.load(folder / "agent.onnx").graph
    assert described(agent.input) == tensors.agent_inputs(config.hidden_size)
    assert described(agent.output) == tensors.agent_outputs()


@each
def test_one_fused_attention_a_layer_and_no_node_of_the_seam(bundle, reference, architecture, lowering) -> None:
    layers = reference(architecture).config.num_hidden_layers
    model = onnx.load(bundle(architecture, lowering) / "llm.onnx", load_external_data=False)
    nodes = Counter((node.domain, node.op_type) for node in model.graph.node)
    assert not [node for node in nodes if node[0] == "mara"]
    assert not [opset.domain for opset in model.opset_import if opset.domain == "mara"]
    assert not model.functions
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if lowering == "ort":
        assert nodes["com.microsoft", "GroupQueryAttention"] == layers
        assert {domain for domain, _ in nodes} == {"", "com.microsoft"}
        assert [kind for domain, kind in nodes if domain] == ["GroupQueryAttention"]
    else:
        assert nodes["", "TensorScatter"] == 2 * layers
        assert nodes["", "Attention"] == layers
        assert {domain for domain, _ in nodes} == {""}
        assert opsets == {"": 24}
    assert nodes["", "Softmax"] == 0  # no attention but the fused one


@each
def test_the_checker_is_content_with_types_and_shapes(bundle, architecture, lowering) -> None:
    folder = bundle(architecture, lowering)
    onnx.checker.check_model(str(folder / "llm.onnx"), full_check=lowering == "portable")
    onnx.checker.check_model(str(folder / "agent.onnx"), full_check=True)


@each
def test_weights_lie_beside_the_graph(bundle, reference, architecture, lowering) -> None:
    folder: Path = bundle(architecture, lowering)
    graph = onnx.load(folder / "llm.onnx", load_external_data=False).graph
    outside = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert {entry.value for t in outside for entry in t.external_data if entry.key == "location"} == {"llm.onnx.data"}
    parameters = {id(p): p.numel() for p in reference(architecture).parameters()}
    assert sum(np.prod(t.dims) for t in outside) >= 0.9 * sum(parameters.values())
    assert all(np.prod(t.dims) * 4 <= 1024 for t in inside)
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    assert all(np.prod(t.dims) * 4 <= 1024 for t in constants)
    assert (folder / "llm.onnx").stat().st_size < 100_000 < (folder / "llm.onnx.data").stat().st_size
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "llm.onnx",
        "llm.onnx.data",
        "agent.onnx",
        "tokenizer.json",
        "chat_template.jinja",
    }


# --- the numbers -----------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """An engine with a prompt in its cache, and what Hugging Face computes for sequences."""

    engine: OrtEngine
    model: Any
    prompt: list[int]

    def prefill(self, pieces: Sequence[int] = (LENGTH,)) -> list[Forward]:
        """The prompt in passes of the given sizes; logits of all rows."""
        assert sum(pieces) == LENGTH
        out, start = [], 0
        for size in pieces:
            out.append(self.forward(self.prompt[start : start + size], range(start, start + size), start))
            start += size
        return out

    def forward(
        self, tokens: Sequence[int], positions: Sequence[int], slot: int, rows: Sequence[int] | None = None
    ) -> Forward:
        out = self.engine.forward(tokens, positions, slot, range(len(tokens)) if rows is None else rows)
        return Forward(out.hidden.copy(), out.logits.copy())

    def expected(self, tokens: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(T, D) hidden states and (T, V) logits of a sequence, in one pass without a cache."""
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0].numpy(), out.logits[0].numpy()

    def after_prompt(self, *continuations: Sequence[int]) -> Forward:
        """The last row of the prompt followed by each continuation."""
        rows = [self.expected([*self.prompt, *continuation]) for continuation in continuations]
        return Forward(np.stack([h[-1] for h, _ in rows]), np.stack([z[-1] for _, z in rows]))


def assert_close(found: Forward, expected: Forward, relative: float = RELATIVE) -> None:
    for name in ("hidden", "logits"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= relative * np.abs(b).max(), name


@pytest.fixture(scope="module")
def engines(bundle: Callable[..., Path]) -> Callable[[str, str], OrtEngine]:
    opened: dict[tuple[str, str], OrtEngine] = {}

    def get(architecture: str, lowering: str) -> OrtEngine:
        key = architecture, lowering
        if key not in opened:
            opened[key] = OrtEngine(Bundle.open(bundle(architecture, lowering)), threads=1)
        return opened[key]

    return get


@pytest.fixture(params=BOTH, ids="-".join)
def pair(request: pytest.FixtureRequest, engines, reference) -> Pair:
    architecture, lowering = request.param
    engine = engines(architecture, lowering)
    # Rubbish in every slot: what a test must not see, it would notice.
    rubbish = checkpoints.random_prompts(1, seed=99, length=engine.slots)[0]
    engine.forward(rubbish, range(engine.slots), 0, [])
    return Pair(engine, reference(architecture), checkpoints.random_prompts(1, seed=5, length=LENGTH)[0])


def test_any_chunking_of_the_prompt_gives_hugging_faces_rows(pair: Pair) -> None:
    expected = Forward(*pair.expected(pair.prompt))
    for pieces in ([LENGTH], [1] * LENGTH, [3] * 7 + [2], [7, 7, 7, 2], [1, 3, 7, 12]):
        parts = pair.prefill(pieces)
        found = Forward(np.concatenate([p.hidden for p in parts]), np.concatenate([p.logits for p in parts]))
        assert_close(found, expected)


def test_siblings_in_one_pass_one_at_a_time_and_on_copied_caches(pair: Pair) -> None:
    siblings = list(range(40, 57))
    expected = pair.after_prompt(*([token] for token in siblings))
    assert np.abs(expected.hidden[0] - expected.hidden[1]).max() > 0.01 * np.abs(expected.hidden).max()
    pair.prefill()
    assert_close(pair.forward(siblings, [LENGTH] * len(siblings), LENGTH), expected)
    for index, token in enumerate(siblings):
        alone = pair.forward([token], [LENGTH], LENGTH + index)
        assert_close(alone, Forward(expected.hidden[[index]], expected.logits[[index]]))
    for token, index in ((siblings[3], 3), (siblings[0], 0)):  # all in the same slot
        alone = pair.forward([token], [LENGTH], LENGTH)
        assert_close(alone, Forward(expected.hidden[[index]], expected.logits[[index]]))


def test_siblings_in_later_slots(pair: Pair) -> None:
    siblings = [65, 66, 67]
    expected = pair.after_prompt(*([token] for token in siblings))
    pair.prefill()
    pair.forward([1, 2, 3, 4, 5], [LENGTH] * 5, LENGTH)
    for slot in (LENGTH + 5, LENGTH + 60, pair.engine.slots - len(siblings)):
        assert_close(pair.forward(siblings, [LENGTH] * len(siblings), slot), expected)


def test_a_moved_entry_carries_the_sequence_on(pair: Pair) -> None:
    siblings, following = [65, 66, 67, 68], 99
    pair.prefill()
    pair.forward(siblings, [LENGTH] * len(siblings), LENGTH)
    for index in (2, 1):
        pair.engine.move(LENGTH + index, LENGTH)
        found = pair.forward([following], [LENGTH + 1], LENGTH + 10)
        assert_close(found, pair.after_prompt([siblings[index], following]))
    wrong = pair.after_prompt([siblings[0], following])  # what stands there without a move
    assert np.abs(found.hidden - wrong.hidden).max() > 0.01 * np.abs(wrong.hidden).max()
    # The moved one stays where it was: a move is a copy.
    pair.engine.move(LENGTH + 3, LENGTH)
    assert_close(pair.forward([following], [LENGTH + 1], LENGTH + 10), pair.after_prompt([siblings[3], following]))


@pytest.mark.parametrize("rows", [[0], [LENGTH - 1], [5, 2, 9], [3, 3, 0, 3], [], list(range(LENGTH))[::-1]], ids=str)
def test_logits_of_the_rows_asked_for_alone(pair: Pair, rows: list[int]) -> None:
    hidden, logits = pair.expected(pair.prompt)
    found = pair.forward(pair.prompt, range(LENGTH), 0, rows)
    assert found.logits.shape == (len(rows), pair.model.config.vocab_size)
    assert np.abs(found.hidden - hidden).max() <= RELATIVE * np.abs(hidden).max()
    if rows:
        assert np.abs(found.logits - logits[rows]).max() <= RELATIVE * np.abs(logits).max()


def test_a_chain_beside_siblings(pair: Pair) -> None:
    chain, siblings = [70, 71, 72], [80, 81]
    expected = pair.after_prompt(chain[:1], chain[:2], chain, *([token] for token in siblings))
    pair.prefill()
    positions = [LENGTH, LENGTH + 1, LENGTH + 2, LENGTH, LENGTH]
    assert_close(pair.forward([*chain, *siblings], positions, LENGTH), expected)


def test_margins_are_those_of_the_agent_in_pytorch(pair: Pair, agent, request) -> None:
    (out,) = pair.prefill()
    architecture = request.node.callspec.params["pair"][0]
    with torch.no_grad():
        expected = agent(architecture).margin(torch.tensor(pair.expected(pair.prompt)[0])).numpy()
    found = pair.engine.margins(out.hidden)
    assert found.shape == (LENGTH,)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert 0 < (found > 0).sum() < LENGTH


def test_the_last_slot_is_used_and_none_after_it(pair: Pair) -> None:
    slots = pair.engine.slots
    pair.prefill()
    expected = pair.after_prompt([65])
    assert_close(pair.forward([65], [LENGTH], slots - 1), expected)
    for tokens, slot in (([65], slots), ([65, 66], slots - 1), ([65] * (slots + 1), 0)):
        with pytest.raises(
            EngineError, match=f"{len(tokens)} rows at slot {slot} exceed the KV cache of {slots} slots"
        ):
            pair.engine.forward(tokens, [LENGTH] * len(tokens), slot, [])
    assert_close(pair.forward([65], [LENGTH], LENGTH), expected)  # and nothing was written


def test_a_whole_capacity_of_prompt(pair: Pair) -> None:
    capacity = pair.engine.slots - 64
    tokens = checkpoints.random_prompts(1, seed=8, length=capacity)[0]
    hidden, logits = pair.expected(tokens)
    found = pair.forward(tokens, range(capacity), 0, [capacity - 1])
    assert_close(found, Forward(hidden, logits[-1:]), 3e-5)
