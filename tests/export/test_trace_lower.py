"""The exported step graph as a file, and as ONNX Runtime computes it, against Hugging Face eager and against NumPy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from mara_export.export import export, finish, trace
from mara_export.graph.pipeline import LOWERINGS as LOWERING_MODULES
from mara_export.hf.families import model_shape
from mara_export.hf.sources import resolve_model
from mara_export.options import ExportOptions
from mara_export.parity import NAMES, Rows
from mara_export.targets import LOWERINGS
from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines.base import Pass, StepOutput
from mara_runtime.engines.ort import CpuEngine
from mara_runtime.errors import EngineError
from tests import checkpoints
from tests.export.conftest import MAX_CANDIDATES, MAX_CONTEXT
from tests.table_engine import TableEngine

COVERING = {("qwen2", "ort"), ("qwen3", "portable"), ("llama", "decomposed"), ("mistral", "ort")}
"""Every architecture and every lowering once; the other combinations are left to `make test-long`."""
LONG = {both: () if both in COVERING else pytest.mark.long for both in product(checkpoints.ARCHITECTURES, LOWERINGS)}
each = pytest.mark.parametrize(
    ("architecture", "lowering"), [pytest.param(*both, marks=marks) for both, marks in LONG.items()]
)

LENGTH = 23
RELATIVE = 1e-5
INLINE_BYTES, ALIGNMENT = 1024, 4096
TOP = MAX_CANDIDATES + 8


# --- the files -------------------------------------------------------------------------------------------------------


def described(infos: Sequence[onnx.ValueInfoProto]) -> list[tensors.Tensor]:
    kinds = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}
    return [
        tensors.Tensor(
            info.name,
            kinds[info.type.tensor_type.elem_type],
            tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim),
        )
        for info in infos
    ]


def step_graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "step.onnx", load_external_data=False)


def place(tensor: TensorProto) -> tuple[int, int]:
    """Where its bytes lie in the data file: offset and length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    assert entries["location"] == "step.onnx.data"
    return int(entries["offset"]), int(entries["length"])


@each
def test_inputs_and_outputs_are_those_of_the_one_table(bundle, reference, architecture, lowering) -> None:
    config = reference(architecture).config
    shape = model_shape(config)
    assert (shape.hidden_size, shape.vocab_size) == (config.hidden_size, config.vocab_size)
    graph = step_graph(bundle(architecture, lowering)).graph
    assert described(graph.input) == tensors.step_inputs(shape)
    assert described(graph.output) == tensors.step_outputs(shape, TOP)
    sizes = {t.name: t.shape for t in described(graph.output)}
    assert sizes["top_ids"] == sizes["top_logits"] == ("P", TOP)
    assert sizes["rows"] == sizes["log_normaliser"] == ("P",)
    assert sizes["margins"] == ("N",)


@each
def test_the_graph_is_made_of_what_its_lowering_promises(bundle, architecture, lowering) -> None:
    """The trace's nodes are gone, attention is fused unless decomposed, and no layer moves heads at run time."""
    path = bundle(architecture, lowering) / "step.onnx"
    onnx.checker.check_model(str(path), full_check=lowering != "ort")
    model = step_graph(path.parent)
    assert {opset.domain: opset.version for opset in model.opset_import} == LOWERING_MODULES[lowering].OPSETS
    assert {node.domain for node in model.graph.node} == set(LOWERING_MODULES[lowering].OPSETS)
    kinds = {node.op_type for node in model.graph.node}
    assert "Identity" not in kinds
    assert ("Softmax" in kinds) == (lowering == "decomposed")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    if lowering == "ort":
        assert not [node.name for node in model.graph.node if node.op_type == "Transpose" and "layers" in node.name]


