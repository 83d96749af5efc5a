"""`mara-train`: an accept/reject agent for a frozen LLM and a score."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mara_deploy.commands.scoring import ScoreOption, add_score_options, judges, of_models
from mara_deploy.commands.shared import Parser, add_template_option, guarded, template_variables
from mara_deploy.train.config import RECIPES, TrainConfig, flag
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_deploy.scores.base import WeightedScore
    from mara_deploy.train.folder import RunFolder
    from mara_deploy.train.task import TrainingTask
    from mara_export.hf.sources import ModelSource

EPILOG = """\
--weight and --score-template apply to the --score before them. A run that was interrupted, or ended, goes on with
--resume; more --episodes may be asked for. docs/training.md explains the method, the files and the settings.

examples:
  mara-train --model demo --prompts demo --score demo --out demo-agent
  mara-train --model llama3.2-1b --prompts prompts.json --score my_scores:politeness --out polite
  mara-train --model mistral --prompts SafeRLHF/train.json --out safe \\
      --score REWARD_MODEL --weight 2 --score COST_MODEL --weight=-1
  mara-train --resume --out safe
"""
SETTINGS = {
    "episodes": "answers to train on",
    "prompts_at_once": "answers in progress at the same time; the agent learns after each such round",
    "max_new_tokens": "longest answer, in tokens",
    "top_k": "most candidates at a position",
    "top_p": "nucleus of the candidates, applied after --top-k",
    "widths": "of the agent's two hidden layers",
    "fallback": "recorded with the agent: what it emits when it rejects everything, first or last",
    "kl_weight": "price of a nat of divergence from the LLM, in units of the score",
    "score_baseline": "subtracted from every score",
    "discount": "γ, per transition",
    "n_step": "n of the n-step return",
    "target_entropy": "of the policy, as a fraction of ln 2",
    "batch": "batch size, in transitions",
    "updates_per_episode": "gradient steps",
    "start_transitions": "collected before learning begins",
    "replay_transitions": "replay capacity, in transitions",
    "learning_rate": "of actor and critics",
    "clip_norm": "largest gradient norm, of actor and critics each",
    "target_rate": "τ, how far an update moves the target critics towards the critics",
    "alpha": "entropy temperature at the start",
    "alpha_rate": "learning rate of the temperature; 0 keeps it fixed",
    "alpha_form": "log: learn the logarithm of the temperature; direct: the temperature itself",
    "seed": "of weights, prompts, actions and batches",
    "checkpoint_minutes": "minutes between checkpoints",
}
"""Help of the options that set a field of TrainConfig."""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-train",
        "Train an accept/reject agent for a frozen LLM by discrete soft actor-critic, rewarded by a score of answers.",
        EPILOG,
    )
    options.add_argument("--model", metavar="M", help="demo, an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder")
    options.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt per line; .jsonl; a .json list of texts or of objects with `instruction`; or demo",
    )
    options.add_argument("--out", required=True, metavar="DIR", help="folder of the run; new or empty, or see --resume")
    options.add_argument("--resume", action="store_true", help="go on with the run in --out")
    options.add_argument("--recipe", choices=("paper", "demo"), help="defaults of the settings (demo for --model demo)")
    add_template_option(options)
    options.add_argument("--device", metavar="D", help="auto (default: CUDA if there is any), cpu, cuda")
    options.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the LLM (default: bfloat16 on CUDA, else float32)",
    )
    options.add_argument("--threads", type=int, metavar="N", help="torch CPU threads (default: torch's own choice)")
    options.add_argument("--quiet", action="store_true", help="no progress, no summary")
    add_score_options(options)

    settings = options.add_argument_group("settings, with the defaults of the paper and of the demo's recipe")
    for name, default in _defaults().items():
        kind: dict[str, Any] = {"type": type(default[0]), "metavar": "N" if type(default[0]) is int else "X"}
        if isinstance(default[0], tuple):
            kind = {"type": int, "nargs": 2, "metavar": ("N", "N")}
        shown = [" ".join(map(str, d)) if isinstance(d, tuple) else str(d) for d in default]
        settings.add_argument(
            flag(name),
            default=None,
            help=f"{SETTINGS[name]} ({', '.join(dict.fromkeys(shown))})",
            **kind,
        )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _train, argv)


def _train(args: argparse.Namespace) -> None:
    config = _config(args)  # what can be wrong with the options is found before torch is loaded
    if not args.quiet:
        print("mara-train: loading PyTorch and transformers …", file=sys.stderr)
    _load_packages()
    with ExitStack() as folder_held:
        run = _resume(args, folder_held) if args.resume else _begin(args, config, folder_held)
        done, told = _run(run, args.quiet)
    if done < run.config.episodes:
        raise MaraError(
            f"interrupted after {done} of {run.config.episodes} episodes, and saved: "
            f"mara-train --resume --out {args.out}"
        )
    for caution in told:  # also with --quiet: it is no summary
        print(f"mara-train: warning: {caution}", file=sys.stderr)
    if not args.quiet:
        print(f"{args.out}/agent.safetensors   report: {args.out}/report.html", file=sys.stderr)
    if not args.quiet and not told:
        model = run.facts["model"]["asked"]
        agent = shlex.quote(f"{args.out}/agent.safetensors")
        print(f"mara-export --model {shlex.quote(model)} --agent {agent}", file=sys.stderr)


def _load_packages() -> None:
    try:
        import mara_deploy.train.monitor
        import mara_deploy.train.report  # noqa: F401
    except ImportError as error:
        raise MaraError(
            f"training needs packages that are not installed ({error}): pip install 'mara-deploy[train]'"
        ) from None
    from mara_export.hf.checkpoint import silence_transformers

    silence_transformers()


class _Run(NamedTuple):
    """A run that is ready to go, or to go on."""

    folder: RunFolder
    facts: dict[str, Any]
    """what run.json says"""
    config: TrainConfig
    task: TrainingTask
    checkpoint: dict[str, Any] | None


def _begin(args: argparse.Namespace, config: TrainConfig, folder_held: ExitStack) -> _Run:
    """A new run. Nothing is written if it cannot begin."""
    from mara_deploy.files import run_lock
    from mara_deploy.prompts import find_prompts
    from mara_deploy.train.folder import RunFolder

    out = Path(args.out)
    RunFolder.check_unused(out)
    prompts = [prompt.text for prompt in find_prompts(args.prompts).prompts]
    facts = _describe(args, config, len(prompts))
    task = _open(facts, prompts, config)
    folder_held.enter_context(run_lock(out))
    return _Run(RunFolder.new(out, facts, prompts), facts, config, task, None)


def _resume(args: argparse.Namespace, folder_held: ExitStack) -> _Run:
    """The run in --out, as of its last checkpoint."""
    from mara_deploy.files import run_lock
    from mara_deploy.train.folder import RunFolder

    folder = RunFolder.existing(Path(args.out))
    folder_held.enter_context(run_lock(folder.path))
    facts, prompts, checkpoint = folder.run, folder.prompts, folder.load()
    config = _resumed(args, facts, _episodes(checkpoint))
    task = _open(facts, prompts, config)
    folder.describe(facts)
    return _Run(folder, facts, config, task, checkpoint)


def _open(facts: dict[str, Any], prompts: list[str], config: TrainConfig) -> TrainingTask:
    """Load what the run needs, and complete its facts."""
    import torch

    from mara_deploy.files import fingerprint
    from mara_deploy.scores.base import Combined
    from mara_deploy.train.task import open_task

    torch.set_num_threads(facts["threads"])
    model = facts["model"]
    source = _source(model["asked"], model["revision"])
    if model["name"] is not None and source.revision != model["revision"]:
        raise MaraError(f"{source.name} is at revision {source.revision}, but the run began with {model['revision']}")
    model |= {"name": source.name, "revision": source.revision}
    score = Combined(_judges(facts))
    facts["score"], facts["config"] = score.name, config.to_json()
    where = {name: facts[name] for name in ("device", "dtype", "template")}
    task = open_task(source, prompts, score, config, **where)
    files = None if source.revision else fingerprint(source.folder)  # it reads the weights through
    if model.get("files") not in (None, files):
        raise MaraError(f"the files of {source.name} have changed since the run began: begin a new one")
    model["files"] = files
    lm = task.environment.lm
    facts["device"], facts["dtype"] = str(lm.device), str(lm.dtype).removeprefix("torch.")
    return task


def _run(run: _Run, quiet: bool) -> tuple[int, list[str]]:
    """Train, and write the report. Returns the episodes made so far, and what to know of the agent."""
    from mara_deploy.train.cautions import cautions
    from mara_deploy.train.loop import train
    from mara_deploy.train.monitor import Monitor, deferred_interrupt
    from mara_deploy.train.report import write_report

    by = f"mara-deploy {installed('mara-deploy')['mara-deploy']}"
    told = {"model": run.facts["model"]["name"], "score": run.facts["score"], "trained_by": by}
    try:
        with (
            deferred_interrupt(lambda text: print(f"\nmara-train: {text}", file=sys.stderr)) as stop,
            Monitor(run.config.episodes, _episodes(run.checkpoint), run.folder.tensorboard, quiet) as monitor,
        ):
            train(
                run.task, run.config, run.folder, checkpoint=run.checkpoint, on_round=monitor, stop=stop, metadata=told
            )
    except MaraError:
        with suppress(MaraError):  # the first is the cause
            write_report(run.folder)
        raise
    write_report(run.folder)
    return monitor.episodes, cautions(run.folder.rows(), run.config.to_json())


def _episodes(checkpoint: dict[str, Any] | None) -> int:
    return 0 if checkpoint is None else int(checkpoint["progress"]["episodes"])


def _defaults() -> dict[str, tuple[Any, ...]]:
    """{field of TrainConfig: its values in the recipes}."""
    return {f.name: tuple(getattr(recipe, f.name) for recipe in RECIPES.values()) for f in fields(TrainConfig)}


def _given(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _config(args: argparse.Namespace) -> TrainConfig:
    if args.out == "":
        raise OptionError("--out is empty: name the folder of the run")
    if args.threads is not None and args.threads < 1:
        raise OptionError(f"--threads is {args.threads}; it must be at least 1")
    if args.resume:
        taken = {"--model": args.model, "--prompts": args.prompts, "--score": args.score, "--recipe": args.recipe}
        given = [option for option, value in taken.items() if value]
        given += [flag(name) for name in _given(args) if name != "episodes"]
        given += ["--template"] * bool(args.template)
        machine = ("threads", "device", "dtype", "score_device", "score_batch")
        given += [flag(name) for name in machine if getattr(args, name) is not None]
        if given:
            raise OptionError(f"--resume takes everything but --episodes from the run: leave out {', '.join(given)}")
        return RECIPES["paper"]  # the run's own settings are read later
    for option, value in (("--model", args.model), ("--prompts", args.prompts), ("--score", args.score)):
        if not value:
            raise OptionError(f"{option} is missing: a new run needs --model, --prompts and --score")
    of_models(args.score, args.score_device, args.score_batch)  # their checks
    recipe = args.recipe or ("demo" if args.model == "demo" else "paper")
    config = replace(RECIPES[recipe], **_given(args))
    config.check_replay()
    return config


def _resumed(args: argparse.Namespace, run: dict[str, Any], done: int) -> TrainConfig:
    """The settings of the run in --out, with more episodes than the `done` ones if they were asked for."""
    if args.episodes is not None and args.episodes < done:
        raise OptionError(f"--episodes is {args.episodes}, but the run has made {done}: ask for more, or leave it out")
    if "score_device" not in run:
        raise MaraError(f"{args.out} was begun by an earlier mara-train, which recorded too little: begin a new run")
    config = TrainConfig.from_json(run["config"])
    if args.episodes is not None:
        config = replace(config, episodes=args.episodes)
        config.check_replay()
    return config


def _describe(args: argparse.Namespace, config: TrainConfig, prompts: int) -> dict[str, Any]:
    import torch

    score_device, score_batch = of_models(args.score, args.score_device, args.score_batch)
    packages = ("mara-deploy", "torch", "transformers", "numpy")
    return {
        "model": {"asked": args.model, "name": None, "revision": None},
        "prompts": {"source": Path(args.prompts).name, "count": prompts},
        "score": None,
        "scores": [asdict(option) for option in args.score],
        "score_device": score_device,
        "score_batch": score_batch,
        "template": template_variables(args.template),
        "device": "auto" if args.device is None else args.device,
        "dtype": "auto" if args.dtype is None else args.dtype,
        "config": config.to_json(),
        "versions": {"python": platform.python_version(), **installed(*packages)},
        "threads": torch.get_num_threads() if args.threads is None else args.threads,
    }


def _source(name: str, revision: str | None) -> ModelSource:
    from mara_deploy.demo import MODEL_FOLDER
    from mara_export.hf.sources import ModelSource, resolve_model

    return ModelSource(MODEL_FOLDER, "demo", None) if name == "demo" else resolve_model(name, revision=revision)


def _judges(run: dict[str, Any]) -> list[WeightedScore]:
    """The scores of a run, whose fingerprints it keeps. Raises MaraError where one has changed since."""
    options = [ScoreOption(of["spec"], of["weight"], of["template"]) for of in run["scores"]]
    found = judges(options, run["score_device"], run["score_batch"])
    for judge, of in zip(found, run["scores"], strict=True):
        now = (judge.settings or {})["code or weights"]
        if of.setdefault("code or weights", now) != now:
            raise MaraError(
                f"the code or weights of the score {judge.score.name} have changed since the run began: restore "
                "them, or begin a new run"
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
