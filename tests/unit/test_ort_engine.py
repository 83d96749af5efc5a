"""The conformance suite on ONNX Runtime and on TensorRT's double (tests/double), and what ONNX Runtime alone does."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest

from mara_runtime.bundle import Bundle
from mara_runtime.engines import open_engine, ort, ort_banks, ort_cpu, ort_memory
from mara_runtime.engines.base import Engine, Pass
from mara_runtime.engines.machine import most_threads
from mara_runtime.engines.ort_cpu import CpuEngine
from mara_runtime.engines.ort_cuda import CudaEngine, CudaMemory
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError, OptionError
from tests.conformance import Conformance, chain, siblings
from tests.double.machine import Machine
from tests.unit import helpers
from tests.unit.written_model import (
    CANDIDATES,
    CONTEXT,
    FINE,
    INFINITE,
    SHAPE,
    SIZES,
    SLOTS,
    add_engines,
    table,
    write_bundle,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(write_bundle(tmp_path_factory.mktemp("bundle"), always_head=False))


@pytest.fixture(scope="module")
def trt_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By how passes write the cache."""
    return {
        name: add_engines(write_bundle(tmp_path_factory.mktemp("bundle"), always_head=True), SIZES, name == "in place")
        for name in ("in place", "two copies")
    }


def largest_only(bundle: Bundle) -> Bundle:
    """The bundle with the largest of its engines alone."""
    largest = max(bundle.manifest.engines, key=lambda engine: engine.slots)
    return replace(bundle, manifest=replace(bundle.manifest, engines=(largest,)))


class Maker:
    """Opens engines for one test."""

    def __init__(self, bundle: Bundle, trt_bundles: dict[str, Bundle], patch: pytest.MonkeyPatch) -> None:
        self._bundle, self._trt_bundles, self._patch = bundle, trt_bundles, patch
        self._stack = contextlib.ExitStack()
        self.machine: Machine | None = None

    def ort(self, name: str, slots: int, *, graphs: bool = False) -> Engine:
        """ONNX Runtime with so many slots at first. "cuda": the CUDA engine, on the provider that is here."""
        self._patch.setattr(ort_memory, "FIRST_SLOTS", slots)
        self._patch.setattr(ort_banks, "FIRST_LIMIT", 4 * slots)
        self._patch.setitem(ort.PROVIDERS, "cuda", "CPUExecutionProvider")
        self._patch.setattr(CudaMemory, "device", "cpu")
        return CpuEngine(self._bundle, 1) if name == "cpu" else CudaEngine(self._bundle, 1, graphs=graphs)

    def trt(self, cache: str, *, graphs: bool = True, grows: bool = True) -> Engine:
        """TensorRT on the double."""
        if self.machine is None:
            self.machine = Machine()
            self.machine.install(self._patch)
            self._stack.callback(self.machine.check_given_back)
        made = self._trt_bundles[cache]
        engine = TrtEngine(made if grows else largest_only(made), "tensorrt", graphs=graphs)
        self._stack.callback(engine.close)
        return engine

    def close(self) -> None:
        """Everything on the GPU is given back."""
        self._stack.close()


