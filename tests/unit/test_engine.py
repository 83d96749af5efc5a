"""Choosing an engine; what a pass is, shown by the engine that is a table."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import ENGINES, DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engines import open_engine, ort, ort_cpu, ort_cuda, tensorrt
from mara_runtime.engines.base import NEVER, Seating, StepOutput, is_finite
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.tensors import TOP_SPARE, spare_slots, top_tokens
from tests.conformance import chain, siblings
from tests.table_engine import TableEngine
from tests.unit import helpers

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class FakeEngine(TableEngine):
    """Stands for ONNX Runtime's engines: no graph is loaded."""

    name = "cpu"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        super().__init__(helpers.scripted({}, {}), helpers.AGENTS, slots=32 + spare_slots(8))
        self.opened = (self.name, threads)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class FakeCudaEngine(FakeEngine):
    name = "cuda"


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of this machine's ONNX Runtime."""
    present = [CPU]
    monkeypatch.setitem(
        sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: present, __version__="1")
    )
    monkeypatch.setattr(ort_cpu, "CpuEngine", FakeEngine)
    monkeypatch.setattr(ort_cuda, "CudaEngine", FakeCudaEngine)
    return present


def bundle_for(folder: Path, *targets: str) -> Bundle:
    return Bundle.open(helpers.make_bundle(folder, targets=targets))


def opened(bundle: Bundle, name: str = "auto", threads: int | None = None) -> tuple[Any, list[str]]:
    """(name and threads of the engine, names of those that declined)."""
    engine, declined = open_engine(bundle, name, threads)
    assert isinstance(engine, FakeEngine)
    return engine.opened, list(declined)


def test_auto_opens_the_preferred_engine_that_fits(tmp_path: Path, providers: list[str]) -> None:
    assert ENGINES == ("tensorrt", "tensorrt-rtx", "cuda", "cpu")
    both, cpu = bundle_for(tmp_path / "both", "cpu", "cuda"), bundle_for(tmp_path / "cpu", "cpu")
    assert opened(both, threads=3) == (("cpu", 3), ["tensorrt", "tensorrt-rtx", "cuda"])
    _, declined = open_engine(both)
    assert f"no {CUDA} (it has {CPU})" in declined["cuda"]
    assert "targets: cpu, cuda" in declined["tensorrt"]
    providers.insert(0, CUDA)
    assert opened(both) == (("cuda", None), ["tensorrt", "tensorrt-rtx"])
    assert opened(cpu) == (("cpu", None), ["tensorrt", "tensorrt-rtx", "cuda"])


def test_a_named_engine_is_opened_or_refused(tmp_path: Path, providers: list[str]) -> None:
    bundle = bundle_for(tmp_path, "cpu", "cuda")
    assert opened(bundle, "cpu") == (("cpu", None), [])
    with pytest.raises(EngineError, match=f"cuda: .*no {CUDA}"):
        open_engine(bundle, "cuda")


def test_an_unknown_engine_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--engine is 'CPU'; .*auto, tensorrt, tensorrt-rtx, cuda, cpu$"):
        open_engine(bundle_for(tmp_path, "cpu"), "CPU")


@pytest.mark.parametrize("name", ["auto", "tensorrt"])
def test_threads_are_refused_for_an_engine_on_a_gpu(
    tmp_path: Path, providers: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tensorrt, "why_not", lambda bundle, name: None)
    with pytest.raises(OptionError, match=r"--threads .* tensorrt"):
        open_engine(bundle_for(tmp_path, "cpu"), name, threads=4)


def test_when_no_engine_fits_every_reason_is_given(
    tmp_path: Path, providers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError) as caught:
        open_engine(bundle_for(tmp_path, "cuda"))
    message = str(caught.value)
    assert "\n" not in message
    for reason in (str(tmp_path), f"cuda: this ONNX Runtime has no {CUDA}", "cpu: ", "targets: cuda"):
        assert reason in message
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what makes an import fail
    with pytest.raises(EngineError, match=r"not installed.*mara-deploy\[gpu\].*mara-deploy\[cpu\]"):
        open_engine(bundle_for(tmp_path, "cpu", "cuda"))