@each
def test_weights_lie_beside_the_graph(bundle, reference, agent, architecture, lowering) -> None:
    folder: Path = bundle(architecture, lowering)
    graph = step_graph(folder).graph
    outside = [t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL]
    inside = [t for t in graph.initializer if t.data_location != TensorProto.EXTERNAL]
    places = sorted({place(t) for t in outside})  # equal bytes share a place
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert all(offset + length <= after for (offset, length), (after, _) in pairwise(places))
    size = (folder / "step.onnx.data").stat().st_size
    assert sum(places[-1]) == size
    parameters = {id(p): p.numel() for p in [*reference(architecture).parameters(), *agent(architecture).parameters()]}
    tables = sum(place(t)[1] for t in outside if t.name.startswith("rotary/"))
    stored = sum(length for _, length in places) - tables
    rows = MAX_CONTEXT + MAX_CANDIDATES + 17 + (lowering == "ort")  # one at which nothing turns
    assert tables <= 2 * 4 * rows * model_shape(reference(architecture).config).head_dim / 2
    assert 0.95 * 4 * sum(parameters.values()) <= stored <= 4 * sum(parameters.values())
    assert all(len(t.raw_data) <= INLINE_BYTES for t in inside)
    constants = [a.t for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    assert all(t.data_location != TensorProto.EXTERNAL and len(t.raw_data) <= INLINE_BYTES for t in constants)
    branches = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    nodes = [node for part in (graph, *branches) for node in part.node]
    assert {t.name for t in graph.initializer} <= {name for node in nodes for name in node.input}
    assert (folder / "step.onnx").stat().st_size < 150_000 < size
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "step.onnx",
        "step.onnx.data",
        "tokenizer.json",
        "chat_template.jinja",
    }


@each
def test_a_tied_head_reads_the_table_of_the_embedding(bundle, reference, architecture, lowering) -> None:
    graph = step_graph(bundle(architecture, lowering)).graph
    (head,) = [node for node in graph.node if tensors.LOGITS in node.output]
    (lookup,) = [node for node in graph.node if node.op_type == "Gather" and tensors.INPUT_IDS in node.input]
    weights = {t.name: list(t.dims) for t in graph.initializer}
    config = reference(architecture).config
    assert weights[lookup.input[0]] == [config.vocab_size, config.hidden_size]
    if config.tie_word_embeddings:
        assert head.op_type == "Gemm"
        assert head.input[1] == lookup.input[0]
        assert len([name for name, dims in weights.items() if config.vocab_size in dims]) == 1
    else:
        assert head.op_type == "MatMul"
        assert weights[head.input[1]] == [config.hidden_size, config.vocab_size]


# --- the numbers -----------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """An engine with a prompt in its cache, and what Hugging Face computes for sequences."""

    engine: CpuEngine
    model: Any
    agent: Any
    prompt: list[int]

    def prefill(self, pieces: Sequence[int] = (LENGTH,)) -> list[Rows]:
        """The prompt in passes of the given sizes."""
        assert sum(pieces) == LENGTH
        out, start = [], 0
        for size in pieces:
            out.append(self.evaluate(self.prompt[start : start + size], range(start, start + size), start))
            start += size
        return out

    def evaluate(self, tokens: Sequence[int], positions: Sequence[int], slot: int) -> Rows:
        return full(self.engine, tokens, positions, slot)

    def run(self, work: Pass) -> StepOutput:
        out = self.engine.run(work)
        arrays = (getattr(out, name) for name in StepOutput.__dataclass_fields__)
        return StepOutput(*(None if array is None else array.copy() for array in arrays))

    def expected(self, tokens: Sequence[int]) -> Rows:
        """All rows of a sequence, in one pass without a cache."""
        with torch.no_grad():
            out = self.model(input_ids=torch.tensor([list(tokens)]), output_hidden_states=True, use_cache=False)
            hidden = out.hidden_states[-1][0]
            return Rows(hidden.numpy(), out.logits[0].numpy(), self.agent.margin(hidden).numpy())

    def after_prompt(self, *continuations: Sequence[int]) -> Rows:
        """The last row of the prompt followed by each continuation."""
        rows = [self.expected([*self.prompt, *continuation]) for continuation in continuations]
        return Rows(*(np.stack([getattr(row, name)[-1] for row in rows]) for name in NAMES))


def full(engine: CpuEngine, tokens: Sequence[int], positions: Sequence[int], slot: int) -> Rows:
    out = engine.run(Pass.full_outputs(tokens, positions, slot))
    return Rows(*(getattr(out, name).copy() for name in NAMES))


def row(everything: Rows, index: int) -> Rows:
    return Rows(*(getattr(everything, name)[[index]] for name in NAMES))


def joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in NAMES))


def assert_close(found: Rows, expected: Rows, relative: float = RELATIVE) -> None:
    for name in NAMES:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        assert a.dtype == np.float32
        assert np.abs(a - b).max() <= relative * max(np.abs(b).max(), 1.0), name  # margins are of the order of 1