@pytest.fixture
def make(bundle: Bundle, trt_bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    maker = Maker(bundle, trt_bundles, monkeypatch)
    yield maker
    maker.close()


class TestEngines(Conformance):
    """Every engine, on this machine's CPU."""

    @pytest.fixture(
        params=[
            *("cpu", "cuda", "trt, in place", "trt, two copies"),
            pytest.param("cuda, graphs", marks=pytest.mark.long),
            pytest.param("trt, two copies, no graphs", marks=pytest.mark.long),
        ]
    )
    def engine(self, make: Maker, request: pytest.FixtureRequest) -> Iterator[Engine]:
        name, *rest = request.param.split(", ")
        if name != "trt":
            yield make.ort(name, 4, graphs=rest == ["graphs"])
            return
        yield make.trt(rest[0], graphs=len(rest) == 1)
        assert make.machine is not None
        assert make.machine.cuda.launched == 0 or len(rest) == 1

    @pytest.fixture(params=["cpu", "cuda", "trt, in place", "trt, two copies"])
    def growing_and_whole(self, make: Maker, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        """An engine that begins small, and one that begins with all its slots."""
        name, *rest = request.param.split(", ")
        if name == "trt":
            return make.trt(*rest), make.trt(*rest, grows=False)
        whole = make.ort(name, SLOTS)
        return make.ort(name, 4), whole  # last: growth reads the size of the first allocation


def test_top_k_never_runs_on_zero_rows(bundle: Bundle) -> None:
    """ONNX Runtime before 1.31 would divide by zero, which ends the process."""
    graph = onnx.load(bundle.path(bundle.manifest.step.file)).graph
    assert "TopK" not in {node.op_type for node in graph.node}  # it is in a branch
    out = CpuEngine(bundle).run(chain([1]))
    assert len(out.rows) == len(out.top_ids) == len(out.top_logits) == len(out.log_normaliser) == 0


def test_memory_that_cuda_graphs_refer_to_stays_where_it_is(make: Maker) -> None:
    engine: Any = make.ort("cuda", 4, graphs=True)
    addresses = [value.data_ptr() for value in engine.memory.bank.slab.values]
    engine.run(chain([INFINITE, 1, 2]))
    bindings = dict(engine.memory.bank.slab.bindings)
    assert {stride for group in engine.memory.bank.slab.entries for stride in group.strides} == {
        0
    }  # the host holds no second copy
    engine.cache.clear()
    for position in range(CONTEXT):
        is_right(engine, position)
    assert engine.memory.slots == engine.cache.capacity
    assert [value.data_ptr() for value in engine.memory.bank.slab.values] == addresses
    assert bindings.items() <= engine.memory.bank.slab.bindings.items()


# ── the cache on a CPU ───────────────────────────────────────────────────────────────────────────────────────────────


def step(position: int) -> Pass:
    return chain([(3 * position + 1) % FINE], position, head_rows=[0])


def is_right(engine: Any, *positions: int) -> None:
    for position in positions:
        prefix = tuple((3 * p + 1) % FINE for p in range(position + 1))
        assert engine.run(step(position)).top_logits[0, 0] == table(prefix)[0].max()


def test_the_cache_grows_in_small_steps_up_to_its_capacity(make: Maker) -> None:
    engine: Any = make.ort("cpu", 4)
    assert (engine.cache.capacity, engine.memory.slots) == (SLOTS, 4)
    sizes = []
    for position in range(CONTEXT):
        is_right(engine, position)
        sizes.append(engine.memory.slots)
    assert sorted(set(sizes)) == list(range(4, CONTEXT + 3, 4))
    assert all(position < size for position, size in enumerate(sizes))
    engine.run(siblings([1] * 20, CONTEXT))
    assert engine.memory.slots == SLOTS


def test_the_cache_has_the_size_that_a_text_needs(make: Maker) -> None:
    engine: Any = make.ort("cpu", 4)
    sizes = []
    for kept, slots in ((0, 30), (8, 20), (8, 13), (0, CONTEXT), (3, 2 * SLOTS)):
        engine.memory.places[0].resize(slots, kept)
        sizes.append(engine.memory.slots)
    assert sizes == [32, 32, 16, 60, SLOTS]  # it shrinks where that halves it
    engine.run(chain([INFINITE] * 9))
    engine.cache.clear()
    assert engine.memory.slots == 4


def test_a_masked_slot_with_nan_reaches_every_row_until_the_cache_is_cleared(bundle: Bundle) -> None:
    # Why an error clears the cache, and why the row at fault is searched one at a time. Other kernels may skip it.
    engine = CpuEngine(bundle)
    engine.run(chain([1]))
    out = engine.run(siblings([2, INFINITE], 1, head_rows=[0], agent_rows=[0, 1], priorities=[0.0, 0.0]))
    assert np.isnan(out.margins).all()
    assert np.isnan(out.log_normaliser).all()
    assert np.isnan(engine.run(chain([2], 1, head_rows=[0])).log_normaliser).all()
    engine.cache.clear()
    engine.run(chain([1]))
    assert np.isfinite(engine.run(chain([2], 1, head_rows=[0])).log_normaliser).all()


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("threads", "fewer", "expected"), [(None, None, 0), (None, 2, 2), (3, 2, 3)])
def test_the_session_has_its_threads_and_is_opened_within_huge_pages(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, threads: int | None, fewer: int | None, expected: int
) -> None:
    """fewer: cores that the process may use, if it has not all."""
    opened, inside = [], []
    session = onnxruntime.InferenceSession

    @contextlib.contextmanager
    def watched() -> Iterator[None]:
        yield
        inside.append(len(opened))

    def open_session(path: str, options: Any, **how: Any) -> Any:
        opened.append(options.intra_op_num_threads)
        return session(path, options, **how)

    monkeypatch.setattr(ort, "default_threads", lambda: fewer)
    monkeypatch.setattr(ort, "most_threads", lambda: 4)
    monkeypatch.setattr(ort_cpu, "huge_pages", watched)
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    facts = CpuEngine(bundle, threads).describe()
    assert (opened, inside) == ([expected], [1])  # 0 threads: ONNX Runtime's own choice
    assert facts == {
        "name": "cpu",
        "version": f"onnxruntime {onnxruntime.__version__}",
        "lowering": "ort",
        "precision": "int4",
        "threads": threads,
    }


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_onnx_runtime_silently_replaces_is_refused(bundle: Bundle) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider.*pip install"):
        CudaEngine(bundle)


def test_attention_of_a_wide_pass_on_cuda_has_as_many_rows_as_its_fused_kernel_takes(make: Maker) -> None:
    engine, plain = make.ort("cuda", 32), make.ort("cpu", 32)  # by its second cache, a multiple of eight
    for rows in (1, 7, 8, 9, 11, 12, 13):
        for slot in (0, 3, plain.cache.capacity - rows):
            work = Pass([1 + (5 * row + slot) % 8 for row in range(rows)], range(rows), slot, [rows - 1], [0], [0.0])
            out, expected = engine.run(work), plain.run(work)
            assert np.array_equal([*out.margins, *out.top_logits[0]], [*expected.margins, *expected.top_logits[0]])
    engine.run(Pass(range(10), range(10), engine.cache.capacity - 10))
    assert {key[2] for key in engine.memory.bank.slab.bindings} == {1, 7, 8, 16}


class Failing:
    """A session that opens, and whose passes fail, as on a GPU that the library has no kernels for."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *_: Any) -> None:
        raise RuntimeError("no kernel image is available\nfor execution on the device")


def test_a_provider_that_cannot_compute_is_refused_when_it_is_opened(
    bundle: Bundle, make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.ort("cuda", 4)
    session, fails = onnxruntime.InferenceSession, [True, False, True]  # cuda; cpu, in its place; cuda by name
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *given, **how: Failing(session(*given, **how)) if fails.pop(0) else session(*given, **how),
    )
    both = replace(bundle, manifest=replace(bundle.manifest, targets=("cpu", "cuda")))
    engine, declined = open_engine(both, "auto")
    assert engine.describe()["name"] == "cpu"
    assert f"cannot run {both.path('step.onnx')}: no kernel image is available; " in declined["cuda"]
    assert "cuDNN" in declined["cuda"]
    with pytest.raises(EngineError, match=r"no kernel image is available; .*cuDNN"):
        open_engine(both, "cuda")


def test_a_pass_that_fails_is_an_error_of_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *given, **how: Failing(session(*given, **how)))
    with pytest.raises(EngineError, match=r"cannot run .*step\.onnx: no kernel image is available$"):
        CpuEngine(bundle).run(chain([1]))


def test_a_device_without_memory_for_the_cache(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = make.ort("cuda", 4)
    engine.run(chain([1]))
    full = Mock(side_effect=RuntimeError("out of memory\nat line 1"))
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", full)
        with pytest.raises(EngineError, match=r"KV cache of 8 slots: out of memory; "):
            engine.run(chain([1] * 6, 1))
    assert engine.memory.slots == 4
    engine.run(chain([1] * 6, 1))


def test_every_size_of_a_cache_on_cuda_is_a_multiple(make: Maker) -> None:
    """Its fused attention takes no mask of other sizes (tests/cuda)."""
    engine: Any = make.ort("cuda", 32)
    assert engine.cache.capacity == -(-SLOTS // 32) * 32 > SLOTS
    engine.memory.grow(engine.cache.capacity)
    assert engine.memory.slots == engine.cache.capacity


def test_opening_leaves_an_empty_cache(make: Maker) -> None:
    """Whatever an engine runs to see whether it can."""
    engine: Any = make.ort("cuda", 4)
    assert engine.cache.tokens == []
    assert not any(value.numpy().any() for value in engine.memory.bank.slab.values)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (None, "cannot load"),
        ({"vocab_size": 30, "hidden_size": 4}, "top_ids|logits"),
        ({"vocab_size": 24, "hidden_size": 8}, "agents.0.weight"),
        ({"vocab_size": 24, "hidden_size": 4, "max_candidates": 6}, "top_ids"),
        ({"hidden_size": 4, "shape": asdict(replace(SHAPE, caches=SHAPE.caches[::-1]))}, "past_key_values.0.key"),
    ],
    ids=str,
)
def test_a_graph_that_does_not_fit_its_manifest_is_refused(
    bundle: Bundle, tmp_path: Path, sizes: dict[str, Any] | None, named: str
) -> None:
    graph = helpers.GRAPH if sizes is None else bundle.path("step.onnx").read_bytes()
    shape = {} if sizes is None else {"num_layers": 3, "caches": asdict(SHAPE)["caches"]}
    facts = {"max_candidates": CANDIDATES, "shape": shape, **(sizes or {})}
    folder = helpers.make_bundle(tmp_path, graph=graph, **facts)
    with pytest.raises(EngineError, match=named) as caught:
        CpuEngine(Bundle.open(folder))
    assert str(folder / "step.onnx") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_threads_out_of_range_are_refused(bundle: Bundle) -> None:
    for threads in (-1, 0, most_threads() + 1):
        with pytest.raises(OptionError, match=f"--threads is {threads}; .* 1 and {most_threads()}"):
            CpuEngine(bundle, threads)
