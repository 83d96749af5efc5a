"""Prepares a first run on a machine that reaches no registry and takes little at a time.

    python -m benchmarks.carry --bundles DIR --out OUT [--packages DIR --capability 9.0] [--part-mb 48]

writes OUT/first-gpu.tar.xz.00, .01, …: the bundles, what a CPU computes of each (NAME.json), and the packages. There,
`cat first-gpu.tar.xz.* | tar xJ` unpacks them for `python -m benchmarks.first_gpu --bundles bundles --packages packages
--out results`.

Large bundles travel without their large weights, as speed depends on shapes only. `--fill BUNDLE --out FOLDER` puts
numbers from a seed in their place, with each weight's mean and deviation, at the offsets that the graph names: they are
the same on every machine, and the manifest has their checksum. Of shared libraries, the machine code for GPUs other
than `--capability` is zeroed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.first_gpu import FILLING, find_bundles, positive
from benchmarks.gpu_stages import SMALL_BYTES
from mara_export.folder import file_entries, whole_or_absent, write_manifest
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError
from mara_runtime.manifest import MANIFEST_FILE

KEPT = "kept.bin"
KEPT_BYTES = 1 << 16
"""Weights up to this size travel: norms, biases, scales."""
BLOCK = 1 << 20
"""Numbers drawn at a time."""
FAT_BINARY = b"\x50\xed\x55\xba"
"""Begins what nvcc embeds in a library: pieces of machine code, one per GPU."""


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hollow(bundle: Bundle, out: Path) -> None:
    """Copy a bundle without its large weights."""
    import onnx
    from onnx import helper

    graph = onnx.load(bundle.path(bundle.manifest.step.file), load_external_data=False).graph
    (data,) = {entry.value for t in graph.initializer for entry in t.external_data if entry.key == "location"}
    shutil.copytree(bundle.folder, out, ignore=shutil.ignore_patterns(data))
    weights = np.memmap(bundle.path(data), np.uint8, "r")
    parts, kept = [], bytearray()
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            continue
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        start, size = int(where["offset"]), int(where["length"])
        if size <= KEPT_BYTES:
            parts.append({"offset": start, "size": size, "kept": len(kept)})
            kept += weights[start : start + size].tobytes()
            continue
        part: dict[str, Any] = {"offset": start, "size": size, "dtype": dtype.name}
        if dtype.kind == "f":
            values = weights[start : start + size].view(dtype)[:BLOCK].astype(np.float64)
            part |= {"mean": float(values.mean()), "deviation": float(values.std())}
        parts.append(part)
    (out / KEPT).write_bytes(kept)
    (out / FILLING).write_text(json.dumps({"file": data, "size": len(weights), "parts": parts}), encoding="utf-8")


def fill(folder: Path, out: Path) -> Bundle:
    """Copy a bundle of `hollow` with numbers in place of its weights."""
    if not (folder / FILLING).is_file():
        raise MaraError(f"{folder} lacks no weights: it has no {FILLING}, which the bundles of --bundles get")
    filling = json.loads((folder / FILLING).read_text(encoding="utf-8"))
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(FILLING, KEPT), dirs_exist_ok=True)
    kept = (folder / KEPT).read_bytes()
    with (out / filling["file"]).open("wb") as file:
        file.truncate(filling["size"])
        for part in filling["parts"]:
            file.seek(part["offset"])
            if "kept" in part:
                file.write(kept[part["kept"] : part["kept"] + part["size"]])
            else:
                for numbers in drawn(part):
                    file.write(numbers.tobytes())
    return Bundle.open(out, verify=False)


def drawn(part: dict[str, Any]) -> Iterator[NDArray[Any]]:
    """Numbers of a weight, in blocks: uniform, of its mean and deviation; of integers, any bits."""
    dtype, bits = np.dtype(part["dtype"]), np.random.PCG64(part["offset"])
    left = part["size"] // dtype.itemsize
    while left:
        raw = bits.random_raw(BLOCK // 4).view(np.uint16)[:left]
        left -= len(raw)
        if dtype.kind == "f":
            spread = np.float32(part["deviation"] * 3**0.5)
            yield (np.float32(part["mean"]) + spread * (raw.astype(np.float32) / 32767.5 - 1)).astype(dtype)
        else:
            yield raw.astype(dtype)


# ── packages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def thin(library: bytearray, capability: int) -> set[int]:
    """Zero the machine code of other GPUs, in place; returns those that there is code for. capability: times ten."""
    found, at = set(), library.find(FAT_BINARY)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        entry, end = at + header, min(at + header + size, len(library))
        while entry + 32 <= end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, entry)
            if kind not in (1, 2):  # PTX, machine code
                break
            (gpu,) = struct.unpack_from("<I", library, entry + 28)
            found.add(gpu)
            if gpu != capability:
                library[entry + header : entry + header + size] = bytes(size)
            entry += header + size
        at = library.find(FAT_BINARY, max(end, at + 4))
    return found


def carry_packages(packages: Path, out: Path, capability: int) -> None:
    """Copy a folder of packages, thinned. Raises MaraError where no code is left."""
    # ONNX Runtime brings a provider for TensorRT, and itself once more for C
    unused = shutil.ignore_patterns("*tensorrt*.so", "libonnxruntime.so*", "__pycache__")
    shutil.copytree(packages, out, ignore=unused)
    gpus = set()
    for path in sorted(out.rglob("*.so*")):
        library = bytearray(path.read_bytes())
        if found := thin(library, capability):
            path.write_bytes(library)
            gpus |= found
    if gpus and capability not in gpus:
        has = ", ".join(f"{gpu / 10}" for gpu in sorted(gpus))
        raise MaraError(f"--capability is {capability / 10}, and {packages} has machine code for {has} alone")


# ── the commands ─────────────────────────────────────────────────────────────────────────────────────────────────────


def carry_bundle(folder: Path, out: Path) -> None:
    """Write a bundle, hollow if it is large, and OUT.json, what a CPU computes of it."""
    bundle = Bundle.open(folder)
    with tempfile.TemporaryDirectory(dir=out.parent.parent) as scratch:
        if sum(entry.size_bytes for entry in bundle.manifest.files.values()) <= SMALL_BYTES:
            shutil.copytree(folder, out)
        else:
            hollow(bundle, out)
            bundle = fill(out, Path(scratch) / "filled")
            entries = {name: entry for name, entry in file_entries(bundle.folder).items() if name != MANIFEST_FILE}
            write_manifest(out, replace(bundle.manifest, files=entries))
            write_manifest(bundle.folder, replace(bundle.manifest, files=entries))
        command = [sys.executable, "-m", "benchmarks.gpu_stages", "reference", str(bundle.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MaraError(f"a CPU cannot run {folder}: {done.stderr.strip().splitlines()[-1]}")
    out.with_name(f"{out.name}.json").write_text(done.stdout.splitlines()[-1], encoding="utf-8")


def pack(folder: Path, out: Path, part_mb: float) -> None:
    """Pack what a folder holds, in parts."""
    tar = subprocess.Popen(["tar", "-C", folder, "-cJ", "."], stdout=subprocess.PIPE)
    split = ["split", "-d", "-b", str(round(part_mb * (1 << 20))), "-", out / "first-gpu.tar.xz."]
    subprocess.run(split, stdin=tar.stdout, check=True)
    if tar.wait():
        raise MaraError(f"tar cannot pack {folder}: exit code {tar.returncode}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder to write, must be new")
    options.add_argument("--bundles", type=Path, help="folder of bundles")
    options.add_argument("--packages", type=Path, help="folder of `pip install --target` for the other machine")
    options.add_argument("--capability", type=positive, help="compute capability of its GPU, as in 9.0")
    options.add_argument("--part-mb", type=positive, default=48, help="size of a part (default 48)")
    options.add_argument("--fill", type=Path, metavar="BUNDLE", help="fill in the weights of a bundle that was carried")
    return options


def main() -> int:
    args = parser().parse_args()
    try:
        if args.fill is not None:
            with whole_or_absent(args.out) as folder:
                fill(args.fill, folder).verify()
            return 0
        if args.bundles is None or (args.packages is None) != (args.capability is None):
            raise MaraError("give --bundles, and --capability with --packages")
        bundles = find_bundles(args.bundles)
        with whole_or_absent(args.out) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
            if args.packages is not None:
                carry_packages(args.packages, Path(scratch) / "packages", round(10 * args.capability))
            for bundle in bundles:
                carry_bundle(bundle.folder, Path(scratch) / "bundles" / bundle.folder.name)
            pack(Path(scratch), folder, args.part_mb)
    except MaraError as error:
        print(f"carry: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