@pytest.fixture(scope="module")
def engines(bundle: Callable[..., Path]) -> Callable[[str, str], CpuEngine]:
    opened: dict[tuple[str, str], CpuEngine] = {}

    def get(architecture: str, lowering: str) -> CpuEngine:
        key = architecture, lowering
        if key not in opened:
            opened[key] = CpuEngine(Bundle.open(bundle(architecture, lowering)), threads=1)
        return opened[key]

    return get


@pytest.fixture(params=[pytest.param(both, marks=marks, id="-".join(both)) for both, marks in LONG.items()])
def pair(request: pytest.FixtureRequest, engines, reference, agent) -> Pair:
    architecture, lowering = request.param
    engine = engines(architecture, lowering)
    # Rubbish in every slot: what a test must not see, it would notice.
    rubbish = checkpoints.random_prompts(1, seed=99, length=engine.cache.capacity)[0]
    engine.run(Pass(rubbish, [slot % MAX_CONTEXT for slot in range(engine.cache.capacity)], 0))
    prompt = checkpoints.random_prompts(1, seed=5, length=LENGTH)[0]
    return Pair(engine, reference(architecture), agent(architecture), prompt)


def test_any_chunking_of_the_prompt_gives_hugging_faces_rows(pair: Pair) -> None:
    expected = pair.expected(pair.prompt)
    assert 0 < (expected.margins > 0).sum() < LENGTH
    for pieces in ([LENGTH], [1] * LENGTH, [3] * 7 + [2], [7, 7, 7, 2], [1, 3, 7, 12]):
        assert_close(joined(pair.prefill(pieces)), expected)


def test_siblings_in_one_pass_one_at_a_time_and_on_copied_caches(pair: Pair) -> None:
    siblings = list(range(40, 57))
    expected = pair.after_prompt(*([token] for token in siblings))
    assert np.abs(expected.hidden[0] - expected.hidden[1]).max() > 0.01 * np.abs(expected.hidden).max()
    pair.prefill()
    assert_close(pair.evaluate(siblings, [LENGTH] * len(siblings), LENGTH), expected)
    for index, token in enumerate(siblings):
        assert_close(pair.evaluate([token], [LENGTH], LENGTH + index), row(expected, index))
    for index in (3, 0):  # all in the same slot
        assert_close(pair.evaluate([siblings[index]], [LENGTH], LENGTH), row(expected, index))


def test_siblings_in_later_slots(pair: Pair) -> None:
    siblings = [65, 66, 67]
    expected = pair.after_prompt(*([token] for token in siblings))
    pair.prefill()
    pair.evaluate([1, 2, 3, 4, 5], [LENGTH] * 5, LENGTH)
    for slot in (LENGTH + 5, LENGTH + 60, pair.engine.cache.capacity - len(siblings)):
        assert_close(pair.evaluate(siblings, [LENGTH] * len(siblings), slot), expected)


def test_a_moved_entry_carries_the_sequence_on(pair: Pair) -> None:
    siblings, following = [65, 66, 67, 68], 99
    pair.prefill()
    pair.evaluate(siblings, [LENGTH] * len(siblings), LENGTH)
    for index in (2, 1):
        pair.engine.memory.move(0, LENGTH + index, LENGTH)
        found = pair.evaluate([following], [LENGTH + 1], LENGTH + 10)
        assert_close(found, pair.after_prompt([siblings[index], following]))
    wrong = pair.after_prompt([siblings[0], following])  # what stands there without a move
    assert np.abs(found.hidden - wrong.hidden).max() > 0.01 * np.abs(wrong.hidden).max()
    # The moved one stays where it was: a move is a copy.
    pair.engine.memory.move(0, LENGTH + 3, LENGTH)
    assert_close(pair.evaluate([following], [LENGTH + 1], LENGTH + 10), pair.after_prompt([siblings[3], following]))


def test_a_chain_beside_siblings(pair: Pair) -> None:
    """A draft under the first candidate and the others behind it: what a pass of the decode loop holds."""
    chain, siblings = [70, 71, 72], [80, 81]
    expected = pair.after_prompt(chain[:1], chain[:2], chain, *([token] for token in siblings))
    pair.prefill()
    positions = [LENGTH, LENGTH + 1, LENGTH + 2, LENGTH, LENGTH]
    assert_close(pair.evaluate([*chain, *siblings], positions, LENGTH), expected)


