"""runtime/jetson: the Dockerfiles install what the package needs on JetPack. Nothing here needs a Jetson."""

import re
import shlex
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

from mara_runtime.engines import cuda
from mara_runtime.engines import tensorrt as trt_engine

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
PACKAGES = tomllib.loads(PYPROJECT)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
CUDA_BINDINGS = {"Dockerfile.jetpack6": "12.8", "Dockerfile.jetpack7": "13.2"}
"""For each image's CUDA; 12.8 is the last without a CUDA runtime that JetPack 6's driver refuses."""
ARM_WHEELS = {"cuda-bindings": ("12.8.0", "13.2.0"), "numpy": ("1.26.4",)}
"""Versions that PyPI has for arm64 and the boards' Python (November 2026)."""


@pytest.mark.parametrize("name", CUDA_BINDINGS)
def test_an_image_has_the_sources_and_pins_that_exist_for_arm(name: str) -> None:
    lines = (ROOT / "runtime" / "jetson" / name).read_text(encoding="utf-8").splitlines()
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in lines if not line.startswith("#"))).splitlines()
    copied = {word for line in joined if line.startswith("COPY ") for word in line.split()[1:-1]}
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert copied == needed | {Path(package).parts[0] for package in PACKAGES}

    (command,) = [line.partition("pip install")[2].partition("&&")[0] for line in joined if "pip install" in line]
    pinned = [Requirement(word) for word in shlex.split(command) if re.match(r"\w[\w-]*[=<>]", word)]
    pins = {requirement.name: requirement.specifier for requirement in pinned}
    assert str(pins["cuda-bindings"]) == f"=={CUDA_BINDINGS[name]}.*"
    extra = map(Requirement, [*PROJECT["optional-dependencies"]["tensorrt"], *PROJECT["dependencies"]])
    allowed = {requirement.name: requirement.specifier for requirement in extra}
    for package, pin in pins.items():
        assert any(version in pin and version in allowed[package] for version in ARM_WHEELS[package]), package


def test_on_arm_tensorrt_comes_with_jetpack() -> None:
    jetson = {"platform_machine": "aarch64", "sys_platform": "linux"}
    extra = map(Requirement, PROJECT["optional-dependencies"]["tensorrt"])
    installed = {r.name for r in extra if r.marker is None or r.marker.evaluate(jetson)}
    assert installed == {"cuda-bindings", "onnx"}


def test_packages_for_cuda_12_are_the_same_everywhere() -> None:
    for text in (cuda.FOR_CUDA_12, trt_engine.INSTALL["tensorrt"], PYPROJECT):
        for package in (
            "tensorrt-cu12",
            "cuda-bindings<13",
            f"cuda-bindings=={CUDA_BINDINGS['Dockerfile.jetpack6']}.*",
        ):
            assert package in text
