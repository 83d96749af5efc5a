"""`mara-eval`: how often aligned answers are preferred to a baseline's."""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mara_deploy.commands.scoring import add_score_options, judges, of_models
from mara_deploy.commands.shared import (
    Parser,
    add_decode_options,
    add_engine_options,
    add_template_option,
    decode_config,
    guarded,
    template_variables,
)
from mara_runtime.errors import MaraError, OptionError, PromptError
from mara_runtime.versions import installed

if TYPE_CHECKING:
    from mara_deploy.evaluate.answers import AnswerSource, PromptFormat
    from mara_deploy.prompts import Prompt
    from mara_runtime.config import DecodeConfig
    from mara_runtime.decoder import AlignedDecoder

EPILOG = """\
Answers and scores are kept in --out as they come: the same command goes on where an interrupted one stopped, and adding
a baseline or a score computes only what is new. docs/evaluation.md explains the measures.

examples:
  mara-eval BUNDLE --prompts prompts.txt --score my_scores:politeness
  mara-eval BUNDLE --prompts SafeRLHF/test.json --training-prompts SafeRLHF/train.json --baseline greedy \\
      --baseline best-of-8 --score REWARD_MODEL --score COST_MODEL --weight -1
  mara-eval BUNDLE --prompts prompts.jsonl --score my_scores:politeness --baseline ./my-model-after-dpo
"""
PACKAGES = ("mara-deploy", "numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-eval",
        "Compare aligned answers of a bundle with a baseline's, by scores: the preference rate\n"
        "(wins - losses) / (wins + ties + losses) over different prompts, with bootstrap intervals.",
        EPILOG,
    )
    options.add_argument("bundle", metavar="BUNDLE", help="folder made by mara-export")
    options.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="one prompt per line; .jsonl; a .json list of texts or of objects with `instruction`; or demo-final",
    )
    options.add_argument("--limit", type=int, metavar="N", help="draw N of the prompts, evenly")
    options.add_argument(
        "--group-by",
        metavar="KEY",
        help="key of the prompt file's objects that names related prompts (default: group, if it is there)",
    )
    options.add_argument(
        "--training-prompts", metavar="FILE", help="prompts the agent was trained on; those also asked here are named"
    )
    options.add_argument(
        "--skip-refused", action="store_true", help="leave out prompts that a side refuses, such as overlong ones"
    )
    options.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="B",
        help="greedy (default), sample or best-of-N: the bundle without its agent; or the folder or Hub id of another "
        "checkpoint, such as one after RLHF or DPO (may be repeated)",
    )
    options.add_argument(
        "--sample-checkpoint", action="store_true", help="sample from a checkpoint baseline instead of greedy decoding"
    )
    options.add_argument(
        "--temperature", dest="sampling_temperature", type=float, metavar="X",
        help="of baselines that sample, applied after --top-k and --top-p (default 1.0)",
    )  # fmt: skip
    options.add_argument(
        "--out", metavar="DIR", help="folder for answers, result.json and report.html (default: evaluations/<bundle>)"
    )
    options.add_argument("--examples", type=int, default=5, metavar="N", help="of each kind, in the report (default 5)")
    options.add_argument("--raw", action="store_true", help="take prompts as plain text, without the chat template")
    add_template_option(options)
    options.add_argument("--quiet", action="store_true", help="no progress, no summary")
    add_score_options(options)
    add_decode_options(options, plain=False)
    add_engine_options(options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if argv is None else argv
    return guarded(parser(), lambda args: _eval(args, given), argv)


def _eval(args: argparse.Namespace, argv: Sequence[str]) -> None:
    ways = _ways(args)

    from mara_deploy.evaluate.compare import Bootstrap
    from mara_deploy.evaluate.evaluate import evaluate
    from mara_deploy.evaluate.report import html, lines, result
    from mara_deploy.files import run_lock, write_file
    from mara_deploy.prompts import find_prompts, overlap, subset
    from mara_runtime.decoder import AlignedDecoder

    prompt_set = find_prompts(args.prompts, args.group_by)
    training = find_prompts(args.training_prompts) if args.training_prompts is not None else None
    decoder = AlignedDecoder(
        args.bundle,
        engine=args.engine,
        threads=args.threads,
        verify=not args.no_verify,
        report=lambda what: None if args.quiet else print(f"mara-eval: {what}", file=sys.stderr),
    )
    if decoder.text_side is None:
        raise MaraError(
            f"{args.bundle} has no tokenizer, so it cannot answer text prompts: export a model folder that has one"
        )
    contestants = _contestants(args.baseline or ["greedy"], decoder, ways)
    prompts, refused = _answerable(contestants, subset(prompt_set.prompts, args.limit), args.skip_refused)
    bundle = decoder.bundle
    out = _out(Path(args.out or Path("evaluations") / bundle.folder.resolve().name))
    bootstrap = Bootstrap()
    judging = judges(args.score, args.score_device, args.score_batch)
    with run_lock(out):
        found = evaluate(
            prompts,
            contestants[0],
            contestants[1:],
            judging,
            out,
            seen=overlap(prompts, training.prompts) if training else (),
            bootstrap=bootstrap,
            quiet=args.quiet,
        )
        manifest = bundle.manifest
        facts = {
            "command": shlex.join(["mara-eval", *argv]),
            "score": " ".join(f"{weight:+g} × {name}" for name, weight in found.weights.items()),
            "bundle": {
                "name": bundle.folder.resolve().name,
                "model": manifest.model.source,
                "revision": manifest.model.revision,
                "agent": manifest.agent.source,
                "fallback": ways.aligned.fallback or manifest.agent.fallback,
                "precision": manifest.step.precision,
                "engine": {**decoder.engine.describe(), "declined": decoder.declined},
            },
            "prompts": {
                "file": prompt_set.name,
                "read": len(prompt_set.prompts) + prompt_set.duplicates,
                "duplicates": prompt_set.duplicates,
                "refused": refused,
                "limit": args.limit,
                "unique": len(prompts),
                "training_file": training.name if training else None,
            },
            "decoding": {contestant.name: dict(contestant.settings) for contestant in contestants},
            "versions": {"python": platform.python_version(), **installed(*PACKAGES)},
        }
        summary = result(found, facts, bootstrap)
        write_file(out / "result.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        write_file(out / "report.html", html(found, summary, args.examples))
    if not args.quiet:
        print("\n".join(lines(summary)))
        print(f"{out / 'report.html'}")


class _Ways(NamedTuple):
    """How the sides decode."""

    aligned: DecodeConfig
    greedy: DecodeConfig
    sampled: DecodeConfig
    checkpoint: DecodeConfig
    asking: PromptFormat


def _ways(args: argparse.Namespace) -> _Ways:
    """The options of decoding. Raises OptionError."""
    from mara_deploy.evaluate.answers import PromptFormat

    if args.out == "":
        raise OptionError("--out is empty; leave it out for the default")
    for flag, value, least in (("--limit", args.limit, 1), ("--examples", args.examples, 0)):
        if value is not None and value < least:
            raise OptionError(f"{flag} is {value}; it must be at least {least}")
    of_models(args.score, args.score_device, args.score_batch)  # their checks
    sampling = [name for name in args.baseline if name == "sample" or _best_of(name) is not None]
    if args.sample_checkpoint and not set(args.baseline) - {"greedy", *sampling}:
        raise OptionError("--sample-checkpoint is given, but no --baseline is a checkpoint: leave it out")
    temperature = args.sampling_temperature
    if temperature is not None and not sampling and not args.sample_checkpoint:
        raise OptionError(f"--temperature is {temperature}, but no --baseline samples: leave it out")
    variables = template_variables(args.template)
    if variables and args.raw:
        raise OptionError("--template needs the chat template: leave out --raw")
    aligned = decode_config(args)
    # what chooses among the agent's verdicts has no part in plain decoding
    greedy = replace(aligned, align=False, strategy="top1", order="ranked", fallback=None, threshold=0.0)
    sampled = replace(greedy, sample=True, temperature=1.0 if temperature is None else temperature)
    return _Ways(
        aligned, greedy, sampled, sampled if args.sample_checkpoint else greedy, PromptFormat(args.raw, variables)
    )


def _answerable(contestants: Sequence[AnswerSource], prompts: Sequence[Prompt], skip: bool) -> tuple[list[Prompt], int]:
    """The prompts that every side takes, and how many one refuses. Raises PromptError at the first unless `skip`."""
    taken = []
    for number, prompt in enumerate(prompts, 1):
        try:
            for contestant in contestants:
                contestant.check(prompt.text)
        except PromptError as error:
            if not skip:
                raise PromptError(f"prompt {number}: {error}; or leave such prompts out with --skip-refused") from None
        else:
            taken.append(prompt)
    if not taken:
        raise PromptError("every prompt is refused: leave out --skip-refused to see why")
    return taken, len(prompts) - len(taken)


def _contestants(baselines: Sequence[str], decoder: AlignedDecoder, ways: _Ways) -> list[AnswerSource]:
    """The aligned side, then the baselines."""
    from mara_deploy.evaluate.answers import BundleAnswers
    from mara_deploy.evaluate.store import file_name

    found: list[AnswerSource] = [BundleAnswers("aligned", decoder, ways.aligned, ways.asking)]
    for name in baselines:
        samples = _best_of(name)
        if samples is not None and samples < 2:
            raise OptionError(f"--baseline is {name}; best-of-N needs an N of at least 2")
        if samples is not None:
            found.append(BundleAnswers(name, decoder, ways.sampled, ways.asking, samples=samples))
        elif name in ("greedy", "sample"):
            config = ways.greedy if name == "greedy" else ways.sampled
            found.append(BundleAnswers(name, decoder, config, ways.asking))
        else:
            found.append(_checkpoint(name, ways))
    names = [file_name(contestant.name) for contestant in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"two --baseline have the name {twice}: give each once, or rename a checkpoint's folder")
    return found


def _best_of(baseline: str) -> int | None:
    """The N of best-of-N."""
    found = re.fullmatch(r"best-of-(\d{1,4})", baseline)
    return int(found[1]) if found else None


def _checkpoint(name: str, ways: _Ways) -> AnswerSource:
    try:
        from mara_deploy.evaluate.checkpoint import CheckpointAnswers
        from mara_export.hf.checkpoint import silence_transformers
    except ImportError as error:
        raise MaraError(
            f"a checkpoint as baseline needs packages that are not installed ({error}): pip install "
            "'mara-deploy[train]', or compare with greedy, sample or best-of-N"
        ) from None
    from mara_export.errors import ModelError

    silence_transformers()
    try:
        return CheckpointAnswers(name, ways.checkpoint, ways.asking)
    except ModelError as error:
        raise OptionError(f"--baseline is {name!r}, which is not greedy, sample or best-of-N: {error}") from None


def _out(out: Path) -> Path:
    """The output folder: new, empty, or one of an earlier evaluation."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "answers").is_dir())):
        raise MaraError(f"{out} exists already and is not an evaluation: choose another --out")
    return out


if __name__ == "__main__":
    sys.exit(main())