def test_the_last_slot_is_used_and_none_after_it(pair: Pair) -> None:
    slots = pair.engine.cache.capacity
    assert slots == MAX_CONTEXT + MAX_CANDIDATES + 17  # siblings, a draft, and the fallback once more
    pair.prefill()
    expected = pair.after_prompt([65])
    assert_close(pair.evaluate([65], [LENGTH], slots - 1), expected)
    for tokens, slot in (([65], slots), ([65, 66], slots - 1), ([65] * (slots + 1), 0)):
        message = f"{slot + len(tokens)} slots are needed; the KV cache has {slots}"
        with pytest.raises(EngineError, match=message):
            pair.engine.run(Pass(tokens, [LENGTH] * len(tokens), slot))
        with pytest.raises(EngineError, match=message):
            pair.evaluate(tokens, [LENGTH] * len(tokens), slot)
    assert_close(pair.evaluate([65], [LENGTH], LENGTH), expected)  # and nothing was written


def test_a_whole_capacity_of_prompt(pair: Pair) -> None:
    tokens = checkpoints.random_prompts(1, seed=8, length=MAX_CONTEXT)[0]
    assert_close(pair.evaluate(tokens, range(MAX_CONTEXT), 0), pair.expected(tokens), 3e-5)


# --- the head --------------------------------------------------------------------------------------------------------


def assert_best_tokens(out: StepOutput, logits: NDArray[np.float32], relative: float = RELATIVE) -> None:
    """The best tokens of `logits` (R, V) and the normalisers, within what float32 leaves open."""
    wanted = logits.astype(np.float64)
    slack = relative * max(np.abs(wanted).max(initial=0.0), 1.0)
    assert out.top_ids.shape == out.top_logits.shape == (len(out.rows), TOP)
    assert out.log_normaliser.shape == (len(out.rows),)
    assert (out.top_logits[:, :-1] >= out.top_logits[:, 1:]).all()
    np.testing.assert_allclose(out.top_logits, np.sort(wanted, axis=1)[:, ::-1][:, :TOP], rtol=0, atol=slack)
    np.testing.assert_allclose(out.top_logits, np.take_along_axis(wanted, out.top_ids, 1), rtol=0, atol=slack)
    assert all(len(set(ids)) == TOP for ids in out.top_ids.tolist())
    greatest = wanted.max(axis=1, initial=-np.inf)
    normaliser = np.log(np.exp(wanted - greatest[:, None]).sum(axis=1)) + greatest
    np.testing.assert_allclose(out.log_normaliser, normaliser, rtol=0, atol=2 * slack)


def test_the_best_tokens_are_those_of_the_sorted_row(pair: Pair) -> None:
    """To the last bit, where both come out of the same logits."""
    (everything,) = pair.prefill()
    out = pair.run(Pass(pair.prompt, range(LENGTH), 0, range(LENGTH), range(LENGTH), [-np.inf] * LENGTH))
    assert out.rows.tolist() == list(range(LENGTH))
    assert np.array_equal(out.margins, everything.margins)
    assert_best_tokens(out, everything.logits)
    assert np.array_equal(out.top_logits, np.sort(everything.logits, axis=1)[:, ::-1][:, :TOP])
    assert np.array_equal(out.top_logits, np.take_along_axis(everything.logits, out.top_ids, 1))


@pytest.mark.parametrize("rows", [[0], [LENGTH - 1], [5, 2, 9], [3, 3, 0, 3], [], list(range(LENGTH))[::-1]], ids=str)
def test_the_head_runs_on_the_rows_asked_for_alone(pair: Pair, rows: list[int]) -> None:
    expected = pair.expected(pair.prompt)
    out = pair.run(Pass(pair.prompt, range(LENGTH), 0, rows))
    assert out.rows.tolist() == rows
    assert out.margins.shape == (0,)
    assert_best_tokens(out, expected.logits[rows])
    asked = [4, *rows, 4]
    out = pair.run(Pass(pair.prompt, range(LENGTH), 0, rows, asked, [-np.inf] * len(asked)))
    assert out.rows.tolist() == rows
    assert_best_tokens(out, expected.logits[rows])
    np.testing.assert_allclose(out.margins, expected.margins[asked], rtol=0, atol=RELATIVE)


# --- the choice ------------------------------------------------------------------------------------------------------

SIBLINGS = list(range(40, 57))
COUNT = len(SIBLINGS)


def siblings(**options: Any) -> Pass:
    """All of them, after the prompt; by default the greatest margin is elected."""
    given = {"agent_rows": range(COUNT), "priorities": [0.0] * COUNT, "margin_weight": 1.0, **options}
    return Pass(SIBLINGS, [LENGTH] * COUNT, LENGTH, **given)


