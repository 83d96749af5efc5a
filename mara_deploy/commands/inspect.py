"""`mara-inspect`: what a bundle contains, and whether it is intact; what a trace of `mara-run` shows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mara_deploy.commands.decoding import BUNDLE_HELP
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded, print_json
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.manifest import AdapterFacts, AgentFacts, Manifest, ModelFacts
from mara_runtime.options import Options, option, required
from mara_runtime.reports import AGENT_NUMBERS, AGENT_OUTCOMES, MODEL_NUMBERS, MODEL_OUTCOMES
from mara_runtime.training import Training

EPILOG = """\
examples:
  mara-inspect BUNDLE
  mara-inspect BUNDLE --json
  mara-run BUNDLE --prompt "How do I cook rice?" --trace t.jsonl --beside-plain
  mara-inspect t.jsonl --html t.html
"""

OUTCOMES = {
    "first": ("best token", "that lead by"),
    "ranks": ("40 best tokens", "apart from their neighbours by"),
    "decisions": ("decisions", "decided by"),
}
"""Of the parity report: the name of each outcome, and the gap that it must exceed to count."""


@dataclass(frozen=True)
class InspectArguments(Options):
    """What to inspect."""

    bundle: str = required(
        f"{BUNDLE_HELP}, or a trace file of mara-run --trace", metavar="BUNDLE|TRACE", positional=True
    )
    html: Path | None = option(
        None, "of a trace: write a page that shows each token with its candidates, in one file", metavar="FILE"
    )
    json: bool = option(False, "print the manifest as JSON")
    require_signature: Path | None = option(
        None, "public key: refuse a bundle that its owner has not signed with mara-sign", metavar="KEY"
    )


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-inspect",
        "Show what a bundle contains, and verify every file's checksum; or show the decisions in a trace.",
        EPILOG,
    )
    add_options(options, InspectArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _inspect, argv)


def _inspect(args: argparse.Namespace) -> None:
    arguments = from_args(InspectArguments, args)
    if Path(arguments.bundle).is_file():
        _inspect_trace(arguments)
        return
    if arguments.html is not None:
        raise OptionError(f"--html is given, and {arguments.bundle} is no trace file: leave it out")
    bundle = Bundle.open(arguments.bundle, require_signature=arguments.require_signature)
    for name in bundle.unlisted():
        print(f"mara-inspect: {name!a} is not listed in the manifest: no command reads it", file=sys.stderr)
    if arguments.json:
        print_json(json.loads(bundle.manifest.to_json()))
    else:
        print("\n".join(summary(bundle)))
        print("intact    every file has the size and sha256 of the manifest")


def _inspect_trace(arguments: InspectArguments) -> None:
    from mara_deploy.files import write_file
    from mara_deploy.see import summary as traced
    from mara_deploy.see.reader import read_trace

    for flag, given in (("--json", arguments.json), ("--require-signature", arguments.require_signature is not None)):
        if given:
            raise OptionError(f"{flag} is given, and {arguments.bundle} is a trace, not a bundle: leave it out")
    answers = read_trace(Path(arguments.bundle))
    print("\n".join(traced.summary(answers)))
    if arguments.html is not None:
        from mara_deploy.see.trace_page import trace_page

        write_file(arguments.html, trace_page(answers, Path(arguments.bundle).name))
        print(arguments.html, file=sys.stderr)


def summary(bundle: Bundle) -> list[str]:
    """A bundle in about a dozen lines."""
    m = bundle.manifest
    shape = m.model.shape
    total = sum(entry.size_bytes for entry in m.files.values())
    text = (
        "none: token ids only"
        if m.tokenizer is None
        else "yes, " + ("with a chat template" if m.tokenizer.chat_template else "without a chat template")
    )
    lines = [
        f"bundle    {bundle.folder}  ({total / 1e6:.1f} MB)",
        f"model     {_source(m.model)}",
        *_adapter(m.model.adapter),
        f"          {m.model.architecture}{'' if m.model.tested else ' (untested)'}, {shape.num_layers} layers, "
        f"hidden size {shape.hidden_size}, vocabulary {shape.vocab_size}, ends at {list(m.model.eos_token_ids)}",
        *([f"          without weights {', '.join(m.model.ignored_weights)}"] if m.model.ignored_weights else []),
        *(line for agent in m.agents for line in _agent(m, agent)),
        *([] if m.agents else ["agent     none: mara-agent adds one"]),
        f"graph     {m.step.precision}{_quantised(m.step.quantisation)}, lowering {m.step.lowering}, "
        f"for {', '.join(m.targets)}",
        *(
            f"engine    {e.target} {e.version} for compute capability {e.compute_capability} on {e.platform}: "
            f"{e.slots} KV slots, {m.files[e.file].size_bytes / 1e6:.1f} MB"
            for e in m.engines
        ),
        f"capacity  {m.max_context} tokens of prompt and answer, {m.max_candidates} candidates",
        f"tokenizer {text}",
        "made with " + ", ".join(f"{name} {version}" for name, version in m.made_with.items()),
    ]
    return lines + structure_lines(m.structure) + parity_lines(m.parity)


def _source(facts: ModelFacts | AdapterFacts) -> str:
    return facts.source + (f" @ {facts.revision}" if facts.revision else "")


def _adapter(adapter: AdapterFacts | None) -> list[str]:
    if adapter is None:
        return []
    base = "" if adapter.base is None else f", trained on {adapter.base}"
    return [f"          with the adapter {_source(adapter)}{base}: {adapter.weights} weights, rank {adapter.rank}"]


def _agent(manifest: Manifest, agent: AgentFacts) -> list[str]:
    return [
        f"agent     {agent.name}, from {agent.source}: {agent.hidden_size} → {' → '.join(map(str, agent.widths))} → 2, "
        f"falls back to the {agent.fallback} candidate",
        *_training(agent.training),
        *(f"          note: {doubt}" for doubt in manifest.doubts(agent.name)),
        *(
            compared(agent.parity, AGENT_NUMBERS, AGENT_OUTCOMES)
            if agent.parity
            else ["          NOT CHECKED: exported or added with --no-gate"]
        ),
    ]


def _training(training: Training | None) -> list[str]:
    if training is None:
        return ["          training not recorded"]
    values = ", ".join(f"{name}={json.dumps(value)}" for name, value in training.template.items())
    prompts = "plain text" if training.chat_template is None else f"the chat template {values}".rstrip()
    return [
        f"          trained for {training.model} and {training.score}: {training.episodes:,} episodes, "
        f"{training.transitions:,} transitions, {training.updates:,} updates",
        f"          with top-k {training.top_k}, top-p {training.top_p}, answers of up to "
        f"{training.max_new_tokens} tokens, prompts in {prompts}",
    ]


def structure_lines(report: dict[str, Any] | None) -> list[str]:
    """What the structural gate's report says, for people."""
    if report is None:
        return ["structure NOT CHECKED: exported with --no-gate"]
    windows = sorted({window for window in report["windows"] if window})
    layers = f"{report['layers']} small random layers"
    layers += f" with windows of {', '.join(map(str, windows))} tokens" if windows else ""
    return [
        f"structure passed: {report['prompts']} prompts, {report['rows']} token rows, {layers}",
        *compared(report, MODEL_NUMBERS, MODEL_OUTCOMES),
    ]


