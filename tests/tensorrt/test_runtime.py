"""What can be asked of NVIDIA's own runtime without a GPU: TensorRT for RTX itself refuses what is no engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from mara_runtime.engines import trt_file
from mara_runtime.engines.tensorrt import TrtEngine
from mara_runtime.errors import EngineError
from tests.double.machine import Machine
from tests.unit.written_model import SLOTS, add_engines, write_bundle

trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is for Linux on x86-64")


@pytest.mark.parametrize("content", [b"", b"not an engine" * 1000], ids=["empty", "other"])
def test_what_is_no_engine_is_refused_in_the_runtime_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    machine = Machine()  # for memory
    machine.install(monkeypatch)
    monkeypatch.setattr(trt_file, "load", lambda target: trt)  # the same interface
    bundle = add_engines(write_bundle(tmp_path, always_head=True), (SLOTS,), True, version=trt.__version__)
    path = bundle.path(bundle.manifest.engines[0].file)
    path.write_bytes(content)
    with pytest.raises(EngineError) as caught:
        TrtEngine(bundle, "tensorrt")
    message = str(caught.value)
    assert message.startswith(f"TensorRT {trt.__version__} cannot open {path} (")
    assert "Error Code" in message
    assert message.endswith(f"build it again on this machine with mara-build {tmp_path} --target tensorrt")
    assert "\n" not in message
    del caught
    machine.check_given_back()
