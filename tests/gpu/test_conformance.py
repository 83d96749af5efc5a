"""The conformance suite of every engine (tests/unit/test_ort_engine.py), on the device.

Its model is made of small whole numbers, so the GPU has to give the same bits; it writes its KV cache by ScatterND,
which TensorRT does in a second cache (lowering `decomposed`). In what order a device returns equal numbers nobody
promises: see `promised`.
"""

import inspect
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_runtime import tensors
from mara_runtime.bundle import Bundle
from mara_runtime.config import STRATEGIES
from mara_runtime.engines import open_engine
from mara_runtime.engines import ort as ort_engine
from mara_runtime.engines.base import Engine, Pass, StepOutput
from tests.gpu.conftest import close
from tests.table_engine import TableEngine
from tests.unit import helpers
from tests.unit import test_ort_engine as suite
from tests.unit.written_model import CANDIDATES, SHAPE, SLOTS, judge, table

OTHER_FIXTURES = {"bundle", "trt_bundles", "machine", "monkeypatch", "tmp_path"}
"""Of tests that are about one engine only."""
CONFORMANCE = {
    name: test
    for name, test in vars(suite).items()
    if name.startswith("test_")
    and {"engine", "growing_and_whole"} & inspect.signature(test).parameters.keys()
    and not OTHER_FIXTURES & inspect.signature(test).parameters.keys()
}
globals().update(CONFORMANCE)
CAPACITIES = (10, 26)
"""Contexts of the smaller engines, so that the suite's model grows twice."""


def promised(patch: pytest.MonkeyPatch) -> None:
    """Let the suite ask for what a device promises: any order of equal logits, and no choice among equal scores."""
    patch.setattr(suite, "twin", lambda: TableEngine(table, judge, SLOTS, SHAPE.vocab_size))  # it tells of all tokens
    patch.setattr(suite, "same", same_but_for_order)
    patch.setattr(suite, "some_pass", some_pass_without_equals)
    patch.setattr(suite, "STRATEGIES", tuple(s for s in STRATEGIES if s != "max_prob"))  # margins are its scores


def same_but_for_order(found: StepOutput, expected: StepOutput) -> None:
    """expected: with all tokens."""
    np.testing.assert_array_equal(found.margins, expected.margins)
    np.testing.assert_array_equal(found.rows, expected.rows)
    count = CANDIDATES + tensors.TOP_SPARE
    assert found.top_ids.shape == (len(found.rows), count)
    assert all(len(set(ids)) == count for ids in found.top_ids.tolist())
    by_id = np.take_along_axis(expected.top_logits, np.argsort(expected.top_ids), 1)
    np.testing.assert_array_equal(found.top_logits, expected.top_logits[:, :count])
    np.testing.assert_array_equal(found.top_logits, np.take_along_axis(by_id, found.top_ids, 1))
    np.testing.assert_allclose(found.log_normaliser, expected.log_normaliser, rtol=1e-6)
    assert found.margins.dtype == found.top_logits.dtype == found.log_normaliser.dtype == np.float32


_some_pass = suite.some_pass


def some_pass_without_equals(rng: random.Random, length: int, placed: int) -> Pass:
    """The suite's, each row's score apart from the others': margins and priorities are multiples of 1/4."""
    work = _some_pass(rng, length, placed)
    return replace(work, priorities=[priority - i / 64 for i, priority in enumerate(work.priorities)])


@pytest.fixture(autouse=True)
def _promised(monkeypatch: pytest.MonkeyPatch) -> None:
    promised(monkeypatch)


def written_bundle(target: str, folder: Path) -> Bundle:
    """The suite's model for a target, without engines."""
    suite.write_bundle(folder, always_head=True)
    manifest = helpers.read_manifest(folder)
    manifest["targets"] = [target]
    manifest["step"].update(lowering="ort" if target == "cuda" else "decomposed", precision="fp32", quantisation=None)
    helpers.write_manifest(folder, manifest)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def written(target: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The suite's model, with engines of three sizes."""
    bundle = written_bundle(target, tmp_path_factory.mktemp("written"))
    if target == "cuda":
        return bundle
    from mara_export.options import BuildOptions
    from mara_export.tensorrt.build import build

    return build(bundle, target, BuildOptions(capacities=CAPACITIES))


def opened(written: Bundle, target: str, growing: bool, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that begins small, or one that begins with all its slots."""
    if target == "cuda":
        monkeypatch.setattr(ort_engine, "FIRST_SLOTS", 4 if growing else suite.SLOTS)
    engine, _ = open_engine(written if growing or target == "cuda" else suite.largest_only(written), target)
    assert engine.describe()["name"] == target
    return engine


@pytest.fixture(params=[False, True], ids=["one size", "growing"])
def engine(
    written: Bundle, target: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    engine = opened(written, target, request.param, monkeypatch)
    yield engine
    close(engine)


@pytest.fixture
def growing_and_whole(written: Bundle, target: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    growing, whole = (opened(written, target, grows, monkeypatch) for grows in (True, False))
    yield growing, whole
    close(growing)
    close(whole)


def test_the_suite_is_there() -> None:
    assert len(CONFORMANCE) >= 12
    assert any("growing_and_whole" in inspect.signature(test).parameters for test in CONFORMANCE.values())