def parity_lines(report: dict[str, Any] | None) -> list[str]:
    """What the gate's report says, for people."""
    if report is None:
        return ["parity    NOT CHECKED: exported with --no-gate"]
    parts = f", in {report['parts']} parts" if report["parts"] > 1 else ""
    rows = f"{report['prompts']} prompts, {report['rows']} token rows"
    lines = [f"parity    passed: {rows} against Hugging Face eager{parts}"]
    if report["rerouted"]:
        lines.append(f"          numbers of the {1 - report['rerouted']:.0%} of the rows that differ least: experts")
    lines += compared(report, MODEL_NUMBERS, MODEL_OUTCOMES)
    if report["largest_activation"] is not None:
        lines.append(f"          largest activation: {report['largest_activation']:,.0f}; float16 goes up to 65,504")
    if report["perplexity"] is not None:
        lines.append(
            f"          perplexity of its prompts: {report['perplexity']['exported']:.4g}, "
            f"Hugging Face {report['perplexity']['reference']:.4g}"
        )
    return lines


def compared(report: dict[str, Any], numbers: Sequence[str], outcomes: Sequence[str]) -> list[str]:
    """What a gate compared, a line each."""
    lines = []
    for name in numbers:
        cosine = f", least cosine {report[name]['least_cosine']:.7f}" if "least_cosine" in report[name] else ""
        difference = f"greatest difference {report[name]['greatest_difference']:.1e} of the largest value"
        lines.append(f"          {name}: {difference}{cosine}")
    for name in outcomes:
        (outcome, gap), counts, least = OUTCOMES[name], report[name], report["min_gap"][name]
        lines.append(
            f"          {outcome}: {counts['differing']} of {counts['compared']} {gap} more than {least:.2g} "
            f"nat{'' if least == 1 else 's'} differ; {counts['changed']} of all "
            f"{counts['compared'] + counts['within_noise']} changed"
        )
    return lines


def _quantised(quantisation: dict[str, Any] | None) -> str:
    if quantisation is None:
        return ""
    kept = f", kept {quantisation['keep']}" if quantisation["keep"] else ""
    size = quantisation["block_size"]
    scales = "one scale per column" if size == -1 else f"blocks of {size}"
    return f" ({quantisation['quantiser']}, {scales}{kept})"


if __name__ == "__main__":
    sys.exit(main())
