"""`mara-inspect`: what is in a bundle, and whether it is intact; what a bundle or a model takes of memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mara_deploy.commands.shared import Parser, guarded
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError

EPILOG = """\
examples:
  mara-inspect BUNDLE
  mara-inspect --memory qwen2
  mara-inspect --memory BUNDLE --context 1024
"""

OUTCOMES = {
    "first": ("best token", "that lead by"),
    "ranks": ("40 best tokens", "apart from their neighbours by"),
    "decisions": ("decisions", "decided by"),
}
"""Of the parity report: what they are, and what makes them clear enough to be held against the export."""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-inspect",
        "Show what a bundle holds, and check every file against its checksum. With --memory: estimate the\n"
        "memory that a bundle, or a model once exported, needs where it runs, and which Jetson has enough.",
        EPILOG,
    )
    options.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="folder made by mara-export; with --memory also an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder "
        "with a config.json",
    )
    options.add_argument("--json", action="store_true", help="print the manifest, with --memory the figures")
    options.add_argument("--memory", action="store_true", help="print engine, KV cache, workspace and host memory")
    group = options.add_argument_group("memory")
    group.add_argument(
        "--context",
        type=int,
        action="append",
        metavar="N",
        help="tokens (may be repeated; default 2048 and 8192, or what the model was made for if that is less)",
    )
    group.add_argument("--target", metavar="NAME", help="as of mara-export (default tensorrt, or the bundle's first)")
    group.add_argument("--precision", metavar="NAME", help="of a model (default: all that the target has)")
    group.add_argument("--lowering", metavar="NAME", help="of a model; decomposed has two KV caches in TensorRT")
    group.add_argument("--max-candidates", type=int, metavar="K", help="of a model (default 64)")
    group.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="of a model's int8 or int4, with --precision (default: as mara-export)",
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _inspect, argv)


def _inspect(args: argparse.Namespace) -> None:
    if args.memory:
        from mara_deploy.commands.memory import show

        show(args)
        return
    for flag in ("context", "target", "precision", "lowering", "max_candidates", "block_size"):
        if (given := getattr(args, flag)) is not None:
            value = ", ".join(map(str, given)) if flag == "context" else repr(given)
            raise OptionError(f"--{flag.replace('_', '-')} is {value}, but it acts on --memory only; leave it out")
    bundle = Bundle.open(args.bundle)
    if args.json:
        print(json.dumps(json.loads(bundle.manifest.to_json()), ensure_ascii=False))
    else:
        print("\n".join(summary(bundle)))
        print("intact    every file has the size and sha256 of the manifest")


def summary(bundle: Bundle) -> list[str]:
    """A bundle in a dozen lines."""
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
        f"model     {m.model.source}{' @ ' + m.model.revision if m.model.revision else ''}",
        f"          {m.model.architecture}, {shape.num_layers} layers, hidden size {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size}, ends at {list(m.model.eos_token_ids)}",
        f"agent     {m.agent.source}: {m.agent.hidden_size} → {' → '.join(map(str, m.agent.widths))} → 2, "
        f"falls back to the {m.agent.fallback} candidate",
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
    return lines + _parity_lines(m.parity)


def _parity_lines(report: dict[str, object] | None) -> list[str]:
    if report is None:
        return ["parity    NOT CHECKED: exported with --no-gate"]
    outcome = "passed" if report.get("passed") is True else "NOT PASSED"
    compared = f"{report.get('prompts')} prompts, {report.get('rows')} token rows against Hugging Face eager"
    lines = [f"parity    {outcome}: {compared}"]
    for name in ("hidden", "logits", "margins"):
        values = report.get(name)
        if isinstance(values, dict):
            cosine = f", least cosine {values['least_cosine']:.7f}" if "least_cosine" in values else ""
            difference = f"greatest difference {values['greatest_difference']:.1e} of the largest value"
            lines.append(f"          {name}: {difference}{cosine}")
    min_gap = report.get("min_gap")
    for name, (what, gap) in OUTCOMES.items():
        counts = report.get(name)
        if isinstance(counts, dict):
            told = f"{counts['differing']} of {counts['compared']}"
            if isinstance(min_gap, dict) and "changed" in counts:
                every = counts["compared"] + counts["within_noise"]
                nats = f"{min_gap[name]:.2g} nat{'' if min_gap[name] == 1 else 's'}"
                told += f" {gap} more than {nats} differ; {counts['changed']} of all {every} changed"
            else:  # a bundle of an earlier version
                told += f" differ, {counts['within_noise']} more were not compared"
            lines.append(f"          {what}: {told}")
    largest = report.get("largest_activation")
    if isinstance(largest, float):
        lines.append(f"          largest activation: {largest:,.0f}; float16 holds 65,504")
    perplexity = report.get("perplexity")
    if isinstance(perplexity, dict):
        lines.append(
            f"          perplexity of its prompts: {perplexity['exported']:.4g}, "
            f"Hugging Face {perplexity['reference']:.4g}"
        )
    return lines


def _quantised(how: dict[str, object] | None) -> str:
    if how is None:
        return ""
    kept = f", kept {how['keep']}" if how.get("keep") else ""
    size = how.get("block_size")
    shared = "a scale a column" if size == -1 else f"blocks of {size}"
    return f" ({how.get('quantiser')}, {shared}{kept})"


if __name__ == "__main__":
    sys.exit(main())
