"""Aligned decoding of an exported bundle, a frozen LLM and its accept/reject agents, without PyTorch.

    from mara_runtime import AlignedDecoder, DecodeConfig

Names are imported on first use: `import mara_runtime` alone costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # ONNX Runtime ≥ 1.32 sends telemetry unless it is disabled; 0 allows it

if TYPE_CHECKING:
    from mara_runtime.answer import Generation, Piece
    from mara_runtime.bundle import Bundle
    from mara_runtime.config import DecodeConfig
    from mara_runtime.decoder import AlignedDecoder
    from mara_runtime.errors import MaraError

__all__ = ["AlignedDecoder", "Bundle", "DecodeConfig", "Generation", "MaraError", "Piece"]

_HOME = {
    "AlignedDecoder": "decoder",
    "Bundle": "bundle",
    "DecodeConfig": "config",
    "Generation": "answer",
    "MaraError": "errors",
    "Piece": "answer",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"mara_runtime.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mara_runtime' has no attribute {name!r}")
