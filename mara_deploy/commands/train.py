"""`mara-train`: train an accept/reject agent for a frozen LLM and a score."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mara_deploy import demo
from mara_deploy.commands.decoding import IGNORE_HELP, TEMPLATE_HELP, template_variables
from mara_deploy.commands.options import add_options, flags_given, from_args, given
from mara_deploy.commands.scoring import ScoreModelOptions, ScoreOption, add_score_options, judges, score_options
from mara_deploy.commands.shared import Parser, guarded, needs_extra
from mara_deploy.models import MODEL_HELP, find_model
from mara_deploy.train.config import RECIPES, TrainConfig
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.options import Options, option, required
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_deploy.scores.base import WeightedScore
    from mara_deploy.train.folder import RunFolder
    from mara_deploy.train.task import TrainingTask

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


@dataclass(frozen=True)
class TrainArguments(Options):
    """What to train on, and where."""

    out: Path = required("folder of the run; must be new or empty unless --resume is given", metavar="DIR")
    model: str | None = option(None, MODEL_HELP, metavar="MODEL")
    prompts: str | None = option(
        None,
        "one prompt per line; .jsonl; a .json list of texts or of objects with `instruction`; or demo",
        metavar="FILE",
    )
    resume: bool = option(False, "continue the run in --out")
    recipe: str | None = option(
        None, "defaults of the settings", choices=tuple(RECIPES), unset="demo for --model demo, else paper"
    )
    template: tuple[str, ...] = option((), TEMPLATE_HELP, metavar="KEY=JSON")
    ignore_weights: tuple[str, ...] = option((), IGNORE_HELP, metavar="PATTERN")
    device: str = option("auto", "device of the LLM: auto (CUDA if available), cpu, cuda", metavar="DEVICE")
    dtype: str = option(
        "auto",
        "data type of the LLM; auto: bfloat16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    threads: int | None = option(None, "CPU threads of PyTorch", least=1, unset="PyTorch's choice")
    quiet: bool = option(False, "suppress progress and summary")


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
        _reject_settings(args)
        config = None
    else:
        config = new_config(arguments, args)
    if not arguments.quiet:
        print("mara-train: loading PyTorch and transformers …", file=sys.stderr)
    with needs_extra("train", "training"):
        from mara_export.hf.checkpoint import silence_transformers
    silence_transformers()
    with ExitStack() as lock:
        run = _begin(arguments, args, config, lock) if config else _resume(arguments.out, args, lock)
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
        model = run.facts["model"]["asked"]
        print(f"mara-export --model {shlex.quote(model)} --agent {shlex.quote(str(agent))}", file=sys.stderr)


class _Run(NamedTuple):
    """A run that is ready to start or to continue."""

    folder: RunFolder
    facts: dict[str, Any]
    """contents of run.json"""
    config: TrainConfig
    task: TrainingTask
    checkpoint: dict[str, Any] | None = None
    done: int = 0
    """episodes of the checkpoint"""


def _begin(arguments: TrainArguments, args: argparse.Namespace, config: TrainConfig, lock: ExitStack) -> _Run:
    """A new run. Nothing is written if it cannot start."""
    from mara_deploy.files import run_lock
    from mara_deploy.prompts import find_prompts
    from mara_deploy.train.folder import RunFolder

    RunFolder.check_unused(arguments.out)
    prompts = [prompt.text for prompt in find_prompts(str(arguments.prompts)).prompts]
    facts = _describe(arguments, args, config, len(prompts))
    task = _open(facts, prompts, config)
    lock.enter_context(run_lock(arguments.out))
    return _Run(RunFolder.new(arguments.out, facts, prompts), facts, config, task)


def _resume(out: Path, args: argparse.Namespace, lock: ExitStack) -> _Run:
    """The run in `out`, from its last checkpoint."""
    from mara_deploy.files import run_lock
    from mara_deploy.train.folder import RunFolder

    folder = RunFolder.existing(out)
    lock.enter_context(run_lock(folder.path))
    facts, prompts, checkpoint = folder.run, folder.prompts, folder.load()
    done = checkpoint["progress"]["episodes"] if checkpoint else 0
    changes = given(TrainConfig, args)  # --episodes, or nothing
    config = replace(TrainConfig.from_json(facts["config"]), **changes)
    if changes and config.episodes < done:
        raise OptionError(
            f"--episodes is {config.episodes}, but the run already has {done}: give a larger number, or leave it out"
        )
    config.check_replay()
    task = _open(facts, prompts, config)
    folder.describe(facts)
    return _Run(folder, facts, config, task, checkpoint, done)


def _open(facts: dict[str, Any], prompts: list[str], config: TrainConfig) -> TrainingTask:
    """Load what the run needs, and complete `facts`."""
    import torch

    from mara_deploy.files import fingerprint
    from mara_deploy.scores.base import Combined
    from mara_deploy.train.task import open_task

    torch.set_num_threads(facts["threads"])
    model = facts["model"]
    source = find_model(model["asked"], revision=model["revision"])
    if model["name"] is not None and source.revision != model["revision"]:
        raise MaraError(f"{source.name} is at revision {source.revision}, but the run started with {model['revision']}")
    model |= {"name": source.name, "revision": source.revision}
    score = Combined(_judges(facts))
    facts["score"], facts["config"] = score.name, config.to_json()
    where = {name: facts[name] for name in ("device", "dtype", "template", "ignore_weights")}
    task = open_task(source, prompts, score, config, **where)
    files = None if source.revision else fingerprint(source.folder)  # reads all weights
    if model.get("files") not in (None, files):
        raise MaraError(f"the files of {source.name} have changed since the run started: start a new one")
    model["files"] = files
    lm = task.environment.lm
    facts["device"], facts["dtype"] = str(lm.device), str(lm.dtype).removeprefix("torch.")
    return task


def _run(run: _Run, quiet: bool) -> tuple[int, list[str]]:
    """Train, and write the report. Returns the number of episodes so far, and warnings about the agent."""
    from mara_deploy.train.cautions import cautions
    from mara_deploy.train.loop import train
    from mara_deploy.train.monitor import Monitor, deferred_interrupt
    from mara_deploy.train.report import write_report

    try:
        with (
            deferred_interrupt(lambda text: print(f"\nmara-train: {text}", file=sys.stderr)) as stop,
            Monitor(run.config.episodes, run.done, run.folder.tensorboard, quiet) as monitor,
        ):
            train(
                run.task,
                run.config,
                run.folder,
                checkpoint=run.checkpoint,
                on_round=monitor,
                stop=stop,
            )
    except MaraError:
        with suppress(MaraError):  # the first error is the cause
            write_report(run.folder)
        raise
    write_report(run.folder)
    return monitor.episodes, cautions(run.folder.rows(), run.config.to_json())


def _reject_settings(args: argparse.Namespace) -> None:
    """Raise OptionError for options that a resumed run takes from run.json."""
    flags = flags_given(TrainArguments, args, exclude=("out", "resume", "quiet"))
    flags += ["--score"] if args.score else []
    flags += flags_given(ScoreModelOptions, args) + flags_given(TrainConfig, args, exclude=("episodes",))
    if flags:
        raise OptionError(
            f"--resume continues with the run's own settings, except for --episodes; leave out {', '.join(flags)}"
        )


def new_config(arguments: TrainArguments, args: argparse.Namespace) -> TrainConfig:
    """The settings of a new run. Raises OptionError, also for other options that a new run cannot have."""
    for flag, value in (("--model", arguments.model), ("--prompts", arguments.prompts), ("--score", args.score)):
        if not value:
            raise OptionError(f"{flag} is missing: a new run needs --model, --prompts and --score")
    score_options(args)
    template_variables(arguments.template)
    recipe = arguments.recipe or ("demo" if arguments.model == demo.NAME else "paper")
    config = replace(RECIPES[recipe], **given(TrainConfig, args))
    config.check_replay()
    return config


def _describe(arguments: TrainArguments, args: argparse.Namespace, config: TrainConfig, prompts: int) -> dict[str, Any]:
    import torch

    scores, score_device, score_batch = score_options(args)
    packages = ("mara-deploy", "torch", "transformers", "numpy")
    return {
        "model": {"asked": arguments.model, "name": None, "revision": None},
        "prompts": {"source": Path(str(arguments.prompts)).name, "count": prompts},
        "score": None,
        "scores": [asdict(score) for score in scores],
        "score_device": score_device,
        "score_batch": score_batch,
        "template": template_variables(arguments.template),
        "ignore_weights": list(arguments.ignore_weights),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "config": config.to_json(),
        "versions": {"python": platform.python_version(), **installed(*packages)},
        "threads": torch.get_num_threads() if arguments.threads is None else arguments.threads,
    }


def _judges(run: dict[str, Any]) -> list[WeightedScore]:
    """The scores of a run, with their fingerprints recorded. Raises MaraError where one has changed since."""
    options = [ScoreOption(score["spec"], score["weight"], score["template"]) for score in run["scores"]]
    loaded = judges(options, run["score_device"], run["score_batch"])
    for judge, score in zip(loaded, run["scores"], strict=True):
        fingerprint = judge.settings["code or weights"]
        if score.setdefault("code or weights", fingerprint) != fingerprint:
            raise MaraError(
                f"the code or weights of the score {judge.score.name} have changed since the run started: restore "
                "them, or start a new run"
            )
    return loaded


if __name__ == "__main__":
    sys.exit(main())
