"""What the commands that decode with a bundle have in common: engine, chat template, decoding options."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mara_deploy.commands.options import from_args, reject
from mara_deploy.commands.process import limit_memory
from mara_runtime.config import ENGINES, DecodeConfig
from mara_runtime.errors import OptionError
from mara_runtime.manifest import Manifest
from mara_runtime.options import Options, option

if TYPE_CHECKING:
    from mara_runtime.decoder import AlignedDecoder

BUNDLE_HELP = "bundle folder made by mara-export"
IGNORE_HELP = "leave out weights of the checkpoint that the model has no place for, as in 'v_head.*'"
TEMPLATE_HELP = "variable for the chat template, as in enable_thinking=false"


@dataclass(frozen=True)
class EngineOptions(Options):
    """How a bundle is opened."""

    engine: str = option(
        "auto",
        "engine to run; auto: the first one that the bundle and this machine support",
        choices=("auto", *ENGINES),
    )
    threads: int | None = option(None, "threads of a CPU engine", least=1, unset="one per physical core")
    verify: bool = option(True, "skip the verification of the bundle's checksums")
    require_signature: Path | None = option(
        None, "public key: refuse a bundle that its owner has not signed with mara-sign", metavar="KEY"
    )

    def open(self, bundle: str, report: Callable[[str], None]) -> AlignedDecoder:
        """Open a bundle. report: takes messages about what takes time. Raises MaraError."""
        from mara_runtime.decoder import AlignedDecoder

        limit_memory(self.engine, self.threads)
        return AlignedDecoder(
            bundle,
            engine=self.engine,
            threads=self.threads,
            verify=self.verify,
            require_signature=self.require_signature,
            report=report,
        )


def decode_config(args: argparse.Namespace) -> DecodeConfig:
    """The decoding options. Raises OptionError, also for options without effect."""
    config = from_args(DecodeConfig, args)
    if not config.align:
        reject(args, DecodeConfig, ("agents", "strategy", "order", "fallback", "threshold"), "--no-align runs no agent")
    default = DecodeConfig()
    drafts = not config.sample and (config.strategy, config.order) == (default.strategy, default.order)
    if config.draft and not drafts:
        reject(args, DecodeConfig, ("draft",), "only greedy decoding and top1 in ranked order use drafts")
    return config


def report_departures(decoder: AlignedDecoder, config: DecodeConfig, variables: Mapping[str, Any] | None) -> None:
    """Say on stderr why agents may not align, and where decoding differs from the training of the first.

    variables: of the chat template, as given; None: the prompts do not use it.
    """
    if not config.align:
        return
    config, manifest = decoder.resolve(config), decoder.bundle.manifest
    agents = list(config.agents or ())
    training = manifest.agent(agents[0]).training
    notes = [f"{name}: {doubt}" if len(agents) > 1 else doubt for name in agents for doubt in manifest.doubts(name)]
    if training is not None:
        template = training.template if variables is None else decoder.variables(variables, agents)
        notes += training.departures(config, template)
    for what in notes:
        print(f"note: {what}", file=sys.stderr)


def mix_text(config: DecodeConfig) -> str:
    """The agents of a resolved configuration, each with its part of the mix."""
    return " + ".join(name if part == 1 else f"{part:g} × {name}" for name, part in (config.agents or {}).items())


def template_variables(settings: Sequence[str]) -> dict[str, Any]:
    """The values of `--template` by key. Raises OptionError."""
    variables = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        try:
            variables[key] = json.loads(value)
        except (ValueError, RecursionError):
            sign = ""
        if not key or not sign:
            raise OptionError(
                f"--template is {setting!r}; it must be KEY=JSON, as in enable_thinking=false or 'name=\"text\"'"
            )
    return variables


def prompt_options(manifest: Manifest) -> str:
    """Example options for `mara-run` with this bundle."""
    return "--input-ids 1,2,3" if manifest.tokenizer is None else '--prompt "…"'
