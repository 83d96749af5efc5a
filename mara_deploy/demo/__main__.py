"""`python -m mara_deploy.demo`: export the embedded demo and show the same prompts plain and aligned."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy import demo
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.process import limit_memory
from mara_deploy.commands.shared import Parser, guarded, needs_extra
from mara_deploy.demo.prompts import demo_prompts
from mara_deploy.demo.score import score
from mara_deploy.evaluate.answers import total_stats
from mara_runtime.errors import MaraError
from mara_runtime.options import Options, option

if TYPE_CHECKING:
    from mara_runtime.answer import Generation

INTRODUCTION = (
    "The demo's LM was trained on considerate and inconsiderate replies in equal parts; its agent, to prefer the\n"
    "considerate ones, on other questions than these. The score counts considerate sentences, from -1 to +1."
)
PROMPT_SEED = 7


@dataclass(frozen=True)
class DemoArguments(Options):
    """What to show."""

    prompts: int = option(4, "number of prompts to show", least=1, most=100)
    out: Path = option(Path("bundles/demo"), "bundle folder to write", metavar="DIR")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "python -m mara_deploy.demo",
        "Export the embedded demo model with its agent, then answer the same prompts plain and aligned.",
    )
    add_options(options, DemoArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _demo, argv)


def _demo(args: argparse.Namespace) -> None:
    options = from_args(DemoArguments, args)
    out = options.out
    with needs_extra("cpu,export", "the demo"):
        import mara_export.export  # noqa: F401 - before a previous bundle is removed
        from mara_export.hf.checkpoint import silence_transformers
    _remove_previous(out)
    print(f"Exporting the demo to {out}", file=sys.stderr, flush=True)
    silence_transformers()
    bundle = demo.export_demo(out)

    from mara_runtime import AlignedDecoder, DecodeConfig

    limit_memory("auto")
    decoder = AlignedDecoder(bundle)
    plain, aligned = DecodeConfig(align=False), DecodeConfig()
    print(f"\n{INTRODUCTION}\n")
    pairs, scores = [], []
    questions = demo_prompts("demo-final")
    for prompt in random.Random(PROMPT_SEED).sample(questions, len(questions))[: options.prompts]:
        pair = decoder.generate(prompt.text, plain), decoder.generate(prompt.text, aligned)
        pairs.append(pair)
        scores.append([score(prompt.text, answer.text or "") for answer in pair])
        print("\n".join(_side_by_side(prompt.text, *pair, *scores[-1])))
        print()
    print("\n".join(_totals(pairs, scores)))
    run = _command("mara-run")
    print(f'\nGo on with\n  {run} {out} --prompt "{prompt.text}"\n  {run} {out}        for a chat')


def _remove_previous(out: Path) -> None:
    """Remove `out` if it contains a demo bundle and nothing else."""
    from mara_runtime import Bundle
    from mara_runtime.manifest import MANIFEST_FILE

    if out.is_symlink():
        raise MaraError(f"{out} is a link: remove it, or choose another --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        manifest = Bundle.open(out, verify=False).manifest
    except MaraError:
        manifest = None
    if manifest is None or {manifest.model.source, *(agent.source for agent in manifest.agents)} != {demo.NAME}:
        raise MaraError(f"{out} exists already and is not a demo bundle: remove it, or choose another --out")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if foreign := sorted(files - {MANIFEST_FILE, *manifest.files}):
        raise MaraError(f"{out} contains {foreign[0]}, which is not part of the demo: move it, or choose another --out")
    shutil.rmtree(out)


def _command(name: str) -> str:
    """How to call a command from here: by name if it is on PATH, else by its path in this environment."""
    script = Path(sys.executable).parent / name
    if shutil.which(name) or not script.exists():
        return name
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def _columns() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 120)


def _side_by_side(
    prompt: str, plain: Generation, aligned: Generation, plain_score: float, aligned_score: float
) -> list[str]:
    width = _columns() // 2 - 2
    rule = "─" * width
    columns = [textwrap.wrap(answer.text or "", width) for answer in (plain, aligned)]
    s = aligned.stats
    ranks = ", ".join(f"{count} at rank {rank}" for rank, count in sorted(s.accepted_rank.items()))
    counters = (
        f"{s.tokens} tokens, {s.decisions} decisions over {s.examined} examined candidates: "
        f"accepted {ranks or 'none'}; all rejected {s.forced}"
    )
    return [
        f"▶ {prompt}",
        f"{f'plain (greedy): {plain_score:+.2f}':<{width}}  aligned: {aligned_score:+.2f}",
        f"{rule}  {rule}",
        *(f"{left:<{width}}  {right}" for left, right in zip_longest(*columns, fillvalue="")),
        *textwrap.wrap(counters, _columns(), initial_indent="  ", subsequent_indent="  "),
    ]


def _totals(pairs: Sequence[tuple[Generation, Generation]], scores: Sequence[Sequence[float]]) -> list[str]:
    plain, aligned = (total_stats([pair[i].stats.to_json() for pair in pairs]) for i in (0, 1))
    tokens, decisions = aligned["tokens"], aligned["decisions"]
    means = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
    text = (
        f"Over {len(pairs)} prompts: mean score plain {means[0]:+.2f}, aligned {means[1]:+.2f}. "
        f"Aligned: {tokens} tokens, {decisions / tokens:.0%} of them decisions; accepted "
        f"{aligned['accepted_rank'].get('1', 0) / max(1, decisions):.0%} at rank 1, all rejected "
        f"{aligned['forced'] / max(1, decisions):.0%}."
    )
    speed = (
        f"Decoding speed: plain {plain['tokens_per_second']:.0f}, aligned {aligned['tokens_per_second']:.0f} tokens/s; "
        f"{aligned['forwards'] / tokens:.2f} passes a token."
    )
    return [*textwrap.wrap(text, _columns()), speed]


if __name__ == "__main__":
    sys.exit(main())
