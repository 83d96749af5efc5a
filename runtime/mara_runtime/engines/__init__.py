"""The engines, one module each, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mara_runtime.config import ENGINES
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS

if TYPE_CHECKING:
    from mara_runtime.bundle import Bundle
    from mara_runtime.engines.base import Engine


def open_engine(bundle: Bundle, name: str = "auto", threads: int | None = None) -> tuple[Engine, dict[str, str]]:
    """Open the named engine, or with "auto" the best that bundle and machine have.

    Returns the engine and, for each engine preferred to it, why that one declined.
    Raises EngineError, with every reason, when none fits.
    """
    if name not in ("auto", *ENGINES):
        raise OptionError(f"--engine is {name!r}; it must be one of auto, {', '.join(ENGINES)}")
    declined: dict[str, str] = {}
    for candidate in ENGINES if name == "auto" else (name,):
        why_not, make = _kind(candidate)
        reason = why_not(bundle, candidate)
        if threads is not None and candidate in ENGINE_TARGETS and (reason is None or name == candidate):
            raise OptionError(f"--threads is for an engine on a CPU, and this is {candidate}: leave it out")
        if reason is None:
            try:
                return make(bundle, candidate, threads), declined
            except EngineError as error:  # damaged, or larger than the device's memory
                if name != "auto":
                    raise
                reason = str(error)
        declined[candidate] = reason
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in declined.items())
    raise EngineError(f"no engine can run {bundle.folder} here ({reasons})")


def _kind(name: str) -> tuple[Callable[[Bundle, str], str | None], Callable[[Bundle, str, int | None], Engine]]:
    """Of an engine: why it cannot run a bundle here, and what opens it."""
    if name in ENGINE_TARGETS:
        from mara_runtime.engines import tensorrt

        return tensorrt.why_not, lambda bundle, name, threads: tensorrt.TrtEngine(bundle, name)
    from mara_runtime.engines import ort

    if name == "cpu":
        from mara_runtime.engines import ort_cpu

        return ort.why_not, lambda bundle, name, threads: ort_cpu.CpuEngine(bundle, threads)
    from mara_runtime.engines import ort_cuda

    return ort.why_not, lambda bundle, name, threads: ort_cuda.CudaEngine(bundle, threads)
