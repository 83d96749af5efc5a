"""`mara-eval`: how often aligned answers are preferred to those of a baseline."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.decoding import (
    BUNDLE_HELP,
    IGNORE_HELP,
    TEMPLATE_HELP,
    EngineOptions,
    decode_config,
    report_departures,
    template_variables,
)
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.scoring import add_score_options, judges, score_options
from mara_deploy.commands.shared import Parser, guarded, needs_extra
from mara_runtime.config import CONVERSATIONS, DecodeConfig
from mara_runtime.errors import MaraError, OptionError, PromptError
from mara_runtime.options import Options, option, required
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_deploy.evaluate.ability import Tasks
    from mara_deploy.evaluate.answers import AnswerSource, BundleAnswers, PromptFormat
    from mara_deploy.evaluate.compare import Preference
    from mara_deploy.evaluate.evaluate import Evaluation
    from mara_deploy.prompts import Prompt
    from mara_deploy.scores.base import Combined
    from mara_runtime.decoder import AlignedDecoder

EPILOG = """\
Answers and scores are saved to --out as they are computed: repeating the command continues an interrupted evaluation,
and an added baseline or score computes only what is new. docs/guide/evaluate.md explains the measures.

examples:
  mara-eval BUNDLE --prompts prompts.txt --score my_scores:politeness
  mara-eval BUNDLE --prompts SafeRLHF/test.json --training-prompts SafeRLHF/train.json --baseline greedy \\
      --baseline best-of-8 --score REWARD_MODEL --score COST_MODEL --weight -1
  mara-eval BUNDLE --prompts prompts.jsonl --score my_scores:politeness --baseline ./my-model-after-dpo
  mara-eval BUNDLE --prompts prompts.txt --score my_scores:politeness --lm-eval gsm8k --sweep -1 --sweep 1
"""
PACKAGES = ("mara-deploy", "numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")
BEST_OF = re.compile(r"best-of-(\d{1,4})")


@dataclass(frozen=True)
class EvalArguments(Options):
    """What to compare."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    prompts: str = required(
        "one prompt per line; .jsonl or a .json list of texts, conversations, or objects with them; or demo-final",
        metavar="FILE",
    )
    limit: int | None = option(None, "evaluate only N of the prompts, selected by hash", least=1)
    group_by: str | None = option(
        None,
        "key of the prompt file's objects that identifies related prompts",
        metavar="KEY",
        unset="group, if present",
    )
    training_prompts: str | None = option(
        None, "prompts the agent was trained on; the report names those evaluated here too", metavar="FILE"
    )
    skip_refused: bool = option(False, "skip prompts that one of the sides rejects, such as those that are too long")
    baseline: tuple[str, ...] = option(
        ("greedy",),
        "greedy, sample or best-of-N: the bundle's LLM alone; or the folder or Hub id of another checkpoint, "
        "such as one after RLHF or DPO",
        metavar="BASELINE",
    )
    sample_checkpoint: bool = option(False, "sample from checkpoint baselines instead of greedy decoding")
    ignore_weights: tuple[str, ...] = option((), f"checkpoint baselines: {IGNORE_HELP}", metavar="PATTERN")
    temperature: float | None = option(
        None, "softmax temperature of baselines that sample, applied after --top-k and --top-p", above=0, unset="1.0"
    )
    out: Path | None = option(
        None, "folder for answers, result.json and report.html", metavar="DIR", unset="evaluations/<bundle>"
    )
    examples: int = option(5, "examples of each kind in the report", least=0)
    raw: bool = option(False, "use prompts as plain text, without the chat template")
    template: tuple[str, ...] = option((), TEMPLATE_HELP, metavar="KEY=JSON")
    sweep: tuple[float, ...] = option(
        (), "another threshold at which to measure the preference rate, and the tasks of --lm-eval", metavar="THRESHOLD"
    )
    lm_eval: tuple[str, ...] = option(
        (), "task of lm-eval that generates, as gsm8k: shows whether alignment costs ability", metavar="TASK"
    )
    lm_eval_folder: Path | None = option(None, "task files of your own for --lm-eval", metavar="DIR")
    lm_eval_limit: int | None = option(None, "answer only the first N documents of a task", least=1)
    conversations: int = option(
        CONVERSATIONS, "answers of the bundle decoded at once; with 1 they repeat to the last bit", least=1
    )
    quiet: bool = option(False, "suppress progress and summary")

    def __post_init__(self) -> None:
        super().__post_init__()
        sampling = {name for name in self.baseline if _samples(name) is not None}
        for flag, value in (("--sample-checkpoint", self.sample_checkpoint), ("--ignore-weights", self.ignore_weights)):
            if value and not set(self.baseline) - {"greedy", *sampling}:
                raise OptionError(f"{flag} is given, but no --baseline is a checkpoint; leave it out")
        for flag, given in (("--lm-eval-folder", self.lm_eval_folder), ("--lm-eval-limit", self.lm_eval_limit)):
            if given is not None and not self.lm_eval:
                raise OptionError(f"{flag} is given, but no --lm-eval; leave it out")
        if self.temperature is not None and not sampling and not self.sample_checkpoint:
            raise OptionError(f"--temperature is {self.temperature}, but no --baseline samples; leave it out")
        if self.template and self.raw:
            raise OptionError("--template needs the chat template: leave out --raw")
        for name in self.baseline:
            if name != "sample" and _samples(name) in (0, 1):
                raise OptionError(f"--baseline is {name}; the N of best-of-N must be at least 2")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-eval",
        "Compare a bundle's aligned answers with those of baselines, by scores: the preference rate\n"
        "(wins - losses) / (wins + ties + losses) over distinct prompts, with bootstrap confidence intervals.",
        EPILOG,
    )
    add_options(options, EvalArguments)
    add_score_options(options)
    add_options(options.add_argument_group("decoding"), DecodeConfig, exclude=("align", "sample", "temperature"))
    add_options(options.add_argument_group("engine"), EngineOptions)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(parser(), lambda args: _eval(args, given), argv)


