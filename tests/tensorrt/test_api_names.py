"""Every name of TensorRT and CUDA that our code uses is there, with these arguments, in the releases that it is for.

Read from NVIDIA's own Python packages. Those of TensorRT import without a GPU and without TensorRT once there are
libraries of its names, which need not do anything: tests/tensorrt/stub.c. TensorRT for RTX and the newest cuda-bindings
are part of the environment; `make test-long` installs the packages of older releases, each in a folder of its own.
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

from mara_runtime.engines import trt_file
from tests.double import cuda as cuda_double
from tests.double import trt as trt_double
from tests.tensorrt import names
from tests.tensorrt.names import Released, Use

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="NVIDIA's wheels are for Linux on x86-64"
)
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = Path(sys.prefix)
RECEIVERS: dict[str, dict[str, str]] = {
    "runtime/mara_runtime/engines/tensorrt.py": {},
    "runtime/mara_runtime/engines/trt_file.py": {"_runtime": "Runtime", "engine": "ICudaEngine"},
    "runtime/mara_runtime/engines/trt_plan.py": {
        "_engine": "ICudaEngine",
        "context": "IExecutionContext",
        "config": "IRuntimeConfig",
        "kernels": "IRuntimeCache",
        "_kernels": "IRuntimeCache",
    },
    "export/mara_export/tensorrt/network.py": {
        "_builder": "Builder",
        "network": "INetworkDefinition",
        "_parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "layer": "IAttentionInputLayer",  # the base class, where it is any layer
        "attention": "IAttention",
        "tensor": "ITensor",
        "error": "ParserError",
    },
    "export/mara_export/tensorrt/build.py": {"config": "IBuilderConfig"},
    "export/mara_export/tensorrt/timings.py": {"config": "IBuilderConfig", "cache": "ITimingCache"},
}
"""Of each file that uses TensorRT: the class of what methods are called on, by its name in the code."""
CUDA_FILES = ("runtime/mara_runtime/engines/cuda.py", "export/mara_export/tensorrt/build.py")
RELEASES = {"10.3": "10", "10.13": "10", "10.16": "10", "11.4": "11"}
"""Of JetPack 6, 7.1 and 7.2, and the newest; and the number behind their libraries' names."""
NEWEST_PYTHON = {"10.3": (3, 12), "10.13": (3, 13), "10.16": (3, 13)}
"""For which there is a package of an older release."""
ONLY = {
    "ComputeCapability": ("rtx",),
    "IBuilderConfig.num_compute_capabilities": ("rtx",),
    "IBuilderConfig.set_compute_capability": ("rtx",),
    "DynamicShapesKernelSpecializationStrategy": ("rtx",),
    "ICudaEngine.create_runtime_config": ("10.13", "10.16", "11.4", "rtx"),
    "IRuntimeConfig": ("10.13", "10.16", "11.4", "rtx"),
    "IRuntimeConfig.create_runtime_cache": ("rtx",),
    "IRuntimeConfig.set_runtime_cache": ("rtx",),
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": ("rtx",),
    "IRuntimeCache": ("rtx",),
    "IAttentionInputLayer": ("10.16", "11.4", "rtx"),
    "IAttention": ("10.16", "11.4", "rtx"),
}
"""What the code uses for some releases alone; the others do not have it."""


def folder(name: str) -> Path:
    path = FOLDERS / name
    assert path.is_dir(), f"{path} is missing: run make test-long, which installs NVIDIA's Python packages there"
    return path


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT's names."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler (cc) to make stub libraries with")
    path = tmp_path_factory.mktemp("libraries")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", path / "stub.so", Path(__file__).with_name("stub.c")], check=True
    )
    for number in set(RELEASES.values()):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            (path / f"lib{name}.so.{number}").symlink_to("stub.so")
    return path


@pytest.fixture(scope="module", params=[*(pytest.param(name, marks=pytest.mark.long) for name in RELEASES), "rtx"])
def tensorrt(request: pytest.FixtureRequest, libraries: Path) -> Released:
    """One release of TensorRT, or TensorRT for RTX."""
    if request.param == "rtx":
        return names.released("tensorrt_rtx_bindings", [])
    newest = NEWEST_PYTHON.get(request.param, sys.version_info[:2])
    if sys.version_info[:2] > newest:
        pytest.skip(f"TensorRT {request.param} has no package for a Python after {'.'.join(map(str, newest))}")
    found = names.released("tensorrt_bindings", [folder(f"tensorrt-{request.param}")], libraries)
    assert found.version.startswith(request.param)
    return found


@pytest.fixture(scope="module", params=[pytest.param("12.9", marks=pytest.mark.long), "installed"])
def cuda(request: pytest.FixtureRequest) -> Released:
    """cuda-bindings: the line of CUDA 12, as on JetPack 6, and the one that is installed."""
    folders = [] if request.param == "installed" else [folder(f"cuda-bindings-{request.param}")]
    return names.released("cuda.bindings.runtime", folders)


def name_of(there: Released) -> str:
    """Of a release, as ONLY has it."""
    return "rtx" if "ComputeCapability" in there.names else next(r for r in RELEASES if there.version.startswith(r))


def only(use: Use) -> tuple[str, ...] | None:
    """The releases that a name is for, if it is not for all."""
    found = [name for name in ONLY if f"{use.name}.".startswith(f"{name}.")]
    return ONLY[max(found, key=len)] if found else None


def tensorrt_uses() -> list[Use]:
    return [use for file, of in RECEIVERS.items() for use in names.tensorrt_uses(ROOT / file, of)]


def cuda_uses() -> list[Use]:
    return [use for file in CUDA_FILES for use in names.cuda_uses(ROOT / file)]


