"""Remake the embedded demo LM from a seed: `python -m mara_deploy.demo.train [--out DIR] [--seed N] ...`.

A Qwen2-architecture LM with its own byte-level BPE tokenizer and chat template, trained from scratch on the
text that `mara_deploy.demo.corpus` generates. About six minutes on one CPU core; the defaults of `Recipe` made the
model in `mara_deploy/demo/model`.

Reproducibility: the same seed, steps, threads and package versions give the same bytes on the same machine
(tests/export/test_demo_lm.py). The corpus and the tokenizer depend on nothing else and are the same everywhere. The
weights may differ in the last bits, and after many steps visibly, where torch takes other kernels: on another
processor type, with another number of threads, with another torch version. The figures in recipe.json then move
a little; the recipe is meant to give an equally good model there, not the same one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mara_deploy.commands.shared import Parser, guarded
from mara_deploy.demo.recipe import Recipe
from mara_export.folder import whole_or_absent
from mara_runtime.errors import OptionError


def write(out: Path, recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Train, measure and write the model folder, whole or not at all; return what recipe.json says.

    Raises MaraError where `out` exists and is not an empty folder.
    """
    import tokenizers
    import torch
    import transformers

    from mara_deploy.demo.lm import torch_threads, train
    from mara_deploy.demo.measure import measure

    with whole_or_absent(out) as folder:
        began = time.perf_counter()
        model, tokenizer, _ = train(recipe, progress)
        seconds = time.perf_counter() - began
        with torch_threads(recipe.threads):
            figures = measure(model, tokenizer)
        options = f"--seed {recipe.seed} --steps {recipe.steps} --threads {recipe.threads}"
        record = {
            "command": f"python -m mara_deploy.demo.train {options}",
            "recipe": asdict(recipe),
            "parameters": model.num_parameters(),
            "held_out": figures,
            "seconds": round(seconds, 1),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
            },
        }
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def parser() -> Parser:
    """The command's options."""
    default = Recipe()
    options = Parser(
        "python -m mara_deploy.demo.train",
        "Train the demo LM from scratch on generated text (about six minutes on one CPU core).",
    )
    options.add_argument("--out", default="demo-lm", metavar="DIR", help="folder to write; must be new or empty")

    def add(name: str, value: int, text: str) -> None:
        options.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{text} (default {value})")

    add("seed", default.seed, "of the text, the tokenizer and the weights")
    add("steps", default.steps, "optimizer steps")
    add("threads", default.threads, "torch CPU threads")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _train, argv)


def _train(args: argparse.Namespace) -> None:
    for flag, least in (("seed", 0), ("steps", 1), ("threads", 1)):
        if getattr(args, flag) < least:
            raise OptionError(f"--{flag} is {getattr(args, flag)}; it must be at least {least}")
    record = write(Path(args.out), Recipe(seed=args.seed, steps=args.steps, threads=args.threads))
    figures = ", ".join(f"{name} {value}" for name, value in record["held_out"].items())
    print(f"{args.out}: {record['parameters']:,} parameters, {record['seconds']} s; {figures}")


if __name__ == "__main__":
    sys.exit(main())
