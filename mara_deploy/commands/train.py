"""`mara-train`: train an accept/reject agent for a frozen LLM and a score."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from mara_deploy.commands import process
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.scoring import add_score_options
from mara_deploy.commands.shared import Parser, guarded, needs_extra
from mara_deploy.commands.train_open import Run, TrainArguments, begin, check_resumable, new_config, resume
from mara_deploy.train.config import RECIPES, TrainConfig
from mara_runtime.errors import MaraError

if TYPE_CHECKING:
    from mara_deploy.train.loop import Row

EPILOG = """\
--weight and --score-template apply to the preceding --score. --resume continues a run that was interrupted or has
ended, with more --episodes if given. docs/guide/train.md explains the method, the files and the settings.

examples:
  mara-train --model demo --prompts demo --score demo --out demo-agent
  mara-train --model llama3.2-1b --prompts prompts.json --score my_scores:politeness --out polite
  mara-train --model mistral --prompts SafeRLHF/train.json --out safe \\
      --score REWARD_MODEL --weight 2 --score COST_MODEL --weight=-1
  mara-train --resume --out safe
"""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-train",
        "Train an accept/reject agent for a frozen LLM by discrete soft actor-critic, rewarded by a score of answers.",
        EPILOG,
    )
    add_options(options, TrainArguments)
    add_score_options(options)
    settings = options.add_argument_group(f"settings, with the defaults of --recipe {', '.join(RECIPES)}")
    add_options(settings, TrainConfig, defaults=tuple(RECIPES.values()))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _train, argv)


def _train(args: argparse.Namespace) -> None:
    arguments = from_args(TrainArguments, args)
    if arguments.resume:
        check_resumable(arguments.out, args)
        config = None
    else:
        config = new_config(arguments, args)

    def say(text: str) -> None:
        if not arguments.quiet:
            print(f"mara-train: {text}", file=sys.stderr)

    say("loading PyTorch and transformers …")
    with needs_extra("train", "training"):
        from mara_export.hf.checkpoint import silence_transformers
    silence_transformers()
    with ExitStack() as lock:
        run = begin(arguments, args, config, lock, say) if config else resume(arguments, args, lock, say)
        done, warnings = _run(run, arguments.quiet)
    if done < run.config.episodes:
        raise MaraError(
            f"interrupted after {done} of {run.config.episodes} episodes, and saved: "
            f"mara-train --resume --out {arguments.out}"
        )
    for warning in warnings:  # also with --quiet
        print(f"mara-train: warning: {warning}", file=sys.stderr)
    if arguments.quiet:
        return
    agent = arguments.out / "agent.safetensors"
    print(f"{agent}   report: {arguments.out / 'report.html'}", file=sys.stderr)
    if not warnings:
        model = shlex.quote(run.facts["model"]["asked"])
        if run.facts["lora"] is not None:
            model += f" --lora {shlex.quote(run.facts['lora']['asked'])}"
        print(f"mara-export --model {model} --agent {shlex.quote(str(agent))}", file=sys.stderr)


def _run(run: Run, quiet: bool) -> tuple[int, list[str]]:
    """Train, and write the report. Returns the number of episodes so far, and warnings about the agent."""
    from mara_deploy.train.cautions import cautions, troubles
    from mara_deploy.train.loop import train
    from mara_deploy.train.monitor import Monitor
    from mara_deploy.train.report import write_report

    config, done = run.config.to_json(), run.checkpoint["progress"]["episodes"]
    rounds, told = 0, set[str]()

    def on_round(row: Row) -> None:
        nonlocal rounds
        monitor(row)
        rounds += 1
        if rounds >= 8 and rounds.bit_count() == 1:  # 8, 16, 32, …
            for caution in troubles(run.folder.rows(), config):
                if (words := caution.partition(":")[0]) not in told:
                    told.add(words)
                    print(f"\nmara-train: warning: {caution}", file=sys.stderr)

    try:
        with (
            process.ends_deferred(lambda text: print(f"\nmara-train: {text}", file=sys.stderr)) as stop,
            Monitor(run.config.episodes, done, run.folder.tensorboard, quiet) as monitor,
        ):
            what = (run.task, run.config, run.folder, run.checkpoint, run.files)
            train(*what, on_round=on_round, stop=stop)
    except Exception:
        with suppress(Exception):  # the first error is the cause
            write_report(run.folder)
        raise
    write_report(run.folder)
    return monitor.episodes, cautions(run.folder.rows(), config)


if __name__ == "__main__":
    sys.exit(main())
