"""`mara-agent`: add agents to a bundle, remove them, list them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mara_deploy.commands.decoding import BUNDLE_HELP, prompt_options
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.process import limit_memory
from mara_deploy.commands.shared import Parser, guarded, needs_extra, note_signature, print_json
from mara_runtime.bundle import Bundle
from mara_runtime.manifest import AgentFacts, Manifest
from mara_runtime.options import Options, option, required

EPILOG = """\
examples:
  mara-agent add BUNDLE polite/agent.safetensors --name polite
  mara-agent add BUNDLE IAAR-Shanghai/MARA_AGENTS:FILE.pth --default
  mara-agent list BUNDLE
  mara-agent remove BUNDLE polite

Graph, weights and engines stay as they are: nothing is exported or built again.
"""


@dataclass(frozen=True)
class AddArguments(Options):
    """What to add."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    file: str = required("demo, a .pth or .safetensors file, or HUB_ID:FILE", metavar="FILE", positional=True)
    name: str | None = option(
        None, "what the agent is called in the bundle", metavar="NAME", unset="the name of its file"
    )
    replace: bool = option(False, "take the place of the bundle's agent of that name")
    default: bool = option(False, "make it the bundle's first agent, which mara-run takes by default")
    gate: bool = option(True, "skip the gate, which compares the agent in the bundle's graph with PyTorch")
    verify: bool = option(True, "skip the verification of the bundle's checksums")
    quiet: bool = option(False, "suppress progress and summary")


@dataclass(frozen=True)
class RemoveArguments(Options):
    """What to remove."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    name: str = required("the agent, by its name in the bundle", metavar="NAME", positional=True)


@dataclass(frozen=True)
class ListArguments(Options):
    """What to list."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    json: bool = option(False, "print them as JSON")


def parser() -> Parser:
    """The command's options."""
    options = Parser("mara-agent", "Add agents to a bundle, remove them, list them.", EPILOG)
    add_options(options.add_command("add", "Add an agent to a bundle, after its parity gate."), AddArguments)
    add_options(options.add_command("remove", "Remove an agent from a bundle."), RemoveArguments)
    add_options(options.add_command("list", "List a bundle's agents, the default first."), ListArguments)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _agent, argv)


def _agent(args: argparse.Namespace) -> None:
    {"add": _add, "remove": _remove, "list": _list}[args.command](args)


def _add(args: argparse.Namespace) -> None:
    arguments = from_args(AddArguments, args)
    bundle = Bundle.open(arguments.bundle, verify=arguments.verify)
    with needs_extra("cpu,export", "adding an agent"):
        import onnxruntime  # noqa: F401
        import torch  # noqa: F401

        from mara_deploy.models import named_agent
        from mara_export.agents import add_agent
        from mara_export.progress import Progress

    named = named_agent(arguments.file, bundle.manifest.model.source, arguments.name)
    limit_memory("cpu")
    bundle = add_agent(
        bundle,
        named,
        gate=arguments.gate,
        replace=arguments.replace,
        default=arguments.default,
        progress=Progress(arguments.quiet),
    )
    note_signature("mara-agent", bundle)
    if not arguments.quiet:
        print("\n".join(_lines(bundle.manifest)))
        print(f"\nmara-run {shlex.quote(str(bundle.folder))} --agent {named.name} {prompt_options(bundle.manifest)}")


def _remove(args: argparse.Namespace) -> None:
    arguments = from_args(RemoveArguments, args)

    from mara_export.agents import remove_agent

    bundle = remove_agent(Bundle.open(arguments.bundle, verify=False), arguments.name)
    note_signature("mara-agent", bundle)
    print("\n".join(_lines(bundle.manifest)))


def _list(args: argparse.Namespace) -> None:
    arguments = from_args(ListArguments, args)
    manifest = Bundle.open(arguments.bundle, verify=False).manifest
    if arguments.json:
        print_json([_facts(manifest, agent) for agent in manifest.agents])
    else:
        print("\n".join(_lines(manifest)))


def _facts(manifest: Manifest, agent: AgentFacts) -> dict[str, Any]:
    training = agent.training
    return {
        "name": agent.name,
        "default": agent is manifest.agents[0],
        "source": agent.source,
        "widths": list(agent.widths),
        "fallback": agent.fallback,
        "score": None if training is None else training.score,
        "updates": None if training is None else training.updates,
        "gate": None if agent.parity is None else "passed",
        "noise": agent.noise,
        "doubts": manifest.doubts(agent.name),
    }


def _lines(manifest: Manifest) -> Iterator[str]:
    """The bundle's agents, for people."""
    for agent in (_facts(manifest, agent) for agent in manifest.agents):
        widths = " and ".join(map(str, agent["widths"]))
        yield (
            f"{agent['name']:<9} {'the default, ' if agent['default'] else ''}from {agent['source']}: hidden layers of "
            f"{widths}, falls back to the {agent['fallback']} candidate"
        )
        trained = "not recorded" if agent["score"] is None else f"for {agent['score']}, {agent['updates']:,} updates"
        yield f"          training {trained}"
        noise = "" if agent["noise"] is None else f", noise of its margins {agent['noise']:.1e}"
        yield f"          gate {agent['gate'] or 'NOT RUN'}{noise}"
        yield from (f"          note: {doubt}" for doubt in agent["doubts"])
    if not manifest.agents:
        yield "no agent: mara-agent add BUNDLE FILE adds one"


if __name__ == "__main__":
    sys.exit(main())
