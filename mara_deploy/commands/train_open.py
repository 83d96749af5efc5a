"""What `mara-train` trains on: a run opened, new or resumed, before anything is written."""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mara_deploy import demo
from mara_deploy.commands.decoding import IGNORE_HELP, TEMPLATE_HELP, template_variables
from mara_deploy.commands.options import flags_given, given
from mara_deploy.commands.scoring import ScoreModelOptions, ScoreOption, judges, score_options
from mara_deploy.models import LORA_HELP, MODEL_HELP, find_adapter, find_model
from mara_deploy.train.config import CHANGEABLE, RECIPES, RUN_FILE, TrainConfig
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.options import Options, flag, option, required
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_deploy.prompts import Prompt
    from mara_deploy.scores.base import Combined, WeightedScore
    from mara_deploy.train.folder import Log, RunFolder
    from mara_deploy.train.replay import ReplayBuffer
    from mara_deploy.train.task import TrainingTask
    from mara_export.hf.sources import ModelSource

Say = Callable[[str], None]
"""Tells the user something, unless --quiet."""
_SCORE = ("spec", "weight", "template")


@dataclass(frozen=True)
class TrainArguments(Options):
    """What to train on, and where."""

    out: Path = required("folder of the run; must be new or empty unless --resume is given", metavar="DIR")
    model: str | None = option(None, MODEL_HELP, metavar="MODEL")
    lora: str | None = option(None, LORA_HELP, metavar="ADAPTER")
    prompts: str | None = option(
        None,
        "one prompt per line; .jsonl or a .json list of texts, conversations, or objects with them; or demo",
        metavar="FILE",
    )
    resume: bool = option(False, "continue the run in --out; some options may change")
    recipe: str | None = option(
        None, "defaults of the settings", choices=tuple(RECIPES), unset="demo for --model demo, else paper"
    )
    init_agent: str | None = option(
        None, "agent that a new run begins with: a file, HUB_ID:FILE, or demo", metavar="AGENT", unset="random weights"
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


def check_resumable(out: Path, args: argparse.Namespace) -> None:
    """Raise OptionError for options that would make a resumed run another one, MaraError if there is no run."""
    changeable = ("out", "resume", "quiet", "model", "lora", "device", "dtype", "threads")
    flags = flags_given(TrainArguments, args, exclude=changeable)
    flags += flags_given(TrainConfig, args, exclude=CHANGEABLE)
    if flags:
        can = ", ".join(flag(name) for name in ("model", "lora", "score", "device", *CHANGEABLE))
        raise OptionError(
            f"--resume continues the run, of which {can} and the like can change: leave out {', '.join(flags)}, or "
            "start a new run, which --init-agent lets begin with this run's agent"
        )
    if not (out / RUN_FILE).is_file():
        raise MaraError(f"{out} has no training run to resume: there is no {RUN_FILE}")


def new_config(arguments: TrainArguments, args: argparse.Namespace) -> TrainConfig:
    """The settings of a new run. Raises OptionError, also for other options that a new run cannot have."""
    for name, value in (("--model", arguments.model), ("--prompts", arguments.prompts), ("--score", args.score)):
        if not value:
            raise OptionError(f"{name} is missing: a new run needs --model, --prompts and --score")
    score_options(args)
    template_variables(arguments.template)
    recipe = RECIPES[arguments.recipe or ("demo" if arguments.model == demo.NAME else "paper")]
    settings = given(TrainConfig, args)
    if isinstance(most := settings.get("replay_transitions"), int):  # which the default must not exceed
        settings = {"start_transitions": max(1, min(most, recipe.start_transitions)), **settings}
    return replace(recipe, **settings)


def _describe(arguments: TrainArguments, args: argparse.Namespace, config: TrainConfig) -> dict[str, Any]:
    import torch

    packages = ("mara-deploy", "torch", "transformers", "numpy")
    return {
        "model": {"asked": arguments.model, "name": None, "revision": None},
        "lora": None if arguments.lora is None else {"asked": arguments.lora, "name": None, "revision": None},
        "prompts": {},
        "init_agent": arguments.init_agent,
        "score": None,
        **_scores(args),
        "template": template_variables(arguments.template),
        "ignore_weights": list(arguments.ignore_weights),
        "device": arguments.device,
        "dtype": arguments.dtype,
        "config": config.to_json(),
        "versions": {"python": platform.python_version(), **installed(*packages)},
        "threads": torch.get_num_threads() if arguments.threads is None else arguments.threads,
        "changes": [],
    }


def _scores(args: argparse.Namespace) -> dict[str, Any]:
    scores, device, batch = score_options(args)
    return {"scores": [asdict(score) for score in scores], "score_device": device, "score_batch": batch}


def _judges(facts: dict[str, Any]) -> list[WeightedScore]:
    """The scores of a run; device and fingerprints are recorded."""
    options = [ScoreOption(score["spec"], score["weight"], score["template"]) for score in facts["scores"]]
    loaded = judges(options, facts["score_device"], facts["score_batch"])
    for judge, score in zip(loaded, facts["scores"], strict=True):
        score["code or weights"] = judge.settings["code or weights"]
        facts["score_device"] = judge.settings.get("device", facts["score_device"])
    return loaded


class Run(NamedTuple):
    """A run that is ready to start or to continue."""

    folder: RunFolder
    facts: dict[str, Any]
    """contents of run.json"""
    config: TrainConfig
    task: TrainingTask
    checkpoint: dict[str, Any]
    files: tuple[ReplayBuffer, Log]


def begin(
    arguments: TrainArguments,
    args: argparse.Namespace,
    config: TrainConfig,
    lock: ExitStack,
    say: Say,
) -> Run:
    """A new run. Nothing is written if it cannot start."""
    from mara_deploy.files import run_lock
    from mara_deploy.models import find_agent
    from mara_deploy.prompts import find_prompts
    from mara_deploy.scores.base import Combined
    from mara_deploy.train.folder import RunFolder
    from mara_deploy.train.loop import first_checkpoint, open_files

    RunFolder.check_unused(arguments.out)
    agent, fixed = None, given(TrainConfig, args)
    if arguments.init_agent is not None:
        agent, _ = find_agent(arguments.init_agent, str(arguments.model))
        if fixed.get("widths", agent.widths) != agent.widths:
            raise OptionError(
                f"--widths is {config.widths}, but the agent of --init-agent has {agent.widths}: leave it out"
            )
        config = replace(config, widths=agent.widths)
    facts = _describe(arguments, args, config)
    score = Combined(_judges(facts))
    found = find_prompts(str(arguments.prompts), columns=score.columns)
    facts["prompts"] = {"source": found.name, "count": len(found.prompts), "remarks": list(found.remarks)}
    for remark in found.remarks:
        say(remark)
    task, room = _open(facts, found.prompts, score, config, fixed, say, None if agent is None else agent.hidden_size)
    place = next(path for path in (arguments.out.absolute(), *arguments.out.absolute().parents) if path.exists())
    fitted, task = task.fit(config, fixed, room, shutil.disk_usage(place).free)
    changed = [name for name, value in fitted.to_json().items() if value != config.to_json()[name]]
    if changed:
        settings = ", ".join(f"{flag(name)} {getattr(fitted, name)}" for name in changed)
        say(f"fitted to the model, the prompts and this machine: {settings}")
    facts["config"] = fitted.to_json()
    lock.enter_context(run_lock(arguments.out))
    checkpoint = first_checkpoint(task.hidden_size, fitted, agent)
    folder = RunFolder.new(arguments.out, facts, [prompt.to_json() for prompt in found.prompts], checkpoint)
    return Run(folder, facts, fitted, task, checkpoint, open_files(folder, fitted, checkpoint))


def resume(arguments: TrainArguments, args: argparse.Namespace, lock: ExitStack, say: Say) -> Run:
    """The run in --out, from its last checkpoint; what has changed is recorded in run.json."""
    from mara_deploy.files import run_lock
    from mara_deploy.prompts import read_prompts
    from mara_deploy.scores.base import Combined
    from mara_deploy.train.folder import RunFolder, damaged
    from mara_deploy.train.loop import open_files

    folder = RunFolder(arguments.out)
    lock.enter_context(run_lock(folder.path))
    facts = folder.run()
    try:
        config, before = TrainConfig.from_json(facts["config"]), _changeable(facts)
        prompts, _ = folder.prompts(facts), facts["changes"]
    except (AttributeError, KeyError, TypeError, OptionError) as error:
        raise damaged(folder.path / RUN_FILE, f"another version of mara-train wrote it: {error!r}") from None
    checkpoint = folder.load()
    done, fixed = checkpoint["progress"]["episodes"], given(TrainConfig, args)
    config = replace(config, **fixed)
    if config.episodes < done:
        raise OptionError(
            f"--episodes is {config.episodes}, but the run already has {done}: give a larger number, or leave it out"
        )
    files = open_files(folder, config, checkpoint)
    facts["config"] = config.to_json()
    for name in given(TrainArguments, args).keys() & {"device", "dtype", "threads"}:
        facts[name] = getattr(arguments, name)
    if arguments.model is not None:
        facts["model"]["asked"] = arguments.model
    if arguments.lora is not None:
        if facts["lora"] is None:
            raise OptionError("--lora is given, and the run was started without: start a new run")
        facts["lora"]["asked"] = arguments.lora
    args.score = args.score or [{name: score[name] for name in _SCORE} for score in facts["scores"]]
    scores = _scores(args)
    for name in scores.keys() - {"scores"} - given(ScoreModelOptions, args).keys():
        scores[name] = scores[name] and (facts[name] or scores[name])  # None where no score is a model
    facts |= scores
    score = Combined(_judges(facts))
    task, _ = _open(facts, read_prompts(prompts, columns=score.columns).prompts, score, config, fixed, say)
    now = _changeable(facts)
    for what in {**before, **now}:
        was, will = before.get(what), now.get(what)
        if was != will:
            say(f"changed since the run began: {what}, from {was} to {will}")
            facts["changes"].append({"episodes": done, "what": what, "from": was, "to": will})
    folder.describe(facts)
    return Run(folder, facts, config, task, checkpoint, files)


def _changeable(facts: dict[str, Any]) -> dict[str, Any]:
    """What may change when a run is resumed, as of run.json."""
    scores = {
        f"score {score['spec']}": ", ".join(f"{name} {value}" for name, value in score.items() if name != "spec")
        for score in facts["scores"]
    }
    options = {flag(name): facts[name] for name in ("device", "dtype", "threads", "score_device", "score_batch")}
    settings = {flag(name): facts["config"][name] for name in CHANGEABLE}
    lora = {} if facts["lora"] is None else {"--lora": facts["lora"]["asked"]}
    return {"--model": facts["model"]["asked"], **lora, **scores, **options, **settings}


def _open(
    facts: dict[str, Any],
    prompts: Sequence[Prompt],
    score: Combined,
    config: TrainConfig,
    fixed: Collection[str],
    say: Say,
    hidden_size: int | None = None,
) -> tuple[TrainingTask, int | None]:
    """Load what the run needs, and complete `facts`. Returns the task, and the longest answer that the scores read.

    fixed: settings given on the command line; hidden_size: of the agent to begin with.
    """
    import torch

    from mara_deploy.train.task import open_task, scored
    from mara_export.hf.checkpoint import read_config

    torch.set_num_threads(facts["threads"])
    source = _same_files(find_model, "model", facts)
    lora = None if facts["lora"] is None else _same_files(find_adapter, "lora", facts)
    if hidden_size not in (None, (own := read_config(source).hidden_size)):
        raise OptionError(f"the agent of --init-agent reads {hidden_size} values, but {source.name} has {own}")
    facts["score"] = score.name
    room = score.room([prompt.asked for prompt in prompts])
    scored(score, [max(prompts, key=lambda prompt: len(prompt.text))], ["Yes."], say)  # what fails does so now
    where = {name: facts[name] for name in ("device", "dtype", "template", "ignore_weights")}
    task = open_task(source, prompts, score, config, lora=lora, given=fixed, notify=say, **where)
    lm = task.environment.lm
    facts["device"], facts["dtype"] = str(lm.device), str(lm.dtype).removeprefix("torch.")
    return task, room


def _same_files(find: Callable[..., ModelSource], name: str, facts: dict[str, Any]) -> ModelSource:
    """What --model or --lora names, as it was when the run started; completes the facts of a new one."""
    from mara_deploy.files import fingerprint
    from mara_export.errors import ModelError

    known = facts[name]
    try:
        source = find(known["asked"], revision=known["revision"])
    except ModelError as error:
        if known["name"] is None:
            raise
        raise ModelError(f"{error}; {flag(name)} also takes its new place") from None
    files = None if source.revision else fingerprint(source.folder)  # reads all weights
    if known["name"] is not None and (source.revision, files) != (known["revision"], known["files"]):
        raise MaraError(f"the files of {source.name} have changed since the run started: start a new one")
    known |= {"name": source.name, "revision": source.revision, "files": files}
    return source
