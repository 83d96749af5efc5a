"""Prints what the passes of a bundle for CUDA ask of CUDA: python -m tests.cuda.count BUNDLE"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.cuda.fake import WHEEL, FakeCuda, why_not

COLUMNS = ("kernels", "cuBLAS", "to device", "to host", "on device", "waits", "replays", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--capability", type=int, default=87, help="compute capability times ten (default 87)")
    parser.add_argument("--wheel", type=Path, default=WHEEL, help="a folder with another onnxruntime-gpu")
    args = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        fake = FakeCuda(Path(folder), args.wheel)
        result = fake.run(args.capability, "tests.cuda.child", "passes", str(args.bundle))
    print(f"{'a pass that has run before':34}", *(f"{name:>9}" for name in COLUMNS))
    for name, calls in result.passes.items():
        if name.endswith(", later"):
            copies = [len(calls.copied(way)) for way in ("host-to-device", "device-to-host", "device-to-device")]
            counts = len(calls.kernels), calls.products, *copies, calls.waits, calls.replays, len(calls.wrong)
            print(f"{name.removesuffix(', later'):34}", *(f"{count:9}" for count in counts))


if __name__ == "__main__":
    main()
