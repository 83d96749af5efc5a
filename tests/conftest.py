"""The cores of the machine, shared among the workers of pytest-xdist."""

import os


def pytest_configure() -> None:
    """Give each worker cores of its own: PyTorch and ONNX Runtime start a thread on each core that they see."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.startswith("gw") and hasattr(os, "sched_setaffinity"):
        cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        if own := cores[int(worker.removeprefix("gw")) :: workers]:
            os.sched_setaffinity(0, own)