def choice(work: Pass, margins: NDArray[np.float32]) -> list[int]:
    """The rows for the head, as mara_runtime.tensors words it; scores add up in float32, as in the graph."""
    best, elected = -np.inf, work.fallback_row
    for asked, priority, margin in zip(work.agent_rows, work.priorities, margins, strict=True):
        score = np.float32(priority) + np.float32(work.margin_weight) * margin
        if float(margin) > work.threshold and score > best:
            best, elected = score, asked
    return [*work.head_rows, *([] if elected is None else [elected])]


@pytest.fixture
def prefilled(pair: Pair) -> tuple[Pair, NDArray[np.float32], Rows]:
    """The pair with its prompt in the cache, the siblings' margins, and Hugging Face's rows of them."""
    pair.prefill()
    margins = pair.run(siblings()).margins
    assert 0 < (margins > 0).sum() < COUNT
    assert len(set(margins.tolist())) == COUNT
    return pair, margins, pair.after_prompt(*([token] for token in SIBLINGS))


def test_the_greatest_margin_is_elected(prefilled) -> None:
    pair, margins, expected = prefilled
    np.testing.assert_allclose(margins, expected.margins, rtol=0, atol=RELATIVE)
    best = int(margins.argmax())
    for work, elected in (
        (siblings(), best),
        (siblings(fallback_row=COUNT - 1), best),
        (siblings(margin_weight=1e30, threshold=-1e9), best),  # others are accepted as well
        (siblings(agent_rows=range(COUNT)[::-1]), best),
        (siblings(agent_rows=[best, best, best], priorities=[0.0, -1.0, 2.0]), best),
    ):
        out = pair.run(work)
        assert out.rows.tolist() == choice(work, out.margins) == [elected]
        assert_best_tokens(out, expected.logits[[elected]])
        np.testing.assert_allclose(out.margins, margins[list(work.agent_rows)], rtol=0, atol=RELATIVE)


def test_the_accepted_one_of_the_greatest_priority_is_elected(prefilled) -> None:
    pair, margins, expected = prefilled
    accepted = np.flatnonzero(margins > 0).tolist()
    for priorities, elected in (
        ([-float(i) for i in range(COUNT)], accepted[0]),
        ([float(i) for i in range(COUNT)], accepted[-1]),
        ([0.0] * COUNT, accepted[0]),  # of equals the first
        ([-3.4e38] * COUNT, accepted[0]),
        ([1.0 if i == accepted[1] else 0.0 for i in range(COUNT)], accepted[1]),
    ):
        work = siblings(priorities=priorities, margin_weight=0.0)
        out = pair.run(work)
        assert out.rows.tolist() == choice(work, out.margins) == [elected]
        assert_best_tokens(out, expected.logits[[elected]])
    # the first in the order of asking, not of the rows
    out = pair.run(siblings(agent_rows=range(COUNT)[::-1], margin_weight=0.0))
    assert out.rows.tolist() == [accepted[-1]]


def test_a_priority_of_minus_infinity_is_never_chosen(prefilled) -> None:
    pair, margins, _ = prefilled
    best, second = np.argsort(-margins)[:2].tolist()
    assert margins[second] > 0
    never = [-np.inf if i == best else 0.0 for i in range(COUNT)]
    assert pair.run(siblings(priorities=never)).rows.tolist() == [second]
    for weight in (0.0, 1.0, 1e30):
        nobody = siblings(priorities=[-np.inf] * COUNT, margin_weight=weight)
        assert pair.run(nobody).rows.tolist() == []
        assert pair.run(replace(nobody, fallback_row=4)).rows.tolist() == [4]


def test_a_margin_of_exactly_the_threshold_is_rejected(prefilled) -> None:
    """The threshold is a float64, margins are float32: in between, the float64 decides."""
    pair, margins, _ = prefilled
    best, second = np.argsort(-margins)[:2].tolist()
    for row_, others in ((best, []), (second, [best])):
        at = float(margins[row_])
        priorities = [float(i == row_) for i in range(COUNT)]  # whoever else is accepted comes after it
        for threshold, accepted in (
            (at, False),
            (np.nextafter(at, np.inf), False),
            (np.nextafter(at, -np.inf), True),
            (float(np.nextafter(margins[row_], np.float32(np.inf))), False),
            (float(np.nextafter(margins[row_], np.float32(-np.inf))), True),
            (1e300, None),
            (-1e300, True),
        ):
            work = siblings(priorities=priorities, margin_weight=0.0, threshold=threshold)
            out = pair.run(work)
            assert np.array_equal(out.margins, margins)
            expected = [row_] if accepted else [] if accepted is None else others
            assert out.rows.tolist() == choice(work, margins) == expected, threshold


