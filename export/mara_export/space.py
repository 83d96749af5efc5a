"""Disk and memory that an export needs, checked before its hours of work and not after."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from mara_export.errors import ModelError
from mara_export.hf.checkpoint import open_stored
from mara_export.hf.sources import ModelSource
from mara_export.options import ExportOptions
from mara_export.stages import Stages, graph_name
from mara_runtime.engines.machine import free_memory

_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_COPIES = 3
"""Of the largest weight in float32, while it is read, transposed and quantised."""


def bundle_bytes(numbers: int, options: ExportOptions) -> int:
    """About the size of a bundle of a model with so many numbers in its weights."""
    quantisation = options.quantisation
    if quantisation is None:
        return numbers * _FLOAT_BYTES[options.precision]
    scales = 4 / quantisation.block_size if quantisation.block_size > 0 else 0
    return math.ceil(numbers * (quantisation.bits / 8 + scales))


def check_space(
    source: ModelSource, bundles: Sequence[tuple[ExportOptions, Path]], stages: Stages | None = None
) -> None:
    """Reject bundles for which there is clearly not enough disk or memory here. Raises ModelError.

    stages: of a work folder, where graphs lie, too; on the disk of a bundle they are the same bytes.
    """
    weights = _sizes(source)
    needs: dict[int, int] = {}
    for options, out in bundles:
        place = next(folder for folder in (out, *out.parents) if folder.exists())
        size = bundle_bytes(sum(weights), options)
        goals = {place.stat().st_dev: (place, size, out, "--out")}
        if stages is not None:
            work, missing = stages.folder, max(size - stages.size(graph_name(options)), 0)
            goals[work.stat().st_dev] = work, missing, work, "--work"
        for disk, (place, size, goal, flag) in goals.items():
            free = shutil.disk_usage(place).free
            needs[disk] = needs.get(disk, 0) + size
            if free < needs[disk]:
                raise ModelError(
                    f"{source.name} needs about {_gigabytes(needs[disk])} of disk where {goal.name} goes, and "
                    f"{_gigabytes(free)} are free: free some, or choose another {flag}"
                )
    memory = free_memory()
    if memory is None:
        return
    if (needed := _COPIES * 4 * max(weights, default=0)) > memory:
        raise ModelError(
            f"{source.name} needs about {_gigabytes(needed)} of memory to be exported, for its largest weight, and "
            f"{_gigabytes(memory)} are free"
        )


def _sizes(source: ModelSource) -> list[int]:
    """Numbers in each weight of a checkpoint, by the heads of its files; none if they are damaged."""
    with contextlib.suppress(ModelError):  # said at loading
        stored = open_stored(source)
        return [math.prod(stored.shape(name)) for name in stored]
    return []


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
