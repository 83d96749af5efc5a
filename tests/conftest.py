"""For all tests: cores shared among the workers of pytest-xdist, and a cache folder of their own."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Give each worker cores of its own: PyTorch and ONNX Runtime start a thread on each core that they see.

    Ctrl-C reaches what the tests start, even where a shell started them in the background, and so without it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        if own := cores[int(worker.removeprefix("gw")) :: workers]:
            os.sched_setaffinity(0, own)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this session: tests and the processes they start do not touch the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