def test_the_fallback_when_nobody_is_elected(prefilled) -> None:
    pair, _, expected = prefilled
    nobody = siblings(threshold=1e9)
    for fallback in (0, 7, COUNT - 1):
        out = pair.run(replace(nobody, fallback_row=fallback))
        assert out.rows.tolist() == [fallback]
        assert_best_tokens(out, expected.logits[[fallback]])
    out = pair.run(nobody)
    assert out.rows.shape == out.log_normaliser.shape == (0,)
    assert out.top_ids.shape == out.top_logits.shape == (0, TOP)
    assert len(out.margins) == COUNT  # they are there all the same
    again = pair.run(siblings())  # and the next pass of that shape elects again
    assert again.rows.tolist() == choice(siblings(), again.margins)


def test_nobody_is_asked(prefilled) -> None:
    pair, _, expected = prefilled
    nobody = Pass(SIBLINGS, [LENGTH] * COUNT, LENGTH)
    for heads in ((), (2,), (5, 0)):
        out = pair.run(replace(nobody, head_rows=heads))
        assert out.rows.tolist() == list(heads)
        assert out.margins.shape == (0,)
        out = pair.run(replace(nobody, head_rows=heads, fallback_row=3))
        assert out.rows.tolist() == [*heads, 3]
        assert_best_tokens(out, expected.logits[[*heads, 3]])


def test_rows_asked_for_come_before_the_elected_one(prefilled) -> None:
    pair, margins, expected = prefilled
    best = int(margins.argmax())
    for heads in ([0], [3, 1, 1], [best], list(range(COUNT))):  # the elected may be among them
        out = pair.run(siblings(head_rows=heads))
        assert out.rows.tolist() == [*heads, best]
        assert_best_tokens(out, expected.logits[[*heads, best]])
        out = pair.run(siblings(head_rows=heads, threshold=1e9))
        assert out.rows.tolist() == heads
        assert_best_tokens(out, expected.logits[heads])


