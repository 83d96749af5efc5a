"""The names of TensorRT and CUDA that our code and its doubles use exist in the releases that they are for.

Read from NVIDIA's own Python packages. Those of TensorRT import without a GPU and without TensorRT once there are
libraries of its names, which need not do anything (tests/tensorrt/stub.c). TensorRT for RTX and the newest
cuda-bindings are part of the environment; `make test-long` installs older releases, each in a folder of its own.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.engines import trt_file
from tests.double import cuda as cuda_double
from tests.double import trt as trt_double
from tests.unit import test_timings

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="NVIDIA's wheels are for Linux on x86-64"
)
ROOT = Path(__file__).resolve().parents[2]
RUNTIME, EXPORT = "runtime/mara_runtime/engines", "export/mara_export/tensorrt"
CALLERS = [f"{RUNTIME}/{name}.py" for name in ("trt_file", "trt_plan", "tensorrt")]
CALLERS += [f"{EXPORT}/{name}.py" for name in ("network", "build", "timings")]
OBJECTS = (
    "trt|context|_?engine|_runtime|modes|kinds|config|profile|_builder|_parser|network|layer|attention|error|cache"
)
"""What the callers name objects of TensorRT."""
OURS = {
    "build", "check_in_place", "config", "get", "kinds", "places", "settle", "size_bytes", "strerror", "turn",
    "weight_bytes", "wide_weight_bytes",
}  # fmt: skip
"""Attributes of objects that are named like one of TensorRT's and are not."""
RTX = {
    "ComputeCapability", "num_compute_capabilities", "set_compute_capability", "create_runtime_cache",
    "set_runtime_cache", "EAGER", "LAZY",
    "dynamic_shapes_kernel_specialization_strategy", "REQUIRE_USER_ALLOCATION",
}  # fmt: skip
DOUBLES = ("tests.double.trt", "tests.double.trt_context", "tests.unit.test_timings")
RTX_CLASSES = {"IRuntimeCache", "DynamicShapesKernelSpecializationStrategy"}
FUSED = {"IAttentionInputLayer", "attention", "get_aliased_input_tensor"}
CONFIG = {"create_runtime_config", "set_execution_context_allocation_strategy"}
MISSING = {"10.3": RTX | FUSED | CONFIG, "10.13": RTX | FUSED, "10.16": RTX, "11.4": RTX, "rtx": set[str]()}
"""{release: attributes that the code uses with later releases or TensorRT for RTX alone}: those of JetPack 6, 7.1 and
7.2, and the newest."""
NEWEST_PYTHON = {"10.3": (3, 12), "10.13": (3, 13), "10.16": (3, 13)}
"""For which there is a package of an older release."""

LIST = """
import importlib, json, sys
found = {}
def visit(value, path):
    for name in dir(value):
        item = getattr(value, name)
        found[".".join([*path, name])] = (item.__doc__ or "") if callable(item) else ""
        if isinstance(item, type) and len(path) < 3 and not name.startswith("_"):
            visit(item, [*path, name])
visit(importlib.import_module(sys.argv[1]), [])
print(json.dumps(found))
"""
Names = dict[str, str]
"""{dotted name: documentation, for what can be called}"""