def test_a_library_that_is_broken_is_not_said_to_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libx.so: cannot enable executable stack')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    with pytest.raises(EngineError, match=r"ONNX Runtime cannot be imported \(libx.so: cannot enable"):
        open_engine(bundle_for(tmp_path, "cpu"))


@pytest.mark.parametrize(
    ("engine", "options"), [(ort_cpu.CpuEngine, {}), (ort_cuda.CudaEngine, {"use_tf32": "0"})], ids=["cpu", "cuda"]
)
def test_tf32_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any, options: dict[str, str]
) -> None:
    asked: list[tuple[str, dict[str, str]]] = []

    def session(path: str, session_options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        asked.extend(providers)
        raise RuntimeError("enough")

    fake = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=session, preload_dlls=lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(EngineError, match="enough"):
        engine(bundle_for(tmp_path, engine.name))
    ((provider, given),) = asked
    assert provider == ort.PROVIDERS[engine.name]
    assert options.items() <= given.items()


def test_the_result_records_the_engine_and_why_others_declined(tmp_path: Path, providers: list[str]) -> None:
    decoder = AlignedDecoder(bundle_for(tmp_path, "cpu"), cost=helpers.COST)
    facts = decoder.generate([1], DecodeConfig(top_k=2, max_new_tokens=1)).to_json()["stats"]["engine"]
    assert facts["name"] == "cpu"
    assert list(facts["declined"]) == ["tensorrt", "tensorrt-rtx", "cuda"]


# ── what a pass returns ──────────────────────────────────────────────────────────────────────────────────────────────


def pass_of(margins: Sequence[float], **options: Any) -> StepOutput:
    """Siblings with these margins after a prompt of one token."""
    table = helpers.scripted({}, {(0, i + 1): margin for i, margin in enumerate(margins)}, vocab_size=20)
    engine = TableEngine(table, helpers.AGENTS, 40)
    engine.use([helpers.AGENT])
    engine.run(chain([0]))
    return engine.run(siblings(range(1, len(margins) + 1), 1, mix=[1.0], **options))


@pytest.mark.parametrize(
    ("margins", "priorities", "options", "rows"),
    [
        ([-1.0, 2.0, 3.0], [0.0, -1.0, -2.0], {}, [1]),  # accepted, of the greatest priority
        ([1.0, 2.0, 3.0], [-2.0, -1.0, 0.0], {}, [2]),
        ([1.0, 2.0, 3.0], [2.0, 1.0, 0.5], {"margin_weight": 0.5}, [0]),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 0.0], {"margin_weight": 1.0}, [1]),
        ([1.0, 2.0, 2.0], [0.0, 0.0, 0.0], {"margin_weight": 1.0}, [1]),  # the first of equals
        ([0.0, -1.0], [0.0, 0.0], {}, []),  # the threshold must be exceeded
        ([-1.0, -2.0], [-1.0, 0.0], {"threshold": -1.5}, [0]),
        ([float(np.float32(0.1))], [0.0], {"threshold": 0.1}, [0]),  # float32(0.1) > 0.1
        ([float(np.float32(0.7))], [0.0], {"threshold": 0.7}, []),  # float32(0.7) < 0.7
        ([1.0, 2.0], [NEVER, NEVER], {}, []),
        ([1.0, 2.0], [NEVER, NEVER], {"fallback_row": 0}, [0]),
        ([-1.0, -2.0], [0.0, 0.0], {"fallback_row": 1}, [1]),
        ([-1.0, 2.0, -2.0], [0.0, -1.0, -2.0], {"fallback_row": 0}, [1]),
        ([1.0, -1.0, 2.0], [NEVER, 0.0, 0.0], {"head_rows": [2, 0]}, [2, 0, 2]),  # after the head rows
        ([-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], {"head_rows": [1], "fallback_row": 0}, [1, 0]),
    ],
)
def test_which_row_is_elected(
    margins: list[float], priorities: list[float], options: dict[str, Any], rows: list[int]
) -> None:
    out = pass_of(margins, agent_rows=range(len(margins)), priorities=priorities, **options)
    assert out.margins.tolist() == margins
    assert out.rows.tolist() == rows
    assert len(out.top_ids) == len(out.top_logits) == len(out.log_normaliser) == len(rows)


