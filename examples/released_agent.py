"""A released MARA agent on its LLM: export, ten prompts plain and aligned, evaluation.

    python examples/released_agent.py --agent IAAR-Shanghai/MARA_AGENTS:FILE.pth

needs a login at the Hugging Face Hub with access to the LLM; docs/guide/released-agents.md says which agent goes with
which model.
Without --agent it lists the repository's agents. The evaluation takes the reward and the cost model of the paper
(PKU-Alignment/beaver-7b-v1.0-reward and -cost, 7B parameters each, for non-commercial use). Options after `--` are
those of mara-eval and may name other scores:

    python examples/released_agent.py --agent … -- --score my_scores:politeness --baseline best-of-4
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mara_deploy.commands import eval, export
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded
from mara_export.targets import PRECISIONS
from mara_runtime.errors import OptionError
from mara_runtime.options import Options, option

AGENTS = "IAAR-Shanghai/MARA_AGENTS"
BEAVER = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{answer}"
SCORES = (
    *("--score", "PKU-Alignment/beaver-7b-v1.0-reward", "--score-template", BEAVER),
    *("--score", "PKU-Alignment/beaver-7b-v1.0-cost", "--score-template", BEAVER, "--weight", "-1"),
)


@dataclass(frozen=True)
class ReleasedAgentArguments(Options):
    """What to try."""

    model: str = option("llama3.2-1b", "model, as in mara-export", metavar="MODEL")
    agent: str | None = option(None, f"{AGENTS}:FILE.pth; without it, the files are listed", metavar="AGENT")
    precision: str = option("fp32", "data type of the stored LLM weights, as in mara-export", choices=PRECISIONS)
    prompts: str = option(str(Path(__file__).with_name("prompts.txt")), "prompts, as in mara-eval", metavar="FILE")
    max_new_tokens: int = option(256, "maximum number of tokens per answer", least=1)
    out: Path = option(Path("released-agent"), "folder to write", metavar="DIR")


def parser() -> Parser:
    options = Parser("released_agent", __doc__.split("\n\n")[0])
    add_options(options, ReleasedAgentArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    for_eval = given[cut + 1 :]
    if "--score" not in for_eval:
        for_eval += SCORES
    return guarded(parser(), lambda args: run(from_args(ReleasedAgentArguments, args), for_eval), given[:cut])


def run(args: ReleasedAgentArguments, for_eval: list[str]) -> None:
    if args.agent is None:
        raise OptionError(f"--agent is missing; {AGENTS} has {', '.join(released_files())}")
    bundle = args.out / "bundle"
    if bundle.exists():
        require_same(bundle, args)
    else:
        options = ["--model", args.model, "--agent", args.agent, "--precision", args.precision, "--out", str(bundle)]
        call("mara-export", export.main, options)
    show_answers(bundle, args.prompts, args.max_new_tokens)
    options = ["--prompts", args.prompts, "--max-new-tokens", str(args.max_new_tokens), "--out", str(args.out / "eval")]
    call("mara-eval", eval.main, [str(bundle), *options, *for_eval])


def require_same(bundle: Path, args: ReleasedAgentArguments) -> None:
    """Reject a bundle that an earlier run made with other options."""
    from mara_export.hf.catalogue import hub_id_of
    from mara_export.hf.sources import local_path
    from mara_runtime import Bundle

    model, agent = local_path(args.model), local_path(args.agent)
    made = Bundle.open(bundle, verify=False).manifest
    for flag, recorded, asked in (
        ("model", made.model.source, model.resolve().name if model else hub_id_of(args.model)),
        ("agent", made.agents[0].source, agent.name if agent else args.agent),
        ("precision", made.step.precision, args.precision),
    ):
        if recorded != asked:
            raise OptionError(f"--{flag} is {asked}, but {bundle} was made with {recorded}: choose another --out")


def show_answers(bundle: Path, prompts: str, max_new_tokens: int) -> None:
    """Answer up to ten prompts with the LLM alone and with its agent."""
    from mara_deploy.prompts import read_prompts
    from mara_runtime import AlignedDecoder, DecodeConfig

    decoder = AlignedDecoder(bundle)
    plain = DecodeConfig(align=False, max_new_tokens=max_new_tokens)
    aligned = DecodeConfig(max_new_tokens=max_new_tokens)
    for prompt in read_prompts(prompts).prompts[:10]:
        print(f"\n▶ {prompt.text}")
        for name, config in (("plain", plain), ("aligned", aligned)):
            answer = decoder.generate(prompt.asked, config)
            s = answer.stats
            verdicts = f", {s.decisions} decisions, {s.forced} with every candidate rejected" if config.align else ""
            print(f"\n[{name}: {s.tokens} tokens, {s.tokens_per_second:.1f} per second{verdicts}]\n{answer.text}")
    print()


def released_files() -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        return [name for name in list_repo_files(AGENTS) if name.endswith((".pth", ".safetensors"))]
    except OSError as error:
        raise OptionError(f"--agent is missing, and {AGENTS} cannot be listed: {error}") from None


def call(name: str, command: Callable[[Sequence[str]], int], options: list[str]) -> None:
    """Print and run a command; exit with its code if it fails."""
    print("$", shlex.join([name, *options]), flush=True)
    if code := command(options):
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