def released(module: str, folder: str | None = None, libraries: Path | None = None) -> Names:
    """The names of a module, imported in a process of its own. folder: of .venv; comes first on its path."""
    environment = dict(os.environ)
    if folder:
        path = Path(sys.prefix) / folder
        assert path.is_dir(), f"{path} is missing: run make test-long, which installs NVIDIA's Python packages there"
        environment["PYTHONPATH"] = str(path)
    if libraries:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-c", LIST, module]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr
    return dict(json.loads(out.stdout))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT's names."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to make stub libraries with")
    path = tmp_path_factory.mktemp("libraries")
    source = Path(__file__).with_name("stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path / "stub.so", source], check=True)
    for number in ("10", "11"):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            (path / f"lib{name}.so.{number}").symlink_to("stub.so")
    return path


@pytest.fixture(
    scope="module", params=[*(pytest.param(r, marks=pytest.mark.long) for r in MISSING if r != "rtx"), "rtx"]
)
def tensorrt(request: pytest.FixtureRequest) -> tuple[str, Names]:
    """A release of TensorRT, or TensorRT for RTX."""
    release: str = request.param
    if release == "rtx":
        return release, released("tensorrt_rtx_bindings")
    newest = NEWEST_PYTHON.get(release, sys.version_info[:2])
    if sys.version_info[:2] > newest:
        pytest.skip(f"TensorRT {release} has no package for a Python after {'.'.join(map(str, newest))}")
    libraries = request.getfixturevalue("libraries")
    return release, released("tensorrt_bindings", f"tensorrt-{release}", libraries)


@pytest.fixture(scope="module", params=[pytest.param("cuda-bindings-12.9", marks=pytest.mark.long), None])
def cuda(request: pytest.FixtureRequest) -> Names:
    """cuda-bindings: of CUDA 12, as on JetPack 6, and as installed."""
    return released("cuda.bindings.runtime", request.param)


def code(file: str) -> str:
    return re.sub(r'"""[\s\S]*?"""|#.*', "", (ROOT / file).read_text(encoding="utf-8"))


def attributes() -> set[str]:
    """What our code looks up on objects that are named like TensorRT's, in chains of two at most."""
    chain = re.compile(rf"\b(?:{OBJECTS})\.(\w+)(?:\.(\w+))?")
    found = {name for file in CALLERS for match in chain.finditer(code(file)) for name in match.groups() if name}
    return found - OURS


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def overloads(names: Names, dotted: str) -> list[list[str]]:
    """Parameters without self, as the docstrings of pybind11 and Cython begin with them."""
    found = []
    for text in re.findall(rf"^(?:\d+\. )?{dotted.split('.')[-1]}\((.*)\)(?: -> .*)?$", names[dotted], re.MULTILINE):
        while (shorter := re.sub(r"[\[(<{][^][(){}<>]*[])>}]", "", text)) != text:
            text = shorter
        parts = [part.partition("=")[0].partition(":")[0].split()[-1] for part in text.split(",") if part.strip()]
        found.append([part for part in parts if part != "self"])
    return found


def test_the_code_uses_no_name_of_tensorrt_that_a_release_lacks(tensorrt: tuple[str, Names]) -> None:
    release, names = tensorrt
    members = {part for name in names for part in name.split(".")}
    assert len(attributes()) > 70
    assert attributes() - members == MISSING[release]
    assert [name for name in trt_file.TYPES.values() if f"DataType.{name}" not in names] == []


def test_the_double_of_tensorrt_is_called_like_each_release(tensorrt: tuple[str, Names]) -> None:
    release, names = tensorrt
    doubles = {**vars(trt_double), "IBuilderConfig": test_timings.Config, "ITimingCache": test_timings.Cache}
    of_double = {"numpy_type", "bounds", "in_place", "build"}
    compared = 0
    for name, double in doubles.items():
        if not isinstance(double, type) or double.__module__ not in DOUBLES:
            continue
        if name == "TrtDouble" or (release != "rtx" and name in RTX_CLASSES):
            continue
        for method, function in vars(double).items():
            dotted = f"{name}.{method}"
            if method.startswith("_") or method in of_double | MISSING[release]:
                continue
            if inspect.isfunction(function) and (dotted in names or not method.startswith(("is_", "get_aliased"))):
                assert parameters(function) in overloads(names, dotted), dotted
                compared += 1
    assert compared > 15


def test_cuda_has_the_names_that_the_code_uses_and_its_double_is_called_alike(cuda: Names) -> None:
    used = set(re.findall(r"\bcuda[A-Z]\w+", code(f"{RUNTIME}/cuda.py")))
    members = {part for name in cuda for part in name.split(".")}
    assert len(used) > 25
    assert used - members == set()
    doubles = {name for name, value in vars(cuda_double.CudaDouble).items() if inspect.isfunction(value)}
    for name in (name for name in doubles if name.startswith("cuda")):
        assert [parameters(getattr(cuda_double.CudaDouble, name))] == overloads(cuda, name), name
