"""Prints what the passes of a bundle for CUDA ask of CUDA: python -m tests.cuda.count BUNDLE [--widths]"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.cuda.fake import WHEEL, Calls, FakeCuda, why_not

KINDS = {"fused": "AttentionKernel", "widened": "Dequantize"}
"""Kernels that are counted apart, by a part of their names: fused attention, and quantised weights made float16."""
COLUMNS = ("kernels", *KINDS, "cuBLAS", "to device", "to host", "on device", "waits", "replays", "wrong")


def counts(calls: Calls) -> tuple[int, ...]:
    """By column."""
    kinds = [sum(part in name for name in calls.kernels) for part in KINDS.values()]
    copies = [len(calls.copied(way)) for way in ("host-to-device", "device-to-host", "device-to-device")]
    return len(calls.kernels), *kinds, calls.products, *copies, calls.waits, calls.replays, len(calls.wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--widths", action="store_true", help="of 1 to 64 candidates, where something changes")
    parser.add_argument("--capability", type=int, default=87, help="compute capability times ten (default 87)")
    parser.add_argument("--wheel", type=Path, default=WHEEL, help="a folder with another onnxruntime-gpu")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeCuda(Path(folder), args.wheel)
        what = "widths" if args.widths else "passes"
        result = fake.run(args.capability, "tests.cuda.child", what, str(args.bundle))
    print(f"{'a pass that has run before':34}", *(f"{name:>9}" for name in COLUMNS))
    before: tuple[int, ...] = ()
    for name, calls in result.passes.items():
        found = counts(calls)
        if name.endswith(", later") and (not args.widths or found[:4] != before[:4]):
            print(f"{name.removesuffix(', later'):34}", *(f"{count:9}" for count in found))
            before = found


if __name__ == "__main__":
    main()