def _eval(args: argparse.Namespace, argv: Sequence[str]) -> None:
    arguments, engine = from_args(EvalArguments, args), from_args(EngineOptions, args)
    scores, device, batch = score_options(args)
    config, variables = decode_config(args), template_variables(arguments.template)

    from mara_deploy.evaluate.ability import measure
    from mara_deploy.evaluate.answers import PromptFormat
    from mara_deploy.evaluate.compare import Bootstrap
    from mara_deploy.evaluate.evaluate import evaluate
    from mara_deploy.evaluate.report import html, lines, result
    from mara_deploy.files import run_lock, write_file
    from mara_deploy.prompts import find_prompts, overlap, subset
    from mara_deploy.scores.base import Combined

    prompt_format = PromptFormat(arguments.raw, variables)
    training = None if arguments.training_prompts is None else find_prompts(arguments.training_prompts)
    weighted = judges(scores, device, batch)
    judge = Combined(weighted)
    prompt_set = find_prompts(arguments.prompts, arguments.group_by, judge.columns)

    def report(message: str) -> None:
        if not arguments.quiet:
            print(f"mara-eval: {message}", file=sys.stderr)

    for remark in prompt_set.remarks:
        report(remark)
    decoder = engine.open(arguments.bundle, report)
    if decoder.text_side is None:
        raise MaraError(
            f"{arguments.bundle} has no tokenizer, so it cannot answer text prompts: export a model folder that has one"
        )
    config = decoder.resolve(config)
    tasks = _tasks(arguments)
    of_bundle = _of_bundle(arguments, decoder, config, prompt_format)
    sources = _answer_sources(arguments, config, prompt_format, of_bundle)
    prompts, refused = _answerable(sources, subset(prompt_set.prompts, arguments.limit), arguments.skip_refused)
    report_departures(decoder, config, None if arguments.raw else variables)
    bundle = decoder.bundle
    out = _require_evaluation(arguments.out or Path("evaluations") / bundle.folder.resolve().name)
    room = _try_scores(judge, prompts)
    if room is not None and room < config.max_new_tokens:
        report(f"a score reads {room} tokens of an answer to the longest prompt: a longer answer ends the command")
    bootstrap = Bootstrap()
    seen = overlap(prompts, training.prompts) if training else ()

    def compared(aligned: AnswerSource, baselines: Sequence[AnswerSource]) -> Evaluation:
        options: dict[str, Any] = {"seen": seen, "bootstrap": bootstrap, "quiet": arguments.quiet}
        return evaluate(prompts, aligned, baselines, weighted, out, **options)

    def rate(aligned: BundleAnswers) -> Preference:
        return compared(aligned, sources[1:2]).comparisons[sources[1].name].combined

    with run_lock(out):
        evaluation = compared(sources[0], sources[1:])
        points = []
        if tasks or arguments.sweep:
            points = measure(decoder, config, arguments.sweep, of_bundle, rate, tasks, out / "lm-eval", report)
        manifest = bundle.manifest
        facts = {
            "command": shlex.join(["mara-eval", *argv]),
            "score": " ".join(f"{weight:+g} × {name}" for name, weight in evaluation.weights.items()),
            "bundle": {
                "name": bundle.folder.resolve().name,
                "model": manifest.model.name,
                "revision": manifest.model.revision,
                "agents": [
                    {"name": name, "part": part, "source": manifest.agent(name).source}
                    for name, part in (config.agents or {}).items()
                ],
                "fallback": config.fallback,
                "precision": manifest.step.precision,
                "engine": {**decoder.engine.describe(), "declined": decoder.declined},
            },
            "prompts": {
                "file": prompt_set.name,
                "read": len(prompt_set.prompts) + prompt_set.duplicates,
                "duplicates": prompt_set.duplicates,
                "remarks": list(prompt_set.remarks),
                "refused": refused,
                "limit": arguments.limit,
                "unique": len(prompts),
                "training_file": training.name if training else None,
            },
            "trade_off": [asdict(point) for point in points],
            "decoding": {source.name: dict(source.settings) for source in sources},
            "versions": {"python": platform.python_version(), **installed(*PACKAGES)},
        }
        summary = result(evaluation, facts, bootstrap)
        write_file(out / "result.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_file(out / "report.html", html(evaluation, summary, arguments.examples))
    if not arguments.quiet:
        print("\n".join(lines(summary)))
        print(f"{out / 'report.html'}")


def _answerable(sources: Sequence[AnswerSource], prompts: Sequence[Prompt], skip: bool) -> tuple[list[Prompt], int]:
    """The prompts that every side accepts, and the number of the others. Raises PromptError for those unless `skip`."""
    accepted = []
    for number, prompt in enumerate(prompts, 1):
        try:
            for source in sources:
                source.check(prompt.asked)
        except PromptError as error:
            if not skip:
                raise PromptError(f"prompt {number}: {error}; or skip such prompts with --skip-refused") from None
        else:
            accepted.append(prompt)
    if not accepted:
        raise PromptError("every prompt was rejected: leave out --skip-refused to see why")
    return accepted, len(prompts) - len(accepted)


def _try_scores(score: Combined, prompts: Sequence[Prompt]) -> int | None:
    """Call the scores once, so that what fails does so now. Returns the tokens of the longest answer that they read."""
    first = prompts[0]
    score.detail([first.asked], ["Yes."], **{name: [first.columns[name]] for name in score.columns})
    return score.room([prompt.asked for prompt in prompts])


def _tasks(arguments: EvalArguments) -> Tasks | None:
    """The tasks of `--lm-eval`. Raises OptionError."""
    if not arguments.lm_eval:
        return None
    from mara_deploy.evaluate.ability import Tasks

    with needs_extra("eval", "--lm-eval"):
        return Tasks(arguments.lm_eval, arguments.lm_eval_folder, arguments.lm_eval_limit, arguments.raw)


def _of_bundle(
    arguments: EvalArguments, decoder: AlignedDecoder, config: DecodeConfig, prompt_format: PromptFormat
) -> Callable[..., BundleAnswers]:
    """(name, configuration, samples=1) → answers of the bundle, all with the template's variables of the aligned."""
    from mara_deploy.evaluate.answers import BundleAnswers

    ours = replace(
        prompt_format, template=None if prompt_format.raw else decoder.variables(prompt_format.template, config.agents)
    )
    return lambda name, config, samples=1: BundleAnswers(name, decoder, config, ours, samples, arguments.conversations)


def _answer_sources(
    arguments: EvalArguments,
    config: DecodeConfig,
    prompt_format: PromptFormat,
    of_bundle: Callable[..., AnswerSource],
) -> list[AnswerSource]:
    """The aligned side, then the baselines, which share all of its settings but those of the agent."""
    from mara_deploy.evaluate.ability import at
    from mara_deploy.evaluate.store import file_name

    greedy = at(config, None)
    sampled = replace(greedy, sample=True, temperature=arguments.temperature or 1.0)
    sources = [of_bundle("aligned", config)]
    for name in arguments.baseline:
        if name == "greedy":
            sources.append(of_bundle(name, greedy))
        elif (samples := _samples(name)) is not None:
            sources.append(of_bundle(name, sampled, samples))
        else:
            checkpoint = sampled if arguments.sample_checkpoint else greedy
            sources.append(_checkpoint(name, checkpoint, prompt_format, arguments.ignore_weights))
    names = [file_name(source.name) for source in sources]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"--baseline {duplicate} is given twice: give each once, or rename a checkpoint's folder")
    return sources


def _samples(baseline: str) -> int | None:
    """Answers per prompt of a baseline that samples from the bundle; None: it does not."""
    if match := BEST_OF.fullmatch(baseline):
        return int(match[1])
    return 1 if baseline == "sample" else None


def _checkpoint(name: str, config: DecodeConfig, prompt_format: PromptFormat, ignored: Sequence[str]) -> AnswerSource:
    with needs_extra("train", "a checkpoint as a baseline"):
        from mara_deploy.evaluate.checkpoint import CheckpointAnswers
        from mara_export.hf.checkpoint import silence_transformers
    from mara_export.errors import ModelError

    silence_transformers()
    try:
        return CheckpointAnswers(name, config, prompt_format, ignored)
    except ModelError as error:
        raise OptionError(f"--baseline is {name!r}, which is not greedy, sample or best-of-N: {error}") from None


def _require_evaluation(out: Path) -> Path:
    """The output folder, if it is new, empty, or an evaluation's. Raises MaraError."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "answers").is_dir())):
        raise MaraError(f"{out} exists already and is not an evaluation: choose another --out")
    return out


if __name__ == "__main__":
    sys.exit(main())
