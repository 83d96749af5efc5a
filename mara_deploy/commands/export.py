"""`mara-export`: export a Hugging Face model and its agents to bundles."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy.commands.decoding import prompt_options
from mara_deploy.commands.options import add_options, from_args, values_of
from mara_deploy.commands.shared import Parser, guarded, needs_extra
from mara_deploy.models import LORA_HELP, MODEL_HELP, find_adapter, find_model, named_agents
from mara_export.options import ExportOptions
from mara_export.targets import BITS
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS
from mara_runtime.options import Options, option, required

if TYPE_CHECKING:
    from mara_export.hf.packing import Packing
    from mara_export.hf.sources import ModelSource
    from mara_export.progress import Progress

EPILOG = """\
examples:
  mara-export --model demo --agent demo
  mara-export --model qwen2 --agent agent.safetensors --out qwen2-polite
  mara-export --model qwen2 --lora ./my-adapter --agent agent.safetensors
  mara-export --model ./my-llama --agent IAAR-Shanghai/MARA_AGENTS:FILE.pth --max-context 2048
  mara-export --model qwen2 --agent polite=a.safetensors --agent brief=b.safetensors
  mara-export --model qwen2 --agent agent.safetensors --precision int4 --precision fp16

Several --target or --precision write one bundle for each combination, from a single load and trace of the model.
"""
BUNDLES = Path("bundles")


@dataclass(frozen=True)
class ExportArguments(Options):
    """What to export, and where to."""

    model: str = required(MODEL_HELP, metavar="MODEL")
    lora: str | None = option(None, LORA_HELP, metavar="ADAPTER")
    agent: tuple[str, ...] = option(
        (),
        "demo, a .pth or .safetensors file, or HUB_ID:FILE; the first is the bundle's default",
        metavar="[NAME=]AGENT",
        unset="no agent: mara-agent adds one later",
    )
    out: Path | None = option(
        None,
        "bundle folder to write, must be new or empty; with several bundles, their parent: DIR/<target>-<precision>",
        metavar="DIR",
        unset="bundles/<model>-<adapter>-<agents>-<target>-<precision>",
    )
    work: Path | None = option(
        None,
        "keep the results of finished stages in DIR, and go on from them when the same export is run again; new or "
        "empty at first, removed on success",
        metavar="DIR",
        unset="an export that is interrupted leaves nothing",
    )
    build: bool = option(True, "TensorRT: build no engine now; mara-build does so on the device that will run it")
    quiet: bool = option(False, "suppress progress and summary")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-export",
        "Export a frozen LLM and accept/reject agents to a bundle that mara-run decodes without PyTorch. A parity\n"
        "gate compares the bundle with Hugging Face first: a bundle that computes something else is not written.",
        EPILOG,
    )
    options.add_argument("--list-models", action=_ListModels, nargs=0, help="show the models with an alias and exit")
    add_options(options, ExportArguments)
    add_options(options.add_argument_group("export"), ExportOptions, several=("target", "precision"))
    return options


class _ListModels(argparse.Action):
    """As --version, for the aliases."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from mara_export.hf.catalogue import listing

        print("\n".join(listing()))
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _export, argv)


