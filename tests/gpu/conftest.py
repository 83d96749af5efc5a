"""What only a GPU can show. Without one, each test is skipped with what was looked for and not found.

benchmarks/first_gpu.py runs them with MARA_GPU_BUNDLE, a bundle. Without it, a tiny model is exported and its engine
built, which needs PyTorch.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.board import NoBoard, find
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda, open_engine
from mara_runtime.engines.base import Engine
from mara_runtime.engines.ort import PROVIDERS
from mara_runtime.engines.ort_cuda import CudaEngine

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = "cuda, graphs"
"""The target cuda, with recurring passes as CUDA graphs."""
TARGETS = ("tensorrt", "tensorrt-rtx", "cuda", GRAPHS)


def why_not(target: str) -> str | None:
    """Why nothing can be run on `target` here, or None."""
    try:
        find()
    except NoBoard as error:
        return f"no NVIDIA GPU here: {error}"
    if not target.startswith("cuda"):
        from mara_export.tensorrt.build import why_cannot_build

        return why_cannot_build(target) or cuda.why_not()
    try:
        import onnxruntime
    except ImportError as error:
        return f"ONNX Runtime cannot be imported: {error}"
    available = onnxruntime.get_available_providers()
    if PROVIDERS["cuda"] not in available:
        return f"this ONNX Runtime has no {PROVIDERS['cuda']} (it has {', '.join(available)})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """A target that runs here."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def _told(request: pytest.FixtureRequest, record_property: Callable[[str, str], None]) -> None:
    """In --junitxml, which target a test ran on: benchmarks/first_gpu.py counts them."""
    if "target" in request.fixturenames:
        record_property("target", request.getfixturevalue("target"))


@pytest.fixture(scope="session")
def bundle(target: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A real model for the target, float16, with its engine."""
    given, name = os.environ.get("MARA_GPU_BUNDLE"), target.split(",")[0]
    if given is None:
        pytest.importorskip("torch", reason="without MARA_GPU_BUNDLE a bundle is exported here, which needs PyTorch")
        return exported(name, tmp_path_factory.mktemp("gpu"))
    bundle = Bundle.open(given)
    if name not in bundle.manifest.targets:
        pytest.skip(f"{given} is not for {name}")
    return bundle


@pytest.fixture
def engine(bundle: Bundle, target: str) -> Iterator[Engine]:
    """The target's engine on the real model, new."""
    engine = open_on(target, bundle)
    yield engine
    close(engine)


def open_on(target: str, bundle: Bundle) -> Engine:
    """The target's engine."""
    return CudaEngine(bundle, graphs=True) if target == GRAPHS else open_engine(bundle, target)[0]


def close(engine: Engine) -> None:
    """Give the device's memory back now, where an engine can."""
    if hasattr(engine, "close"):
        engine.close()


def exported(target: str, folder: Path) -> Bundle:
    """A tiny random model's bundle for the target."""

    def run(*command: object) -> None:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)

    model, out = folder / "model", folder / "bundle"
    run("benchmarks/shape.py", "tiny", model)
    source = ("--model", model / "checkpoint", "--agent", model / "agent.safetensors")
    options = ("--target", target, "--precision", "fp16", "--max-context", 512, "--out", out, "--quiet")
    if target == "cuda":
        run("-m", "mara_deploy.commands.export", *source, *options)
        return Bundle.open(out)
    run("-m", "mara_deploy.commands.export", *source, *options, "--no-build")
    run("-m", "mara_deploy.commands.build", out, "--target", target, "--capacity", 128, "--quiet")
    return Bundle.open(out)
