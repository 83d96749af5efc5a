"""Which engine `auto` opens: where a CUDA provider opens and cannot compute, the CPU's, which records why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda.fake import FakeCuda

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("lacks", "why"),
    [
        ({"without": "cudnn"}, "cuDNN is unavailable"),
        ({"no_kernels": True}, "no kernel image is available"),
        ({"without": "cublas"}, "CUDA or cuDNN is missing"),
    ],
    ids=str,
)
def test_auto_falls_back_to_the_cpu(fake: FakeCuda, bundle: Callable[[str, str], Path], lacks, why: str) -> None:
    said = fake.run(87, "tests.cuda.child", "opening", str(bundle("demo", "fp16")), **lacks).said
    assert said["engine"] == "cpu"
    assert why in said["declined"]["cuda"]
    assert "pip install" in said["declined"]["cuda"]
    assert "\n" not in said["declined"]["cuda"]


def test_auto_takes_the_gpu_where_nothing_lacks(fake: FakeCuda, bundle: Callable[[str, str], Path]) -> None:
    said = fake.run(87, "tests.cuda.child", "opening", str(bundle("demo", "fp16"))).said
    assert said["engine"] == "cuda"


def test_the_libraries_of_nvidias_packages_are_found(fake: FakeCuda, bundle: Callable[[str, str], Path]) -> None:
    """Where pip puts them, which is on no search path."""
    said = fake.run(87, "tests.cuda.child", "opening", str(bundle("demo", "fp16")), packages=True).said
    assert said["engine"] == "cuda"


def test_an_answer_is_decoded(fake: FakeCuda, bundle: Callable[[str, str], Path]) -> None:
    """From the calibration of passes to the text."""
    said = fake.run(87, "tests.cuda.child", "answer", str(bundle("demo", "fp16"))).said
    assert said["token_ids"]
    assert said["stats"]["decisions"] > 0
    assert said["stats"]["engine"]["name"] == "cuda"
