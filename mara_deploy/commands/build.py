"""`mara-build`: build TensorRT engines on the device that will run them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mara_deploy.commands.decoding import BUNDLE_HELP, prompt_options
from mara_deploy.commands.options import add_options, from_args
from mara_deploy.commands.shared import Parser, guarded, note_signature
from mara_export.options import BuildOptions
from mara_runtime.bundle import Bundle
from mara_runtime.manifest import ENGINE_TARGETS, EngineFacts
from mara_runtime.options import Options, option, required

LAYER_KINDS = (
    *("ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "MATRIX_MULTIPLY", "DEQUANTIZE", "SCATTER", "TOPK"),
)
"""Kinds of layers that the summary counts."""
EPILOG = """\
examples:
  mara-build BUNDLE --target tensorrt
  mara-build BUNDLE --target tensorrt --capacity 1024,2048
  mara-build BUNDLE --target tensorrt-rtx --compute-capability 8.9,12.0

tensorrt builds for the GPU of this machine, with the TensorRT version that will run the engine. tensorrt-rtx needs no
GPU. Neither needs PyTorch.
"""


@dataclass(frozen=True)
class BuildArguments(Options):
    """Which engines to build."""

    bundle: str = required(BUNDLE_HELP, metavar="BUNDLE", positional=True)
    target: str = required("engine to build", choices=ENGINE_TARGETS)
    verify: bool = option(True, "skip the verification of the bundle's checksums")
    quiet: bool = option(False, "suppress progress and summary")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-build",
        "Build TensorRT engines from a bundle's graph and add them to the bundle, which mara-export made with\n"
        "--target tensorrt or tensorrt-rtx.",
        EPILOG,
    )
    add_options(options, BuildArguments)
    add_options(options.add_argument_group("engines"), BuildOptions)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _build, argv)


def _build(args: argparse.Namespace) -> None:
    arguments, options = from_args(BuildArguments, args), from_args(BuildOptions, args)

    from mara_export.progress import Progress
    from mara_export.tensorrt.build import build

    bundle = Bundle.open(arguments.bundle, verify=arguments.verify)
    bundle = build(bundle, arguments.target, options, Progress(arguments.quiet))
    note_signature("mara-build", bundle)
    if not arguments.quiet:
        print("\n".join(summary(bundle, arguments.target)))


def summary(bundle: Bundle, target: str) -> list[str]:
    """The bundle's engines for a target, and the command that runs them."""
    lines = [line for engine in bundle.manifest.engines if engine.target == target for line in _facts(bundle, engine)]
    return [
        *lines,
        "",
        f"mara-run {shlex.quote(str(bundle.folder))} --engine {target} {prompt_options(bundle.manifest)}",
    ]


def _facts(bundle: Bundle, engine: EngineFacts) -> list[str]:
    size = bundle.manifest.files[engine.file].size_bytes
    layers = engine.options.get("layers", {})
    kinds = ", ".join(f"{count} {kind.lower()}" for kind, count in layers.items() if kind in LAYER_KINDS)
    unfused = engine.options.get("decomposable")
    return [
        f"engine    {engine.file}  ({size / 1e6:.1f} MB, built in {engine.options.get('seconds')} s)",
        f"          {engine.slots} KV slots, passes of 1 to {engine.decode_rows} and to {engine.prefill_rows} rows, "
        f"{engine.places} conversation{'s' if engine.places > 1 else ''} at once, "
        f"{'TensorRT' if engine.target == 'tensorrt' else 'TensorRT for RTX'} {engine.version}, "
        f"compute capability {engine.compute_capability}",
        f"          {sum(layers.values())} layers, including {kinds}",
        *(
            [f"          attention not fused: {unfused if isinstance(unfused, str) else ', '.join(unfused)}"]
            if unfused
            else []
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
