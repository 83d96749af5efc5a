"""Train the demo's LM from a seed: `python -m examples.demo_lm.train [--out DIR] [--seed N] ...`.

An LM of the Qwen2 architecture with its own byte-level BPE tokenizer and chat template, trained from scratch on the
text that corpus.py generates. Takes about six minutes on one CPU core; the defaults of `Recipe` produced the model in
mara_deploy/demo/model.

Reproducibility: the same seed, steps, threads and package versions give the same bytes on the same machine
(tests/export/test_demo_lm.py). Corpus and tokenizer are the same everywhere. The weights can differ in the last bits,
and visibly after many steps, where PyTorch selects other kernels: on another type of processor, with another number of
threads, with another version. The figures in recipe.json then change slightly; the recipe gives an equally good model
there, not an identical one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.demo_lm.recipe import Recipe
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded
from mara_export.folder import whole_or_absent
from mara_runtime.options import Options, option


def write(out: Path, recipe: Recipe, progress: bool = True) -> dict[str, Any]:
    """Train, measure and write the model folder, whole or not at all; return what recipe.json says.

    Raises MaraError where `out` exists and is not an empty folder.
    """
    import tokenizers
    import torch
    import transformers

    from examples.demo_lm.lm import torch_threads, train
    from examples.demo_lm.measure import measure

    with whole_or_absent(out) as folder:
        began = time.perf_counter()
        model, tokenizer, _ = train(recipe, progress)
        seconds = time.perf_counter() - began
        with torch_threads(recipe.threads):
            figures = measure(model, tokenizer)
        options = f"--seed {recipe.seed} --steps {recipe.steps} --threads {recipe.threads}"
        record = {
            "command": f"python -m examples.demo_lm.train {options}",
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


@dataclass(frozen=True)
class DemoLMArguments(Options):
    """Where to write the LM, and what of the recipe can be changed."""

    out: Path = option(Path("demo-lm"), "folder to write; must be new or empty", metavar="DIR")
    seed: int = option(Recipe.seed, "random seed of the text, the tokenizer and the weights", least=0)
    steps: int = option(Recipe.steps, "optimiser steps", least=1)
    threads: int = option(Recipe.threads, "CPU threads of PyTorch", least=1)


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "python -m examples.demo_lm.train",
        "Train the demo LM from scratch on generated text (about six minutes on one CPU core).",
    )
    add_options(options, DemoLMArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _train, argv)


def _train(args: argparse.Namespace) -> None:
    options = from_args(DemoLMArguments, args)
    record = write(options.out, Recipe(seed=options.seed, steps=options.steps, threads=options.threads))
    figures = ", ".join(f"{name} {value}" for name, value in record["held_out"].items())
    print(f"{options.out}: {record['parameters']:,} parameters, {record['seconds']} s; {figures}")


if __name__ == "__main__":
    sys.exit(main())
