"""Choosing an engine, and the attention rule that all engines share. No model is run here."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime import ort_engine
from mara_runtime.bundle import Bundle
from mara_runtime.config import ENGINES, DecodeConfig
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.engine import attention_mask, open_engine
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.table_engine import TableEngine
from mara_runtime.tensors import MASKED
from tests.unit import helpers


class FakeEngine(TableEngine):
    """Stands for OrtEngine: no graph is loaded."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None) -> None:
        super().__init__(helpers.scripted({}, {}), helpers.sum_agent, slots=40)
        self.opened = (name, threads)

    def describe(self) -> dict[str, Any]:
        return {"name": self.opened[0]}


def have(monkeypatch: pytest.MonkeyPatch, *providers: str) -> None:
    """A machine whose ONNX Runtime has these providers."""
    fake = SimpleNamespace(get_available_providers=lambda: list(providers))
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(ort_engine, "OrtEngine", FakeEngine)


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def bundle_for(folder: Path, *targets: str) -> Bundle:
    return Bundle.open(helpers.make_bundle(folder, targets=targets))


def opened(
    bundle: Bundle, name: str = "auto", threads: int | None = None
) -> tuple[tuple[str, int | None], dict[str, str]]:
    engine, declined = open_engine(bundle, name, threads)
    assert isinstance(engine, FakeEngine)
    return engine.opened, declined


def test_auto_takes_the_preferred_one_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CUDA, CPU)
    assert ENGINES == ("cuda", "cpu")
    assert opened(bundle_for(tmp_path, "cpu", "cuda")) == (("cuda", None), {})


def test_auto_says_why_the_preferred_one_declined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    engine, declined = opened(bundle_for(tmp_path / "both", "cpu", "cuda"), threads=3)
    assert engine == ("cpu", 3)
    assert list(declined) == ["cuda"]
    assert f"no {CUDA} (it has {CPU})" in declined["cuda"]

    have(monkeypatch, CUDA, CPU)
    engine, declined = opened(bundle_for(tmp_path / "cpu", "cpu"))
    assert engine == ("cpu", None)
    assert declined == {"cuda": "the bundle was not exported for it (targets: cpu)"}


def test_a_named_engine_is_that_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    bundle = bundle_for(tmp_path, "cpu", "cuda")
    assert opened(bundle, "cpu") == (("cpu", None), {})
    with pytest.raises(EngineError) as caught:
        open_engine(bundle, "cuda")
    assert f"cuda: this ONNX Runtime has no {CUDA}" in str(caught.value)
    assert "cpu:" not in str(caught.value)  # it was not asked


@pytest.mark.parametrize("name", ["tensor-rt", "", "CPU", "auto,cpu"])
def test_an_unknown_engine_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(EngineError, match=rf"^unknown engine {name!r}; known: auto, cuda, cpu$"):
        open_engine(bundle_for(tmp_path, "cpu"), name)


def test_when_none_fits_every_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, CPU)
    bundle = bundle_for(tmp_path, "cuda")
    with pytest.raises(EngineError) as caught:
        open_engine(bundle)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert f"cuda: this ONNX Runtime has no {CUDA} (it has {CPU})" in message
    assert "cpu: the bundle was not exported for it (targets: cuda)" in message
    assert "\n" not in message


def test_without_onnx_runtime_the_package_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what makes an import fail
    with pytest.raises(EngineError) as caught:
        open_engine(bundle_for(tmp_path, "cpu", "cuda"))
    assert "cuda: ONNX Runtime is not installed: pip install 'mara-deploy[gpu]'" in str(caught.value)
    assert "cpu: ONNX Runtime is not installed: pip install 'mara-deploy[cpu]'" in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_below_1_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: [CPU]))
    with pytest.raises(OptionError, match=f"^--threads is {threads}; it must lie between 1 and 1024"):
        open_engine(bundle_for(tmp_path, "cpu"), "cpu", threads)


def test_the_decoder_records_which_engine_and_why_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, CPU)
    decoder = AlignedDecoder(bundle_for(tmp_path, "cpu"))
    result = decoder.generate([1], DecodeConfig(top_k=2, max_new_tokens=1))
    assert result.to_json()["stats"]["engine"] == {
        "name": "cpu",
        "declined": {"cuda": "the bundle was not exported for it (targets: cpu)"},
    }


# ── the attention mask ───────────────────────────────────────────────────────────────────────────────────────────────


def seen(positions: list[int], slot: int, slots: int) -> list[list[int]]:
    mask = attention_mask(positions, slot, slots)
    assert mask.shape == (1, 1, len(positions), slots)
    assert mask.dtype == np.float32
    assert set(np.unique(mask)) <= {np.float32(0), np.float32(MASKED)}
    return [np.flatnonzero(row == 0).tolist() for row in mask[0, 0]]


def test_a_prompt_is_a_chain() -> None:
    assert seen([0, 1, 2], 0, 6) == [[0], [0, 1], [0, 1, 2]]
    assert seen([3, 4], 3, 6) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_siblings_see_the_prefix_and_themselves() -> None:
    assert seen([2, 2, 2], 2, 6) == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert seen([2], 4, 6) == [[0, 1, 4]]  # a sibling of a later pass


@given(st.integers(0, 20), st.integers(0, 6), st.integers(1, 8))
def test_a_row_sees_the_slots_below_its_position_and_its_own(position: int, offset: int, rows: int) -> None:
    slot = position + offset
    expected = [sorted({*range(position), slot + row}) for row in range(rows)]
    assert seen([position] * rows, slot, slot + rows) == expected
