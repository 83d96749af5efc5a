"""Several conversations at once against one alone: tokens a second of all together, plain and aligned.

    python benchmarks/conversations.py BUNDLE [--conversations 1,4,8] [--context 256] [--tokens 96] [--rounds 9]
                                       [--genai PYTHON MODEL_FOLDER]

All take turns in one sitting; aligned decoding follows the first profile of synthetic acceptance (README.md). --genai
measures the continuous batching of ONNX Runtime GenAI beside it: PYTHON is that of an environment with the package,
MODEL_FOLDER a model that its builder made. Prints mara-bench's table and its JSON line.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from mara_deploy.commands.bench import main as bench


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("bundle")
    options.add_argument("--conversations", default="1,4,8", metavar="N[,N…]")
    options.add_argument("--context", default="256")
    options.add_argument("--tokens", default="96")
    options.add_argument("--rounds", default="9")
    options.add_argument("--threads")
    options.add_argument("--genai", nargs=2, metavar=("PYTHON", "MODEL_FOLDER"))
    args = options.parse_args()
    argv = [args.bundle, "--measure", "conversations"]
    for name in ("conversations", "context", "tokens", "rounds", "threads"):
        argv += [f"--{name}", value] if (value := getattr(args, name)) else []
    if args.genai:
        python, model = args.genai
        peer = Path(__file__).resolve().parent / "peers" / "genai.py"
        argv += ["--peer", f"genai={shlex.join([python, str(peer), model])}"]
    return bench(argv)


if __name__ == "__main__":
    sys.exit(main())
