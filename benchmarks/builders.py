"""mara-export beside ONNX Runtime GenAI's model builder: time and peak memory for the same checkpoint, in turns.

    python benchmarks/builders.py CHECKPOINT AGENT --genai PYTHON [--block-size 128] [--rounds 3]

Both make int4 for a CPU. PYTHON is one of an environment with onnxruntime-genai and what its builder takes: torch,
transformers, onnx-ir. What they make is removed. The builder does not compare its graph with the model; --no-gate
leaves that out here, too.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint", type=Path)
    options.add_argument("agent", type=Path)
    options.add_argument("--genai", required=True, metavar="PYTHON")
    options.add_argument("--block-size", type=int, default=128)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--no-gate", action="store_true")
    options.add_argument("--scratch", type=Path, help="folder for what is made (default: the system's)")
    args = options.parse_args()

    size = str(args.block_size)
    ours = [str(Path(sys.executable).parent / "mara-export"), "--model", str(args.checkpoint.resolve())]
    ours += ["--agent", str(args.agent.resolve()), "--precision", "int4", "--block-size", size, "--quiet"]
    ours += ["--no-gate"] if args.no_gate else []
    theirs = [args.genai, "-m", "onnxruntime_genai.models.builder", "-i", str(args.checkpoint.resolve()), "-p", "int4"]
    theirs += ["-e", "cpu", "--extra_options", f"int4_block_size={size}", "int4_accuracy_level=4", "-o"]
    commands = {"mara-export": [*ours, "--out"], "GenAI's builder": theirs}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
                found[name].append(run([*command, f"{folder}/out"], Path(folder)))
                seconds, gigabytes = found[name][-1]
                print(f"{name:<16} {seconds:7.1f} s  {gigabytes:5.2f} GB", flush=True)
    medians = {
        name: [statistics.median(column) for column in zip(*figures, strict=True)] for name, figures in found.items()
    }
    (seconds, gigabytes), (their_seconds, their_gigabytes) = medians.values()
    print(f"mara-export / GenAI's builder, medians: time {seconds / their_seconds:.3f}", end=", ")
    print(f"peak memory {gigabytes / their_gigabytes:.3f}")


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall time in seconds, and peak resident memory in GB of the process."""
    log = folder / "log"
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)  # the builder has a cache there
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    gigabytes = usage.ru_maxrss * 1024 / 1e9
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        how = "was killed" if process.returncode == -signal.SIGKILL else f"ended with {process.returncode}"
        sys.exit(f"{' '.join(command)} {how} after {seconds:.0f} s and {gigabytes:.2f} GB; its last words: {lines[-1]}")
    return seconds, gigabytes


if __name__ == "__main__":
    main()