def _export(args: argparse.Namespace) -> None:
    arguments = from_args(ExportArguments, args)
    exports = _exports(args)  # checked before anything is loaded
    if not arguments.build and not any(options.target in ENGINE_TARGETS for options in exports):
        raise OptionError(f"--no-build is for --target {' and '.join(ENGINE_TARGETS)}; leave it out")
    if not arguments.quiet:
        print("mara-export: loading PyTorch and transformers …", file=sys.stderr)
    with needs_extra("cpu,export", "the export"):
        from mara_export.export import export_all
        from mara_export.folder import claimed
        from mara_export.hf.checkpoint import read_packing, silence_transformers
        from mara_export.hf.packing import quantisation_of
        from mara_export.progress import Progress
        from mara_export.stages import is_written, work_folder
        from mara_export.tracing import vet

    silence_transformers()
    progress = Progress(arguments.quiet)

    def require_writable(folders: Sequence[Path]) -> None:
        with contextlib.nullcontext() if arguments.work is None else work_folder(arguments.work, folders):
            for folder in folders:
                with claimed(folder, is_written(arguments.work, folder)):
                    pass

    # before anything is loaded
    require_writable([] if arguments.out is None else _folders(arguments.out, exports, ""))
    agents = named_agents(arguments.agent, arguments.model)
    lora = None if arguments.lora is None else find_adapter(arguments.lora)

    def wanted(source: ModelSource) -> list[tuple[ExportOptions, Path]]:
        packing = read_packing(source)
        exports = _exports(args, packing)
        for options in exports:
            quantisation_of(options, packing)
        models = (source,) if lora is None else (source, lora)
        names = (*(each.name.rpartition("/")[2] for each in models), *(agent.name for agent in agents))
        return list(zip(exports, _folders(arguments.out, exports, "-".join(names)), strict=True))

    def check_before_download(config_only: ModelSource) -> None:
        vet(config_only, agents, exports[0].max_context, exports[0].tracer, lora)
        require_writable([folder for _, folder in wanted(config_only)])

    source = find_model(arguments.model, check_before_download)
    pairs = wanted(source)
    bundles = export_all(source, agents, pairs, progress, lora, arguments.work)
    for bundle, (options, _) in zip(bundles, pairs, strict=True):
        missing = _build(bundle, options.target, arguments.build, progress)
        if not arguments.quiet:
            _report(bundle, options.target, missing)


def _exports(args: argparse.Namespace, packing: Packing | None = None) -> list[ExportOptions]:
    """The options of each bundle. Of several, options of quantisation apply to those that are quantised.

    packing: of the checkpoint, as far as it is known.
    """
    precisions = values_of(ExportOptions, "precision", args)
    pairs = [
        (target, precision or (packing.default_precision(target) if packing is not None else ""))
        for target in values_of(ExportOptions, "target", args)
        for precision in precisions
    ]
    quantised = any(precision in BITS for _, precision in pairs)
    unquantised = {"block_size": None, "quantiser": "", "keep": ()} if quantised else {}
    return [
        from_args(ExportOptions, args, target=target, precision=precision, **({} if precision in BITS else unquantised))
        for target, precision in pairs
    ]


def _folders(out: Path | None, exports: Sequence[ExportOptions], name: str) -> list[Path]:
    """Where the bundles are written. name: of model and agents, for the default."""
    kinds = [f"{options.target}-{options.precision}" for options in exports]
    if out is None:
        return [BUNDLES / f"{name}-{kind}" for kind in kinds]
    return [out] if len(exports) == 1 else [out / kind for kind in kinds]


def _build(bundle: Bundle, target: str, wanted: bool, progress: Progress) -> str | None:
    """Build an engine here where that is possible. Returns why none was built; None: it was, or it needs none."""
    if target not in ENGINE_TARGETS:
        return None
    from mara_export.tensorrt.build import build, why_cannot_build

    reason = why_cannot_build(target) if wanted else "--no-build was given"
    if reason is None:
        try:
            build(bundle, target, progress=progress)
        except MaraError as error:
            raise MaraError(f"the bundle {bundle.folder} is complete except for its engine: {error}") from error
    return reason


def _report(bundle: Bundle, target: str, missing: str | None) -> None:
    """Print the summary of a bundle and how to run it. missing: why it has no engine."""
    from mara_deploy.commands.inspect import summary

    folder = shlex.quote(str(bundle.folder))
    print("\n".join(summary(Bundle.open(bundle.folder, verify=False))))
    if missing is not None:
        print(f"engine not built: {missing}. Build it on the device that will run it:")
        print(f"mara-build {folder} --target {target}")
    print(f"\nmara-run {folder} {prompt_options(bundle.manifest)}")


if __name__ == "__main__":
    sys.exit(main())