def missing(uses: list[Use], there: Released) -> str:
    return "\n".join(f"{use.where} uses {use.name}" for use in uses if use.name not in there.names)


def misused(uses: list[Use], there: Released) -> str:
    """Calls that the release would refuse."""
    calls = [use for use in uses if use.positional is not None and use.name in there.names]
    return "\n".join(
        f"{use.where} calls {use.name} with {use.positional} arguments and {set(use.keywords) or 'no'} keywords: "
        f"{there.signatures(use.name)}"
        for use in calls
        if not names.fits(use, there.signatures(use.name))
    )


def test_every_name_of_tensorrt_exists(tensorrt: Released) -> None:
    release = name_of(tensorrt)
    uses = [u for u in tensorrt_uses() if not u.optional and release in (only(u) or (release,))]
    assert len(uses) > 80
    assert missing(uses, tensorrt) == ""


def test_every_call_of_tensorrt_has_the_arguments_that_it_takes(tensorrt: Released) -> None:
    assert misused(tensorrt_uses(), tensorrt) == ""


def test_what_is_for_some_releases_alone_is_not_in_the_others(tensorrt: Released) -> None:
    # … or the table has become wrong
    release = name_of(tensorrt)
    assert [name for name in ONLY if name in tensorrt.names] == [n for n, of in ONLY.items() if release in of]


def test_what_is_derived_from_tensorrt_has_the_parameters_that_it_is_called_with(tensorrt: Released) -> None:
    found = [override for file in RECEIVERS for override in names.overrides(ROOT / file)]
    assert len(found) > 5
    own = [(of, method) for of, method, *_ in found if f"{of}.{method}" not in tensorrt.names]
    assert own == [("IErrorRecorder", "text")]
    for of, method, parameters, where in found:
        if (of, method) not in own:
            expected = tensorrt.signatures(f"{of}.{method}")
            assert len(parameters) in [len(overload) for overload in expected], f"{where}: {method} takes {expected}"


def test_every_type_of_the_step_graph_s_tensors_is_known(tensorrt: Released) -> None:
    assert [name for name in trt_file.TYPES.values() if f"DataType.{name}" not in tensorrt.names] == []


def test_no_use_of_tensorrt_goes_unseen(tensorrt: Released) -> None:
    """Whatever is called like a method of a class that the code uses is known to be one, or to be ours."""
    classes = {of for receivers in RECEIVERS.values() for of in receivers.values()}
    members = {name.partition(".")[2] for name in tensorrt.names if name.partition(".")[0] in classes}
    members = {name for name in members if "_" in name.strip("_")}
    for file, receivers in RECEIVERS.items():
        seen = {(use.where, use.name.rpartition(".")[2]) for use in names.tensorrt_uses(ROOT / file, receivers)}
        unseen = {(where, chain[-1]) for chain, where in names.attributes(ROOT / file) if chain[-1] in members} - seen
        assert {name for _, name in unseen} <= {"num_layers"}, unseen  # of ModelShape


def test_every_name_of_cuda_exists(cuda: Released) -> None:
    uses = cuda_uses()
    assert len({use.name for use in uses}) > 25
    assert missing(uses, cuda) == ""


def test_every_call_of_cuda_has_the_arguments_that_it_takes(cuda: Released) -> None:
    assert misused(cuda_uses(), cuda) == ""


# ── the double ───────────────────────────────────────────────────────────────────────────────────────────────────────


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_double_of_tensorrt_takes_the_real_arguments(tensorrt: Released) -> None:
    compared = 0
    for use in tensorrt_uses():
        of, _, method = use.name.rpartition(".")
        stands_for = getattr(trt_double, of, None) if of else None
        function = vars(stands_for).get(method) if isinstance(stands_for, type) else None
        if inspect.isfunction(function) and use.name in tensorrt.names and method != "__init__":
            overloads = [[name for name, _ in overload] for overload in tensorrt.signatures(use.name)]
            assert parameters(function) in overloads, use.name
            compared += 1
    assert compared > 10


def test_the_double_of_cuda_takes_the_real_arguments(cuda: Released) -> None:
    methods = {n: f for n, f in vars(cuda_double.CudaDouble).items() if n.startswith("cuda") and inspect.isfunction(f)}
    assert {use.name for use in cuda_uses() if use.positional is not None} <= set(methods)
    for name, function in methods.items():
        assert [parameters(function)] == [[n for n, _ in overload] for overload in cuda.signatures(name)], name


# ── the reader of our code ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_that_is_not_there_is_found(tmp_path: Path, tensorrt: Released) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        "kinds = trt.DataType\n"
        "kinds.FLAOT, self._trt.TensorIOMode.INPUT, getattr(trt.BuilderFlag, 'DIRECT_I')\n"
        "if hasattr(self._engine, 'fly'): self._engine.fly()\n"
        "self._engine.get_tensor_shapes('x')\n"
        "self._engine.get_tensor_shape('x', 1)\n"
        "context.set_device_memory(1, sice=2)\n"
        "context.set_device_memory(1, size=2)\n",
        encoding="utf-8",
    )
    uses = names.tensorrt_uses(path, RECEIVERS["runtime/mara_runtime/engines/trt_plan.py"])
    lost = missing([use for use in uses if not use.optional], tensorrt).splitlines()
    assert sorted(line.rpartition(" ")[2] for line in lost) == [
        "BuilderFlag.DIRECT_I",
        "DataType.FLAOT",
        "ICudaEngine.get_tensor_shapes",
    ]
    assert [line.split()[0] for line in misused(uses, tensorrt).splitlines()] == ["code.py:5", "code.py:6"]
