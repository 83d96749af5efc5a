"""`BuildOptions`, and what mara-build rejects before TensorRT is asked. test_refusals.py has its options."""

import enum
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands.build import main
from mara_export.options import BuildOptions
from mara_export.progress import Progress
from mara_export.tensorrt.build import why_cannot_build
from mara_export.tensorrt.network import Network
from mara_runtime.bundle import Bundle
from mara_runtime.engines.cuda import FOR_CUDA_12
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.tensors import spare_slots
from tests.unit import helpers

CONTEXT, CANDIDATES = 200, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that mara-build can open and not use: its graph is for ONNX Runtime."""
    return helpers.make_bundle(tmp_path / "bundle", max_context=CONTEXT, max_candidates=CANDIDATES)


def test_slots_hold_the_context_and_a_decision(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    (most,) = BuildOptions().slots(manifest)
    assert 0 <= most - CONTEXT - spare_slots(CANDIDATES) < 16
    small, middle, largest = BuildOptions(capacities=(100, 20)).slots(manifest)
    assert 0 <= small - 20 - spare_slots(CANDIDATES) < 16
    assert 0 <= middle - 100 - spare_slots(CANDIDATES) < 16
    assert largest == most
    assert [slots % 16 for slots in (small, middle, largest)] == [0, 0, 0]
    assert BuildOptions(capacities=(CONTEXT, CONTEXT)).slots(manifest) == (most,)


def test_a_capacity_beyond_the_bundle_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"--capacity is 201.*200"):
        BuildOptions(capacities=(CONTEXT + 1,)).slots(Bundle.open(folder).manifest)


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    try:
        code: Any = main([str(argument) for argument in argv])
    except SystemExit as left:  # argparse
        code = left.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("mara-build: error: ")
    assert err.count("\n") == 1
    return err


def test_repeated_options_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BuildOptions] = []

    def build(bundle: Bundle, target: str, options: BuildOptions, progress: Progress) -> Bundle:
        asked.append(options)
        return bundle

    monkeypatch.setattr("mara_export.tensorrt.build.build", build)
    lists = ["--capacity", "64,32", "--compute-capability", "8.9", "--capacity", "48", "--compute-capability", "12.0"]
    assert main([str(folder), "--target", "tensorrt-rtx", "--quiet", *lists]) == 0
    assert main([str(folder), "--target", "tensorrt-rtx", "--quiet"]) == 0
    assert [(o.capacities, o.compute_capabilities) for o in asked] == [((64, 32, 48), ("8.9", "12.0")), ((), ())]


def test_the_workspace_is_given_in_mebibytes() -> None:
    assert BuildOptions().workspace_bytes is None
    assert BuildOptions(workspace_mib=3).workspace_bytes == 3 << 20
    assert BuildOptions(workspace_mib=(1 << 43) - 1).workspace_bytes < 1 << 63  # what TensorRT takes


@pytest.mark.parametrize(
    ("target", "missing", "mends"),
    [
        ("tensorrt", ("tensorrt",), "pip install 'mara-deploy[tensorrt]'"),
        ("tensorrt", ("tensorrt",), FOR_CUDA_12),
        ("tensorrt", ("tensorrt",), "JetPack"),
        ("tensorrt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "pip install tensorrt-rtx-cu13-libs"),
        ("tensorrt-rtx", ("onnx",), "pip install onnx"),
    ],
)
def test_without_the_packages_it_says_which(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    missing: tuple[str, ...],
    mends: str,
) -> None:
    monkeypatch.delattr(
        "mara_export.tensorrt.network", raising=False
    )  # if it was imported before, it holds what it needs
    monkeypatch.delitem(sys.modules, "mara_export.tensorrt.network", raising=False)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert mends in (why_cannot_build(target) or "")
    assert mends in refused(capsys, folder, "--target", target)


def test_a_target_without_engines() -> None:
    assert "tensorrt, tensorrt-rtx" in (why_cannot_build("cuda") or "")


class NoDriver(types.ModuleType):
    """TensorRT for RTX where its library does not start: the bindings turn a builder that is none into a TypeError."""

    __version__ = "1.7.1"

    class ILogger:
        class Severity(enum.IntEnum):
            INTERNAL_ERROR = 0
            ERROR = 1

    def __init__(self, says: str) -> None:
        super().__init__("tensorrt_rtx")
        self._says = says

    def Builder(self, logger: Any) -> None:
        if self._says:
            logger.log(self.ILogger.Severity.ERROR, self._says)
        raise TypeError("pybind11::init(): factory function returned nullptr")


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("CUDA initialization failure with error: 35\n", "CUDA initialization failure with error: 35"),
        ("", "pybind11::init(): factory function returned nullptr"),
    ],
    ids=["a reason", "no reason"],
)
def test_a_builder_that_does_not_start(folder: Path, says: str, told: str) -> None:
    with pytest.raises(EngineError) as caught:
        Network(NoDriver(says), folder / "step.onnx", 64)
    assert str(caught.value) == f"TensorRT for RTX 1.7.1 does not start here: {told}"
