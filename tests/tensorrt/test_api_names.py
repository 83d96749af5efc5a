"""Every name of TensorRT and CUDA that our code uses is there, with these arguments, in the releases that it is for.

Read from NVIDIA's own Python packages. Those of TensorRT import without a GPU and without TensorRT once there are
libraries of its names, which need not do anything: tests/tensorrt/stub.c. `make setup` installs the packages, each in a
folder of its own.
"""

from __future__ import annotations

import inspect
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import trt_plan
from tests import double
from tests.double import cuda as cuda_double
from tests.double import trt as trt_double
from tests.tensorrt import names
from tests.tensorrt.names import Released, Use

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="NVIDIA's wheels are for Linux on x86-64"
)
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = Path(sys.prefix)
RECEIVERS = {
    "runtime/mara_runtime/trt_engine.py": {},
    "runtime/mara_runtime/trt_plan.py": {
        "_runtime": "Runtime",
        "_engine": "ICudaEngine",
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
    },
    "export/mara_export/trt.py": {
        "_builder": "Builder",
        "network": "INetworkDefinition",
        "_parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "layer": "ILayer",
        "tensor": "ITensor",
        "attention": "IAttention",
        "error": "IParserError",
    },
    "export/mara_export/build.py": {"config": "IBuilderConfig", "timings": "ITimingCache"},
}
"""Of each file that uses TensorRT: the class of what methods are called on, by its name in the code."""
CUDA_FILES = ("runtime/mara_runtime/cuda.py", "export/mara_export/build.py")
OURS = {"attentions"}
TENSORRT = {"10.16": "10", "11.4": "11"}
"""Releases, and the number behind their libraries' names."""
ONLY_RTX = {"ComputeCapability", "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability"}
"""What the code uses for TensorRT for RTX alone; the other releases do not have it."""


def folder(name: str) -> Path:
    path = FOLDERS / name
    assert path.is_dir(), f"{path} is missing: run make setup, which installs NVIDIA's Python packages there"
    return path


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT's names."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to make stub libraries with")
    path = tmp_path_factory.mktemp("libraries")
    source = Path(__file__).with_name("stub.c")
    for number in TENSORRT.values():
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            library = path / f"lib{name}.so.{number}"
            subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return path


@pytest.fixture(scope="module", params=[*TENSORRT, "rtx"])
def tensorrt(request: pytest.FixtureRequest, libraries: Path) -> Released:
    """One release of TensorRT, or TensorRT for RTX."""
    if request.param == "rtx":
        return names.released("tensorrt_rtx_bindings", [])
    found = names.released("tensorrt_bindings", [folder(f"tensorrt-{request.param}")], libraries)
    assert found.version.startswith(request.param)
    return found


@pytest.fixture(scope="module", params=["12.9", "installed"])
def cuda(request: pytest.FixtureRequest) -> Released:
    """cuda-bindings: the oldest line that is supported, and the one that is installed."""
    folders = [] if request.param == "installed" else [folder(f"cuda-bindings-{request.param}")]
    return names.released("cuda.bindings.runtime", folders)


def tensorrt_uses() -> list[Use]:
    return [use for file, of in RECEIVERS.items() for use in names.tensorrt_uses(ROOT / file, of)]


def cuda_uses() -> list[Use]:
    return [use for file in CUDA_FILES for use in names.cuda_uses(ROOT / file)]


def missing(uses: list[Use], there: Released) -> list[str]:
    return [f"{use.where} uses {use.name}" for use in uses if use.name not in there.names]


def misused(uses: list[Use], there: Released) -> list[str]:
    """Calls that the release would refuse."""
    calls = [use for use in uses if use.positional is not None and use.name in there.names]
    return [
        f"{use.where} calls {use.name} with {use.positional} arguments and {set(use.keywords) or 'no'} keywords: "
        f"{there.signatures(use.name)}"
        for use in calls
        if not names.fits(use, there.signatures(use.name))
    ]


def is_rtx(there: Released) -> bool:
    return "ComputeCapability" in there.names


def test_every_name_of_tensorrt_exists(tensorrt: Released) -> None:
    uses = [u for u in tensorrt_uses() if not u.optional and (is_rtx(tensorrt) or not only_rtx(u))]
    assert len(uses) > 40
    assert missing(uses, tensorrt) == []


def only_rtx(use: Use) -> bool:
    return any(use.name == name or use.name.startswith(f"{name}.") for name in ONLY_RTX)


def test_every_call_of_tensorrt_has_the_arguments_that_it_takes(tensorrt: Released) -> None:
    assert misused(tensorrt_uses(), tensorrt) == []


def test_what_is_for_rtx_alone_is_in_no_other(tensorrt: Released) -> None:
    assert {name for name in ONLY_RTX if name in tensorrt.names} == (ONLY_RTX if is_rtx(tensorrt) else set())
    assert {name for name in ONLY_RTX if any(only_rtx(u) for u in tensorrt_uses())} == ONLY_RTX
