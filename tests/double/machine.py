"""One GPU with both modules, put in the place of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mara_runtime.engines import cuda as cuda_calls
from mara_runtime.engines import trt_file
from tests.double import Broken
from tests.double.cuda import CudaDouble
from tests.double.trt import TrtDouble


class Machine:
    """See tests/double/__init__.py."""

    def __init__(self, **options: Any) -> None:
        """options: attributes of the two doubles, by name, like `total_bytes` or `__version__`."""
        self.cuda = CudaDouble()
        self.trt = TrtDouble(self.cuda)
        for name, value in options.items():
            double: Any = self.cuda if hasattr(self.cuda, name) else self.trt
            assert hasattr(double, name), name
            setattr(double, name, value)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let the engine find this machine."""
        patch.setattr(cuda_calls, "load", lambda: self.cuda)
        patch.setattr(trt_file, "load", lambda target: self.trt)

    def in_use(self) -> dict[str, int]:
        """How much of everything is in use."""
        return {**self.cuda.in_use(), **self.trt.in_use()}

    def check_given_back(self) -> None:
        left = {name: count for name, count in self.in_use().items() if count}
        if left:
            raise Broken("all given back", str(left))


def write_engine(path: Path, graph: Path, **facts: Any) -> None:
    """Write an "engine file". facts: those of EngineFacts that an engine itself knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"graph": str(graph), **facts}), encoding="utf-8")
