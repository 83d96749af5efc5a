"""runtime/jetson: the Dockerfiles install what the package needs on JetPack. Nothing here needs a Jetson."""

from __future__ import annotations

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
PROJECT = tomllib.loads(PYPROJECT)
DOCKERFILES = {
    # file: cuda-bindings for its CUDA; 12.8 is the last without a CUDA runtime that JetPack 6's driver refuses
    "Dockerfile.jetpack6": "==12.8.*",
    "Dockerfile.jetpack7": "==13.2.*",
}
ARM_WHEELS = {"cuda-bindings": ("12.8.0", "13.2.0"), "numpy": ("1.26.4",)}
"""Versions that PyPI has for arm64 and the boards' Python (November 2026)."""


def instructions(name: str) -> list[tuple[str, str]]:
    """(keyword, arguments), continued lines joined, comments left out."""
    lines = (ROOT / "runtime" / "jetson" / name).read_text(encoding="utf-8").splitlines()
    joined = re.sub(r"\\\n\s*", "", "\n".join(line for line in lines if not line.startswith("#")))
    return [(keyword, rest) for keyword, _, rest in (line.partition(" ") for line in joined.splitlines()) if keyword]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_gets_all_that_the_package_is_built_from(name: str) -> None:
    copied = {word for keyword, rest in instructions(name) if keyword == "COPY" for word in rest.split()[:-1]}
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert copied == needed | {Path(package).parts[0] for package in packages}
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_pins_exist_for_arm_and_are_within_our_bounds(name: str) -> None:
    (line,) = [rest for _, rest in instructions(name) if "pip install" in rest]
    words = shlex.split(line.partition("pip install")[2].partition("&&")[0])
    pins = {r.name: r.specifier for r in map(Requirement, (w for w in words if re.match(r"\w[\w-]*[=<>]", w)))}
    assert str(pins["cuda-bindings"]) == DOCKERFILES[name]
    extra = [*PROJECT["project"]["optional-dependencies"]["tensorrt"], *PROJECT["project"]["dependencies"]]
    allowed = {r.name: r.specifier for r in map(Requirement, extra)}
    for package, pin in pins.items():
        assert any(version in pin and version in allowed[package] for version in ARM_WHEELS[package]), package


def test_on_arm_tensorrt_comes_with_jetpack() -> None:
    jetson = {"platform_machine": "aarch64", "sys_platform": "linux"}
    extra = map(Requirement, PROJECT["project"]["optional-dependencies"]["tensorrt"])
    installed = {r.name for r in extra if r.marker is None or r.marker.evaluate(jetson)}
    assert installed == {"cuda-bindings", "onnx"}


def test_packages_for_cuda_12_are_the_same_everywhere() -> None:
    for text in (cuda.FOR_CUDA_12, trt_engine.INSTALL["tensorrt"], PYPROJECT):
        for package in ("tensorrt-cu12", "cuda-bindings<13", f"cuda-bindings{DOCKERFILES['Dockerfile.jetpack6']}"):
            assert package in text