def test_any_pass_is_that_of_the_table(pair: Pair) -> None:
    """Random passes against TableEngine, with Hugging Face's rows in its table, and against the choice in NumPy."""
    rng = np.random.default_rng(7)
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}
    prompt = pair.expected(pair.prompt)
    for length in range(1, LENGTH + 1):
        known[tuple(pair.prompt[:length])] = prompt.logits[length - 1], prompt.hidden[length - 1]

    def lookup(prefix: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if prefix not in known:
            found = pair.expected(prefix)
            known[prefix] = found.logits[-1], found.hidden[-1]
        return known[prefix]

    @torch.no_grad()
    def margins(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(pair.agent.margin(torch.tensor(hidden)))

    table = TableEngine(lookup, margins, pair.engine.cache.capacity, MAX_CANDIDATES)
    table.run(Pass.full_outputs(pair.prompt, range(LENGTH), 0))
    pair.prefill()
    elected = alike = 0
    chains = [rng.integers(0, 256, 5).tolist() for _ in range(4)]
    rounds = 80
    for _ in range(rounds):
        chain = chains[rng.integers(4)][: rng.integers(1, 6)]
        others = rng.choice(16, rng.integers(0, 12), replace=False).tolist()
        tokens = [*chain, *others]
        positions = [*range(LENGTH, LENGTH + len(chain)), *[LENGTH] * len(others)]
        count = int(rng.integers(0, len(tokens) + 1))
        work = Pass(
            tokens,
            positions,
            LENGTH,
            rng.choice(len(tokens), rng.integers(0, 4)).tolist(),
            rng.choice(len(tokens), count, replace=False).tolist(),
            rng.choice([-np.inf, -2.0, -1.0, 0.0, 1.5], count).tolist(),
            float(rng.choice([0.0, 1.0, 0.5])),
            float(rng.choice([0.0, 0.0, -0.5, 0.5, 9.0, -9.0])),
            None if rng.random() < 0.5 else int(rng.integers(len(tokens))),
        )
        found, wanted = pair.run(work), table.run(work)
        np.testing.assert_allclose(found.margins, wanted.margins, rtol=0, atol=RELATIVE)
        for out in (found, wanted):
            assert out.rows.tolist() == choice(work, out.margins)
            assert_best_tokens(out, pair_rows(known, pair.prompt, work, out.rows))
        elected += len(found.rows) - len(work.head_rows)
        alike += np.array_equal(found.rows, wanted.rows)
    assert 0.4 * rounds < elected < 0.95 * rounds
    assert alike >= rounds - 1  # two margins within the last bits of each other


def pair_rows(
    known: dict[tuple[int, ...], tuple[Any, Any]], prompt: list[int], work: Pass, rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits of rows of a pass whose chain comes first."""
    found = []
    for index in rows.tolist():
        before = work.tokens[: work.positions[index] - LENGTH]
        found.append(known[(*prompt, *before, work.tokens[index])][0])
    vocab_size = len(next(iter(known.values()))[0])
    return np.stack(found) if found else np.zeros((0, vocab_size), np.float32)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_small_vocabulary_is_returned_whole(checkpoint, reference, agent, tmp_path, lowering) -> None:
    """More candidates than tokens."""
    options = ExportOptions(lowering=lowering, max_context=32, max_candidates=1024)
    made = export(resolve_model(str(checkpoint("mistral"))), agent("mistral"), "agent", tmp_path / "out", options)
    pair = Pair(CpuEngine(made, threads=1), reference("mistral"), agent("mistral"), SIBLINGS)
    vocab_size = pair.model.config.vocab_size
    out = pair.run(Pass(SIBLINGS, range(COUNT), 0, range(COUNT)))
    expected = pair.expected(SIBLINGS).logits
    assert out.top_ids.shape == (COUNT, vocab_size)
    assert np.array_equal(np.sort(out.top_ids, axis=1), np.tile(np.arange(vocab_size), (COUNT, 1)))
    slack = RELATIVE * np.abs(expected).max()
    np.testing.assert_allclose(out.top_logits, np.take_along_axis(expected, out.top_ids, 1), rtol=0, atol=slack)
    assert (out.top_logits[:, :-1] >= out.top_logits[:, 1:]).all()


# --- the KV cache in buckets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_the_cache_grows_with_the_conversation_and_keeps_what_is_in_it(
    bundle, reference, agent, monkeypatch, lowering
) -> None:
    monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 16)
    engine = CpuEngine(Bundle.open(bundle("qwen3", lowering)), threads=1)
    slots = engine.cache.capacity
    pair = Pair(engine, reference("qwen3"), agent("qwen3"), checkpoints.random_prompts(1, seed=5, length=LENGTH)[0])
    expected = pair.expected(pair.prompt)
    sizes = []
    for turn in range(2):
        assert engine.memory.slots == 16
        assert_close(pair.evaluate(pair.prompt[:9], range(9), 0), Rows(*(getattr(expected, n)[:9] for n in NAMES)))
        assert engine.memory.slots == 16
        for index in range(9, LENGTH):  # the sixteenth row fits, the seventeenth makes room
            found = pair.run(Pass([pair.prompt[index]], [index], index, [0], [0], [-np.inf]))
            assert_best_tokens(found, expected.logits[[index]])
            sizes.append(engine.memory.slots)
        for slot, size in ((LENGTH, 32), (40, 48), (100, 112), (200, 208), (slots - 3, slots), (50, slots)):
            wanted = pair.after_prompt([65], [66], [67])
            assert_close(pair.evaluate([65, 66, 67], [LENGTH] * 3, slot), wanted)
            assert engine.memory.slots == size
        engine.memory.move(67, 52, LENGTH)  # the third sibling, written before and after a growth
        assert_close(pair.evaluate([99], [LENGTH + 1], LENGTH + 1), pair.after_prompt([67, 99]))
        if turn == 0:
            engine.cache.clear()
    assert sizes == 2 * ([16] * 7 + [32] * 7)
    assert engine.cache.capacity == slots


def test_a_cleared_cache_is_that_of_a_new_engine(engines, bundle) -> None:
    used, prompt = engines("llama", "ort"), [70, 71, 72]
    fresh = CpuEngine(Bundle.open(bundle("llama", "ort")), threads=1)
    used.run(Pass([1, 2, 3, 4], range(4), 0))
    used.cache.clear()
    for engine in (used, fresh):
        assert not engine.memory.entries.any()
        assert engine.memory.slots == min(ort_engine.FIRST_SLOTS, engine.cache.capacity)
    a, b = (full(engine, prompt, range(3), 0) for engine in (used, fresh))
    for name in NAMES:
        assert np.array_equal(getattr(a, name), getattr(b, name))


# --- numbers that are none -------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def altered(bundle, tmp_path) -> Callable[..., CpuEngine]:
    """(lowering, weight, [index], value) → an engine on llama's graph with some of its numbers replaced."""

    def make(lowering: str, name: str, index: Any, value: float) -> CpuEngine:
        original = Bundle.open(bundle("llama", lowering))
        model = onnx.load(original.path("step.onnx"))
        (tensor,) = [t for t in model.graph.initializer if t.name == name]
        array = numpy_helper.to_array(tensor).copy()
        array[index] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, tmp_path / "step.onnx")
        return CpuEngine(Bundle(tmp_path, original.manifest), threads=1)

    return make


each_lowering = pytest.mark.parametrize("lowering", LOWERINGS)
not_finite = pytest.mark.parametrize("value", [NAN, pytest.param(INF, marks=pytest.mark.long), -INF], ids=str)
EVERYBODY = {"priorities": [0.0, 0.0], "margin_weight": 1.0, "threshold": -1e9}


@each_lowering
def test_equal_margins_elect_the_first(altered, lowering) -> None:
    engine = altered(lowering, "agent/agent.output_linear.weight", slice(None), 0.0)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        out = engine.run(Pass([70, 71, 72], range(3), 0, [], order, [0.0] * len(order), 1.0, -1e9))
        assert len(set(out.margins.tolist())) == 1
        assert out.rows.tolist() == [order[0]]


@each_lowering
@not_finite
def test_a_state_that_is_not_finite_has_no_margin(altered, engines, lowering, value) -> None:
    engine = altered(lowering, "model.embed_tokens.weight", 77, value)
    good = full(engines("llama", lowering), [70, 71], range(2), 0)
    engine.run(Pass([70], [0], 0))
    work = Pass([77, 71], [1, 1], 1, [0], [0, 1], **EVERYBODY)
    out = engine.run(work)
    assert np.isnan(out.margins[0])
    assert np.isnan(out.log_normaliser[0])
    assert out.rows.tolist() == [0, 1][: 1 if np.isnan(out.margins[1]) else 2]  # nobody is elected without a margin
    engine.cache.clear()
    again = full(engine, [70, 71], range(2), 0)
    for name in NAMES:  # nothing is left of it
        assert np.array_equal(getattr(again, name), getattr(good, name))


@each_lowering
@not_finite
def test_a_state_that_only_the_last_norm_makes_infinite_has_no_margin(altered, lowering, value) -> None:
    """The cache holds finite numbers; an agent's ReLU may make one of what is none."""
    engine = altered(lowering, "model.norm.weight", 0, value)
    out = engine.run(Pass([70, 71], range(2), 0, [], [0, 1], **EVERYBODY))
    assert np.isnan(out.margins).all()
    assert out.rows.tolist() == []
    assert engine.run(Pass([70, 71], range(2), 0, [], [0, 1], **EVERYBODY, fallback_row=1)).rows.tolist() == [1]


@each_lowering
@not_finite
def test_logits_that_are_not_finite_have_no_normaliser(altered, bundle, engines, lowering, value) -> None:
    (head,) = [n for n in step_graph(bundle("llama", lowering)).graph.node if tensors.LOGITS in n.output]
    engine = altered(lowering, head.input[1], (0, 300), value)  # one weight of one token
    work = Pass(SIBLINGS, range(COUNT), 0, range(COUNT), [0], [-np.inf])
    out = engine.run(work)
    logits = full(engine, work.tokens, work.positions, 0).logits
    bad = np.isnan(logits[:, 300]) | np.isposinf(logits[:, 300])
    assert bad.any()
    assert np.array_equal(np.isnan(out.log_normaliser), bad)  # minus infinity is a token that is never emitted
    good = engines("llama", lowering).run(work)
    assert np.array_equal(out.margins, good.margins)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
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
    traced = trace(resolve_model(str(folder)), agent(architecture), "agent", tmp_path / "trace", max_context=64)
    for lowering in LOWERINGS:
        for precision in ("fp32", "int8"):
            out = finish(traced, ExportOptions(lowering=lowering, precision=precision), tmp_path / lowering / precision)
            graph = step_graph(out.folder).graph  # it has passed the gate
            assert "Identity" not in {node.op_type for node in graph.node}
            stored = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
            plain = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored]
            assert bool(plain) == (precision == "fp32"), plain
            heads = [n.name for n in graph.node if n.op_type == "Transpose" and "layers" in n.name]
            assert lowering != "ort" or not heads
