"""From a bundle's step graph to TensorRT engines inside the bundle: `build`, top to bottom.

Imports neither PyTorch nor Optimum, as TensorRT builds an engine on the device that will run it: a Jetson needs onnx
and TensorRT alone. TensorRT for RTX builds for other GPUs than the one at hand, and without any.
"""

from __future__ import annotations

import contextlib
import platform
import time
from pathlib import Path
from typing import Any

from mara_export.folder import add_engines, staging_folder
from mara_export.options import BuildOptions
from mara_export.progress import Progress
from mara_export.targets import HEAD_ROWS, LOWERINGS, MOST_AGENTS, SHARED_ROWS, TARGETS
from mara_export.tensorrt import network as parts
from mara_export.tensorrt import timings
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda, trt_file
from mara_runtime.errors import EngineError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS, EngineFacts, Manifest
from mara_runtime.tensors import AGENT_WIDTHS, PREFILL_ROWS, spare_slots

OLDEST = min(lowering.tensorrt_since for lowering in LOWERINGS.values() if lowering.tensorrt_since)
"""Version of TensorRT that some lowering needs at least."""
USUAL_ROWS = 4
"""Rows of a decoding pass that the kernels of the first profile are tuned for."""
KERNEL_BYTES = 64 << 20
"""More than an engine's kernels and names take. Where quantised weights save less than that, the engine's size does not
show whether they are still packed."""
RTX_DEFAULT = "8.0+"
"""GPUs that an engine of TensorRT for RTX runs on when none are named.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html"""
RTX_OLDEST = 8.0
"""Compute capability below which TensorRT for RTX knows GPUs, but has no kernels for the graph: no Gemm in float32."""


def why_cannot_build(target: str) -> str | None:
    """Why engines of a target cannot be built on this machine; None: they can."""
    if target not in ENGINE_TARGETS:
        return f"it is not one of {', '.join(ENGINE_TARGETS)}"
    facts = TARGETS[target]
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        return f"onnx cannot be imported ({error}): pip install onnx"
    try:
        trt = trt_file.load(target)
    except (ImportError, OSError) as error:  # OSError: a native library that it loads is missing
        remedy = facts.install if facts.just_in_time else f"{facts.install}; {cuda.FOR_CUDA_12}"
        return f"its Python package cannot be imported ({error}): {remedy}"
    if not facts.just_in_time:
        if parts.version(trt) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            return f"TensorRT {trt.__version__} is too old: {oldest} is the oldest that is supported"
        reason = cuda.why_not()
        return None if reason is None else f"{reason}, and TensorRT builds on the GPU that will run the engine"
    return None


def build(bundle: Bundle, target: str, options: BuildOptions | None = None, progress: Progress | None = None) -> Bundle:
    """Build engines of the bundle's graph for `target`, one of ENGINE_TARGETS, and add them to the bundle.

    Returns the bundle with its new manifest. Raises MaraError; then, and when interrupted, the bundle is as it was.
    """
    options, progress = options or BuildOptions(), progress or Progress(quiet=True)
    reason = why_cannot_build(target)
    if reason is not None:
        raise EngineError(f"no engine for {target} can be built here: {reason}")

    trt = trt_file.load(target)
    _check(bundle, target, options, trt)
    sizes = options.slots(bundle.manifest)
    with staging_folder(bundle, target) as folder:
        engines = [_build_one(bundle, target, options, slots, trt, folder, progress) for slots in sizes]
        return add_engines(bundle, folder, engines)


def agent_widths(manifest: Manifest) -> tuple[int, int]:
    """Hidden widths of the agents that engines of a bundle are built for: of its widest, and at least the usual ones.

    So an agent that is added later needs no other engine unless it is wider than that. Narrow agents pay for it with
    reading zeros in every pass, which is little beside the LLM's weights; a build takes minutes.
    """
    first, second = zip(AGENT_WIDTHS, *(agent.widths for agent in manifest.agents), strict=True)
    return max(first), max(second)


def _check(bundle: Bundle, target: str, options: BuildOptions, trt: Any) -> None:
    """Reject what this TensorRT cannot do before the build starts."""
    lowering, just_in_time = bundle.manifest.step.lowering, TARGETS[target].just_in_time
    if lowering not in TARGETS[target].lowerings:
        raise EngineError(
            f"{bundle.folder} has a graph of lowering {lowering}, which TensorRT cannot read: "
            f"export it with --target {target}"
        )
    if not just_in_time:
        since = LOWERINGS[lowering].tensorrt_since or OLDEST
        other = min(TARGETS[target].lowerings, key=lambda name: LOWERINGS[name].tensorrt_since or OLDEST)
        if parts.version(trt) < since:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot read the graph of {bundle.folder}, whose lowering {lowering} needs "
                f"{'.'.join(map(str, since))} or later: install that, or export with --target {target} --lowering "
                f"{other}"
            )
        if options.compute_capabilities:
            raise OptionError(
                "--compute-capability is for tensorrt-rtx; TensorRT builds for the GPU at hand, "
                "or for more of them with --hardware"
            )
        if not hasattr(trt.HardwareCompatibilityLevel, _level(options.hardware)):
            raise OptionError(f"--hardware is {options.hardware}, which TensorRT {trt.__version__} does not know")
        if options.timing_cache is not None:
            timings.check(options.timing_cache)
        return
    if options.timing_cache is not None:
        raise OptionError("--timing-cache is for tensorrt; TensorRT for RTX times no kernels while it builds")
    if options.version_compatible or options.hardware != "none":
        flag = "--version-compatible" if options.version_compatible else "--hardware"
        raise OptionError(f"{flag} is for tensorrt; an engine of TensorRT for RTX is compiled on the GPU that runs it")
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    supported = {f"{name[2:-1]}.{name[-1]}" for name in known if int(name[2:]) >= 10 * RTX_OLDEST}  # SM120: 12.0
    for capability in options.compute_capabilities:
        if capability not in supported:
            raise OptionError(
                f"--compute-capability is {capability!r}; TensorRT for RTX {trt.__version__} builds for "
                f"{', '.join(sorted(supported, key=float))}"
            )


