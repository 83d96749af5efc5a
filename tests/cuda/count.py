"""Prints what a pass asks of CUDA: python -m tests.cuda.count BUNDLE [COMPUTE CAPABILITY TIMES TEN]"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.cuda.fake import FakeCuda, why_not


def main() -> None:
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    bundle, capability = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 87
    with tempfile.TemporaryDirectory() as folder:
        result = FakeCuda(Path(folder)).run(capability, "tests.cuda.child", "passes", bundle)
    head = "kernels", "cuBLAS", "to device", "to host", "on device", "waits", "replays"
    print(f"{'the last run of':32}", *(f"{name:>9}" for name in head))
    for name, calls in result.passes.items():
        if name.endswith("later"):
            copies = [len(calls.copied(way)) for way in ("host-to-device", "device-to-host", "device-to-device")]
            counts = len(calls.kernels), calls.products, *copies, calls.waits, calls.replays
            print(f"{name.removesuffix(', later'):32}", *(f"{count:9}" for count in counts))


if __name__ == "__main__":
    main()
