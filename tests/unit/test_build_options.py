"""`BuildOptions`, and what mara-build refuses before TensorRT has a say: one line and exit code 2."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands.build import main
from mara_export.build import BuildOptions, why_cannot_build
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.tensors import spare_slots
from tests.unit import helpers

CONTEXT, CANDIDATES = 200, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle that mara-build can open and not use: its graph is for ONNX Runtime."""
    return helpers.make_bundle(tmp_path / "bundle", max_context=CONTEXT, max_candidates=CANDIDATES)


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"capacities": (64, 0)}, "--capacity"),
        ({"hardware": "all"}, "--hardware"),
        ({"workspace_bytes": 0}, "--workspace"),
        ({"optimisation_level": -1}, "--optimisation-level"),
        ({"optimisation_level": 6}, "--optimisation-level"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(option: dict[str, Any], flag: str) -> None:
    with pytest.raises(OptionError, match=f"^{flag} is "):
        BuildOptions(**option)


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
    with pytest.raises(OptionError, match="--capacity is 201; the bundle was exported for 200 tokens"):
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--target"),
        (["--target", "cpu"], "'tensorrt', 'tensorrt-rtx'"),
        (["--target", "tensorrt", "--capacity", "many"], "--capacity"),
        (["--target", "tensorrt", "--capacity", "64,"], "--capacity"),
        (["--target", "tensorrt", "--capacity", "-1"], "--capacity"),
        (["--target", "tensorrt", "--workspace", "0"], "--workspace"),
        (["--target", "tensorrt", "--hardware", "all"], "--hardware"),
        (["--target", "tensorrt", "--optimisation-level", "9"], "--optimisation-level"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    before = sorted(folder.rglob("*"))
    assert says in refused(capsys, folder, *arguments)
    assert sorted(folder.rglob("*")) == before


def test_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a bundle" in refused(capsys, tmp_path, "--target", "tensorrt-rtx")
    assert "there is no bundle" in refused(capsys, tmp_path / "nothing", "--target", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("target", "missing", "mends"),
    [
        ("tensorrt", ("tensorrt",), "pip install tensorrt"),
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
    monkeypatch.delattr("mara_export.trt", raising=False)  # if it was imported before, it holds what it needs
    monkeypatch.delitem(sys.modules, "mara_export.trt", raising=False)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert mends in (why_cannot_build(target) or "")
    assert mends in refused(capsys, folder, "--target", target)


def test_a_target_that_is_none() -> None:
    assert why_cannot_build("cuda") == "it is not one of tensorrt, tensorrt-rtx"