def _build_one(
    bundle: Bundle, target: str, options: BuildOptions, slots: int, trt: Any, folder: Path, progress: Progress
) -> EngineFacts:
    """Build one engine and write it under `folder`."""
    started = time.perf_counter()
    name = f"engines/{target}/step-{slots}.engine"  # `add_engines` adds its checksum
    manifest = bundle.manifest
    in_place, just_in_time = LOWERINGS[manifest.step.lowering].in_place, TARGETS[target].just_in_time
    decode_rows = spare_slots(manifest.max_candidates) + 1  # one more for a KV entry that is recomputed
    prefill_rows, widths = min(PREFILL_ROWS, slots), agent_widths(manifest)
    with progress.stage(f"build {name}"), progress.phases() as tell:
        fixed = {"C": slots, "W1": widths[0], "W2": widths[1]}
        network = parts.Network(trt, bundle.path(manifest.step.file), fixed)
        if in_place:
            network.check_in_place(manifest.model.shape.num_caches)
        kinds = network.kinds()
        profiles = _profiles(decode_rows, prefill_rows, options.places)
        config = network.config(profiles)
        capability = _configure(config, target, options, trt)
        with contextlib.ExitStack() as stack:
            if not just_in_time:
                default = f"tensorrt-{trt.__version__}-{capability}.timings"
                stack.enter_context(timings.timing_cache(config, options.timing_cache, default, progress.note))
            plan, unfused = network.build(config, tell, progress.note)
        wide = network.wide_weight_bytes
        if memoryview(plan).nbytes >= wide > network.weight_bytes + KERNEL_BYTES:
            progress.note(
                f"the engine is as large as with 16-bit weights ({wide / 1e6:,.0f} MB): {parts.name(trt)} seems to "
                f"have widened the {manifest.step.precision} weights, which then save no memory"
            )
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(memoryview(plan))
    return EngineFacts(
        target=target,
        file=name,
        slots=slots,
        decode_rows=decode_rows,
        prefill_rows=prefill_rows,
        head_rows=HEAD_ROWS,
        places=options.places,
        shared_rows=min(SHARED_ROWS, prefill_rows),
        agents=MOST_AGENTS,
        agent_widths=widths,
        in_place=in_place,
        version=trt.__version__,
        compute_capability=capability,
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        options={
            "weight_streaming": options.weight_streaming,
            "version_compatible": options.version_compatible,
            "hardware": options.hardware,
            "workspace_bytes": options.workspace_bytes,
            "optimisation_level": options.optimisation_level,
            "decomposable": unfused,
            "layers": kinds,
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


def _profiles(decode_rows: int, prefill_rows: int, places: int) -> list[parts.Profile]:
    """Narrow and wide passes of one conversation, and passes of several."""
    usual, one, agents = min(USUAL_ROWS, decode_rows), (1, 1, 1), (1, 1, MOST_AGENTS)
    decode, prefill = (1, usual, decode_rows), (1, prefill_rows, prefill_rows)
    judged, asked, heads = (1, 1, prefill_rows), (1, usual, decode_rows), (1, 1, HEAD_ROWS)
    profiles: list[parts.Profile] = [
        {"B": one, "M": decode, "S": decode, "H0": heads, "N": asked, "Q": (1, 1, decode_rows), "A": agents},
        {"B": one, "M": prefill, "S": prefill, "H0": heads, "N": judged, "Q": judged, "A": agents},
    ]
    if places > 1:
        width = min(SHARED_ROWS, prefill_rows)
        rows, most = width + decode_rows, places * HEAD_ROWS
        best = min(places * usual, rows)
        profiles.append(
            {
                "B": (2, places, places),
                "M": (1, min(usual, width), width),
                "S": (2, best, rows),
                "H0": (1, places, most),
                "N": (1, best, rows),
                "Q": one,
                "A": agents,
            }
        )
    return profiles


def _configure(config: Any, target: str, options: BuildOptions, trt: Any) -> str:
    """Set the options. Returns the compute capability that the engine is for."""
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimisation_level is not None:
        config.builder_optimization_level = options.optimisation_level
    if TARGETS[target].just_in_time:
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION") and not options.weight_streaming:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # so that passes can be captured in CUDA graphs
        capabilities = tuple(dict.fromkeys(options.compute_capabilities))
        config.num_compute_capabilities = len(capabilities)
        for i, number in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + number.replace(".", "")), i)
        return ", ".join(capabilities) or RTX_DEFAULT
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, _level(options.hardware))
    return "8.0+" if options.hardware == "ampere-plus" else cuda.compute_capability()


def _level(hardware: str) -> str:
    return hardware.upper().replace("-", "_")