def test_the_agent_sees_its_rows_alone() -> None:
    out = pass_of([1.0, 2.0, 3.0], agent_rows=[2, 0], priorities=[-1.0, 0.0])
    assert (out.margins.tolist(), out.rows.tolist()) == ([3.0, 1.0], [0])  # a row of the pass, not of the agent's


def test_the_table_engine_notices_a_wrong_slot() -> None:
    engine = TableEngine(helpers.scripted({}, {}), helpers.AGENTS, slots=8)
    engine.run(chain([1, 2]))
    engine.cache.extend([1, 2])
    engine.run(siblings([5, 6], 2))
    engine.cache.commit(6, 3)
    engine.run(chain([9], 3))
    with pytest.raises(IndexError, match="slot 4 holds None"):
        engine.run(chain([3], 5))
    engine.run(siblings([5, 6], 2))
    with pytest.raises(IndexError, match="slot 3 holds"):  # a sibling is not part of the sequence
        engine.run(chain([7], 4))
    with pytest.raises(IndexError):
        engine.run(siblings([7, 7], 2, 7))


def threshold_input(threshold: float) -> float:
    """What a graph is given for a threshold, in float32."""
    sizes = {"S": 1, "B": 1, "M": 1, "N": 1, "A": 1, "H0": 1, "Q": 1}
    inputs = {
        tensor.name: np.zeros([sizes[d] if isinstance(d, str) else d for d in tensor.shape], tensor.dtype)
        for tensor in tensors.pass_inputs()
    }
    Seating([chain([1], threshold=threshold)], [0], 1, 1).fill(inputs)
    return float(inputs[tensors.THRESHOLD].item())


@given(st.floats(-1e30, 1e30) | st.floats(allow_nan=False, allow_infinity=False))
def test_a_float32_margin_exceeds_the_graph_s_threshold_where_it_exceeds_the_option(threshold: float) -> None:
    with np.errstate(over="ignore"):
        near, below = np.float32(threshold), threshold_input(threshold)
        around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    for margin in around:
        assert (float(margin) > below) == (float(margin) > threshold)


def test_the_best_tokens_and_their_normaliser() -> None:
    logits: dict[tuple[int, ...], dict[int, float]] = {(0,): {3: 1.0, 1: 2.0, 4: 2.0, 2: -1.0}}
    engine = TableEngine(helpers.scripted(logits, {}, vocab_size=30), helpers.AGENTS, 8, max_candidates=3)
    out = engine.run(chain([0], head_rows=[0]))
    assert out.top_ids.shape == out.top_logits.shape == (1, 3 + TOP_SPARE)
    assert out.top_ids[0, :4].tolist() == [1, 4, 3, 2]
    assert out.top_logits[0, :4].tolist() == [2.0, 2.0, 1.0, -1.0]
    assert (out.top_logits[0, 4:] == -math.inf).all()
    assert out.log_normaliser[0] == pytest.approx(math.log(2 * math.e**2 + math.e + math.exp(-1)), rel=1e-6)
    for candidates, vocab, expected in ((8, 12, 12), (4, 12, 12), (3, 12, 11), (40, 10**5, 48)):
        assert top_tokens(candidates, vocab) == expected


def test_an_output_is_finite_if_its_margins_and_normalisers_are() -> None:
    fine = pass_of([1.0, 2.0], agent_rows=[0, 1], priorities=[0.0, 0.0], head_rows=[0, 1])
    assert is_finite(fine)
    assert is_finite(replace(fine, margins=fine.margins[:0], log_normaliser=fine.log_normaliser[:0]))
    assert is_finite(replace(fine, top_logits=np.full_like(fine.top_logits, -np.inf)))  # tokens that are ruled out
    for name in ("margins", "log_normaliser"):
        for bad in (math.nan, math.inf, -math.inf):
            array = getattr(fine, name).copy()
            array[-1] = bad
            assert not is_finite(replace(fine, **{name: array}))
